"""What the keywords of `LLM` make of its three services' settings. Nothing is started."""

from __future__ import annotations

import logging

import pytest

from common.config import TINY_MODEL, DecodeConfig, PrefillConfig, RouterConfig, load
from common.settings import ConfigError
from pdserve.llm_settings import flags_of, settings_of

SEED = {
    "enable_two_gpu_pd": True,
    "prefill_device_id": 0,
    "decode_device_id": 1,
    "enable_decode_pipeline": True,
    "decode_attention_sm": 16,
    "decode_ffn_sm": 16,
    "decode_pipeline_profiling": True,
    "enforce_eager": True,
}


def made(num_gpus: int = 2, model: str = TINY_MODEL, **keywords):
    return settings_of(model, keywords, lambda: num_gpus)


def refusal(num_gpus: int = 2, **keywords) -> str:
    with pytest.raises(ConfigError) as caught:
        made(num_gpus, **keywords)
    return str(caught.value)


def test_two_gpus_and_their_pipeline():
    settings = made(**SEED)
    assert (settings.prefill["device"], settings.decode["device"]) == ("cuda:0", "cuda:1")
    assert (settings.decode["decode_pipeline"], settings.decode["decode_pipeline_profiling"]) == ("static", True)
    assert (settings.decode["decode_attention_sm"], settings.decode["decode_ffn_sm"]) == (16, 16)
    assert settings.prefill["enforce_eager"] is settings.decode["enforce_eager"] is True


@pytest.mark.parametrize("apart", [{}, {"enable_two_gpu_pd": False}])
@pytest.mark.parametrize("pipeline", [{"enable_decode_pipeline": True}, {"decode_pipeline": "static"}])
def test_the_pipeline_without_separation_is_a_configuration_error(apart, pipeline):
    assert "expected enable_two_gpu_pd=True as well" in refusal(**apart, **pipeline)
    assert "expected enable_two_gpu_pd=True as well" in refusal(device="cpu", **apart, **pipeline)


def test_no_pipeline_is_disabled_and_nothing_said_is_the_services_default():
    assert made(enable_decode_pipeline=False).decode["decode_pipeline"] == "disabled"
    assert "decode_pipeline" not in made().decode


def test_without_two_gpus_both_share_what_there_is():
    for keywords in ({}, {"device": "cuda:1"}, {"device": "cpu"}):
        settings, device = made(0, **keywords), keywords.get("device", "auto")
        assert (settings.prefill["device"], settings.decode["device"]) == (device, device)


@pytest.mark.parametrize("keywords", [SEED, {"enable_two_gpu_pd": True}])
def test_on_a_machine_without_gpus_two_services_on_the_cpu_are_the_separation(keywords, caplog):
    with caplog.at_level(logging.WARNING):
        settings = made(0, **keywords)
    assert (settings.prefill["device"], settings.decode["device"]) == ("cpu", "cpu")
    assert caplog.messages == ["no GPU here: prefill and decode are two services on the CPU"]


def test_the_cpu_can_be_asked_for_where_there_are_gpus(caplog):
    settings = made(2, device="cpu", **SEED)
    assert (settings.prefill["device"], settings.decode["device"]) == ("cpu", "cpu")
    assert caplog.messages == []


@pytest.mark.parametrize(
    ("num_gpus", "keywords", "words"),
    [
        (1, {}, "expected two GPUs, here is 1; without it both services share a device, with device='cpu'"),
        (0, {"device": "cuda"}, "expected two GPUs, here are 0"),
        (2, {"decode_device_id": 2}, "decode_device_id=2: expected a number below 2, since here are 2 GPUs"),
        (2, {"prefill_device_id": "0"}, "prefill_device_id='0': expected a number below 2"),
        (2, {"prefill_device_id": 1}, "decode_device_id=1: expected another GPU than prefill's"),
        (2, {"device": "cuda:1"}, "device='cuda:1': expected auto, cuda or cpu with enable_two_gpu_pd=True"),
    ],
)
def test_two_gpus_that_cannot_be_had_are_a_configuration_error(num_gpus, keywords, words):
    assert words in refusal(num_gpus, enable_two_gpu_pd=True, **keywords)


