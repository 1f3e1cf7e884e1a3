"""What torch can do here: compute, move bytes between two ranks over gloo, see a GPU, speak NCCL."""

from __future__ import annotations

import itertools
import warnings
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from common.config import PrefillConfig
from pdserve.cli.doctor.probe import Missing, Probe
from pdserve.cli.doctor.requirements import unmet

_INSTALL = "make install"
_INSTALL_CUDA = "with a GPU: take a CUDA build of torch (https://pytorch.org/get-started/locally)"


def version() -> str:
    torch = _torch(_INSTALL)
    if wanted := unmet("torch", torch.__version__):
        raise RuntimeError(f"{torch.__version__} is installed, but pdserve needs {wanted}")
    return f"{torch.__version__}, {_build(torch)}"


def gloo_pair() -> str:
    """Two ranks in two threads, joined over the interface that workers take by default."""
    torch, interface, num_bytes = _torch(), PrefillConfig().kv_interface, 1 << 20
    distributed = import_module("torch.distributed")
    if not (distributed.is_available() and distributed.is_gloo_available()):
        raise Missing("this torch is built without it", _INSTALL)
    store = distributed.HashStore()

    def side(rank: int) -> Any:
        options = distributed.ProcessGroupGloo._Options()
        options._devices = [distributed.ProcessGroupGloo.create_device(hostname=interface)]
        options._timeout = timedelta(seconds=10)
        group = distributed.ProcessGroupGloo(store, rank, 2, options)
        payload = torch.full((num_bytes,), 1 - rank, dtype=torch.uint8)
        (group.send([payload], 1, 0) if rank == 0 else group.recv([payload], 0, 0)).wait()
        return payload

    with ThreadPoolExecutor(2) as ranks:
        sent, received = ranks.map(side, (0, 1))
    if not torch.equal(sent, received):
        raise RuntimeError("the payload did not arrive as it was sent")
    return f"1 MiB crossed from rank to rank over {interface}"


def cuda_devices() -> str:
    torch = _torch()
    if torch.version.cuda is None:
        raise Missing(f"torch is a {_build(torch)}", _INSTALL_CUDA)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        available = torch.cuda.is_available()
    if not available:
        raise Missing(
            "; ".join(str(one.message) for one in caught) or "torch sees no device", "driver and cuInit say why"
        )
    names = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    return "; ".join(f"cuda:{number} is {name}" for number, name in enumerate(names))


def nccl() -> str:
    torch = _torch()
    if not import_module("torch.distributed").is_nccl_available():
        raise Missing(f"not in a {_build(torch)} of torch")
    number = ".".join(str(part) for part in torch.cuda.nccl.version())
    return f"{number}, {_reach(torch)}"


def triton() -> str:
    try:
        module = import_module("triton")
    except ModuleNotFoundError:
        raise Missing("not installed: a GPU would compute with PyTorch's own, slow kernels", _INSTALL_CUDA) from None
    return f"{module.__version__}, which compiles our kernels"


def flash_attention_3() -> str:
    found = [name for name in ("flash_attn_interface", "fa3_fwd_interface") if find_spec(name) is not None]
    if not found:
        raise Missing(
            "not installed: long prompts use our own kernel, which is slower on Hopper",
            "with an H100 or H200: .venv/bin/pip install -e '.[flash-attn-3]'",
        )
    return f"{found[0]}, for long prompts"


def _torch(remedy: str = "") -> Any:
    try:
        return import_module("torch")
    except ModuleNotFoundError as error:
        raise Missing(str(error), remedy) from None


def _build(torch: Any) -> str:
    return f"CUDA {torch.version.cuda} build" if torch.version.cuda else "CPU build"


def _reach(torch: Any) -> str:
    pairs = list(itertools.combinations(range(torch.cuda.device_count()), 2))
    if not pairs:
        return "no two GPUs here to connect"
    apart = [f"{a} and {b}" for a, b in pairs if not torch.cuda.can_device_access_peer(a, b)]
    return f"through the host between GPUs {', '.join(apart)}" if apart else "every GPU reaches every other directly"


PROBES = {
    "torch": Probe("cpu", version, _INSTALL),
    "gloo": Probe(
        "cpu", gloo_pair, "see that the loopback interface is up (ip addr show lo) and no firewall filters it"
    ),
    "torch on cuda": Probe("gpu", cuda_devices, "driver and cuInit say why"),
    "nccl": Probe("gpu", nccl, _INSTALL_CUDA),
    "triton": Probe("gpu", triton, _INSTALL_CUDA),
    "flash-attn-3": Probe("gpu", flash_attention_3, "install it anew, for this torch"),
}
