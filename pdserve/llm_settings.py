"""From the keywords of `LLM` to the settings of its three services.

A keyword is one of those below, or a setting of the services by its own name (docs/settings.md), which goes to every
service that has it, or such a name behind `router_`, `prefill_` or `decode_`, which goes to that service alone.

    enable_two_gpu_pd       prefill and decode on a GPU each; without it they share a device
    prefill_device_id       which GPU is prefill's then: 0
    decode_device_id        and decode's: 1
    enable_decode_pipeline  decode_pipeline: "static" or "disabled"; needs enable_two_gpu_pd
    gpu_memory_utilization  share of a GPU's memory: 0.9; two services on one GPU have half of it each
    max_num_batched_tokens  max_batch_tokens of prefill
    kvcache_block_size      block_size
    num_kvcache_blocks      num_blocks
    tensor_parallel_size    1

Knows names and values; starts nothing.
"""

from __future__ import annotations

import dataclasses
import difflib
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from common.config import DecodeConfig, PrefillConfig, RouterConfig
from common.settings import ConfigError

log = logging.getLogger(__name__)

CONFIGS: dict[str, type] = {"router": RouterConfig, "prefill": PrefillConfig, "decode": DecodeConfig}
KEYWORDS = (
    "enable_two_gpu_pd",
    "prefill_device_id",
    "decode_device_id",
    "enable_decode_pipeline",
    "gpu_memory_utilization",
    "max_num_batched_tokens",
    "kvcache_block_size",
    "num_kvcache_blocks",
    "tensor_parallel_size",
)
_OTHER_NAMES = {
    "max_num_batched_tokens": "prefill_max_batch_tokens",
    "kvcache_block_size": "block_size",
    "num_kvcache_blocks": "num_blocks",
}
# What an LLM decides itself, or its services on loopback have no use for.
_NOT_FREE = {
    *("listen", "reuse_port", "instance_id", "prefill", "decode", "pair_endpoint", "startup_grace_s", "identities"),
    *("tls_certificate", "tls_key", "tls_ca", "tls_client_certificates", "tls_server_name"),
}
_REFUSED = {
    "max_model_len": "the context is the model's; max_prompt_tokens limits prompts, max_tokens an output",
}
DEFAULT_UTILIZATION = 0.9


class Settings(NamedTuple):
    """Of each service, what is not its default."""

    router: dict[str, Any]
    prefill: dict[str, Any]
    decode: dict[str, Any]

    @property
    def max_in_flight(self) -> int:
        """Requests that the router takes from one client."""
        return RouterConfig(**self.router).max_requests_per_client


def settings_of(model: str | os.PathLike[str], keywords: Mapping[str, Any], num_gpus: Callable[[], int]) -> Settings:
    """`num_gpus` is asked when the answer matters.

    Raises:
        ConfigError: a keyword that there is not (the nearest is named), a value that cannot work, or a combination.
    """
    given = {name: value for name, value in keywords.items() if name in KEYWORDS}
    named = {name: value for name, value in keywords.items() if name not in KEYWORDS}
    two = _flag(given, "enable_two_gpu_pd") or False
    named |= {_OTHER_NAMES[name]: value for name, value in given.items() if name in _OTHER_NAMES}
    named |= _pipeline(_flag(given, "enable_decode_pipeline"), two, named)
    if given.get("tensor_parallel_size", 1) != 1:
        raise ConfigError(
            f"tensor_parallel_size={given['tensor_parallel_size']!r}: expected 1, a worker has one device"
        )

    settings = Settings({}, {}, {})
    for of_service in settings:
        of_service |= {"model": _folder(model), "metrics_listen": ""}
    settings.prefill["device"], settings.decode["device"] = _devices(given, two, named.pop("device", "auto"), num_gpus)
    fraction = _memory_fraction(given, shared=not two)
    settings.prefill["gpu_memory_fraction"] = settings.decode["gpu_memory_fraction"] = fraction
    # A name with a service in front stands over one without.
    for name, value in sorted(named.items(), key=lambda item: not _has(item[0])):
        for service, setting in _places(name):
            getattr(settings, service)[setting] = tuple(value) if isinstance(value, list) else value
    for service, config in CONFIGS.items():
        config(**getattr(settings, service))
    _make_room(settings)
    return settings


def flags_of(values: Mapping[str, Any]) -> list[str]:
    """The command line that gives a service these values."""
    flags = []
    for name, value in values.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            flags.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            flags += [f"--{flag}={one}" for one in (value if isinstance(value, tuple) else (value,))]
    return flags


def _flag(given: Mapping[str, Any], name: str) -> bool | None:
    value = given.get(name)
    if value is not None and not isinstance(value, bool):
        raise ConfigError(f"{name}={value!r}: expected True or False")
    return value


