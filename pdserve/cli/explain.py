"""`pdserve explain`: which workers a prompt would go to at this moment, or a request went to, and why."""

from __future__ import annotations

import argparse
import dataclasses
import json

from rich.table import Table

from pdserve.cli.arguments import access_of, add_router
from pdserve.cli.failures import one_line
from pdserve.cli.terminal import console, counted
from pdserve.client import AsyncClient
from pdserve.results import Candidate, Placing, PrefillWay

# What the router says where no prompt is too long.
ALL_PROMPTS = 2**32 - 1
_REASONS = {
    "DEGRADED": "no prefill worker is alive",
    "SETTING": "the router's local_prefill says so",
    "UNMEASURED": "too little is measured to prefer decode",
    "LESS_WAITING": "all users together wait less",
    "EXPLORING": "one in a few tries the other way",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_router(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object, with all that the router says")
    subject = parser.add_mutually_exclusive_group(required=True)
    subject.add_argument("--request", metavar="ID", help="a request that the router has placed of late")
    subject.add_argument("prompt", nargs="?", metavar="PROMPT", help="a text that would be placed now")


@one_line
async def run(args: argparse.Namespace) -> int:
    async with AsyncClient(args.router, access=access_of(args), retries=args.retries) as client:
        if args.request is not None:
            explanation = await client.explain_request(args.request)
        else:
            explanation = await client.explain(args.prompt)
    if args.json:
        print(json.dumps(dataclasses.asdict(explanation), ensure_ascii=False))
        return 0
    terminal = console()
    for placing in explanation.placings:
        terminal.print(_headline(placing), style="bold", soft_wrap=True)
        if placing.way is not None:
            terminal.print(_way(placing.way), soft_wrap=True)
        terminal.print(_table(placing))
        if placing.num_more_candidates:
            terminal.print(f"and {placing.num_more_candidates:,} more that cost more or would not do")
    if args.request is None and explanation.num_queued_requests:
        waiting = counted(explanation.num_queued_requests, "request")
        terminal.print(f"{waiting} would be in front of it in the queue", style="yellow")
    if explanation.num_replacing_requests:
        lost = counted(explanation.num_replacing_requests, "request")
        terminal.print(f"{lost} without a decode worker: lost, and none to go on at", style="yellow")
    return 0


def _headline(placing: Placing) -> str:
    ago = f", {placing.age_s:.1f} s ago" if placing.age_s >= 0.05 else ""
    if placing.way is not None and placing.way.is_local:
        chosen = "decode itself"
    else:
        chosen = placing.chosen or "nobody for now"
    return f"{placing.role.lower()} of {counted(placing.num_tokens, 'token')}: {chosen}{ago}"


def _way(way: PrefillWay) -> str:
    where = "decode computes the prompt" if way.is_local else "a prefill worker computes the prompt"
    times = [
        f"{name} {value:.1f} ms"
        for name, value in (("there", way.remote_ms), ("at decode", way.local_ms), ("others' waiting", way.harm_ms))
        if value is not None
    ]
    if way.crossover_tokens is not None:
        below = "all" if way.crossover_tokens >= ALL_PROMPTS else f"{way.crossover_tokens:.0f}"
        times.append(f"crossover {below} tokens")
    return f"{where}: {_REASONS.get(way.reason, way.reason)}" + (f" ({', '.join(times)})" if times else "")


def _table(placing: Placing) -> Table:
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="dim")
    table.add_column("", no_wrap=True)
    table.add_column("worker", no_wrap=True)
    for heading in ("cost", "pace ms", "seqs", "tokens", "free blocks", "cached"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("why not", overflow="fold")
    for one in placing.candidates:
        table.add_row(*_row(one, is_chosen=one.address == placing.chosen))
    return table


def _row(one: Candidate, *, is_chosen: bool) -> tuple[str, ...]:
    return (
        "▶" if is_chosen else "",
        one.address,
        f"{one.cost:,.2f}",
        f"{one.pace_ms:.3f}" if one.pace_ms else "?",
        f"{one.num_sequences:,}",
        f"{one.num_waiting_tokens:,}",
        f"{one.num_free_blocks:,}",
        f"{one.num_cached_tokens:,}",
        one.detail,
    )
