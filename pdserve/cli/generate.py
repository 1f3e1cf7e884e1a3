"""`pdserve generate`: one prompt, its text as it comes, and then how it was served."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import json
import sys
from collections.abc import AsyncIterator

from rich.text import Text

from pdserve.cli.arguments import access_of, add_router, seconds
from pdserve.cli.failures import one_line
from pdserve.cli.summary import Stopwatch, summary
from pdserve.cli.terminal import console, counted
from pdserve.client import GENERATE_TIMEOUT_S, AsyncClient
from pdserve.request import Chat, Message, Options, Prompt
from pdserve.results import Chunk, Completion


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_router(parser)
    parser.add_argument("--max-tokens", type=int, metavar="N", help="most tokens to put out (default: 256)")
    parser.add_argument("--temperature", type=float, metavar="T", help="0 is greedy (default: 1)")
    parser.add_argument("--top-p", type=float, metavar="P", help="draw from the top P of the probability (default: 1)")
    parser.add_argument("--top-k", type=int, metavar="K", help="draw from the K most probable tokens (default: all)")
    parser.add_argument(
        "--min-p", type=float, metavar="P", help="drop tokens less than P times as probable as the best"
    )
    parser.add_argument("--seed", type=int, metavar="S", help="the same seed gives the same tokens (default: drawn)")
    parser.add_argument("--stop", action="append", metavar="STR", help="end before this string; repeatable")
    parser.add_argument("--chat", action="store_true", help="send PROMPT as a user's turn through the chat template")
    parser.add_argument(
        "--wait", type=seconds, metavar="SECONDS", help="wait up to that long for a router that is ready"
    )
    parser.add_argument(
        "--timeout",
        type=seconds,
        default=GENERATE_TIMEOUT_S,
        metavar="SECONDS",
        help="give up after that long (default: %(default)g)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object a line: chunks, then the completion")
    parser.add_argument(
        "prompt",
        type=_text,
        metavar="PROMPT",
        help="the text to go on from; - reads standard input, less a last newline",
    )


@one_line
async def run(args: argparse.Namespace) -> int:
    prompt: Prompt = Chat([Message("user", args.prompt)]) if args.chat else args.prompt
    options = Options(
        max_tokens=args.max_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        top_k=args.top_k,
        min_p=args.min_p,
        seed=args.seed,
        stop=args.stop,
    )
    async with AsyncClient(args.router, access=access_of(args), retries=args.retries) as client:
        if args.wait is not None:
            with console(stderr=True).status(Text(f"waiting for the router at {args.router}")):
                await client.wait_until_ready(args.wait)
        stopwatch = Stopwatch()
        async with contextlib.aclosing(client.generate(prompt, timeout_s=args.timeout, **options)) as events:
            try:
                await (_show_json if args.json else _show_text)(events, stopwatch)
            except asyncio.CancelledError:
                print(f"pdserve: cancelled after {counted(stopwatch.num_tokens, 'token')}", file=sys.stderr)
                raise
    return 0


async def _show_text(events: AsyncIterator[Chunk | Completion], stopwatch: Stopwatch) -> None:
    line_is_open = False
    try:
        async for event in events:
            if isinstance(event, Completion):
                completion = event
                continue
            stopwatch.count(len(event.token_ids))
            if event.text:
                print(event.text, end="", flush=True)
                line_is_open = not event.text.endswith("\n")
    finally:
        if line_is_open:
            print(flush=True)
    terminal = console(stderr=True)
    terminal.print()
    for line in summary(completion, stopwatch):
        terminal.print(line, soft_wrap=True)


async def _show_json(events: AsyncIterator[Chunk | Completion], stopwatch: Stopwatch) -> None:
    async for event in events:
        if isinstance(event, Chunk):
            stopwatch.count(len(event.token_ids))
            shown: dict[str, object] = {"chunk": {"token_ids": event.token_ids, "text": event.text}}
        else:
            completion = dataclasses.asdict(event)
            del completion["request_id"]
            timing = {"first_token_ms": stopwatch.first_token_ms, "tokens_per_s": stopwatch.tokens_per_s}
            shown = {"completion": completion, "client": timing}
        print(json.dumps({"request_id": event.request_id, **shown}, ensure_ascii=False), flush=True)


def _text(argument: str) -> str:
    # Read while arguments are parsed: inside the event loop Ctrl-C would not end a blocked read.
    if argument != "-":
        return argument
    try:
        return sys.stdin.buffer.read().decode().removesuffix("\n")
    except UnicodeDecodeError as error:
        raise argparse.ArgumentTypeError(f"standard input is not UTF-8: {error.reason} at byte {error.start}") from None
