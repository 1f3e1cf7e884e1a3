"""Which device a worker computes on, and with which kernels."""

from __future__ import annotations

import importlib.util
import logging
from typing import Protocol

import torch

from common.model.config import ModelConfig
from common.model.operations import Operations, PlainOperations
from common.settings import ConfigError

log = logging.getLogger(__name__)


class ChooseOperations(Protocol):
    def __call__(self, config: ModelConfig, device: torch.device, *, deterministic: bool) -> Operations:
        """See `choose_operations`."""


def resolve_device(name: str) -> torch.device:
    """The device to compute on; `auto` is the first CUDA device where there is one.

    Raises:
        ConfigError: there is no such CUDA device.
    """
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        cause = "no CUDA device is visible" if torch.version.cuda else "this PyTorch is built without CUDA"
        raise ConfigError(f"device={name!r}: {cause}; use cpu, or see `pdserve doctor`")
    index = int(name.partition(":")[2] or 0)
    if index >= torch.cuda.device_count():
        raise ConfigError(f"device={name!r}: the devices here are cuda:0 to cuda:{torch.cuda.device_count() - 1}")
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def choose_operations(config: ModelConfig, device: torch.device, *, deterministic: bool) -> Operations:
    """The kernels for a model on a device: fused ones on a GPU, PyTorch's where those cannot be used.

    Raises:
        ConfigError: `deterministic` asks for kernels that cannot be used here.
    """
    if device.type == "cpu":
        return PlainOperations()
    reason = "Triton is not installed"
    if importlib.util.find_spec("triton") is not None:
        from common.kernels.operations import InvariantOperations, KernelOperations, why_not

        reason = why_not(config, device)
        if not reason:
            operations = (InvariantOperations if deterministic else KernelOperations)(config, device)
            log.info("kernels: %s; %s", operations.name, operations.long_prompts(device))
            return operations
    if deterministic:
        raise ConfigError(f"deterministic: batch-invariant kernels cannot be used: {reason}")
    log.warning("PLAIN_KERNELS: PyTorch's own kernels without CUDA graphs, much slower: %s", reason)
    return PlainOperations()
