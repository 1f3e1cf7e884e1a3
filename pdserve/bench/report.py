"""The JSON file of a run: what was asked, of whom, by whom and when, and the figures of each point."""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import platform
import shlex
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from common.errors import PdserveError
from common.settings import ConfigError
from pdserve.client import AsyncClient

SCHEMA = "pdserve-bench/1"
PACKAGES = ("pdserve", "grpcio", "protobuf", "uvloop")


def now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def command(argv: Sequence[str]) -> str:
    return shlex.join(["pdserve", *argv])


def machine() -> dict[str, Any]:
    """Of the client."""
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "python": platform.python_version(),
        "versions": {name: version for name in PACKAGES if (version := _version(name))},
    }


async def target(client: AsyncClient) -> dict[str, Any]:
    """What a router says of itself. Its workers are for operators to know; where it does not tell them, it says why.

    Raises PdserveError when it does not answer at all.
    """
    model = await client.get_model()
    told: dict[str, Any] = {"address": ",".join(client.targets), "model": dataclasses.asdict(model)}
    try:
        known = await client.list_workers()
    except PdserveError as error:
        return told | {"workers": None, "workers_unknown": f"{error.code.name}: {error.message}"}
    return told | {"workers": [_worker(one) for one in known.workers], "degraded": known.degraded}


def save(path: str, content: dict[str, Any]) -> None:
    """To a file, or to stdout when it is "-". Raises ConfigError."""
    text = json.dumps({"schema": SCHEMA, **content}, indent=2, ensure_ascii=False) + "\n"
    if path == "-":
        sys.stdout.write(text)
        return
    try:
        Path(path).write_text(text)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None


def load(path: str) -> dict[str, Any]:
    """Raises ConfigError for what is no such file."""
    try:
        content = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: {getattr(error, 'strerror', None) or error}") from None
    if not isinstance(content, dict) or content.get("schema") != SCHEMA:
        raise ConfigError(f"{path}: not a file of `pdserve bench --json` ({SCHEMA})")
    return content


def _worker(worker: Any) -> dict[str, Any]:
    names = ("role", "address", "instance_id", "boot_id", "state", "num_total_blocks", "num_pairs", "model_fingerprint")
    return {name: getattr(worker, name) for name in names}


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
