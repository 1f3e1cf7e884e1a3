"""Reads what a Hugging Face folder says about its model. Knows names and shapes, never weights."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from common.errors import InvalidArgument

ARCHITECTURE = "Qwen3ForCausalLM"
# What Transformers assumes for Qwen3 where config.json is silent.
DEFAULT_HEAD_DIM = 128
DEFAULT_ROPE_THETA = 10_000.0
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """A dense Qwen3: shapes, constants and the tokens that end a completion.

    `head_dim` is independent of `hidden_size / num_heads`. `dtype` is the one that the folder's weights are meant for.
    """

    model_id: str
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    rope_theta: float
    rms_norm_eps: float
    tie_word_embeddings: bool
    context_length: int
    dtype: str
    eos_token_ids: tuple[int, ...]

    @classmethod
    def from_folder(cls, folder: str | Path) -> ModelConfig:
        """Reads config.json, in the old spelling or the new, and generation_config.json where there is one.

        Raises:
            InvalidArgument: no such folder, an architecture or feature that is not supported, or a field that is
                missing or makes no sense. The message names file and field.
        """
        folder = Path(folder)
        source = _ConfigFile(folder / "config.json")
        source.require_supported()
        # Its list of end tokens is the complete one; config.json often names only the first.
        generation = _ConfigFile(folder / "generation_config.json", optional=True)
        num_heads = source.count("num_attention_heads")
        config = cls(
            model_id=folder.resolve().name,
            num_layers=source.count("num_hidden_layers"),
            hidden_size=source.count("hidden_size"),
            num_heads=num_heads,
            num_kv_heads=source.count("num_key_value_heads", num_heads),
            head_dim=source.count("head_dim", DEFAULT_HEAD_DIM),
            intermediate_size=source.count("intermediate_size"),
            vocab_size=source.count("vocab_size"),
            rope_theta=source.rope_theta(),
            rms_norm_eps=source.number("rms_norm_eps", 1e-6),
            tie_word_embeddings=source.flag("tie_word_embeddings"),
            context_length=source.count("max_position_embeddings"),
            dtype=source.dtype(),
            eos_token_ids=generation.token_ids("eos_token_id") or source.token_ids("eos_token_id"),
        )
        if config.num_heads % config.num_kv_heads:
            raise source.error("num_key_value_heads", f"must divide num_attention_heads={num_heads}")
        if config.head_dim % 2:
            raise source.error("head_dim", "must be even: rotary embedding turns pairs of dimensions")
        return config

    def kv_layout(self, block_size: int, dtype: torch.dtype) -> str:
        """What two workers must agree on to exchange KV blocks, for a person to read too."""
        return (
            f"layers={self.num_layers} kv_heads={self.num_kv_heads} head_dim={self.head_dim} "
            f"block_size={block_size} dtype={dtype_name(dtype)}"
        )

    def kv_block_bytes(self, block_size: int, dtype: torch.dtype) -> int:
        """Bytes of one layer of one block: keys and values of `block_size` positions."""
        return 2 * block_size * self.num_kv_heads * self.head_dim * dtype.itemsize


def resolve_dtype(dtype: str, config: ModelConfig, device: torch.device) -> torch.dtype:
    """The dtype to compute in. `auto` is float32 on a CPU and the folder's own elsewhere.

    Raises:
        InvalidArgument: not one of auto, float32, bfloat16, float16.
    """
    if dtype == "auto":
        dtype = "float32" if device.type == "cpu" else config.dtype
    if dtype not in DTYPES:
        raise InvalidArgument(f"dtype={dtype!r}: expected auto or one of {', '.join(DTYPES)}", field="dtype")
    return DTYPES[dtype]


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class _ConfigFile:
    """A JSON object with typed reads whose errors name the file, the field and its value."""

    def __init__(self, path: Path, *, optional: bool = False) -> None:
        self.path = path
        self._fields = {} if optional and not path.exists() else _read_json(path)

    def get(self, field: str, default: Any = None) -> Any:
        """A field that is null counts as absent."""
        value = self._fields.get(field)
        return default if value is None else value

    def count(self, field: str, default: int | None = None) -> int:
        value = self.get(field, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self.error(field, "must be a positive integer")
        return value

    def number(self, field: str, default: float) -> float:
        value = self.get(field, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
            raise self.error(field, "must be a positive number")
        return float(value)

    def flag(self, field: str) -> bool:
        value = self.get(field, False)
        if not isinstance(value, bool):
            raise self.error(field, "must be true or false")
        return value

    def token_ids(self, field: str) -> tuple[int, ...]:
        """One id or a list of them; none where the field is absent."""
        value = self.get(field, [])
        ids = value if isinstance(value, list) else [value]
        if not all(isinstance(token_id, int) and token_id >= 0 for token_id in ids):
            raise self.error(field, "must be a token id or a list of token ids")
        return tuple(ids)

    def dtype(self) -> str:
        field = "dtype" if self.get("dtype") else "torch_dtype"
        value = self.get(field, "float32")
        if value not in DTYPES:
            raise self.error(field, f"must be one of {', '.join(DTYPES)}")
        return value

    def rope_theta(self) -> float:
        """`rope_parameters.rope_theta`, or in older folders `rope_theta` beside an optional `rope_scaling`."""
        field = "rope_parameters" if self.get("rope_parameters") else "rope_scaling"
        rope = self.get(field, {})
        plain = isinstance(rope, dict) and rope.get("rope_type", rope.get("type", "default")) == "default"
        if not plain or any(isinstance(value, dict) for value in rope.values()):
            raise self.error(field, "is not supported: only plain rotary embedding (rope_type default) is")
        theta = rope.get("rope_theta", self.get("rope_theta", DEFAULT_ROPE_THETA))
        if not isinstance(theta, int | float) or theta <= 0:
            raise self.error(field, f"with rope_theta={theta!r}: must be a positive number")
        return float(theta)

    def require_supported(self) -> None:
        architectures = self.get("architectures", [ARCHITECTURE] if self.get("model_type") == "qwen3" else [])
        if ARCHITECTURE not in architectures:
            raise InvalidArgument(
                f"{self.path}: architecture {', '.join(architectures) or '(none)'} with model_type="
                f"{self.get('model_type')!r} is not supported; use a {ARCHITECTURE} folder",
                field="model",
            )
        if self.get("hidden_act", "silu") != "silu":
            raise self.error("hidden_act", "is not supported: only silu is")
        for field in ("attention_bias", "use_sliding_window", "quantization_config"):
            if self.get(field):
                raise self.error(field, "is not supported; use a plain dense checkpoint")

    def error(self, field: str, problem: str) -> InvalidArgument:
        return InvalidArgument(f"{self.path}: {field}={self._fields.get(field)!r} {problem}", field="model")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InvalidArgument(
            f"{path}: {error.strerror}; --model takes a Hugging Face folder with config.json and *.safetensors",
            field="model",
        ) from error
    except ValueError as error:
        raise InvalidArgument(f"{path}: not valid JSON ({error})", field="model") from error
    if not isinstance(content, dict):
        raise InvalidArgument(f"{path}: expected a JSON object, found {type(content).__name__}", field="model")
    return content
