"""Draws first tokens with the fused kernel. Nothing here waits for the device."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Seq

import torch
from torch import Tensor

from common.engine.device_sampling import sampling_on_device
from common.engine.drawn_tokens import DrawnTokens
from common.engine.sampling_state import SamplingState
from common.engine.special_rows import SpecialRows
from common.kernels.sampling import sample
from common.model.transfer import to_device
from common.sequence import Sequence


def fused_draw(
    sequences: Seq[Sequence], logits_SV: Tensor, state: SamplingState, slot_of: Mapping[int, int]
) -> DrawnTokens:
    """The token after each sequence's last. `slot_of` are the special rows, with their slots in the state."""
    num_rows, device = len(sequences), logits_SV.device
    # Both halves begin on 16 bytes: kernels are compiled anew for pointers that do not.
    half = -(-num_rows // 4) * 4
    drawn = torch.empty(2 * half, dtype=torch.int32, device=device)
    token_ids_S, scores_S = drawn[:num_rows], drawn[half : half + num_rows].view(torch.float32)
    host = torch.tensor([sequence.num_tokens for sequence in sequences], dtype=torch.int32)
    positions_S = to_device(host, device)
    sampling = sampling_on_device([sequence.request.sampling for sequence in sequences], device)
    sample(logits_SV, sampling, positions_S, token_ids_S, scores_S)
    logprobs = None
    if slot_of:
        special = SpecialRows(state, [*slot_of], [*slot_of.values()])
        logprobs = special.draw(logits_SV, sampling, positions_S, token_ids_S, scores_S)
    return DrawnTokens(drawn, num_rows, logprobs)
