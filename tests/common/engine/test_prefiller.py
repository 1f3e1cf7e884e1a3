from __future__ import annotations

import pytest
import torch

from common.config import PrefillConfig
from common.engine.setup import build
from tests.support.models import VOCAB, dummy_model_folder

pytest.importorskip("triton")

from common.kernels.operations import KernelOperations


def kernels(config, device, *, deterministic):
    return KernelOperations(config, device)


@pytest.fixture
def parts():
    config = PrefillConfig(model=dummy_model_folder(), load_format="dummy", device="cpu", num_blocks=8)
    return build(config, choose=kernels)


@pytest.fixture
def batches(parts, monkeypatch):
    """What the model is run on. It gives zeros."""
    seen = []

    def forward(batch, kv_cache, after_layer=None):
        seen.append(batch)
        return torch.zeros(1, VOCAB)

    monkeypatch.setattr(parts.model, "forward", forward)
    return seen


@pytest.mark.parametrize("max_tokens", [32, 2048])
def test_warming_up_stays_within_the_context_and_the_largest_step(parts, batches, max_tokens):
    parts.prefiller.warm_up(max_tokens)
    assert max(len(batch.token_ids_T) for batch in batches) == max_tokens
    assert max(int(batch.positions_T.max()) for batch in batches) < parts.model.config.context_length


def test_warming_up_draws_as_a_first_prompt_does(parts, batches, monkeypatch):
    drawn = []
    monkeypatch.setattr("common.engine.fused_draw.fused_draw", lambda sequences, logits: drawn.append(len(logits)))
    parts.prefiller.warm_up(16)
    assert drawn == [1] * len(batches)
