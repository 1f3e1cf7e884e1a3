from __future__ import annotations

from pathlib import Path

import pytest
import torch

from common.model.loader import load_model
from common.model.qwen3 import Activations, Qwen3ForCausalLM, State
from tests.common.model.folders import config_folder
from tests.common.model.paged import PagedRunner, Running


@pytest.fixture
def model(tmp_path: Path) -> Qwen3ForCausalLM:
    return load_model(config_folder(tmp_path, num_hidden_layers=3), load_format="dummy")


def runner(model: Qwen3ForCausalLM) -> PagedRunner:
    return PagedRunner(model, num_blocks=32, block_size=4)


def admitted(paged: PagedRunner) -> list[Running]:
    return [paged.admit(range(first, first + 9)) for first in (1, 30, 60)]


def test_the_two_halves_in_a_row_are_forward(model: Qwen3ForCausalLM) -> None:
    by_forward, by_halves = runner(model), runner(model)
    expected = model.forward(by_forward.batch([(sequence, 9) for sequence in admitted(by_forward)]), by_forward.cache)
    batch = by_halves.batch([(sequence, 9) for sequence in admitted(by_halves)])
    state: State = batch.token_ids_T
    with torch.inference_mode():
        for layer in range(3):
            activations = model.forward_attention_stage(layer, state, batch, by_halves.cache)
            state = model.forward_ffn_stage(layer, activations, batch)
    assert isinstance(state, torch.Tensor)
    assert torch.equal(model.forward_head(state), expected)
    assert all(map(torch.equal, by_halves.cache.layers, by_forward.cache.layers))


def test_micro_batches_in_alternating_halves_give_what_each_gives_alone(model: Qwen3ForCausalLM) -> None:
    alone, together = runner(model), runner(model)
    expected = [model.forward(alone.batch([(sequence, 9)]), alone.cache) for sequence in admitted(alone)[:2]]
    batches = [together.batch([(sequence, 9)]) for sequence in admitted(together)[:2]]
    states: list[State] = [batch.token_ids_T for batch in batches]
    with torch.inference_mode():
        for layer in range(3):
            halves = [
                model.forward_attention_stage(layer, state, batch, together.cache)
                for state, batch in zip(states, batches, strict=True)
            ]
            states = [model.forward_ffn_stage(layer, half, batch) for half, batch in zip(halves, batches, strict=True)]
    for state, logits_RV in zip(states, expected, strict=True):
        assert isinstance(state, torch.Tensor)
        torch.testing.assert_close(model.forward_head(state), logits_RV)


def test_a_half_leaves_its_input_untouched(model: Qwen3ForCausalLM) -> None:
    paged = runner(model)
    batch = paged.batch([(sequence, 9) for sequence in admitted(paged)])
    with torch.inference_mode():
        first = model.forward_attention_stage(0, batch.token_ids_T, batch, paged.cache)
        hidden_TD = first.hidden_TD.clone()
        once, again = (model.forward_ffn_stage(0, first, batch) for _ in range(2))
    assert isinstance(once, Activations)
    assert isinstance(again, Activations)
    assert torch.equal(first.hidden_TD, hidden_TD)
    assert torch.equal(once.hidden_TD, again.hidden_TD)


def test_after_layer_comes_in_order_with_that_layers_kv_written_and_no_later_one(model: Qwen3ForCausalLM) -> None:
    paged = runner(model)
    written: list[list[bool]] = []
    batch = paged.batch([(sequence, 9) for sequence in admitted(paged)])
    calls: list[int] = []

    def after_layer(layer: int) -> None:
        calls.append(layer)
        written.append([bool(kv_P2BKH.any()) for kv_P2BKH in paged.cache.layers])

    model.forward(batch, paged.cache, after_layer)
    assert calls == [0, 1, 2]
    assert written == [[True, False, False], [True, True, False], [True, True, True]]


def test_only_the_slots_of_the_batch_are_written(model: Qwen3ForCausalLM) -> None:
    paged = runner(model)
    batch = paged.batch([(sequence, 9) for sequence in admitted(paged)])
    model.forward(batch, paged.cache)
    slots = set(batch.slot_mapping_T.tolist())
    for kv_P2BKH in paged.cache.layers:
        written = kv_P2BKH.flatten(3).any(-1)  # [blocks, 2, block_size]
        expected = torch.tensor([slot in slots for slot in range(32 * 4)]).view(32, 1, 4).expand(32, 2, 4)
        assert torch.equal(written, expected)


def test_logits_come_for_the_wanted_rows_alone_and_in_their_order(model: Qwen3ForCausalLM) -> None:
    paged = runner(model)
    sequences = admitted(paged)
    every_row = model.forward(paged.batch([(sequence, 9) for sequence in sequences]), paged.cache)
    rows = [26, 8, 17]
    some_rows = model.forward(paged.batch([(sequence, 9) for sequence in sequences], rows), paged.cache)
    assert some_rows.shape == (3, model.config.vocab_size)
    torch.testing.assert_close(some_rows, every_row[rows])


def test_a_chunk_that_wants_no_logits_gives_none_and_still_writes_its_kv(model: Qwen3ForCausalLM) -> None:
    paged = runner(model)
    logits_RV = model.forward(paged.batch([(admitted(paged)[0], 9)], []), paged.cache)
    assert logits_RV.shape == (0, model.config.vocab_size)
    assert all(kv_P2BKH.any() for kv_P2BKH in paged.cache.layers)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_logits_of_a_half_precision_model_are_float32_and_near_the_exact_ones(dtype: str, tmp_path: Path) -> None:
    folder = config_folder(tmp_path)
    exact, rounded = (load_model(folder, load_format="dummy", dtype=name) for name in ("float32", dtype))
    sequences = [runner(model).generate([range(20)], 1) for model in (exact, rounded)]
    expected, logits = (torch.stack(list(made[0].logits.values())) for made in sequences)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, expected, atol=0.02 * expected.abs().max().item(), rtol=0)
