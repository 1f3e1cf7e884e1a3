"""Draws first tokens with the fused kernel, and brings them to the host in one copy."""

from __future__ import annotations

import math
from collections.abc import Sequence as Seq

import torch
from torch import Tensor

from common.engine.device_sampling import sampling_on_device
from common.engine.sampler import NonFiniteLogits, SampledBatch
from common.kernels.sampling import sample
from common.model.transfer import to_device
from common.sequence import Sequence


def fused_draw(sequences: Seq[Sequence], logits_SV: Tensor) -> SampledBatch:
    """The token after each sequence's last. Waits for the device. Raises NonFiniteLogits."""
    num_rows, device = len(sequences), logits_SV.device
    # Both halves begin on 16 bytes: kernels are compiled anew for pointers that do not.
    half = -(-num_rows // 4) * 4
    drawn = torch.empty(2 * half, dtype=torch.int32, device=device)
    token_ids_S, scores_S = drawn[:num_rows], drawn[half : half + num_rows].view(torch.float32)
    host = torch.tensor([sequence.num_tokens for sequence in sequences], dtype=torch.int32)
    positions_S = to_device(host, device)
    sampling = sampling_on_device([sequence.request.sampling for sequence in sequences], device)
    sample(logits_SV, sampling, positions_S, token_ids_S, scores_S)
    values = drawn.cpu()
    sampled = SampledBatch(values[:num_rows].tolist(), [None] * num_rows)
    scores = values[half : half + num_rows].view(torch.float32).tolist()
    faulty = tuple(row for row, score in enumerate(scores) if not math.isfinite(score))
    if faulty:
        raise NonFiniteLogits(faulty, sampled)
    return sampled
