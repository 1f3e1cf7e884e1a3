"""The `pdserve` command: one module a subcommand, each with `add_arguments(parser)` and `async run(args) -> exit code`.

Only the module of the subcommand that was typed is imported, so that `pdserve doctor` runs where gRPC does not.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import io
import os
import sys
from collections.abc import Sequence

COMMANDS = {
    "generate": "complete one prompt and show how it was served",
    "workers": "list the workers that a router knows",
    "explain": "say which workers a prompt would go to, or a request went to, and why",
    "stats": "show the attention/FFN pipeline of a decode worker",
    "drain": "take a worker out of service and wait for what it still works on",
    "bench": "load routers and show latencies, throughput and goodput",
    "top": "watch workers, queues, tokens per second and pipelines, live",
    "token": "draw a token for a client or an operator, and the line for the file of identities",
    "doctor": "say what works on this machine and what to do about the rest",
}

INTERRUPTED = 130
BROKEN_PIPE = 141


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: 0 done, 1 failed (stderr says why), 2 wrong usage, 130 Ctrl-C, 141 nobody reads the output."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A terminal that cannot show a character is no reason to stop in the middle of a completion.
        sys.stdout.reconfigure(errors="replace")
    try:
        args = parse(sys.argv[1:] if argv is None else argv)
        return asyncio.run(args.run(args))
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # What is buffered still would be written at exit, and fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The arguments, with the subcommand's `run` among them. Wrong usage raises SystemExit(2)."""
    parser = argparse.ArgumentParser(prog="pdserve", description="Prefill/decode-disaggregated LLM serving.")
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, summary in COMMANDS.items():
        subparser = subparsers.add_parser(
            name, help=summary, description=summary.capitalize() + ".", allow_abbrev=False
        )
        if name in argv[:1]:
            command = importlib.import_module(f"pdserve.cli.{name}")
            command.add_arguments(subparser)
            subparser.set_defaults(run=command.run)
    return parser.parse_args(argv)
