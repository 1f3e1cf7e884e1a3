"""What can be seen from inside this process: Python, packages, the model folder, and the driver through nvidia-smi."""

from __future__ import annotations

import importlib
import platform
import shutil
import sys
from importlib import metadata
from pathlib import Path

from common.config import TINY_MODEL
from pdserve.cli.doctor.bounded import finished
from pdserve.cli.doctor.check import Check
from pdserve.cli.doctor.requirements import unmet

_INSTALL = "make install"
_MODEL_FILES = ("config.json", "tokenizer.json", "model.safetensors")


def software() -> list[Check]:
    python = Check("python", "cpu", "ok", f"{platform.python_version()} at {sys.executable}")
    return [python, _package("grpcio"), _package("protobuf"), _stubs()]


def model_folder(folder: str = TINY_MODEL) -> Check:
    """The bundled model, which services take when none is named."""
    missing = [name for name in _MODEL_FILES if not (Path(folder) / name).is_file()]
    if not missing:
        return Check("model", "cpu", "ok", folder)
    detail = f"{folder} has no {', '.join(missing)}"
    return Check("model", "cpu", "missing", detail, "git checkout models/tiny, or start the services with --model PATH")


def driver() -> Check:
    if shutil.which("nvidia-smi") is None:
        remedy = "with an NVIDIA GPU: install its driver; in a container: start it with the GPU"
        return Check("driver", "gpu", "missing", "no nvidia-smi here", remedy)
    query = ("--query-gpu=name,driver_version,memory.total", "--format=csv,noheader")
    seen = finished("nvidia-smi", *query, timeout_s=20)
    if seen.trouble:
        return Check(
            "driver", "gpu", "failed", f"nvidia-smi: {seen.trouble}", "nvidia-smi by hand; dmesg | grep -i nvrm"
        )
    return Check("driver", "gpu", "ok", "; ".join(seen.stdout.strip().splitlines()))


def _package(name: str) -> Check:
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        return Check(name, "cpu", "missing", "not installed", _INSTALL)
    if wanted := unmet(name, version):
        return Check(name, "cpu", "failed", f"{version} is installed, but pdserve needs {wanted}", _INSTALL)
    return Check(name, "cpu", "ok", version)


def _stubs() -> Check:
    # Generated code refuses runtimes older than itself when it is imported.
    try:
        importlib.import_module("pdserve.v1.router_pb2_grpc")
    except ModuleNotFoundError as error:
        return Check("stubs", "cpu", "missing", str(error), "make protos")
    except Exception as error:
        return Check("stubs", "cpu", "failed", f"{type(error).__name__}: {error}", _INSTALL)
    return Check("stubs", "cpu", "ok", "pdserve.v1 fits grpcio and protobuf")
