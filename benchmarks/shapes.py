"""Models to measure, by their published shapes; weights are seeded noise (`--load-format dummy`)."""

from __future__ import annotations

import functools
import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

# On an NVIDIA H200: a streaming read, in bytes a second, and a large bf16 product, in operations a second.
MEMORY_RATE = 4.2e12
MATRIX_RATE = 800e12


@dataclass(frozen=True, kw_only=True)
class Shape:
    """One dense Qwen3 in bf16."""

    name: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    tied: bool
    num_kv_heads: int = 8
    head_dim: int = 128
    vocab_size: int = 151936
    context_length: int = 40960

    @property
    def layer_parameters(self) -> int:
        attention = (2 * self.num_heads + 2 * self.num_kv_heads) * self.head_dim * self.hidden_size
        return self.num_layers * (attention + 3 * self.hidden_size * self.intermediate_size)

    @property
    def head_parameters(self) -> int:
        return self.vocab_size * self.hidden_size

    @property
    def kv_bytes_per_token(self) -> int:
        return self.num_layers * 2 * self.num_kv_heads * self.head_dim * 2

    def decode_floor_s(self, batch: int, context: int) -> float:
        """Weights read once, or the products if they take longer, and then the KV of every sequence."""
        parameters = self.layer_parameters + self.head_parameters
        dense_s = max(2 * parameters / MEMORY_RATE, 2 * parameters * batch / MATRIX_RATE)
        return dense_s + batch * context * self.kv_bytes_per_token / MEMORY_RATE

    def prefill_floor_s(self, prompts: int, length: int) -> float:
        """Products of every token, and causal attention."""
        dense = 2 * self.layer_parameters * prompts * length + 2 * self.head_parameters * prompts
        attention = prompts * 4 * self.num_layers * self.num_heads * self.head_dim * length * length / 2
        return (dense + attention) / MATRIX_RATE

    @functools.cached_property
    def folder(self) -> str:
        """A folder with config.json alone."""
        folder = Path(tempfile.mkdtemp(prefix="pdserve-shape-")) / self.name
        folder.mkdir()
        config = {
            "architectures": ["Qwen3ForCausalLM"],
            "model_type": "qwen3",
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "vocab_size": self.vocab_size,
            "max_position_embeddings": self.context_length,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
            "tie_word_embeddings": self.tied,
            "hidden_act": "silu",
            "attention_bias": False,
            "dtype": "bfloat16",
            "eos_token_id": 151645,
        }
        (folder / "config.json").write_text(json.dumps(config))
        return str(folder)


SHAPES = {
    "0.6B": Shape(name="Qwen3-0.6B", num_layers=28, hidden_size=1024, intermediate_size=3072, num_heads=16, tied=True),
    "8B": Shape(name="Qwen3-8B", num_layers=36, hidden_size=4096, intermediate_size=12288, num_heads=32, tied=False),
}
# Those that the attention/FFN pipeline is measured on, a few layers of each: the largest leaves little room as a whole.
PIPELINE_SHAPES = SHAPES | {
    "32B": Shape(name="Qwen3-32B", num_layers=64, hidden_size=5120, intermediate_size=25600, num_heads=64, tied=False)
}
# The bundled model's, which has weights of its own.
TINY = Shape(
    name="tiny",
    num_layers=4,
    hidden_size=192,
    intermediate_size=512,
    num_heads=8,
    tied=True,
    num_kv_heads=4,
    head_dim=32,
    vocab_size=2048,
    context_length=2048,
)


def one_model(arguments: Sequence[str]) -> str:
    """The model that this process measures; a second one would not find the GPU's memory free.

    Raises:
        SystemExit: it is not exactly one.
    """
    if len(arguments) != 1 or arguments[0] not in SHAPES:
        raise SystemExit(f"name one model of {', '.join(SHAPES)}, not {' '.join(arguments) or 'none'}")
    return arguments[0]
