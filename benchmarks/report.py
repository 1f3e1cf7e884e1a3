"""How results are kept: one JSON and one Markdown file a run, with hardware, versions, commit and command."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "results"
PACKAGES = ("torch", "transformers", "grpcio", "protobuf", "tokenizers", "uvloop", "xxhash")


@dataclass
class Report:
    """Rows of one benchmark: what was measured, beside its baseline of the same run and the target."""

    name: str
    title: str
    rows: list[dict[str, object]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, **row: object) -> None:
        self.rows.append(row)
        print("  " + "  ".join(f"{key}={_text(value)}" for key, value in row.items()), flush=True)

    def save(self) -> Path:
        """Writes benchmarks/results/<hardware>-<name>.{json,md}; a later run on the same hardware replaces it."""
        setting = environment()
        RESULTS.mkdir(exist_ok=True)
        stem = RESULTS / f"{setting['slug']}-{self.name}"
        content = {"name": self.name, "title": self.title, **setting, "rows": self.rows, "notes": self.notes}
        stem.with_suffix(".json").write_text(json.dumps(content, indent=2) + "\n")
        stem.with_suffix(".md").write_text(self._markdown(setting))
        return stem.with_suffix(".md")

    def _markdown(self, setting: Mapping[str, object]) -> str:
        facts = [f"- {key}: {value}" for key, value in setting.items() if key != "slug"]
        return "\n".join([f"# {self.title}", "", *facts, "", *_table(self.rows), "", *self.notes, ""])


def environment() -> dict[str, object]:
    """Hardware, versions, commit and command of this run."""
    cpu = _cpu_name()
    cores = len(os.sched_getaffinity(0))
    return {
        "slug": f"cpu-{cores}-cores",
        "hardware": f"{cores} cores of {cpu}",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "python": platform.python_version(),
        "versions": ", ".join(f"{name} {metadata.version(name)}" for name in PACKAGES),
        "commit": _commit(),
        "command": "python -m benchmarks " + " ".join(sys.argv[1:]),
    }


def _commit() -> str:
    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], capture_output=True, text=True, check=True, cwd=RESULTS.parent
        ).stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", ":!results")
    return git("rev-parse", "--short=12", "HEAD") + (" with uncommitted changes" if changed else "")


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _table(rows: Sequence[Mapping[str, object]]) -> list[str]:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    return lines + ["| " + " | ".join(_text(row.get(column, "")) for column in columns) + " |" for row in rows]


def _text(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
