"""Attention by flashinfer, for comparison with our own kernels: its paged layout (NHD) is our cache as it is.

A wrapper's `plan()` computes on the host, from the host's numbers, and has to be called for every batch. So neither
fits a decode loop whose steps are replayed without the host: a CUDA graph may hold the kernels, never the plan. One
plan at a time: a batch's layers have all run, on the device too, before the next batch is planned.

flashinfer compiles its kernels with nvcc when they are first used (minutes) and keeps them in its cache.

Shapes: T tokens, S sequences, P blocks, B block_size, N query heads, K kv heads, H head_dim.
"""

from __future__ import annotations

import functools
import importlib
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from common.kernels.availability import why_not_half, why_not_imported
from common.kernels.gather_kv import gather_kv
from common.model.batch import ForwardBatch

HEAD_DIMS = (64, 128, 256)
WORKSPACE_BYTES = 256 << 20


def why_not(head_dim: int, dtype: torch.dtype, device: torch.device, *, backend: str = "fa2") -> str:
    """Why flashinfer cannot serve; `backend` fa3 exists for Hopper alone."""
    if reason := why_not_imported("flashinfer-python", "flashinfer"):
        return reason
    if head_dim not in HEAD_DIMS:
        return f"head_dim is {head_dim}, kernels exist for {', '.join(map(str, HEAD_DIMS))}"
    if reason := why_not_half(dtype, device):
        return reason
    if backend == "fa3" and torch.cuda.get_device_capability(device)[0] != 9:
        return "the GPU is not of compute capability 9.x"
    return ""


class Pages(NamedTuple):
    """All sequences' pages end to end, as flashinfer wants them: on the host, save for the page numbers."""

    start_S1: Tensor
    page_ids: Tensor
    last_len_S: Tensor


