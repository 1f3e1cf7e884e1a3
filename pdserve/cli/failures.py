"""How a command that failed says so: one line on stderr with status, field, message and what to do, and exit code 1;
2 for flags or an environment that cannot work."""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Awaitable, Callable

from common.errors import DeadlineExceeded, PdserveError
from common.settings import ConfigError

Command = Callable[[argparse.Namespace], Awaitable[int]]

_REMEDIES = {
    "UNREACHABLE": "is it running, and is this its address?",
    "NOT_READY": "its log says why",
}


def one_line(run: Command) -> Command:
    """A command whose PdserveError becomes that line."""

    @functools.wraps(run)
    async def reporting(args: argparse.Namespace) -> int:
        try:
            return await run(args)
        except ConfigError as error:
            print(f"pdserve: {error}", file=sys.stderr)
            return 2
        except PdserveError as error:
            sys.stdout.flush()
            print(f"pdserve: {describe(error)}", file=sys.stderr)
            return 1

    return reporting


def describe(error: PdserveError) -> str:
    """`INVALID_ARGUMENT, sampling.top_p: sampling.top_p must be in (0, 1], got 2.0`, on one line."""
    status = error.code.name
    if error.reason not in (status, error.default_reason):
        status += f" ({error.reason})"
    if error.field and error.field not in error.message:
        status += f", {error.field}"
    parts = [f"{status}: {' '.join(error.message.split())}"]
    if error.retry_after_s is not None:
        parts.append(f"try again in {error.retry_after_s:.3g} s")
    elif remedy := _remedy(error):
        parts.append(remedy)
    return "; ".join(parts)


def _remedy(error: PdserveError) -> str:
    if isinstance(error, DeadlineExceeded):
        return "a longer --timeout may help"
    return _REMEDIES.get(error.reason, "")
