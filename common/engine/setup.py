"""Builds what both kinds of worker need from their configuration: device, model, KV cache, pool, identity."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from common.blocks import BlockPool
from common.config import WorkerConfig
from common.engine.kv_cache import KvCache
from common.engine.prefiller import Prefiller
from common.engine.prefix import PrefixCache
from common.errors import InvalidArgument
from common.model.config import ModelConfig, resolve_dtype
from common.model.fingerprint import model_fingerprint
from common.model.loader import load_model
from common.model.qwen3 import Qwen3ForCausalLM
from common.settings import ConfigError
from common.transport.messages import PROTOCOL_VERSION, PairIdentity
from common.worker import new_boot_id
from pdserve.v1 import types_pb2, worker_pb2

log = logging.getLogger(__name__)

_ROLES = {"prefill": types_pb2.ROLE_PREFILL, "decode": types_pb2.ROLE_DECODE}


class WorkerParts(NamedTuple):
    """Everything an engine is made of."""

    device: torch.device
    model: Qwen3ForCausalLM
    cache: KvCache
    pool: BlockPool
    prefix: PrefixCache
    prefiller: Prefiller
    identity: worker_pb2.WorkerIdentity
    pair_identity: PairIdentity


def build(config: WorkerConfig) -> WorkerParts:
    """Loads the model and allocates the KV cache. Takes seconds to minutes.

    Raises:
        ConfigError: the device does not exist, the cache is too small, or the model folder cannot be used.
    """
    try:
        return _build(config)
    except InvalidArgument as error:
        raise ConfigError(error.message) from error


def _build(config: WorkerConfig) -> WorkerParts:
    torch.set_num_threads(config.num_threads or max(1, len(os.sched_getaffinity(0)) // 2))
    device = resolve_device(config.device)
    model_config = ModelConfig.from_folder(config.model)
    dtype = resolve_dtype(config.dtype, model_config, device)
    with progress_bar(f"loading {model_config.model_id}") as progress:
        model = load_model(
            config.model,
            load_format=config.load_format,
            dtype=config.dtype,
            device=device,
            seed=config.seed,
            progress=progress,
        )
    cache = KvCache(model_config, _num_blocks(config, model_config, dtype), config.block_size, dtype, device)
    fingerprint = model_fingerprint(
        config.model,
        model_config,
        load_format=config.load_format,
        dtype=dtype,
        block_size=config.block_size,
        protocol_version=PROTOCOL_VERSION,
        seed=config.seed,
    )
    pool = BlockPool(cache.num_blocks, config.block_size, prefix_cache=config.prefix_cache)
    prefix = PrefixCache(pool, fingerprint)
    boot_id = new_boot_id()
    log.info(
        "%s on %s, %s, %d KV blocks, fingerprint %s",
        model_config.model_id,
        device,
        cache.layout,
        cache.num_blocks,
        fingerprint,
    )
    identity = worker_pb2.WorkerIdentity(
        role=_ROLES[config.role],
        instance_id=config.instance_id,
        boot_id=boot_id,
        model_id=model_config.model_id,
        model_fingerprint=fingerprint,
        protocol_version=PROTOCOL_VERSION,
        # A sequence that fills the whole pool still leaves the spare block of its reservation.
        context_length=min(model_config.context_length, (cache.num_blocks - 1) * config.block_size),
        vocab_size=model_config.vocab_size,
        block_size=config.block_size,
        num_total_blocks=cache.num_blocks,
        max_num_seqs=config.max_num_seqs,
        eos_token_ids=model_config.eos_token_ids,
    )
    return WorkerParts(
        device=device,
        model=model,
        cache=cache,
        pool=pool,
        prefix=prefix,
        prefiller=Prefiller(model, cache, prefix, max_num_seqs=config.max_num_seqs, device=device),
        identity=identity,
        pair_identity=PairIdentity(config.instance_id, boot_id, fingerprint, cache.layout),
    )


@contextlib.contextmanager
def progress_bar(title: str) -> Iterator[Callable[[int, int], None]]:
    """Yields what takes (done_bytes, total_bytes); a bar on stderr where that is a terminal."""
    columns = (TextColumn(title), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task(title)
        yield lambda done_bytes, total_bytes: progress.update(task, completed=done_bytes, total=total_bytes)


def resolve_device(name: str) -> torch.device:
    """The device to compute on.

    Raises:
        ConfigError: it is a CUDA device.
    """
    if name not in ("auto", "cpu"):
        raise ConfigError(f"device={name!r}: the KV transport stages in host memory only; use cpu")
    return torch.device("cpu")


def _num_blocks(config: WorkerConfig, model_config: ModelConfig, dtype: torch.dtype) -> int:
    if config.num_blocks:
        return config.num_blocks
    block_bytes = model_config.num_layers * model_config.kv_block_bytes(config.block_size, dtype)
    num_blocks = int(config.kv_cache_gib * 2**30) // block_bytes
    if num_blocks < 2:
        raise ConfigError(
            f"kv_cache_gib={config.kv_cache_gib:g} holds {num_blocks} blocks of {block_bytes} bytes; raise it"
        )
    return num_blocks
