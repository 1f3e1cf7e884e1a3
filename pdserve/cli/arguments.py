"""Types of command-line arguments that several commands take. What does not fit is wrong usage, in words."""

from __future__ import annotations

import argparse
import math

from common.address import Address


def address(text: str) -> str:
    """HOST:PORT of a service to dial."""
    try:
        port = Address.parse(text).port
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {error}") from None
    if port == 0:
        raise argparse.ArgumentTypeError(f"{text!r}: port 0 cannot be dialled")
    return text


def seconds(text: str) -> float:
    """A finite time above 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a number of seconds above 0")
    return value


def add_router(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--router",
        type=address,
        default="127.0.0.1:50051",
        metavar="HOST:PORT",
        help="the router to ask (default: %(default)s)",
    )
