"""Other programs that may hang or crash, as a broken driver makes them."""

from __future__ import annotations

import signal
import subprocess
from typing import NamedTuple


class Finished(NamedTuple):
    """`trouble` says in words how the program ended; empty when it ended well."""

    stdout: str
    trouble: str


def finished(*command: str, timeout_s: float) -> Finished:
    """Runs a program, kills it when its time is up, and keeps what it wrote until then. Blocks."""
    try:
        process = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=timeout_s)
    except subprocess.TimeoutExpired as error:
        return Finished(_text(error.stdout), f"it did not answer within {timeout_s:g} s")
    return Finished(_text(process.stdout), _trouble(process))


def _trouble(process: subprocess.CompletedProcess[bytes]) -> str:
    code = process.returncode
    if code == 0:
        return ""
    if code < 0:
        return f"it died of {signal.Signals(-code).name}"
    # nvidia-smi complains on stdout.
    last_line = _text(process.stderr or process.stdout).strip().rpartition("\n")[2]
    return f"it ended with exit code {code}: {last_line}"


def _text(raw: bytes | None) -> str:
    return (raw or b"").decode(errors="replace")
