"""`pdserve workers`: the cluster as one router sees it."""

from __future__ import annotations

import argparse
import dataclasses
import json

from rich.table import Table
from rich.text import Text

from pdserve.cli.arguments import access_of, add_router
from pdserve.cli.failures import one_line
from pdserve.cli.terminal import console
from pdserve.client import AsyncClient
from pdserve.results import Worker, Workers

_STYLES = {"SERVING": "green", "DRAINING": "yellow", "UNREACHABLE": "bold red"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_router(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object, with all that the router knows")


@one_line
async def run(args: argparse.Namespace) -> int:
    async with AsyncClient(args.router, access=access_of(args), retries=args.retries) as client:
        known = await client.list_workers()
    if args.json:
        print(json.dumps(dataclasses.asdict(known), ensure_ascii=False))
        return 0
    terminal = console()
    terminal.print(_table(known) if known.workers else f"the router at {args.router} knows no worker")
    for fingerprint in sorted({worker.model_fingerprint for worker in known.workers} - {""}):
        terminal.print(_holders(fingerprint, known), soft_wrap=True)
    for worker in known.workers:
        if worker.pressure:
            terminal.print(_pressure(worker), style="yellow", soft_wrap=True)
    if known.degraded:
        terminal.print("degraded: no prefill worker is alive, so decode workers prefill locally", style="yellow")
    return 0


def _table(known: Workers) -> Table:
    # No wider than 80 columns with names of usual length: of the columns only the name wraps.
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="dim")
    table.add_column("worker", overflow="fold")
    for heading in ("role", "address", "state"):
        table.add_column(heading, no_wrap=True)
    for heading in ("free blocks", "run", "wait", "pairs"):
        table.add_column(heading, justify="right", no_wrap=True)
    for worker in known.workers:
        table.add_row(
            _name(worker),
            worker.role.lower(),
            worker.address,
            Text(worker.state, style=_STYLES.get(worker.state, "")),
            f"{worker.num_free_blocks:,}/{worker.num_total_blocks:,}",
            f"{worker.num_running:,}",
            f"{worker.num_waiting:,}",
            f"{worker.num_pairs:,}",
        )
    return table


def _holders(fingerprint: str, known: Workers) -> Text:
    """Two models side by side are a rolling upgrade: workers pair only within one."""
    names = [_name(worker) for worker in known.workers if worker.model_fingerprint == fingerprint]
    return Text.assemble((f"model {fingerprint[:12]} on ", "dim"), ", ".join(names))


def _pressure(worker: Worker) -> str:
    reasons = ", ".join(reason.lower().replace("_", " ") for reason in worker.pressure)
    return f"{_name(worker)} is under pressure and gets no new prompts: {reasons}"


def _name(worker: Worker) -> str:
    """A worker that never answered has told no name."""
    return worker.instance_id or "?"
