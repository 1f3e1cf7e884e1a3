from __future__ import annotations

import contextlib
import itertools
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from common.model.batch import ForwardBatch
from common.model.loader import load_model
from common.model.qwen3 import Qwen3ForCausalLM
from decode_service.pipeline.execution import ROWS_TOGETHER, bounds, run_pipelined
from decode_service.pipeline.order import Cut, order
from tests.common.model.folders import config_folder
from tests.common.model.paged import PagedRunner

NUM_LAYERS = 3


@pytest.fixture
def model(tmp_path: Path) -> Qwen3ForCausalLM:
    return load_model(config_folder(tmp_path, num_hidden_layers=NUM_LAYERS), load_format="dummy")


def prefilled(model: Qwen3ForCausalLM, num_seqs: int) -> tuple[PagedRunner, ForwardBatch]:
    """Sequences of different lengths, and the batch of their next tokens."""
    paged = PagedRunner(model, num_blocks=128, block_size=4)
    sequences = [paged.admit(range(index, index + 3 + 5 * index % 17)) for index in range(num_seqs)]
    for sequence in sequences:
        if length := len(sequence.token_ids) - 1:
            model.forward(paged.batch([(sequence, length)], []), paged.cache)
            sequence.num_computed += length
    return paged, paged.batch([(sequence, 1) for sequence in sequences])


@pytest.mark.parametrize("cut", Cut)
@pytest.mark.parametrize(("num_seqs", "num_micro_batches"), [(2, 2), (9, 2), (12, 3), (5, 1)])
def test_stages_compute_what_each_micro_batch_gives_alone(
    model: Qwen3ForCausalLM, monkeypatch: pytest.MonkeyPatch, cut: Cut, num_seqs: int, num_micro_batches: int
) -> None:
    paged, batch = prefilled(model, num_seqs)
    alone, same = prefilled(model, num_seqs)
    rows = bounds(num_seqs, num_micro_batches)
    # The head is of the whole batch, which rounds differently.
    monkeypatch.setattr(model, "forward_head", lambda hidden_RD: hidden_RD)
    with torch.inference_mode():
        hidden = run_pipelined(model, paged.cache, batch, order(cut, NUM_LAYERS, num_micro_batches))
    for first, end in itertools.pairwise(rows):
        assert torch.equal(hidden[first:end], model.forward(same.part(first, end), alone.cache))
    assert all(map(torch.equal, paged.cache.layers, alone.cache.layers))


@pytest.mark.parametrize("cut", Cut)
def test_a_pipelined_step_computes_what_the_whole_batch_does(model: Qwen3ForCausalLM, cut: Cut) -> None:
    paged, batch = prefilled(model, 9)
    whole, same = prefilled(model, 9)
    with torch.inference_mode():
        logits = run_pipelined(model, paged.cache, batch, order(cut, NUM_LAYERS, 2))
    torch.testing.assert_close(logits, model.forward(same, whole.cache))


@pytest.mark.parametrize("cut", Cut)
def test_a_step_is_finished_once_after_its_last_stage(model: Qwen3ForCausalLM, cut: Cut) -> None:
    paged, batch = prefilled(model, 9)
    seen: list[object] = []

    @contextlib.contextmanager
    def around(stage):
        seen.append(stage)
        yield
        seen.append("end")

    steps = order(cut, NUM_LAYERS, 2)
    with torch.inference_mode():
        logits = run_pipelined(model, paged.cache, batch, steps, finish=seen.append, around=around)
    assert len(logits) == 9
    assert [entry for entry in seen if isinstance(entry, tuple) and len(entry) == 3] == [s.stage for s in steps.steps]
    assert seen[-2:] == ["end", logits]
    assert sum(entry is logits for entry in seen) == 1


@given(st.integers(1, 600), st.integers(1, 4))
def test_micro_batches_cover_all_rows_evenly(num_rows: int, num_micro_batches: int) -> None:
    rows = bounds(num_rows, num_micro_batches)
    sizes = [end - first for first, end in itertools.pairwise(rows)]
    assert (rows[0], rows[-1], len(sizes)) == (0, num_rows, num_micro_batches)
    assert max(sizes) - min(sizes) <= (2 * ROWS_TOGETHER if num_rows >= num_micro_batches * ROWS_TOGETHER else 1)
    if num_rows >= num_micro_batches * ROWS_TOGETHER:
        assert all(first % ROWS_TOGETHER == 0 for first in rows[:-1])
