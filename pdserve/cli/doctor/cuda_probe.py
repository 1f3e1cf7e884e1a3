"""What the CUDA driver can do here, asked through cuda-python: start, and split a device into SM partitions."""

from __future__ import annotations

from importlib import import_module, metadata
from typing import Any

from pdserve.cli.doctor.probe import Missing, Probe
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
    """Makes one on the first device, as the attention/FFN pipeline does."""
    cuda = _started()
    device = _called(cuda.cuDeviceGet(0))
    whole = _called(cuda.cuDeviceGetDevResource(device, cuda.CUdevResourceType.CU_DEV_RESOURCE_TYPE_SM))
    groups, _, rest = _called(cuda.cuDevSmResourceSplitByCount(1, whole, 0, _NUM_SM))
    description = _called(cuda.cuDevResourceGenerateDesc([groups[0]], 1))
    flags = cuda.CUgreenCtxCreate_flags.CU_GREEN_CTX_DEFAULT_STREAM
    _called(cuda.cuGreenCtxDestroy(_called(cuda.cuGreenCtxCreate(description, device, flags))))
    return f"device 0 splits its {whole.sm.smCount} SMs into {groups[0].sm.smCount} and {rest.sm.smCount}"


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
    "green contexts": Probe(
        "gpu", green_contexts, "the pipeline runs sequentially; partitions need driver 550 or later"
    ),
}
