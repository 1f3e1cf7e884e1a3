"""Prompt chunks' attention by other people's kernels, with the meaning of our own: for comparison and where preferred.

    name                   kernel                                         reads
    flash-attn             flash-attn's FlashAttention-2                  keys and values gathered end to end
    flash-attn-3           FlashAttention-3, of Hopper                    gathered
    flashinfer-fa2, -fa3   flashinfer's kernels (`flashinfer_attention`)  the paged cache as it is
    flashinfer-fa3-ragged                                                 gathered
    torch-varlen           PyTorch's FlashAttention-2, all sequences      gathered
    torch-flash            the same through SDPA, call by call            gathered
    torch-cudnn            cuDNN's attention, call by call                gathered

Nothing is imported before it is asked for. A batch needs its host's numbers, so no CUDA graph replays any of these.

Shapes: T tokens, S sequences, L positions, Q query tokens of a sequence, P blocks, B block_size, N query heads, K kv
heads, H head_dim.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

from common.kernels import flashinfer_attention
from common.kernels.availability import why_not_half, why_not_imported
from common.kernels.gather_kv import gather_kv, ragged
from common.model.batch import ForwardBatch

# Built from source, and the wheel of its forward pass (`fa3-fwd`).
FLASH_ATTN_3 = ("flash_attn_interface", "fa3_fwd_interface")

Attend = Callable[[Tensor, Tensor, ForwardBatch, float], Tensor]
AttendAlike = Callable[[Tensor, Tensor, Tensor, float], Tensor]


class Library(NamedTuple):
    """`attend(q_TNH, kv_P2BKH, batch, scale)` is out_TNH: causal attention of every token over its sequence's cached
    positions, its own included. `why_not(head_dim, dtype, device)` is why that cannot be had; empty when it can.
    """

    attend: Attend
    why_not: Callable[[int, torch.dtype, torch.device], str]


def flash_attn_prefill(
    q_TNH: Tensor, kv_P2BKH: Tensor, batch: ForwardBatch, scale: float, *, modules: Sequence[str]
) -> Tensor:
    """The variable-length call of the first of `modules` that is there. flash-attn's paged one wants blocks of 256."""
    k_LKH, v_LKH = gather_kv(kv_P2BKH, batch)
    plan = batch.once(ragged)
    module = next(module for module in modules if not why_not_imported("flash-attn", module))
    return importlib.import_module(module).flash_attn_varlen_func(
        q_TNH,
        k_LKH,
        v_LKH,
        plan.query_start_S1,
        plan.kv_start_S1,
        plan.max_queries,
        plan.max_positions,
        softmax_scale=scale,
        causal=True,
    )


def torch_varlen_prefill(q_TNH: Tensor, kv_P2BKH: Tensor, batch: ForwardBatch, scale: float) -> Tensor:
    k_LKH, v_LKH = gather_kv(kv_P2BKH, batch)
    plan = batch.once(ragged)
    return _varlen()(
        q_TNH,
        k_LKH,
        v_LKH,
        plan.query_start_S1,
        plan.kv_start_S1,
        plan.max_queries,
        plan.max_positions,
        scale=scale,
        window_size=(-1, 0),
    )


@functools.cache
def _varlen() -> Callable[..., Tensor]:
    """Later versions have to be told that heads are grouped; PyTorch 2.11 takes no such word."""
    varlen_attn = importlib.import_module("torch.nn.attention.varlen").varlen_attn
    grouped = "enable_gqa" in inspect.signature(varlen_attn).parameters
    return partial(varlen_attn, enable_gqa=True) if grouped else varlen_attn


def call_by_call(attend: AttendAlike, q_TNH: Tensor, kv_P2BKH: Tensor, batch: ForwardBatch, scale: float) -> Tensor:
    """`attend(q_SNQH, k_SKLH, v_SKLH, scale)` once for all sequences if they are alike, else for each."""
    assert batch.query_starts is not None
    assert batch.kv_lens is not None
    k_LKH, v_LKH = gather_kv(kv_P2BKH, batch)
    query_lens = [end - start for start, end in zip(batch.query_starts, batch.query_starts[1:], strict=False)]
    num_alike = batch.num_seqs if len(set(zip(query_lens, batch.kv_lens, strict=True))) == 1 else 1
    parts = []
    for q, k, v in zip(
        q_TNH.split(query_lens if num_alike == 1 else len(q_TNH)),
        k_LKH.split(batch.kv_lens if num_alike == 1 else len(k_LKH)),
        v_LKH.split(batch.kv_lens if num_alike == 1 else len(v_LKH)),
        strict=True,
    ):
        q_SNQH, k_SKLH, v_SKLH = (part.unflatten(0, (num_alike, -1)).transpose(1, 2) for part in (q, k, v))
        parts.append(attend(q_SNQH, k_SKLH, v_SKLH, scale).transpose(1, 2).flatten(0, 1))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def torch_flash(q_SNQH: Tensor, k_SKLH: Tensor, v_SKLH: Tensor, scale: float) -> Tensor:
    mask = causal_lower_right(q_SNQH.shape[2], k_SKLH.shape[2])
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return F.scaled_dot_product_attention(q_SNQH, k_SKLH, v_SKLH, attn_mask=mask, scale=scale, enable_gqa=True)


