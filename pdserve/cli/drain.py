"""`pdserve drain`: takes one worker out of service, with a bar until nothing is left."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator

from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from pdserve.cli.arguments import access_of, add_access, address, seconds
from pdserve.cli.failures import one_line
from pdserve.cli.terminal import console, counted
from pdserve.worker_client import DrainProgress, WorkerClient


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--worker", type=address, required=True, metavar="HOST:PORT", help="the worker to drain")
    parser.add_argument(
        "--deadline",
        type=seconds,
        metavar="SECONDS",
        help="end what is left after that long (default: the worker's drain_s)",
    )
    add_access(parser)


@one_line
async def run(args: argparse.Namespace) -> int:
    show = _show_bar if console(stderr=True).is_terminal else _show_lines
    async with (
        WorkerClient(args.worker, access=access_of(args)) as worker,
        contextlib.aclosing(worker.drain(args.deadline)) as progress,
    ):
        try:
            await show(progress)
        except asyncio.CancelledError:
            print("pdserve: no longer watching; the drain goes on", file=sys.stderr)
            raise
    print(f"{args.worker} is drained")
    return 0


async def _show_bar(progress: AsyncIterator[DrainProgress]) -> None:
    columns = (TextColumn("draining"), BarColumn(), TextColumn("{task.fields[left]}"), TimeElapsedColumn())
    with Progress(*columns, console=console(stderr=True), transient=True) as bar:
        task, most = bar.add_task("", total=None, left=""), 0
        async for num_remaining, _ in progress:
            most = max(most, num_remaining)
            bar.update(task, total=most, completed=most - num_remaining, left=_left(num_remaining))


async def _show_lines(progress: AsyncIterator[DrainProgress]) -> None:
    shown = -1
    async for num_remaining, _ in progress:
        if num_remaining not in (0, shown):
            print(_left(num_remaining), flush=True)
            shown = num_remaining


def _left(num_remaining: int) -> str:
    return f"{counted(num_remaining, 'request')} left"
