"""Builds what both kinds of worker need from their configuration: device, model, KV cache, pool, identity."""

from __future__ import annotations

import logging
import os
from typing import NamedTuple

import torch

from common.blocks import BlockPool
from common.config import WorkerConfig
from common.engine.buckets import batch_buckets
from common.engine.chunks import MOST_SCORED_TOKENS
from common.engine.device import ChooseOperations, choose_operations, resolve_device
from common.engine.kv_cache import KvCache
from common.engine.memory import GRAPH_BYTES, RUNTIME_BYTES, MemoryPlan, activation_bytes
from common.engine.prefill_graphs import MOST_SEQS, MOST_TOKENS, token_buckets
from common.engine.prefiller import Prefiller
from common.engine.prefix import PrefixCache
from common.engine.progress import progress_bar
from common.engine.sampling_state import table_bytes
from common.errors import InvalidArgument
from common.model.config import ModelConfig, resolve_dtype
from common.model.fingerprint import model_fingerprint
from common.model.loader import load_model
from common.model.qwen3 import Qwen3ForCausalLM
from common.settings import ConfigError
from common.transport.checksum import warm_up
from common.transport.limits import DEVICE_GATHER_SLOTS, chunk_bytes
from common.transport.messages import PROTOCOL_VERSION, PairIdentity
from common.transport.transports import Transports
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
    transports: Transports


def build(config: WorkerConfig, *, choose: ChooseOperations | None = None) -> WorkerParts:
    """Loads the model and allocates the KV cache. Takes seconds to minutes. `choose` picks the kernels.

    Raises:
        ConfigError: the device does not exist, the cache is too small, or the model folder cannot be used.
    """
    try:
        return _build(config, choose or choose_operations)
    except InvalidArgument as error:
        raise ConfigError(error.message) from error


def _build(config: WorkerConfig, choose: ChooseOperations) -> WorkerParts:
    torch.set_num_threads(config.num_threads or max(1, len(os.sched_getaffinity(0)) // 2))
    device = resolve_device(config.device)
    transports = Transports.of(config.kv_transports, device)
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
            operations=choose(model_config, device, deterministic=config.deterministic),
        )
    num_blocks = _num_blocks(config, model_config, dtype, device)
    cache = KvCache(model_config, num_blocks, config.block_size, dtype, device)
    warm_up(device)
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
        transports=transports,
    )


def _num_blocks(config: WorkerConfig, model_config: ModelConfig, dtype: torch.dtype, device: torch.device) -> int:
    block_bytes = model_config.num_layers * model_config.kv_block_bytes(config.block_size, dtype)
    if device.type == "cuda":
        return _plan_device_memory(config, model_config, dtype, device, block_bytes)
    if config.num_blocks:
        return config.num_blocks
    num_blocks = int(config.kv_cache_gib * 2**30) // block_bytes
    if num_blocks < 2:
        raise ConfigError(
            f"kv_cache_gib={config.kv_cache_gib:g} holds {num_blocks} blocks of {block_bytes} bytes; raise it"
        )
    return num_blocks


def _plan_device_memory(
    config: WorkerConfig, model_config: ModelConfig, dtype: torch.dtype, device: torch.device, block_bytes: int
) -> int:
    """Called with the weights in place. Prints the table."""
    heads = model_config.num_heads + 2 * model_config.num_kv_heads
    sizes = {
        "hidden_size": model_config.hidden_size,
        "qkv_width": heads * model_config.head_dim,
        "intermediate_size": model_config.intermediate_size,
        "vocab_size": model_config.vocab_size,
        "itemsize": dtype.itemsize,
    }
    graphs = 0
    if not config.enforce_eager:
        # Graphs have activations of their own, which all of a kind share.
        num_graphs = len(token_buckets(config.max_batch_tokens))
        graphs = activation_bytes(**sizes, num_tokens=min(config.max_batch_tokens, MOST_TOKENS), num_rows=MOST_SEQS)
        if config.role == "decode":
            num_graphs += len(batch_buckets(config.max_num_seqs))
            graphs += activation_bytes(**sizes, num_tokens=config.max_num_seqs, num_rows=config.max_num_seqs)
        graphs += num_graphs * GRAPH_BYTES
    pieces = _piece_bytes(config, model_config) if config.deterministic else 0
    free, total = torch.cuda.mem_get_info(device)
    # Decode draws the first tokens of local prefills, and all others.
    num_states = 2 if config.role == "decode" else 1
    plan = MemoryPlan(
        device=f"{device} ({torch.cuda.get_device_name(device)})",
        total=total,
        # Loading leaves some to PyTorch, which uses it again.
        free=free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device),
        fraction=config.gpu_memory_fraction,
        runtime=RUNTIME_BYTES,
        weights=torch.cuda.memory_allocated(device),
        activations=pieces
        + activation_bytes(
            **sizes, num_tokens=config.max_batch_tokens, num_rows=max(config.max_num_seqs, MOST_SCORED_TOKENS)
        ),
        graphs=graphs + (pieces if graphs else 0),
        sampling=num_states * table_bytes(config.max_num_seqs, model_config.vocab_size),
        staging=_largest_chunk_bytes(config)
        * (config.staging_chunks if config.role == "decode" else DEVICE_GATHER_SLOTS),
        block_bytes=block_bytes,
        wanted_blocks=config.num_blocks,
    )
    num_blocks = plan.num_blocks
    log.info("memory of %s\n%s", config.instance_id, plan.table(num_blocks, config.block_size))
    return num_blocks


def _piece_bytes(config: WorkerConfig, model_config: ModelConfig) -> int:
    """Every token of a prompt is a sequence of its own to batch-invariant attention."""
    from common.kernels.decode_plan import fixed_piece_bytes

    return fixed_piece_bytes(
        max(config.max_batch_tokens, config.max_num_seqs),
        num_kv_heads=model_config.num_kv_heads,
        num_query_heads=model_config.num_heads,
        head_dim=model_config.head_dim,
    )


def _largest_chunk_bytes(config: WorkerConfig) -> int:
    return max(chunk_bytes(name, config.max_chunk_bytes) for name in config.kv_transports)
