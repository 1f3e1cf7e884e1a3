"""What a worker runs once between its setup and serving: compiles kernels, captures CUDA graphs. On a CPU nothing."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator

import torch

from common.clock import monotonic
from common.config import WorkerConfig
from common.engine.loop import on_device
from common.engine.progress import progress_bar
from common.engine.setup import WorkerParts

log = logging.getLogger(__name__)


@contextlib.contextmanager
def preparing(device: torch.device) -> Iterator[None]:
    """What is run once before serving, on a stream of its own; its memory is given back, since no other can use it."""
    with on_device(device):
        yield
    if device.type == "cuda":
        torch.cuda.empty_cache()


def has_plain_kernels(parts: WorkerParts) -> bool:
    """A GPU computes with PyTorch's own kernels; the log says why."""
    return parts.device.type == "cuda" and not parts.model.operations.replayable


def prepare_prefill(config: WorkerConfig, parts: WorkerParts) -> None:
    """Compiles and captures what prompts need on a GPU, on the current stream. Takes seconds."""
    if parts.device.type == "cpu" or not parts.model.operations.replayable:
        return
    parts.prefiller.warm_up(config.max_batch_tokens)
    if not config.enforce_eager:
        with capturing("prefill", parts.device) as progress:
            parts.prefiller.capture(config.max_batch_tokens, parts.identity.context_length, progress)


@contextlib.contextmanager
def capturing(what: str, device: torch.device) -> Iterator[Callable[[int, int], None]]:
    """A progress bar over the capture of CUDA graphs; then says in the log what they took."""
    started_s, free = monotonic(), torch.cuda.mem_get_info(device)[0]
    with progress_bar(f"capturing CUDA graphs of {what}", in_bytes=False) as progress:
        yield progress
    used_mib = (free - torch.cuda.mem_get_info(device)[0]) / 2**20
    log.info("captured CUDA graphs of %s in %.1f s, %.0f MiB", what, monotonic() - started_s, used_mib)
