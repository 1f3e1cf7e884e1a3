"""What a layer asks of the device, and plain PyTorch that does it: the CPU's path, and every kernel's reference.

Products come together with what feeds or follows them, so that an implementation can fuse them. All of them are pure
functions of their tensors, save that `add_norm_project` writes into the cache.

Shapes: T tokens, D and E widths, F FFN width, J query and key heads, E heads of one projection, N query heads, H
head_dim, C context, P blocks, B block_size.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from common.model.attention import paged_attention, write_kv
from common.model.batch import ForwardBatch
from common.model.rope import norm_and_rotate_, rope_rows


class Operations(Protocol):
    """One implementation serves one model on one device."""

    name: str
    # Everything that changes from step to step is read from device tensors, so that a CUDA graph can replay it.
    replayable: bool
    # Of the table of cosines and sines; None: the model's.
    rope_dtype: torch.dtype | None

    def add_norm(
        self, hidden_TD: Tensor, residual_TD: Tensor | None, weight_D: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        """Adds the pending half to the residual stream (none before the first layer); (normed_TD, residual_TD)."""

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
        """`add_norm`, then the product that gives every token's heads; (q_TNH, residual_TD).

        Every query and key head is RMS-normalised and turned; keys and values are written to their slots.
        """

    def add_norm_gated(
        self, hidden_TD: Tensor, residual_TD: Tensor | None, norm_D: Tensor, eps: float, gate_up_weight: Tensor
    ) -> tuple[Tensor, Tensor]:
        """`add_norm`, then silu(gate) * up of the fused projection [2F, D]; (out_TF, residual_TD)."""

    def linear(self, x_TD: Tensor, weight_ED: Tensor) -> Tensor:
        """x_TD times the transposed weight."""

    def logits(self, x_RD: Tensor, weight_VD: Tensor) -> Tensor:
        """A product whose result is float32."""

    def paged_attention(self, q_TNH: Tensor, kv_P2BKH: Tensor, batch: ForwardBatch, scale: float) -> Tensor:
        """Causal attention of every token over its sequence's cached positions, its own included; out_TNH."""


class PlainOperations:
    """See Operations. Its attention plan comes from the host's numbers, so a CUDA graph cannot replay it."""

    name = "torch"
    replayable = False
    rope_dtype: torch.dtype | None = None

    def add_norm(
        self, hidden_TD: Tensor, residual_TD: Tensor | None, weight_D: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        residual_TD = hidden_TD if residual_TD is None else residual_TD + hidden_TD
        return F.rms_norm(residual_TD, weight_D.shape, weight_D, eps), residual_TD

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
        normed_TD, residual_TD = self.add_norm(hidden_TD, residual_TD, norm_D, eps)
        num_kv_heads, head_dim = kv_P2BKH.shape[3:]
        num_heads = len(qk_norm_JH) - num_kv_heads
        qkv_TEH = F.linear(normed_TD, qkv_weight).view(len(normed_TD), -1, head_dim)
        qk_TJH, kv_TEH = qkv_TEH[:, : len(qk_norm_JH)], qkv_TEH[:, num_heads:]
        norm_and_rotate_(qk_TJH, qk_norm_JH, eps, batch.once(rope_rows, rope_C2H))
        write_kv(kv_TEH.view(-1, 2, num_kv_heads, head_dim), kv_P2BKH, batch)
        return qk_TJH[:, :num_heads], residual_TD

    def add_norm_gated(
        self, hidden_TD: Tensor, residual_TD: Tensor | None, norm_D: Tensor, eps: float, gate_up_weight: Tensor
    ) -> tuple[Tensor, Tensor]:
        normed_TD, residual_TD = self.add_norm(hidden_TD, residual_TD, norm_D, eps)
        gate_TF, up_TF = F.linear(normed_TD, gate_up_weight).chunk(2, -1)
        return F.silu(gate_TF).mul_(up_TF), residual_TD

    def linear(self, x_TD: Tensor, weight_ED: Tensor) -> Tensor:
        return F.linear(x_TD, weight_ED)

    def logits(self, x_RD: Tensor, weight_VD: Tensor) -> Tensor:
        return F.linear(x_RD, weight_VD).float()

    def paged_attention(self, q_TNH: Tensor, kv_P2BKH: Tensor, batch: ForwardBatch, scale: float) -> Tensor:
        return paged_attention(q_TNH, kv_P2BKH, batch, scale)