def pages(batch: ForwardBatch, block_size: int) -> Pages:
    """For `batch.once`."""
    assert batch.kv_lens is not None
    counts = [-(-kv_len // block_size) for kv_len in batch.kv_lens]
    return Pages(
        start_S1=torch.tensor([0, *accumulate(counts)], dtype=torch.int32),
        page_ids=torch.cat([row[:count] for row, count in zip(batch.block_table_SP, counts, strict=True)]).int(),
        last_len_S=torch.tensor([(kv_len - 1) % block_size + 1 for kv_len in batch.kv_lens], dtype=torch.int32),
    )


class Heads(NamedTuple):
    """What a plan depends on besides lengths."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    dtype: torch.dtype
    scale: float

    @classmethod
    def of(cls, q_TNH: Tensor, kv_P2BKH: Tensor, scale: float) -> Heads:
        block_size, num_kv_heads, head_dim = kv_P2BKH.shape[2:]
        return cls(q_TNH.shape[1], num_kv_heads, head_dim, block_size, q_TNH.dtype, scale)


def paged_prefill(q_TNH: Tensor, kv_P2BKH: Tensor, batch: ForwardBatch, scale: float, *, backend: str) -> Tensor:
    """out_TNH: causal attention of every token over its sequence's cached positions, its own included."""
    wrapper = batch.once(_plan_paged, backend, Heads.of(q_TNH, kv_P2BKH, scale))
    return wrapper.run(q_TNH, kv_P2BKH, out=_like(q_TNH))


def ragged_prefill(q_TNH: Tensor, kv_P2BKH: Tensor, batch: ForwardBatch, scale: float, *, backend: str) -> Tensor:
    """The same from keys and values gathered end to end, which Hopper's copy engine can fetch."""
    k_LKH, v_LKH = gather_kv(kv_P2BKH, batch)
    wrapper = batch.once(_plan_ragged, backend, Heads.of(q_TNH, kv_P2BKH, scale))
    return wrapper.run(q_TNH, k_LKH, v_LKH, out=_like(q_TNH))


def decode(q_SNH: Tensor, kv_P2BKH: Tensor, batch: ForwardBatch, scale: float, *, tensor_cores: bool = False) -> Tensor:
    """out_SNH of a batch of one token a sequence."""
    assert batch.decode_only
    wrapper = batch.once(_plan_decode, tensor_cores, Heads.of(q_SNH, kv_P2BKH, scale))
    return wrapper.run(q_SNH, kv_P2BKH, out=_like(q_SNH))


class GraphDecode:
    """Decode of `num_seqs` sequences: a CUDA graph may capture `attend`, and needs `plan` before each replay."""

    def __init__(self, num_seqs: int, max_blocks: int, device: torch.device, *, tensor_cores: bool = False) -> None:
        self._wrapper = _library().BatchDecodeWithPagedKVCacheWrapper(
            _workspace(device),
            "NHD",
            use_cuda_graph=True,
            use_tensor_cores=tensor_cores,
            paged_kv_indptr_buffer=torch.empty(num_seqs + 1, dtype=torch.int32, device=device),
            paged_kv_indices_buffer=torch.empty(max_blocks, dtype=torch.int32, device=device),
            paged_kv_last_page_len_buffer=torch.empty(num_seqs, dtype=torch.int32, device=device),
        )

    def plan(self, batch: ForwardBatch, heads: Heads) -> None:
        _plan_decode_on(self._wrapper, batch, heads)

    def attend(self, q_SNH: Tensor, kv_P2BKH: Tensor) -> Tensor:
        return self._wrapper.run(q_SNH, kv_P2BKH, out=_like(q_SNH))


def _plan_paged(batch: ForwardBatch, backend: str, heads: Heads) -> Any:
    wrapper = _paged_wrapper(backend, batch.kv_len_S.device)
    cached = batch.once(pages, heads.block_size)
    wrapper.plan(
        torch.tensor(batch.query_starts, dtype=torch.int32),
        cached.start_S1,
        cached.page_ids,
        cached.last_len_S,
        heads.num_heads,
        heads.num_kv_heads,
        heads.head_dim,
        heads.block_size,
        causal=True,
        sm_scale=heads.scale,
        q_data_type=heads.dtype,
        kv_data_type=heads.dtype,
    )
    return wrapper


def _plan_ragged(batch: ForwardBatch, backend: str, heads: Heads) -> Any:
    assert batch.kv_lens is not None
    wrapper = _ragged_wrapper(backend, batch.kv_len_S.device)
    wrapper.plan(
        torch.tensor(batch.query_starts, dtype=torch.int32),
        torch.tensor([0, *accumulate(batch.kv_lens)], dtype=torch.int32),
        heads.num_heads,
        heads.num_kv_heads,
        heads.head_dim,
        causal=True,
        sm_scale=heads.scale,
        q_data_type=heads.dtype,
        kv_data_type=heads.dtype,
    )
    return wrapper


def _plan_decode(batch: ForwardBatch, tensor_cores: bool, heads: Heads) -> Any:
    return _plan_decode_on(_decode_wrapper(tensor_cores, batch.kv_len_S.device), batch, heads)


def _plan_decode_on(wrapper: Any, batch: ForwardBatch, heads: Heads) -> Any:
    cached = batch.once(pages, heads.block_size)
    wrapper.plan(
        cached.start_S1,
        cached.page_ids,
        cached.last_len_S,
        heads.num_heads,
        heads.num_kv_heads,
        heads.head_dim,
        heads.block_size,
        sm_scale=heads.scale,
        q_data_type=heads.dtype,
        kv_data_type=heads.dtype,
    )
    return wrapper


def _like(q_TNH: Tensor) -> Tensor:
    """Given none, flashinfer fills one with zeros first."""
    return torch.empty(q_TNH.shape, dtype=q_TNH.dtype, device=q_TNH.device)


def _library() -> Any:
    return importlib.import_module("flashinfer")


@functools.cache
def _workspace(device: torch.device) -> Tensor:
    """One for all wrappers: they run one after the other, on one stream."""
    return torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=device)


@functools.cache
def _paged_wrapper(backend: str, device: torch.device) -> Any:
    return _library().BatchPrefillWithPagedKVCacheWrapper(_workspace(device), "NHD", backend=backend)


@functools.cache
def _ragged_wrapper(backend: str, device: torch.device) -> Any:
    return _library().BatchPrefillWithRaggedKVCacheWrapper(_workspace(device), "NHD", backend=backend)


@functools.cache
def _decode_wrapper(tensor_cores: bool, device: torch.device) -> Any:
    return _library().BatchDecodeWithPagedKVCacheWrapper(_workspace(device), "NHD", use_tensor_cores=tensor_cores)