def _folder(model: str | os.PathLike[str]) -> str:
    folder = Path(model).expanduser()
    if not (folder / "config.json").is_file():
        raise ConfigError(
            f"model={os.fspath(model)!r}: expected a Hugging Face folder of this machine; no {folder}/config.json here"
        )
    return str(folder)


def _pipeline(enabled: bool | None, two: bool, named: Mapping[str, Any]) -> dict[str, str]:
    if enabled is not None and "decode_pipeline" in named:
        raise ConfigError("decode_pipeline: expected to be left out beside enable_decode_pipeline")
    if (enabled or named.get("decode_pipeline") == "static") and not two:
        name = "enable_decode_pipeline=True" if enabled else "decode_pipeline='static'"
        raise ConfigError(
            f"{name}: expected enable_two_gpu_pd=True as well: the attention/FFN pipeline divides decode's device, "
            "which prefill must not share"
        )
    return {} if enabled is None else {"decode_pipeline": "static" if enabled else "disabled"}


def _devices(given: Mapping[str, Any], two: bool, device: str, num_gpus: Callable[[], int]) -> tuple[str, str]:
    """Of prefill and of decode."""
    ids = {name: given[name] for name in ("prefill_device_id", "decode_device_id") if given.get(name) is not None}
    if not two:
        for name, number in ids.items():
            raise ConfigError(
                f"{name}={number!r}: expected enable_two_gpu_pd=True as well; device='cuda:N' is for both"
            )
        return device, device
    if device == "cpu":
        return device, device
    if device not in ("auto", "cuda"):
        raise ConfigError(
            f"device={device!r}: expected auto, cuda or cpu with enable_two_gpu_pd=True; "
            "prefill_device_id and decode_device_id name the GPUs"
        )
    count = num_gpus()
    if count == 0 and device == "auto":
        log.warning("no GPU here: prefill and decode are two services on the CPU")
        return "cpu", "cpu"
    if count < 2:
        raise ConfigError(
            f"enable_two_gpu_pd=True: expected two GPUs, here {'is' if count == 1 else 'are'} {count}; "
            "without it both services share a device, with device='cpu' they are two on the CPU"
        )
    ids = {"prefill_device_id": 0, "decode_device_id": 1} | ids
    for name, number in ids.items():
        if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < count:
            raise ConfigError(f"{name}={number!r}: expected a number below {count}, since here are {count} GPUs")
    prefill, decode = ids["prefill_device_id"], ids["decode_device_id"]
    if prefill == decode:
        raise ConfigError(f"decode_device_id={decode}: expected another GPU than prefill's with enable_two_gpu_pd=True")
    return f"cuda:{prefill}", f"cuda:{decode}"


def _memory_fraction(given: Mapping[str, Any], *, shared: bool) -> float:
    utilization = given.get("gpu_memory_utilization", DEFAULT_UTILIZATION)
    if isinstance(utilization, bool) or not isinstance(utilization, int | float) or not 0 < utilization <= 1:
        raise ConfigError(f"gpu_memory_utilization={utilization!r}: expected more than 0 and at most 1")
    return utilization / 2 if shared else float(utilization)


def _make_room(settings: Settings) -> None:
    """An LLM's requests all come from one client: enough of them for decode's batch, and as many that wait."""
    in_flight = max(RouterConfig().max_requests_per_client, 2 * DecodeConfig(**settings.decode).max_num_seqs)
    settings.router.setdefault("max_requests_per_client", in_flight)
    settings.router.setdefault("max_queue_requests", max(RouterConfig().max_queue_requests, in_flight))


def _has(name: str) -> bool:
    return any(name in _fields(service) for service in CONFIGS)


def _places(name: str) -> Iterator[tuple[str, str]]:
    """(service, setting) of each that a keyword means."""
    service, _, rest = name.partition("_")
    if _has(name):
        setting, services = name, [one for one in CONFIGS if name in _fields(one)]
    elif service in CONFIGS and rest in _fields(service):
        setting, services = rest, [service]
    else:
        raise ConfigError(f"unknown keyword {name!r}; {_REFUSED.get(name) or _nearest(name)}")
    if setting in _NOT_FREE:
        raise ConfigError(f"{name}: expected to be left out: an LLM's services are on loopback, at ports of its choice")
    yield from ((one, setting) for one in services)


def _fields(service: str) -> set[str]:
    return {field.name for field in dataclasses.fields(CONFIGS[service])}


def _nearest(name: str) -> str:
    names = {field for service in CONFIGS for field in _fields(service)} - _NOT_FREE
    prefixed = {f"{service}_{field}" for service in CONFIGS for field in _fields(service) - _NOT_FREE}
    match = difflib.get_close_matches(name, [*KEYWORDS, *sorted(names), *sorted(prefixed)], n=1)
    return f"did you mean {match[0]!r}?" if match else "docs/clients.md and docs/settings.md list them"
