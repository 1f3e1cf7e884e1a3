"""Small models with seeded random weights, and sequences to run on them."""

from __future__ import annotations

import functools
import json
import tempfile
from pathlib import Path

from common.params import SamplingParams, StoppingParams
from common.sequence import Request, Sequence

VOCAB = 384


@functools.cache
def dummy_model_folder(num_layers: int = 3) -> str:
    """A folder for `--load-format dummy`: two kv heads, four query heads, a context of 512."""
    folder = Path(tempfile.mkdtemp(prefix="pdserve-model-"))
    config = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": VOCAB,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "tie_word_embeddings": True,
        "hidden_act": "silu",
        "attention_bias": False,
        "dtype": "float32",
        "eos_token_id": VOCAB - 1,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def make_request(
    token_ids, *, request_id="r", max_tokens=16, num_prompt_tokens=None, ignore_eos=True, min_tokens=0, **fields
) -> Sequence:
    """A sequence as a worker's door makes it. Sampling parameters by name; greedy unless a temperature is given."""
    names = SamplingParams.__dataclass_fields__
    sampling = {name: fields.pop(name) for name in list(fields) if name in names}
    request = Request(
        request_id=request_id,
        token_ids=tuple(token_ids),
        num_prompt_tokens=num_prompt_tokens or len(token_ids),
        sampling=SamplingParams(**{"temperature": 0.0, **sampling}),
        stopping=StoppingParams(max_tokens=max_tokens, min_tokens=min_tokens, ignore_eos=ignore_eos),
        **fields,
    )
    return Sequence(request, frozenset(() if ignore_eos else (VOCAB - 1,)))
