from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from common.model.config import ModelConfig
from common.model.fingerprint import model_fingerprint
from tests.common.model.folders import config_folder, reference_model


def fingerprint(folder: Path, **changes: Any) -> str:
    arguments: dict[str, Any] = {
        "load_format": "auto",
        "dtype": torch.float32,
        "block_size": 16,
        "protocol_version": 1,
    }
    return model_fingerprint(folder, ModelConfig.from_folder(folder), **{**arguments, **changes})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    reference_model().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_copy_under_another_name_and_split_into_shards_is_the_same_model(folder: Path, tmp_path: Path) -> None:
    reference_model().save_pretrained(tmp_path / "copy", max_shard_size="20KB")
    assert fingerprint(folder) == fingerprint(tmp_path / "copy")
    assert len(fingerprint(folder)) == 32


@pytest.mark.parametrize(
    "change", [{"dtype": torch.bfloat16}, {"block_size": 32}, {"protocol_version": 2}, {"load_format": "dummy"}]
)
def test_what_changes_the_kv_changes_the_fingerprint(change: dict[str, Any], folder: Path) -> None:
    assert fingerprint(folder, **change) != fingerprint(folder)


@pytest.mark.parametrize(
    "change",
    [
        {"rms_norm_eps": 1e-5},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
        {"eos_token_id": 3},
        {"max_position_embeddings": 512},
    ],
)
def test_a_changed_config_changes_the_fingerprint(change: dict[str, Any], tmp_path: Path) -> None:
    config_folder(tmp_path / "a")
    config_folder(tmp_path / "b", **change)
    assert fingerprint(tmp_path / "a", load_format="dummy") != fingerprint(tmp_path / "b", load_format="dummy")


def test_every_tensor_counts(folder: Path) -> None:
    """One training step moves every row, so moving any one tensor must show."""
    before = fingerprint(folder)
    original = load_file(folder / "model.safetensors")
    for name in original:
        save_file({**original, name: original[name] * 1.001}, folder / "model.safetensors")
        assert fingerprint(folder) != before, name


def test_dummy_weights_are_told_apart_by_their_seed(tmp_path: Path) -> None:
    config_folder(tmp_path)
    one, other = (fingerprint(tmp_path, load_format="dummy", seed=seed) for seed in (0, 1))
    assert one != other


def test_the_seed_does_not_matter_where_weights_are_loaded(folder: Path) -> None:
    assert fingerprint(folder, seed=0) == fingerprint(folder, seed=1)
