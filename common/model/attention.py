"""Attention over the paged KV cache in plain PyTorch: what runs on a CPU, and the reference for every other kernel.

Shapes: T tokens, S sequences, L cached positions, Q query tokens of one chunk, N query heads, K kv heads, G = N / K,
H head_dim, P blocks, B block_size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from common.model.attention_plan import DecodeGroup, PrefillSpan, plan_attention, written_rows
from common.model.batch import ForwardBatch


def write_kv(kv_T2KH: Tensor, kv_P2BKH: Tensor, batch: ForwardBatch) -> None:
    """Puts each token's key and value into its slot of one layer's cache."""
    rows_T2 = batch.once(written_rows, kv_P2BKH.shape[2])
    kv_P2BKH.view(-1, *kv_P2BKH.shape[3:]).index_put_((rows_T2,), kv_T2KH)


def paged_attention(q_TNH: Tensor, kv_P2BKH: Tensor, batch: ForwardBatch, scale: float) -> Tensor:
    """Causal grouped-query attention of every token over its sequence's cached positions, its own included.

    Query head n reads kv head n // (N / K). The batch's own keys and values are in the cache already. Returns out_TNH.
    """
    _, _, block_size, num_kv_heads, head_dim = kv_P2BKH.shape
    plan = batch.once(plan_attention, block_size, num_kv_heads * head_dim, q_TNH.dtype)
    if plan.decode and plan.decode[0].tokens_S is None:
        return _decode(q_TNH, kv_P2BKH, plan.decode[0], scale)
    out_TNH = torch.empty(q_TNH.shape, dtype=q_TNH.dtype, device=q_TNH.device)
    for group in plan.decode:
        assert group.tokens_S is not None
        out_TNH[group.tokens_S] = _decode(q_TNH[group.tokens_S], kv_P2BKH, group, scale)
    for span in plan.prefill:
        out_TNH[span.start : span.end] = _prefill(q_TNH[span.start : span.end], kv_P2BKH, span, scale)
    return out_TNH


def _decode(q_SNH: Tensor, kv_P2BKH: Tensor, group: DecodeGroup, scale: float) -> Tensor:
    """Treats the G query heads of a kv head as G query positions, so that no key or value is repeated."""
    num_kv_heads, head_dim = kv_P2BKH.shape[3:]
    k_SKLH, v_SKLH = _rows(kv_P2BKH, group.kv_rows_2SL).transpose(2, 3)
    q_SKGH = q_SNH.view(len(q_SNH), num_kv_heads, -1, head_dim)
    out_SKGH = F.scaled_dot_product_attention(q_SKGH, k_SKLH, v_SKLH, attn_mask=group.mask_S11L, scale=scale)
    return out_SKGH.reshape(q_SNH.shape)


def _prefill(q_QNH: Tensor, kv_P2BKH: Tensor, span: PrefillSpan, scale: float) -> Tensor:
    k_1KLH, v_1KLH = _rows(kv_P2BKH, span.kv_rows_21L).transpose(2, 3)
    out_1NQH = F.scaled_dot_product_attention(
        q_QNH.transpose(0, 1).unsqueeze(0),
        k_1KLH,
        v_1KLH,
        attn_mask=span.mask_QL,
        is_causal=span.mask_QL is None,
        scale=scale,
        enable_gqa=True,
    )
    return out_1NQH.squeeze(0).transpose(0, 1)


def _rows(kv_P2BKH: Tensor, rows_2SL: Tensor) -> Tensor:
    """kv_2SLKH, gathered by whole rows."""
    num_kv_heads, head_dim = kv_P2BKH.shape[3:]
    gathered = kv_P2BKH.view(-1, num_kv_heads * head_dim).index_select(0, rows_2SL.view(-1))
    return gathered.view(*rows_2SL.shape, num_kv_heads, head_dim)
