"""The model gives Transformers' logits and greedy tokens, whatever the batching, chunking, paging and prefix reuse."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen3ForCausalLM as TransformersQwen3

from common.model.loader import load_model
from tests.common.model.folders import reference_model
from tests.common.model.paged import PagedRunner, Running

TOLERANCE = 1e-4
# A greedy choice with a smaller margin (in float64) is a tie that float32 may settle either way.
TIE = 1e-5
NUM_PROMPTS = 36
NUM_TOKENS = 16


def shape(layers: int, hidden: int, heads: int, kv_heads: int, head_dim: int, **rest: Any) -> dict[str, Any]:
    return {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        **rest,
    }


def rope(theta: float) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": theta}}


CASES = [
    pytest.param(shape(1, 32, 4, 4, 8, **rope(10_000.0)), 16, id="one-layer-mha-tied"),
    pytest.param(shape(2, 48, 8, 2, 16, tie_word_embeddings=False, **rope(1e6)), 8, id="gqa4-wide-heads-untied"),
    pytest.param(shape(3, 40, 6, 1, 32, rms_norm_eps=1e-5, **rope(100.0)), 4, id="one-kv-head-tied"),
    pytest.param(shape(12, 32, 4, 2, 16, tie_word_embeddings=False, **rope(5e5)), 16, id="twelve-layers-untied"),
    pytest.param(shape(4, 64, 2, 1, 64, **rope(1e7)), 1, id="blocks-of-one-position"),
    pytest.param(shape(6, 64, 16, 8, 8, tie_word_embeddings=False, intermediate_size=96), 32, id="many-heads-untied"),
    pytest.param(shape(2, 24, 9, 3, 10, intermediate_size=33, vocab_size=311), 5, id="odd-sizes"),
]


def prompts(vocab_size: int, seed: int) -> list[list[int]]:
    """Random prompts of 1 to 80 tokens; two in five begin like an earlier one."""
    rng = random.Random(seed)
    made: list[list[int]] = []
    for index in range(NUM_PROMPTS):
        fresh = [rng.randrange(vocab_size) for _ in range(rng.randint(1, 80))]
        shared = rng.choice(made)[: rng.randint(1, 60)] if index % 5 in (2, 4) else []
        made.append((shared + fresh)[:80])
    return made


@torch.inference_mode()
def reference_logits(reference: TransformersQwen3, sequences: list[Running]) -> torch.Tensor:
    """Transformers' logits for whole sequences, padded on the right, where causal attention cannot see it."""
    inputs = [torch.tensor(sequence.token_ids[:-1]) for sequence in sequences]
    return reference(torch.nn.utils.rnn.pad_sequence(inputs, batch_first=True)).logits


def assert_equal_to_transformers(reference: TransformersQwen3, sequences: list[Running]) -> None:
    logits = reference_logits(reference, sequences)
    exact: torch.Tensor | None = None
    for index, sequence in enumerate(sequences):
        for position, ours in sequence.logits.items():
            theirs = logits[index, position]
            assert (ours - theirs).abs().max() < TOLERANCE
            if position >= sequence.num_prompt_tokens - 1 and theirs.argmax() != sequence.token_ids[position + 1]:
                exact = reference_logits(reference.double(), sequences) if exact is None else exact
                best, second = exact[index, position].topk(2).values
                assert best - second < TIE


@pytest.mark.parametrize(("changes", "block_size"), CASES)
def test_logits_and_greedy_tokens_equal_transformers(changes: dict[str, Any], block_size: int, tmp_path: Path) -> None:
    reference = reference_model(seed=len(changes), **changes)
    reference.save_pretrained(tmp_path)
    model = load_model(tmp_path)
    runner = PagedRunner(model, num_blocks=NUM_PROMPTS * 96 // block_size + NUM_PROMPTS, block_size=block_size)

    sequences = runner.generate(prompts(model.config.vocab_size, seed=block_size), NUM_TOKENS)

    assert len(sequences) == NUM_PROMPTS
    assert any(0 not in sequence.logits for sequence in sequences), "some prefix is reused"
    assert_equal_to_transformers(reference, sequences)


def test_the_bundled_model_equals_transformers() -> None:
    folder = Path(__file__).parents[3] / "models" / "tiny"
    model = load_model(folder)
    sequences = PagedRunner(model, num_blocks=400, block_size=16).generate(prompts(2048, seed=1), NUM_TOKENS)
    reference = TransformersQwen3.from_pretrained(folder, dtype=torch.float32).eval()
    assert_equal_to_transformers(reference, sequences)


def test_context_of_many_blocks_equals_transformers(tmp_path: Path) -> None:
    """Long enough that decode attention takes several calls, with lengths far apart."""
    reference = reference_model(num_hidden_layers=2, head_dim=64, num_key_value_heads=4, max_position_embeddings=2048)
    reference.save_pretrained(tmp_path)
    runner = PagedRunner(load_model(tmp_path), num_blocks=300, block_size=16)
    rng = random.Random(0)
    lengths = (1500, 3, 900, 40, 41)
    sequences = [runner.admit([rng.randrange(120) for _ in range(length)]) for length in lengths]
    runner.step([(sequence, len(sequence.token_ids)) for sequence in sequences])
    for _ in range(3):
        runner.step([(sequence, 1) for sequence in sequences])
    for sequence in sequences:
        assert_equal_to_transformers(reference, [sequence])
