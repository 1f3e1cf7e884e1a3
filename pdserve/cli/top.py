"""`pdserve top`: the cluster, live, for people who would rather look than read."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import datetime
import io

from rich.console import Console, RenderableType
from rich.live import Live

from common.settings import ConfigError
from pdserve.cli.arguments import access_of, add_access, add_routers, seconds
from pdserve.cli.failures import one_line
from pdserve.cli.terminal import console
from pdserve.top.keys import keys_told_to
from pdserve.top.screen import frame
from pdserve.top.sorting import ORDERS, next_order
from pdserve.top.watching import Watching

SVG_WIDTH = 120


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_routers(parser, "to watch")
    parser.add_argument(
        "--interval", type=seconds, default=1.0, metavar="SECONDS", help="ask anew this often (default: %(default)g)"
    )
    parser.add_argument("--sort", choices=ORDERS, default=ORDERS[0], help="order of the workers (default: %(default)s)")
    parser.add_argument(
        "--once", action="store_true", help="print one frame; takes an interval, since rates are differences"
    )
    parser.add_argument("--svg", metavar="FILE", help="keep the last frame as a picture, to show it to others")
    parser.add_argument(
        "--no-pipelines",
        action="store_true",
        help="ask routers alone, where decode workers cannot be reached from here",
    )
    add_access(parser)


@one_line
async def run(args: argparse.Namespace) -> int:
    terminal = console()
    watching = Watching(args.router, access_of(args), interval_s=args.interval, pipelines=not args.no_pipelines)
    async with watching.running():
        if args.once:
            await watching.told(2)
            terminal.print(_frame(terminal, watching, args.sort))
            if watching.failure is not None:
                raise watching.failure
        elif terminal.is_terminal:
            await _live(terminal, watching, args)
        else:
            while True:
                await asyncio.sleep(args.interval)
                terminal.print(_frame(terminal, watching, args.sort))
                terminal.print()
        if args.svg:
            _save(args.svg, watching, args.sort)
    return 0


async def _live(terminal: Console, watching: Watching, args: argparse.Namespace) -> None:
    order, is_over, changed = args.sort, False, asyncio.Event()

    def on_key(key: str) -> None:
        nonlocal order, is_over
        order = next_order(order) if key == "s" else order
        is_over = is_over or key in "qQ"
        changed.set()

    with keys_told_to(on_key) as has_keys, Live(console=terminal, screen=True, auto_refresh=False) as live:
        while not is_over:
            keys = f"q quit   s sort: {order}" if has_keys else "Ctrl-C quits"
            live.update(_frame(terminal, watching, order, keys), refresh=True)
            changed.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(changed.wait(), args.interval)


def _save(path: str, watching: Watching, order: str) -> None:
    terminal = Console(record=True, force_terminal=True, width=SVG_WIDTH, file=io.StringIO(), highlight=False)
    terminal.print(_frame(terminal, watching, order))
    try:
        terminal.save_svg(path, title="pdserve top")
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None


def _frame(terminal: Console, watching: Watching, order: str, keys: str = "") -> RenderableType:
    return frame(terminal, watching.view, order=order, time=datetime.datetime.now(), keys=keys)
