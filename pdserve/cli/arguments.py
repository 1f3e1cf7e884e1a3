"""Types of command-line arguments that several commands take. What does not fit is wrong usage, in words."""

from __future__ import annotations

import argparse
import math

from common.address import Address
from pdserve.access import TOKEN_FILE, VARIABLES, Access

DEFAULT_ROUTER = "127.0.0.1:50051"


def address(text: str) -> str:
    """HOST:PORT of a service to dial."""
    try:
        port = Address.parse(text).port
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {error}") from None
    if port == 0:
        raise argparse.ArgumentTypeError(f"{text!r}: port 0 cannot be dialled")
    return text


def addresses(text: str) -> str:
    """HOST:PORT of a service, or of several with commas in between."""
    return ",".join(address(one.strip()) for one in text.split(","))


def count(text: str) -> int:
    """A whole number from 0 on."""
    if not (text.isascii() and text.isdigit()):
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number from 0 on")
    return int(text)


def seconds(text: str) -> float:
    """A finite time above 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a number of seconds above 0")
    return value


def add_access(parser: argparse.ArgumentParser) -> None:
    """What to show and believe; `access_of` reads it."""
    group = parser.add_argument_group("access", "without --tls-ca calls are plaintext")
    group.add_argument("--tls-ca", metavar="FILE", help=f"authorities to believe, as PEM ({VARIABLES['tls_ca']})")
    group.add_argument(
        "--tls-certificate", metavar="FILE", help=f"certificate to show, as PEM ({VARIABLES['tls_certificate']})"
    )
    group.add_argument("--tls-key", metavar="FILE", help=f"its key ({VARIABLES['tls_key']})")
    group.add_argument(
        "--tls-server-name",
        metavar="NAME",
        help=f"whom the service's certificate is made out to, if not the host ({VARIABLES['tls_server_name']})",
    )
    group.add_argument(
        "--token-file", metavar="FILE", help=f"holds the token to show ({TOKEN_FILE}; the token: {VARIABLES['token']})"
    )


def access_of(args: argparse.Namespace) -> Access:
    """From the flags, and from the environment what they leave out. Raises ConfigError."""
    names = ("tls_ca", "tls_certificate", "tls_key", "tls_server_name", "token_file")
    return Access.from_environment(**{name: getattr(args, name) or "" for name in names})


def add_routers(parser: argparse.ArgumentParser, purpose: str) -> None:
    parser.add_argument(
        "--router",
        type=address,
        nargs="+",
        default=[DEFAULT_ROUTER],
        metavar="HOST:PORT",
        help=f"routers {purpose} (default: {DEFAULT_ROUTER})",
    )


def add_router(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--router",
        type=addresses,
        default=DEFAULT_ROUTER,
        metavar="HOST:PORT",
        help="the router to ask, or several with commas in between (default: %(default)s)",
    )
    parser.add_argument(
        "--retries",
        type=count,
        default=0,
        metavar="N",
        help="wait and try again so often when none can serve or the queue is full (default: never)",
    )
    add_access(parser)
