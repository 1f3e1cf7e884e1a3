"""Between host and device without waiting."""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(host: Tensor, device: torch.device) -> Tensor:
    """A copy there, enqueued on the current stream; on a CPU the tensor itself.

    It goes through pinned memory: with any other the host waits for all that the stream has to do before.
    """
    return host if device.type == "cpu" else host.pin_memory().to(device, non_blocking=True)


def to_host(values: Tensor) -> Tensor:
    """A copy here, enqueued on the current stream: it holds the values once the stream has come that far."""
    if values.device.type == "cpu":
        return values.clone()
    return torch.empty(values.shape, dtype=values.dtype, pin_memory=True).copy_(values, non_blocking=True)
