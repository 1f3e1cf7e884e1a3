"""What the CUDA driver can do here, through cuda-python: start, and split a device into SM partitions."""

from __future__ import annotations

from importlib import import_module, metadata
from typing import Any

from pdserve.cli.doctor.probe import Broken, Missing, Probe
from pdserve.cli.doctor.requirements import unmet

_INSTALL = "with a GPU: .venv/bin/pip install -e '.[gpu]'"
_NUM_SM = 16


def version() -> str:
    _bindings(_INSTALL)
    number = metadata.version("cuda-bindings")
    if wanted := unmet("cuda-python", number):
        raise RuntimeError(f"{number} is installed, but pdserve needs {wanted}")
    return number


def init() -> str:
    cuda = _started()
    number, count = _called(cuda.cuDriverGetVersion()), _called(cuda.cuDeviceGetCount())
    return f"CUDA {number // 1000}.{number % 1000 // 10}, {count} device{'' if count == 1 else 's'}"


def green_contexts() -> str:
    """Splits the first device as a decode worker does, which lets kernels say where they run."""
    try:
        torch, manager = import_module("torch"), import_module("decode_service.sm.green_manager")
    except ModuleNotFoundError as error:
        raise Missing(str(error)) from None
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    with manager.GreenManager.of(device) as partitions:
        num_sms = partitions.num_sms
        partitions.allocate(_NUM_SM, max(num_sms - _NUM_SM, 1))
        stats = partitions.stats()
    if stats.verified:
        return f"device 0 splits its {num_sms} SMs into {stats.attention_sm} and {stats.ffn_sm}, also in graphs"
    kind = Broken if stats.state.name.endswith("_FAILED") else Missing
    raise kind(f"{stats.state.name}: {stats.reason}", stats.remedy)


def _bindings(remedy: str = "") -> Any:
    try:
        return import_module("cuda.bindings.driver")
    except ModuleNotFoundError:
        raise Missing("cuda-python is not installed", remedy) from None


def _started() -> Any:
    cuda = _bindings()
    _called(cuda.cuInit(0))
    return cuda


def _called(result: tuple[Any, ...]) -> Any:
    """What a driver call returned, beside its status."""
    status, *values = result
    if status != 0:
        raise RuntimeError(status.name)
    return values[0] if len(values) == 1 else values


PROBES = {
    "cuda-python": Probe("gpu", version, _INSTALL),
    "cuInit": Probe(
        "gpu", init, "CUDA_VISIBLE_DEVICES hides no GPU? driver 580 or later? in a container: with the GPU?"
    ),
    "green contexts": Probe("gpu", green_contexts, "--decode-pipeline disabled does without them"),
}
