"""One digest for everything that two workers must share before the KV of one means the same to the other."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from common.model.checkpoint import open_tensors, tensor_files
from common.model.config import ModelConfig, dtype_name

# Rows read from a matrix: first, last and those between, evenly spaced. A norm's vector is read whole.
SAMPLED_ROWS = 4


def model_fingerprint(
    folder: str | Path,
    config: ModelConfig,
    *,
    load_format: str,
    dtype: torch.dtype,
    block_size: int,
    protocol_version: int,
    seed: int = 0,
) -> str:
    """32 hex digits over the model's configuration (not its name), compute dtype, KV layout, protocol and weights.

    Weights are identified by name, shape and dtype of every tensor and by the bytes of a few rows of each: 16 GB take a
    fraction of a second, and a copy split into other shards counts as the same. An edit by hand between the sampled
    rows goes unnoticed; further training does not. Dummy weights are identified by their seed.

    Raises:
        InvalidArgument: the folder's weights cannot be read.
    """
    identity = {
        "config": {key: value for key, value in asdict(config).items() if key not in ("model_id", "dtype")},
        "dtype": dtype_name(dtype),
        "kv_layout": config.kv_layout(block_size, dtype),
        "protocol_version": protocol_version,
        "weights": {"dummy_seed": seed} if load_format == "dummy" else _weights_identity(folder),
    }
    return hashlib.blake2b(json.dumps(identity, sort_keys=True).encode(), digest_size=16).hexdigest()


def _weights_identity(folder: str | Path) -> dict[str, list[Any]]:
    identity = {}
    for path, names in tensor_files(folder).items():
        with open_tensors(path) as file:
            for name in names:
                entry = file.get_slice(name)
                shape = entry.get_shape()
                content = hashlib.blake2b(digest_size=16)
                for rows in _sampled_rows(shape):
                    content.update(entry[rows].contiguous().view(torch.uint8).numpy())
                identity[name] = [shape, entry.get_dtype(), content.hexdigest()]
    return identity


def _sampled_rows(shape: list[int]) -> list[slice]:
    if len(shape) == 1:
        return [slice(0, shape[0])]
    rows = {sample * (shape[0] - 1) // (SAMPLED_ROWS - 1) for sample in range(SAMPLED_ROWS)}
    return [slice(row, row + 1) for row in sorted(rows)]