def test_a_gpu_of_one_of_them_without_two_is_a_configuration_error():
    assert "decode_device_id=1: expected enable_two_gpu_pd=True as well" in refusal(decode_device_id=1)


def test_memory_is_a_share_of_each_gpu_which_two_services_on_one_halve():
    assert made(**SEED).decode["gpu_memory_fraction"] == 0.9
    assert made().decode["gpu_memory_fraction"] == 0.45 == DecodeConfig().gpu_memory_fraction
    assert made(gpu_memory_utilization=0.5, **SEED).prefill["gpu_memory_fraction"] == 0.5
    assert made(gpu_memory_utilization=0.5).prefill["gpu_memory_fraction"] == 0.25
    assert made(gpu_memory_fraction=0.7).prefill["gpu_memory_fraction"] == 0.7
    assert "gpu_memory_utilization=1.5: expected" in refusal(gpu_memory_utilization=1.5)


def test_other_names_of_nano_vllm():
    settings = made(max_num_batched_tokens=4096, max_num_seqs=8, kvcache_block_size=32, num_kvcache_blocks=100)
    assert settings.prefill["max_batch_tokens"] == 4096
    assert "max_batch_tokens" not in settings.decode
    for of_worker in (settings.prefill, settings.decode):
        assert (of_worker["max_num_seqs"], of_worker["block_size"], of_worker["num_blocks"]) == (8, 32, 100)
    assert made(tensor_parallel_size=1)
    assert refusal(tensor_parallel_size=2) == "tensor_parallel_size=2: expected 1, a worker has one device"


def test_a_setting_goes_to_every_service_that_has_it_and_with_a_prefix_to_one():
    settings = made(decode_max_num_seqs=32, max_num_seqs=16, log_level="debug", router_log_level="error")
    assert (settings.prefill["max_num_seqs"], settings.decode["max_num_seqs"]) == (16, 32)
    assert (settings.router["log_level"], settings.decode["log_level"]) == ("error", "debug")
    assert "max_num_seqs" not in settings.router


@pytest.mark.parametrize(
    ("keyword", "words"),
    [
        ("enable_two_gpu", "did you mean 'enable_two_gpu_pd'?"),
        ("max_num_seq", "did you mean 'max_num_seqs'?"),
        ("decode_max_num_seq", "did you mean 'decode_max_num_seqs'?"),
        ("max_model_len", "the context is the model's; max_prompt_tokens limits prompts"),
        ("zzz", "docs/clients.md and docs/settings.md list them"),
    ],
)
def test_an_unknown_keyword_names_the_nearest(keyword, words):
    message = refusal(**{keyword: 1})
    assert message.startswith(f"unknown keyword {keyword!r}; ")
    assert words in message


@pytest.mark.parametrize("keyword", ["listen", "router_listen", "decode", "tls_ca", "identities"])
def test_where_its_services_are_is_for_the_llm_to_say(keyword):
    assert refusal(**{keyword: "x"}).startswith(f"{keyword}: expected to be left out")


def test_values_are_checked_before_anything_starts():
    assert "block_size=0: expected at least 1" in refusal(block_size=0)
    assert "enable_two_gpu_pd='yes': expected True or False" in refusal(enable_two_gpu_pd="yes")
    assert "expected to be left out beside" in refusal(**SEED, decode_pipeline="auto")
    assert "no Qwen/Qwen3-0.6B/config.json here" in refusal(model="Qwen/Qwen3-0.6B")


def test_one_client_may_have_as_many_in_flight_as_decode_can_use():
    assert made().max_in_flight == RouterConfig().max_requests_per_client == 512
    settings = made(decode_max_num_seqs=1024)
    assert (settings.max_in_flight, settings.router["max_queue_requests"]) == (2048, 2048)


def test_flags_give_a_service_the_same_values():
    values = {"prefix_cache": False, "enforce_eager": True, "max_num_seqs": 8, "kv_transports": ("gloo", "nccl")}
    config = load(PrefillConfig, flags_of(values))
    assert {name: getattr(config, name) for name in values} == values
