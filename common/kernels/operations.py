"""The model's operations as fused kernels. `common.model.operations` says what each computes."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from common.kernels.decode_attention import QUERY_ROWS, decode_attention
from common.kernels.decode_plan import DecodePlan, plan_decode
from common.kernels.elementwise import MAX_HIDDEN_SIZE, add_norm, silu_mul
from common.kernels.invariant_linear import invariant_linear
from common.kernels.launch import num_sms
from common.kernels.library_attention import LIBRARIES, Library
from common.kernels.linear import add_norm_gated, add_norm_project, linear
from common.kernels.prefill_attention import prefill_attention
from common.kernels.prefill_plan import PrefillPlan, plan_prefill
from common.kernels.rotate_write import norm_rotate_write
from common.kernels.sampling import MAX_VOCAB_SIZE
from common.model.batch import ForwardBatch
from common.model.config import ModelConfig

HEAD_DIMS = (16, 32, 64, 128, 256)
# Faster than ours on chunks of at least so many tokens (`benchmarks.attention`), where it is installed.
PREFERRED_LIBRARY, PREFERRED_QUERIES = "flash-attn-3", 1024
# Positions of one sequence that a program of decode attention reads when results must not depend on the batch.
INVARIANT_CHUNK = 256


def why_not(config: ModelConfig, device: torch.device) -> str:
    """Why these kernels cannot serve this model on this device; empty when they can."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return "the GPU is older than compute capability 8.0"
    if config.head_dim not in HEAD_DIMS:
        return f"head_dim is {config.head_dim}, kernels exist for {', '.join(map(str, HEAD_DIMS))}"
    for what, value, limit in (
        ("query heads of one kv head", config.num_heads // config.num_kv_heads, QUERY_ROWS.value),
        ("hidden_size", config.hidden_size, MAX_HIDDEN_SIZE),
        ("vocab_size", config.vocab_size, MAX_VOCAB_SIZE),
    ):
        if value > limit:
            return f"{what}: {value}, kernels exist for at most {limit}"
    return ""


class KernelOperations:
    """See `common.model.operations.Operations`. Picks the kernel by the number of tokens."""

    name = "triton"
    replayable = True
    rope_dtype: torch.dtype | None = torch.float32

    def __init__(self, config: ModelConfig, device: torch.device) -> None:
        self.num_heads, self.num_kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        self.num_sms = num_sms(device)

    def long_prompts(self, device: torch.device) -> str:
        """What computes their attention, for a person."""
        library = LIBRARIES[PREFERRED_LIBRARY]
        reason = library.why_not(self.head_dim, torch.bfloat16, device)
        if reason:
            return f"attention of long prompts by our own ({PREFERRED_LIBRARY}: {reason})"
        return f"attention of prompts of {PREFERRED_QUERIES:,} tokens and more by {PREFERRED_LIBRARY}"

    def add_norm(
        self, hidden_TD: Tensor, residual_TD: Tensor | None, weight_D: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        return add_norm(hidden_TD, residual_TD, weight_D, eps)

    def add_norm_project(
        self,
        hidden_TD: Tensor,
        residual_TD: Tensor | None,
        norm_D: Tensor,
        eps: float,
        qkv_weight: Tensor,
        qk_norm_JH: Tensor,
        rope_C2H: Tensor,
        kv_P2BKH: Tensor,
        batch: ForwardBatch,
    ) -> tuple[Tensor, Tensor]:
        where = rope_C2H, batch.positions_T, batch.slot_mapping_T, kv_P2BKH
        return add_norm_project(hidden_TD, residual_TD, norm_D, eps, qkv_weight, qk_norm_JH, *where)

    def add_norm_gated(
        self, hidden_TD: Tensor, residual_TD: Tensor | None, norm_D: Tensor, eps: float, gate_up_weight: Tensor
    ) -> tuple[Tensor, Tensor]:
        return add_norm_gated(hidden_TD, residual_TD, norm_D, eps, gate_up_weight)

    def linear(self, x_TD: Tensor, weight_ED: Tensor) -> Tensor:
        return linear(x_TD, weight_ED)

    def logits(self, x_RD: Tensor, weight_VD: Tensor) -> Tensor:
        return linear(x_RD, weight_VD, out_dtype=torch.float32)

    def paged_attention(self, q_TNH: Tensor, kv_P2BKH: Tensor, batch: ForwardBatch, scale: float) -> Tensor:
        if batch.decode_only:
            # All layers but the first find the plan made. Not on a part of the SMs, where what that gains at the start
            # is lost many times: on 64 of an H200's, 3.3 instead of 4.1 TB/s.
            settled = batch.attention_sm is None and batch.has_derived(self._plan_decode, q_TNH.dtype)
            decode_plan = batch.once(self._plan_decode, q_TNH.dtype)
            return decode_attention(q_TNH, kv_P2BKH, batch.block_table_SP, decode_plan, scale, settled=settled)
        if library := preferred_library(batch, q_TNH):
            return library.attend(q_TNH, kv_P2BKH, batch, scale)
        assert batch.query_start_S1 is not None
        tiles = batch.once(_plan_prefill)
        return prefill_attention(
            q_TNH, kv_P2BKH, batch.query_start_S1, batch.kv_len_S, batch.block_table_SP, tiles, scale
        )

    def _plan_decode(self, batch: ForwardBatch, dtype: torch.dtype) -> DecodePlan:
        return plan_decode(
            batch.kv_len_S,
            num_kv_heads=self.num_kv_heads,
            num_query_heads=self.num_heads,
            head_dim=self.head_dim,
            num_programs=batch.attention_sm or self.num_sms,
            dtype=dtype,
        )


class InvariantOperations(KernelOperations):
    """Every row's result has the same bits in any batch, and a prompt's position the same as a decoded one's.

    One tile shape for products of every size, and decode's attention, cut at fixed positions, for prompts too.
    """

    name = "triton-invariant"

    def long_prompts(self, device: torch.device) -> str:
        return "attention of prompts by decode's kernel, position by position"

    def add_norm_project(
        self,
        hidden_TD: Tensor,
        residual_TD: Tensor | None,
        norm_D: Tensor,
        eps: float,
        qkv_weight: Tensor,
        qk_norm_JH: Tensor,
        rope_C2H: Tensor,
        kv_P2BKH: Tensor,
        batch: ForwardBatch,
    ) -> tuple[Tensor, Tensor]:
        normed_TD, residual_TD = add_norm(hidden_TD, residual_TD, norm_D, eps)
        qkv_TEH = invariant_linear(normed_TD, qkv_weight).view(len(normed_TD), -1, self.head_dim)
        where = rope_C2H, batch.positions_T, batch.slot_mapping_T, kv_P2BKH, self.num_heads
        return norm_rotate_write(qkv_TEH, qk_norm_JH, eps, *where), residual_TD

    def add_norm_gated(
        self, hidden_TD: Tensor, residual_TD: Tensor | None, norm_D: Tensor, eps: float, gate_up_weight: Tensor
    ) -> tuple[Tensor, Tensor]:
        normed_TD, residual_TD = add_norm(hidden_TD, residual_TD, norm_D, eps)
        return silu_mul(invariant_linear(normed_TD, gate_up_weight)), residual_TD

    def linear(self, x_TD: Tensor, weight_ED: Tensor) -> Tensor:
        return invariant_linear(x_TD, weight_ED)

    def logits(self, x_RD: Tensor, weight_VD: Tensor) -> Tensor:
        return invariant_linear(x_RD, weight_VD, out_dtype=torch.float32)

    def paged_attention(self, q_TNH: Tensor, kv_P2BKH: Tensor, batch: ForwardBatch, scale: float) -> Tensor:
        plan, table_TP = batch.once(self._plan_tokens)
        return decode_attention(q_TNH, kv_P2BKH, table_TP, plan, scale)

    def _plan_tokens(self, batch: ForwardBatch) -> tuple[DecodePlan, Tensor]:
        """Every token as a sequence of its own that ends with it."""
        kv_len_T, table_TP = batch.kv_len_S, batch.block_table_SP
        if not batch.decode_only:
            assert batch.query_start_S1 is not None
            tokens_T = torch.arange(len(batch.positions_T), device=table_TP.device)
            ends_S = batch.query_start_S1[1:].to(tokens_T.dtype)
            # A token of padding belongs to no sequence, and gets any.
            seq_T = torch.searchsorted(ends_S, tokens_T, right=True).clamp_(max=len(ends_S) - 1)
            kv_len_T, table_TP = batch.positions_T + 1, table_TP.index_select(0, seq_T)
        plan = plan_decode(
            kv_len_T,
            num_kv_heads=self.num_kv_heads,
            num_query_heads=self.num_heads,
            head_dim=self.head_dim,
            num_programs=batch.attention_sm or self.num_sms,
            chunk=INVARIANT_CHUNK,
        )
        return plan, table_TP


def _plan_prefill(batch: ForwardBatch) -> PrefillPlan:
    assert batch.query_start_S1 is not None
    return plan_prefill(batch.query_start_S1, len(batch.token_ids_T))


def preferred_library(batch: ForwardBatch, q_TNH: Tensor) -> Library | None:
    """Other people's kernel for this batch's prompts; None for our own. A batch for a CUDA graph gets our own."""
    if batch.query_starts is None or batch.once(_longest_chunk) < PREFERRED_QUERIES:
        return None
    library = LIBRARIES[PREFERRED_LIBRARY]
    return None if library.why_not(q_TNH.shape[2], q_TNH.dtype, q_TNH.device) else library


def _longest_chunk(batch: ForwardBatch) -> int:
    assert batch.query_starts is not None
    return max(end - start for start, end in pairwise(batch.query_starts))
