"""`pdserve stats`: the attention/FFN pipeline of one decode worker."""

from __future__ import annotations

import argparse
import dataclasses
import json

from pdserve.cli.arguments import access_of, add_access, address
from pdserve.cli.failures import one_line
from pdserve.pipeline_report import report_lines
from pdserve.worker_client import WorkerClient


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--decode",
        type=address,
        default="127.0.0.1:50053",
        metavar="HOST:PORT",
        help="the decode worker to ask (default: %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    add_access(parser)


@one_line
async def run(args: argparse.Namespace) -> int:
    async with WorkerClient(args.decode, access=access_of(args)) as worker:
        stats = await worker.get_pipeline_stats()
    if args.json:
        print(json.dumps(dataclasses.asdict(stats)))
    else:
        print(*report_lines(stats), sep="\n")
    return 0
