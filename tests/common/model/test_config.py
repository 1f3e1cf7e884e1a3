from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from common.errors import InvalidArgument
from common.model.config import ModelConfig, resolve_dtype
from tests.common.model.folders import config_folder

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def read(folder: Path, *, without: tuple[str, ...] = (), **changes: Any) -> ModelConfig:
    return ModelConfig.from_folder(config_folder(folder, without=without, **changes))


def test_every_field_comes_from_config_json(tmp_path: Path) -> None:
    assert read(tmp_path / "my-model") == ModelConfig(
        model_id="my-model",
        num_layers=2,
        hidden_size=32,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        intermediate_size=48,
        vocab_size=120,
        rope_theta=10_000.0,
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
        context_length=256,
        dtype="float32",
        eos_token_ids=(2,),
    )


def test_old_and_new_spellings_mean_the_same(tmp_path: Path) -> None:
    new = read(tmp_path / "m", dtype="bfloat16", rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    old = read(
        tmp_path / "m", without=("dtype", "rope_parameters"), torch_dtype="bfloat16", rope_theta=5e5, rope_scaling=None
    )
    assert old == new
    assert old.rope_theta == 5e5
    assert old.dtype == "bfloat16"


def test_absent_fields_have_the_values_that_transformers_gives_them(tmp_path: Path) -> None:
    ours = read(tmp_path, without=("head_dim", "rope_parameters", "rms_norm_eps", "tie_word_embeddings"))
    theirs = AutoConfig.from_pretrained(tmp_path)
    assert ours.tie_word_embeddings == theirs.tie_word_embeddings
    assert ours.head_dim == theirs.head_dim
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
    assert ours.rms_norm_eps == theirs.rms_norm_eps


def test_all_end_tokens_come_from_generation_config(tmp_path: Path) -> None:
    folder = config_folder(tmp_path)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 9]}))
    assert ModelConfig.from_folder(folder).eos_token_ids == (7, 9)


@pytest.mark.parametrize(("declared", "expected"), [(5, (5,)), ([5, 6], (5, 6)), (None, ())])
def test_end_tokens_fall_back_to_config_json(declared: Any, expected: tuple[int, ...], tmp_path: Path) -> None:
    folder = config_folder(tmp_path, eos_token_id=declared)
    (folder / "generation_config.json").write_text(json.dumps({"temperature": 0.6}))
    assert ModelConfig.from_folder(folder).eos_token_ids == expected


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        pytest.param({"architectures": ["LlamaForCausalLM"], "model_type": "llama"}, "LlamaForCausalLM", id="other"),
        pytest.param({"architectures": ["Qwen3MoeForCausalLM"]}, "Qwen3MoeForCausalLM", id="moe"),
        pytest.param({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "rope_parameters", id="yarn"),
        pytest.param({"rope_parameters": None, "rope_scaling": {"type": "linear"}}, "rope_scaling", id="old-scaling"),
        pytest.param({"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, "rope_parameters", id="nested"),
        pytest.param({"use_sliding_window": True}, "use_sliding_window", id="sliding-window"),
        pytest.param({"attention_bias": True}, "attention_bias", id="bias"),
        pytest.param({"hidden_act": "gelu"}, "hidden_act", id="activation"),
        pytest.param({"quantization_config": {"quant_method": "fp8"}}, "quantization_config", id="quantised"),
        pytest.param({"hidden_size": None}, "hidden_size", id="missing"),
        pytest.param({"vocab_size": "many"}, "vocab_size", id="not-a-number"),
        pytest.param({"num_hidden_layers": 0}, "num_hidden_layers", id="zero"),
        pytest.param({"num_key_value_heads": 3}, "num_key_value_heads", id="heads-do-not-divide"),
        pytest.param({"head_dim": 15}, "head_dim", id="odd-head"),
        pytest.param({"dtype": "int8"}, "dtype", id="dtype"),
        pytest.param({"rms_norm_eps": "small"}, "rms_norm_eps", id="epsilon"),
        pytest.param({"rope_parameters": {"rope_theta": "big"}}, "rope_parameters", id="theta"),
        pytest.param({"tie_word_embeddings": "false"}, "tie_word_embeddings", id="not-a-flag"),
        pytest.param({"eos_token_id": ["</s>"]}, "eos_token_id", id="not-an-id"),
    ],
)
def test_what_is_not_supported_is_named_with_its_file(changes: dict[str, Any], named: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match=rf"config\.json: .*{named}") as caught:
        read(tmp_path, **changes)
    assert caught.value.field == "model"


def test_a_folder_that_does_not_exist_is_named_with_a_remedy(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match=r"nowhere/config\.json: .*Hugging Face folder"):
        ModelConfig.from_folder(tmp_path / "nowhere")


@pytest.mark.parametrize("content", ["{", "[]", "\x00"])
def test_a_config_that_does_not_parse_is_named(content: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(InvalidArgument, match=r"config\.json: "):
        ModelConfig.from_folder(tmp_path)


def test_dtype_auto_is_float32_on_a_cpu_and_the_folders_own_on_cuda(tmp_path: Path) -> None:
    config = read(tmp_path, dtype="bfloat16")
    assert resolve_dtype("auto", config, CPU) is torch.float32
    assert resolve_dtype("auto", config, CUDA) is torch.bfloat16
    assert resolve_dtype("float16", config, CUDA) is torch.float16


def test_an_unknown_dtype_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match=r"float64.*bfloat16"):
        resolve_dtype("float64", read(tmp_path), CPU)
