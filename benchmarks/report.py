"""How results are kept: one JSON and one Markdown file a run, with hardware, versions, commit and command."""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"
PACKAGES = (
    "torch",
    "triton",
    "flash-attn",
    "fa3-fwd",
    "flashinfer-python",
    "transformers",
    "grpcio",
    "protobuf",
    "tokenizers",
    "uvloop",
    "xxhash",
)


@dataclass
class Report:
    """Rows of one benchmark: what was measured, beside its baseline of the same run and the target."""

    name: str
    title: str
    # The one model that this run measured, where the benchmark has several; it has results of its own.
    model: str = field(default="", kw_only=True)
    rows: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, **row: object) -> None:
        self.rows.append(row)
        print("  " + "  ".join(f"{key}={_text(value)}" for key, value in row.items()), flush=True)

    def save(self) -> Path:
        """Writes benchmarks/results/<hardware>-<name>[-<model>].{json,md}; a later run there replaces it."""
        setting = environment()
        RESULTS.mkdir(exist_ok=True)
        content = {"name": self.name, "title": self.title, **setting, "rows": self.rows, "notes": self.notes}
        self.path("json").write_text(json.dumps(content, indent=2) + "\n")
        path = self.path("md")
        path.write_text(self._markdown(setting))
        print(f"  kept in {path.relative_to(RESULTS.parent.parent)}", flush=True)
        return path

    def kept_rows(self) -> list[dict[str, Any]]:
        """Of an earlier run on this hardware, for one that goes on with them; none if there was none."""
        path = self.path("json")
        return json.loads(path.read_text())["rows"] if path.exists() else []

    def path(self, suffix: str) -> Path:
        """Of a file that belongs to this result."""
        # Not with_suffix: a model's name has a dot.
        slug, _ = _gpu() or _cpu()
        return RESULTS / f"{'-'.join(filter(None, (slug, self.name, self.model.lower())))}.{suffix}"

    def _markdown(self, setting: Mapping[str, object]) -> str:
        facts = [f"- {key}: {value}" for key, value in setting.items() if key != "slug"]
        title = f"{self.title}, {self.model}" if self.model else self.title
        return "\n".join([f"# {title}", "", *facts, "", *table(self.rows), "", *self.notes, ""])


def environment() -> dict[str, object]:
    """Hardware, versions, commit and command of this run."""
    slug, hardware = _gpu() or _cpu()
    return {
        "slug": slug,
        "hardware": hardware,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "python": platform.python_version(),
        "versions": ", ".join(f"{name} {version}" for name in PACKAGES if (version := _version(name))),
        "commit": _commit(),
        "command": " ".join(["python -m", _module(), *sys.argv[1:]]),
    }


def _module() -> str:
    """What `python -m` was given."""
    spec = sys.modules["__main__"].__spec__
    return "benchmarks" if spec is None else spec.name.removesuffix(".__main__")


def _commit() -> str:
    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], capture_output=True, text=True, check=True, cwd=RESULTS.parent
        ).stdout.strip()

    # A machine that got a copy of the tree without its history is told.
    if told := os.environ.get("PDSERVE_COMMIT"):
        return told

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ":!results")
        return git("rev-parse", "--short=12", "HEAD") + (" with uncommitted changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _gpu() -> tuple[str, str] | None:
    """Where PyTorch has been used and sees one."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return None
    name, count = torch.cuda.get_device_name(), torch.cuda.device_count()
    driver = Path("/proc/driver/nvidia/version")
    found = re.search(r"\d+\.\d+\.\d+|\d{3}\.\d+", driver.read_text()) if driver.exists() else None
    version = found[0] if found else "unknown"
    hardware = f"{name}, driver {version}, CUDA {torch.version.cuda}"
    slug = name.lower().replace(" ", "-")
    return (slug, hardware) if count == 1 else (f"{count}-{slug}", f"{count} x {hardware}")


def _cpu() -> tuple[str, str]:
    cores = len(os.sched_getaffinity(0))
    return f"cpu-{cores}-cores", f"{cores} cores of {_cpu_name()}"


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def table(rows: Sequence[Mapping[str, object]]) -> list[str]:
    """Markdown; columns in the order in which rows first have them."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    return lines + ["| " + " | ".join(_text(row.get(column, "")) for column in columns) + " |" for row in rows]


def _text(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
