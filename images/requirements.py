"""Prints requirements of pyproject.toml, one a line: `python images/requirements.py build`, or `run [EXTRA ...]`.

pip cannot install what a project needs without the project itself, whose layer of an image changes far more often.
"""

from __future__ import annotations

import re
import sys
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path

PROJECT = tomllib.loads((Path(__file__).resolve().parent.parent / "pyproject.toml").read_text())


def build() -> list[str]:
    return PROJECT["build-system"]["requires"]


def run(extras: Iterable[str]) -> Iterator[str]:
    """What the services need, with these extras and the extras that those name."""
    yield from PROJECT["project"]["dependencies"]
    for extra in extras:
        yield from _of(extra)


def _of(extra: str) -> Iterator[str]:
    for requirement in PROJECT["project"]["optional-dependencies"][extra]:
        if own := re.fullmatch(r"pdserve\[(.+)\]", requirement):
            for other in own[1].split(","):
                yield from _of(other.strip())
        else:
            yield requirement


if __name__ == "__main__":
    kind, *extras = sys.argv[1:]
    print("\n".join(build() if kind == "build" else run(extras)))
