"""The Markdown pages that users read, taken apart: prose, blocks of code, and the commands in them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.support.processes import ROOT

README = ROOT / "README.md"
PAGES = [README, ROOT / "SECURITY.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Shown:
    """Something that a reader may copy from a page."""

    page: Path
    text: str

    @property
    def id(self) -> str:
        return f"{self.page.relative_to(ROOT)}: {self.text.strip().splitlines()[0][:60]}"


def prose(page: Path) -> str:
    return FENCE.sub("", page.read_text())


def blocks(page: Path, language: str) -> list[str]:
    return [body for _, name, body in FENCE.findall(page.read_text()) if name == language]


def commands() -> Iterator[Shown]:
    """Each `$ ` line of a console block, with the lines that go on behind a backslash made one."""
    for page in PAGES:
        for block in blocks(page, "console"):
            for line in block.replace("\\\n", " ").splitlines():
                if line.lstrip().startswith("$ "):
                    yield Shown(page, line.lstrip()[2:])


def programs() -> Iterator[Shown]:
    """Each block of Python."""
    for page in PAGES:
        yield from (Shown(page, block) for block in blocks(page, "python"))
