"""`pdserve bench`: load on routers, and what it comes to as a table, JSON and a PNG."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import sys
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from common.errors import InvalidArgument
from common.settings import ConfigError
from pdserve.bench import comparison, picture, report, tables
from pdserve.bench.arrivals import KINDS, POISSON
from pdserve.bench.figures import Limits, figures, ttft_ms
from pdserve.bench.fleet import Fleet, Ran
from pdserve.bench.job import Job
from pdserve.bench.job import Progress as Sending
from pdserve.bench.lengths import Lengths
from pdserve.bench.load import Point, Share
from pdserve.bench.prompt_file import read_prompts
from pdserve.bench.workload import Workload
from pdserve.cli.arguments import access_of, add_access, address, seconds
from pdserve.cli.failures import one_line
from pdserve.cli.terminal import console
from pdserve.client import Client

DEFAULT_ROUTER = "127.0.0.1:50051"
DEFAULT_CONCURRENCY = 8
DEFAULT_DURATION_S = 20.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--router",
        type=address,
        nargs="+",
        default=[DEFAULT_ROUTER],
        metavar="HOST:PORT",
        help=f"routers to load, in turn (default: {DEFAULT_ROUTER})",
    )
    load = parser.add_argument_group("load", "several values of --rate or --concurrency are measured one after another")
    kind = load.add_mutually_exclusive_group()
    kind.add_argument(
        "--rate",
        type=_rate,
        nargs="+",
        metavar="R",
        help="open loop: so many requests a second, whatever becomes of them",
    )
    kind.add_argument(
        "--concurrency",
        type=_count,
        nargs="+",
        metavar="N",
        help=f"closed loop: so many requests at a time (default: {DEFAULT_CONCURRENCY})",
    )
    load.add_argument(
        "--arrivals",
        choices=KINDS,
        default=POISSON,
        help="of an open loop: random or equal gaps (default: %(default)s)",
    )
    load.add_argument(
        "--warmup", type=_seconds_or_0, default=3.0, metavar="SECONDS", help="does not count (default: %(default)g)"
    )
    length = load.add_mutually_exclusive_group()
    length.add_argument(
        "--duration", type=seconds, metavar="SECONDS", help=f"measured after that (default: {DEFAULT_DURATION_S:g})"
    )
    length.add_argument("--num-requests", type=_count, metavar="N", help="measure so many requests instead")
    load.add_argument("--seed", type=int, default=0, metavar="S", help="of prompts, lengths and arrivals (default: 0)")
    load.add_argument("--processes", type=_count, default=1, metavar="N", help="that send (default: 1)")
    load.add_argument(
        "--timeout", type=seconds, default=600.0, metavar="SECONDS", help="deadline of a request (default: %(default)g)"
    )
    work = parser.add_argument_group("requests", "lengths are numbers of tokens, 128, or ranges, 64-256")
    work.add_argument("--prompt-tokens", type=_lengths, default=Lengths(128, 128), metavar="N", help="(default: 128)")
    work.add_argument("--output-tokens", type=_lengths, default=Lengths(64, 64), metavar="N", help="(default: 64)")
    work.add_argument(
        "--shared-prefix", type=_tokens, default=0, metavar="N", help="so many first tokens are the same in all prompts"
    )
    work.add_argument("--text", action="store_true", help="prompts are so many words, not token ids")
    work.add_argument("--prompts", metavar="FILE", help="prompts from JSON lines, or a ShareGPT file")
    work.add_argument("--temperature", type=float, default=0.0, metavar="T", help="(default: 0, greedy)")
    work.add_argument(
        "--stop-at-eos", action="store_true", help="end tokens end a completion; lengths are then at most"
    )
    work.add_argument(
        "--cache-salt", metavar="SALT", help="share cached prefixes with runs of the same salt (default: with none)"
    )
    limits = parser.add_argument_group("limits", "a request within all of them counts as goodput")
    limits.add_argument("--ttft-limit-ms", type=_milliseconds, metavar="MS", help="until the first token")
    limits.add_argument("--inter-token-limit-ms", type=_milliseconds, metavar="MS", help="mean from token to token")
    limits.add_argument("--e2e-limit-ms", type=_milliseconds, metavar="MS", help="until the end")
    out = parser.add_argument_group("results")
    out.add_argument("--json", metavar="FILE", help="keep all figures; - is standard output, without the table")
    out.add_argument("--png", metavar="FILE", help="draw them (needs pdserve[bench])")
    out.add_argument("--requests", metavar="FILE", help="keep each request as one line of JSON")
    out.add_argument(
        "--compare", nargs=2, metavar=("BEFORE", "AFTER"), help="measure nothing: two files of --json side by side"
    )
    add_access(parser)


@one_line
async def run(args: argparse.Namespace) -> int:
    if args.compare:
        before, after = (report.load(path) for path in args.compare)
        console().print(comparison.comparison(before, after, (args.compare[0], args.compare[1])))
        return 0
    if args.png:
        picture.require()
    for path in filter(None, (args.json, args.png, args.requests)):
        _check_writable(path)
    return await _measure(args)


async def _measure(args: argparse.Namespace) -> int:
    limits = Limits(ttft_ms=args.ttft_limit_ms, inter_token_ms=args.inter_token_limit_ms, e2e_ms=args.e2e_limit_ms)
    run: dict[str, Any] = {
        "command": report.command(sys.argv[1:]),
        "started": report.now(),
        "ended": "",
        "client": report.machine(),
        "targets": await _targets(args),
        "settings": _settings(args, limits),
        "points": [],
        "complete": False,
    }
    workload = _workload(args, [target["model"] for target in run["targets"]])
    traces = []
    try:
        async with Fleet.running(args.processes) as fleet:
            for point in _points(args):
                # Each point finds no cached prefix of another.
                salt = args.cache_salt if args.cache_salt is not None else f"bench {uuid.uuid4()}"
                job = Job(
                    routers=tuple(args.router),
                    access=access_of(args),
                    point=point,
                    share=Share(),
                    workload=dataclasses.replace(workload, cache_salt=salt),
                    prompts_path=args.prompts or "",
                    timeout_s=args.timeout,
                )
                ran = await _with_bar(fleet, job)
                run["points"].append(figures(point, ran.start_s, ran.parts, limits))
                traces.append(picture.Trace(ran.start_s, [one for part in ran.parts for one in part.sent]))
        run["complete"] = True
    finally:
        # What was measured before Ctrl-C, or before a router went away, is kept.
        run["ended"] = report.now()
        if run["points"]:
            _put_out(args, run, traces)
    return 0


def _put_out(args: argparse.Namespace, run: dict[str, Any], traces: list[picture.Trace]) -> None:
    if args.json != "-":
        console().print(tables.whole(run["points"], run["settings"]["limits_ms"]), soft_wrap=True)
    if args.json:
        report.save(args.json, run)
    if args.requests:
        _save_requests(args.requests, run["points"], traces)
    if args.png:
        picture.draw(args.png, run, traces[-1])


async def _with_bar(fleet: Fleet, job: Job) -> Ran:
    point = job.point
    columns = (TextColumn(point.name), BarColumn(), TextColumn("{task.fields[told]}"), TimeElapsedColumn())
    terminal = console(stderr=True)
    with Progress(*columns, console=terminal, transient=True, disable=not terminal.is_terminal) as bar:
        task = bar.add_task("", total=1.0, told="starting")

        def show(elapsed_s: float, sending: Sending) -> None:
            total_s = point.warmup_s + (point.duration_s or 0.0)
            share = elapsed_s / total_s if point.num_requests is None else sending.num_ended / point.num_requests
            what = "warming up" if elapsed_s < point.warmup_s else "measuring"
            if share >= 1:
                what = "waiting for the rest"
            open_now = sending.num_sent - sending.num_ended
            told = f"{what}: {sending.num_sent:,} sent, {open_now:,} open, {sending.num_failed:,} not OK"
            bar.update(task, completed=min(1.0, share), told=told)

        return await fleet.run(job, show)


async def _targets(args: argparse.Namespace) -> list[dict[str, Any]]:
    targets = []
    for router in args.router:
        async with Client(router, access=access_of(args)) as client:
            targets.append(await report.target(client))
    return targets


def _points(args: argparse.Namespace) -> list[Point]:
    duration_s = None if args.num_requests else args.duration or DEFAULT_DURATION_S
    common: dict[str, Any] = {
        "arrivals": args.arrivals,
        "warmup_s": args.warmup,
        "duration_s": duration_s,
        "num_requests": args.num_requests,
        "seed": args.seed,
    }
    if args.rate:
        return [Point(rate=rate, **common) for rate in args.rate]
    return [Point(concurrency=number, **common) for number in args.concurrency or [DEFAULT_CONCURRENCY]]


def _workload(args: argparse.Namespace, models: list[dict[str, Any]]) -> Workload:
    most, context = args.prompt_tokens.high + args.output_tokens.high, min(one["context_length"] for one in models)
    if not args.prompts and not args.text and most > context:
        raise InvalidArgument(
            f"prompts of {args.prompt_tokens.high} tokens and {args.output_tokens.high} more are beyond the context of "
            f"{context}: give --prompt-tokens or --output-tokens",
            field="prompt_tokens",
        )
    return Workload(
        seed=args.seed,
        prompt_tokens=args.prompt_tokens,
        output_tokens=args.output_tokens,
        vocab_size=min(one["vocab_size"] for one in models),
        shared_prefix=args.shared_prefix,
        as_text=args.text,
        ignore_eos=not args.stop_at_eos,
        temperature=args.temperature,
        prompts=read_prompts(args.prompts) if args.prompts else (),
    )


def _settings(args: argparse.Namespace, limits: Limits) -> dict[str, Any]:
    return {
        "routers": args.router,
        "prompt_tokens": str(args.prompt_tokens),
        "output_tokens": str(args.output_tokens),
        "shared_prefix": args.shared_prefix,
        "as_text": args.text,
        "prompts": args.prompts,
        "temperature": args.temperature,
        "ignore_eos": not args.stop_at_eos,
        "cache_salt": args.cache_salt,
        "seed": args.seed,
        "processes": args.processes,
        "timeout_s": args.timeout,
        "limits_ms": dataclasses.asdict(limits),
    }


def _save_requests(path: str, points: list[dict[str, Any]], traces: list[picture.Trace]) -> None:
    with Path(path).open("w") as file:
        for point, trace in zip(points, traces, strict=True):
            for one in sorted(trace.sent, key=lambda sent: sent.due_s):
                row = {
                    "load": point["load"],
                    "index": one.index,
                    "measured": one.is_measured,
                    "due_s": one.due_s - trace.start_s,
                    "sent_s": one.sent_s - trace.start_s,
                    "ended_s": one.ended_s - trace.start_s,
                    "ttft_ms": ttft_ms(one),
                    "status": one.status,
                    "messages": [[at_s - trace.start_s, count] for at_s, count in one.messages],
                    **one.answer,
                }
                file.write(json.dumps(row, ensure_ascii=False) + "\n")


def _check_writable(path: str) -> None:
    """Before anything is measured."""
    if path == "-":
        return
    folder = Path(path).resolve().parent
    if not folder.is_dir() or Path(path).is_dir():
        raise ConfigError(f"{path}: expected a file in a folder that exists")


def _typed(make: Callable[[str], Any], is_allowed: Callable[[Any], bool], expected: str) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        with contextlib.suppress(ValueError):
            if is_allowed(value := make(text)):
                return value
        raise argparse.ArgumentTypeError(f"{text!r}: expected {expected}")

    return parse


_count = _typed(int, lambda value: value >= 1, "a number of at least 1")
_tokens = _typed(int, lambda value: value >= 0, "a number of tokens")
_rate = _typed(float, lambda value: 0 < value < math.inf, "requests a second, above 0")
_milliseconds = _typed(float, lambda value: 0 < value < math.inf, "milliseconds, above 0")
_seconds_or_0 = _typed(float, lambda value: 0 <= value < math.inf, "seconds, at least 0")


def _lengths(text: str) -> Lengths:
    try:
        return Lengths.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
