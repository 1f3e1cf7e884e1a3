"""The arguments of `pdserve bench`, and what they say of a run."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import math
from collections.abc import Callable
from typing import Any

from common.errors import InvalidArgument
from pdserve.bench.arrivals import KINDS, POISSON
from pdserve.bench.figures import Limits
from pdserve.bench.lengths import Lengths
from pdserve.bench.load import Point
from pdserve.bench.prompt_file import read_prompts
from pdserve.bench.workload import Workload
from pdserve.cli.arguments import add_access, add_routers, seconds

DEFAULT_CONCURRENCY = 8
DEFAULT_DURATION_S = 20.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_routers(parser, "to load, in turn")
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


def points_of(args: argparse.Namespace) -> list[Point]:
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


def workload_of(args: argparse.Namespace, models: list[dict[str, Any]]) -> Workload:
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


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
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
        "limits_ms": dataclasses.asdict(limits_of(args)),
    }


def limits_of(args: argparse.Namespace) -> Limits:
    return Limits(ttft_ms=args.ttft_limit_ms, inter_token_ms=args.inter_token_limit_ms, e2e_ms=args.e2e_limit_ms)


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
