"""Sampling parameters as the fused draw reads them: packed on the host, laid out on the device.

Shapes: R rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from common.engine.sampling_state import FP32
from common.kernels.sampling import DeviceSampling
from common.model.transfer import to_device
from common.params import SamplingParams


def temperature_of(params: SamplingParams) -> float:
    """0 for greedy; else within float32's range."""
    return 0.0 if params.greedy else min(max(params.temperature, FP32.tiny), FP32.max)


def log_min_p_of(params: SamplingParams) -> float:
    return math.log(params.min_p) if params.min_p > 0 else -math.inf


def sampling_on_device(params: Sequence[SamplingParams], device: torch.device) -> DeviceSampling:
    """One row for each, in one copy."""
    columns: tuple[np.ndarray, ...] = (
        np.array([p.top_p for p in params], dtype=np.float64),
        np.array([p.seed for p in params], dtype=np.uint64),
        np.array([temperature_of(p) for p in params], dtype=np.float32),
        np.array([log_min_p_of(p) for p in params], dtype=np.float32),
        np.array([min(p.top_k, 2**31 - 1) for p in params], dtype=np.int32),
    )
    # Every column begins on 16 bytes: kernels are compiled anew for pointers that do not.
    sizes = [-(-column.nbytes // 16) * 4 for column in columns]
    host = torch.zeros(sum(sizes), dtype=torch.int32)
    for words, column in zip(host.split(sizes), columns, strict=True):
        words.numpy()[: column.nbytes // 4] = column.view(np.int32)
    top_p, seeds, temperature, log_min_p, top_k = (
        words[: column.nbytes // 4] for words, column in zip(to_device(host, device).split(sizes), columns, strict=True)
    )
    return DeviceSampling(
        temperature_S=temperature.view(torch.float32),
        seed_words_S2=seeds.view(-1, 2),
        top_k_S=top_k,
        top_p_S=top_p.view(torch.float64),
        log_min_p_S=log_min_p.view(torch.float32),
    )