def torch_cudnn(q_SNQH: Tensor, k_SKLH: Tensor, v_SKLH: Tensor, scale: float) -> Tensor:
    """PyTorch lets cuDNN align the triangle at the first key only: what is cached before the chunk is a call of its
    own, and the two results are weighted by their sums of exponentials.
    """
    num_cached = k_SKLH.shape[2] - q_SNQH.shape[2]
    own, own_log_SNQ1 = _cudnn(q_SNQH, k_SKLH[:, :, num_cached:], v_SKLH[:, :, num_cached:], scale, causal=True)
    if num_cached == 0:
        return own
    cached, cached_log_SNQ1 = _cudnn(q_SNQH, k_SKLH[:, :, :num_cached], v_SKLH[:, :, :num_cached], scale, causal=False)
    share_SNQ1 = torch.sigmoid(cached_log_SNQ1 - own_log_SNQ1)
    return torch.lerp(own.to(share_SNQ1.dtype), cached.to(share_SNQ1.dtype), share_SNQ1).to(own.dtype)


def _cudnn(q_SNQH: Tensor, k_SKLH: Tensor, v_SKLH: Tensor, scale: float, *, causal: bool) -> tuple[Tensor, Tensor]:
    """(out_SNQH, logarithm of the sum of exponentials)."""
    out_SNQH, log_sum, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        q_SNQH, k_SKLH, v_SKLH, None, True, 0.0, causal, False, scale=scale
    )
    return out_SNQH, log_sum.reshape(*q_SNQH.shape[:3], 1)


def flash_attn_why_not(head_dim: int, dtype: torch.dtype, device: torch.device) -> str:
    return why_not_imported("flash-attn", "flash_attn") or torch_why_not(head_dim, dtype, device)


def flash_attn_3_why_not(head_dim: int, dtype: torch.dtype, device: torch.device) -> str:
    reasons = [why_not_imported("flash-attn-3", module) for module in FLASH_ATTN_3]
    if all(reasons):
        # A library that is there and broken says more than one that is not.
        return max(reasons, key=lambda reason: "cannot be imported" in reason)
    if reason := torch_why_not(head_dim, dtype, device):
        return reason
    return "" if torch.cuda.get_device_capability(device)[0] == 9 else "the GPU is not of compute capability 9.x"


def torch_varlen_why_not(head_dim: int, dtype: torch.dtype, device: torch.device) -> str:
    if importlib.util.find_spec("torch.nn.attention.varlen") is None:
        return f"PyTorch {torch.__version__} has no torch.nn.attention.varlen"
    return torch_why_not(head_dim, dtype, device)


def torch_cudnn_why_not(head_dim: int, dtype: torch.dtype, device: torch.device) -> str:
    if reason := torch_why_not(head_dim, dtype, device):
        return reason
    return "" if torch.backends.cudnn.is_available() else "this PyTorch has no cuDNN"


def torch_why_not(head_dim: int, dtype: torch.dtype, device: torch.device) -> str:
    if head_dim % 8 or head_dim > 256:
        return f"head_dim is {head_dim}, kernels exist for multiples of 8 up to 256"
    return why_not_half(dtype, device)


LIBRARIES = {
    "flash-attn": Library(partial(flash_attn_prefill, modules=["flash_attn"]), flash_attn_why_not),
    "flash-attn-3": Library(partial(flash_attn_prefill, modules=FLASH_ATTN_3), flash_attn_3_why_not),
    "flashinfer-fa2": Library(
        partial(flashinfer_attention.paged_prefill, backend="fa2"),
        partial(flashinfer_attention.why_not, backend="fa2"),
    ),
    "flashinfer-fa3": Library(
        partial(flashinfer_attention.paged_prefill, backend="fa3"),
        partial(flashinfer_attention.why_not, backend="fa3"),
    ),
    "flashinfer-fa3-ragged": Library(
        partial(flashinfer_attention.ragged_prefill, backend="fa3"),
        partial(flashinfer_attention.why_not, backend="fa3"),
    ),
    "torch-varlen": Library(torch_varlen_prefill, torch_varlen_why_not),
    "torch-flash": Library(partial(call_by_call, torch_flash), torch_why_not),
    "torch-cudnn": Library(partial(call_by_call, torch_cudnn), torch_cudnn_why_not),
}
