"""Single keys from a terminal, without Enter."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def keys_told_to(on_key: Callable[[str], None]) -> Iterator[bool]:
    """Calls `on_key` with each key meanwhile; False where stdin is no terminal, and nothing will be told."""
    try:
        import termios
        import tty
    except ImportError:
        # Windows has none; Ctrl-C ends it there.
        yield False
        return
    if not sys.stdin.isatty():
        yield False
        return
    descriptor, loop = sys.stdin.fileno(), asyncio.get_running_loop()
    before = termios.tcgetattr(descriptor)

    def read() -> None:
        typed = os.read(descriptor, 64)
        if not typed:
            loop.remove_reader(descriptor)
        for key in typed.decode(errors="ignore"):
            on_key(key)

    tty.setcbreak(descriptor)
    loop.add_reader(descriptor, read)
    try:
        yield True
    finally:
        loop.remove_reader(descriptor)
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)
