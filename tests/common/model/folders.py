"""Model folders of tiny width: written by Transformers with random weights, or by hand from a config alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen3Config
from transformers import Qwen3ForCausalLM as TransformersQwen3

CONFIG: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 48,
    "vocab_size": 120,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
    "dtype": "float32",
    "eos_token_id": 2,
}


def config_folder(folder: Path, *, without: tuple[str, ...] = (), **changes: Any) -> Path:
    """config.json alone: `CONFIG` with changes."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {key: value for key, value in {**CONFIG, **changes}.items() if key not in without}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def reference_model(*, seed: int = 0, **changes: Any) -> TransformersQwen3:
    """Transformers' own Qwen3 in float32, with weights large enough that greedy choices have clear margins."""
    config = Qwen3Config(**{**CONFIG, **changes})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = TransformersQwen3(config).eval()
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if name.endswith("norm.weight"):
                    weight.uniform_(0.5, 1.5)
                else:
                    weight.normal_(0, 1.5 / config.hidden_size**0.5)
    return model
