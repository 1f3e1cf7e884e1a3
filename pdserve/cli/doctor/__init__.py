"""`pdserve doctor`: what works on this machine, and what to do about the rest."""

from __future__ import annotations

import argparse
import asyncio
import json

from rich.table import Table
from rich.text import Text

from pdserve.cli.doctor.check import Check
from pdserve.cli.doctor.machine import driver, model_folder, software
from pdserve.cli.doctor.ports import default_ports
from pdserve.cli.doctor.probe import probed
from pdserve.cli.terminal import console

_STYLES = {"ok": "green", "missing": "yellow", "failed": "bold red"}
_HEADINGS = {"cpu": "serving on the CPU", "gpu": "serving on NVIDIA GPUs"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object")


async def run(args: argparse.Namespace) -> int:
    """Exit code 1 only when something is broken that the CPU path needs."""
    with console(stderr=True).status("trying what this machine can do"):
        checks = await all_checks()
    broken = [check.name for check in checks if check.path == "cpu" and check.status != "ok"]
    if args.json:
        print(json.dumps({"ok": not broken, "checks": [check._asdict() for check in checks]}, ensure_ascii=False))
    else:
        _print(checks, broken)
    return 1 if broken else 0


async def all_checks() -> list[Check]:
    """The CPU path's first, each path in the order in which one thing needs another."""
    torch, cuda, card, listening = await asyncio.gather(
        asyncio.to_thread(probed, "torch_probe"),
        asyncio.to_thread(probed, "cuda_probe"),
        asyncio.to_thread(driver),
        default_ports(),
    )
    checks = [*software(), card, *torch, model_folder(), *listening, *cuda]
    return sorted(checks, key=lambda check: check.path)


def _print(checks: list[Check], broken: list[str]) -> None:
    terminal = console()
    for path, heading in _HEADINGS.items():
        table = Table.grid(padding=(0, 2))
        for check in checks:
            if check.path == path:
                table.add_row(Text(check.status, style=_STYLES[check.status]), check.name, _words(check))
        terminal.print(heading, style="bold")
        terminal.print(table)
        terminal.print()
    terminal.print(f"broken: {', '.join(broken)}" if broken else "Everything that `make run` needs is here.")


def _words(check: Check) -> Text:
    words = Text(check.detail, overflow="fold")
    if check.status != "ok" and check.remedy:
        words.append(f" → {check.remedy}", style="dim")
    return words
