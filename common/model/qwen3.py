"""Dense Qwen3, cut into an attention half and an FFN half at every level.

    token ids ─▶ attention 0 ─▶ FFN 0 ─▶ attention 1 ─▶ … ─▶ FFN L-1 ─▶ logits

A half works on one layer of one micro-batch and takes all it needs as arguments, so that two micro-batches can be in
different halves at once; `forward` is the same halves in a row. A second cut is around attention proper, with all dense
products between two attentions as one stage:

    token ids ─▶ dense 0 ─▶ core 0 ─▶ dense 1 ─▶ core 1 ─▶ … ─▶ core L-1 ─▶ dense L ─▶ logits

Both are made of the same pieces. Nothing here waits for the device.

Shapes: T tokens, R rows whose logits are wanted, D hidden, F FFN width, V vocabulary, C context; N query heads, K kv
heads, J = N + K query and key heads, E any of the heads that one projection gives, H head_dim; P blocks, B block_size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from common.model.batch import ForwardBatch
from common.model.config import ModelConfig
from common.model.operations import Operations, PlainOperations
from common.model.rope import rope_table

if TYPE_CHECKING:
    from common.engine.kv_cache import KvCache


class Activations(NamedTuple):
    """What one half hands to the next: the residual stream in two parts, so that their sum can be fused with the norm.

    `hidden_TD` is what the last half computed and nobody has added yet; before the first layer there is no residual.
    """

    hidden_TD: Tensor
    residual_TD: Tensor | None


class Projected(NamedTuple):
    """What attention proper starts from: queries that are normalised and turned; keys and values are in the cache."""

    q_TNH: Tensor
    residual_TD: Tensor


class Attended(NamedTuple):
    """What attention proper gives."""

    attended_TNH: Tensor
    residual_TD: Tensor


# Token ids before the first half, logits after the last, activations between.
State = Activations | Tensor


class StoredTensor(NamedTuple):
    """A tensor of a Hugging Face checkpoint, and where its values go here (broadcast, where that is larger)."""

    name: str
    shape: tuple[int, ...]
    destination: Tensor


class Qwen3Layer:
    """One decoder layer. Query, key and value projections are one matrix, and so are gate and up.

    Weights are plain tensors: nothing trains here, and nn.Module's attribute lookup would show in a small model's step.
    """

    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device, operations: Operations) -> None:
        hidden, head_dim = config.hidden_size, config.head_dim
        self.operations = operations
        self.num_heads, self.num_kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, head_dim
        self.eps = config.rms_norm_eps
        self.scale = head_dim**-0.5
        num_qk_heads = self.num_heads + self.num_kv_heads
        self.attention_norm_D = torch.empty(hidden, dtype=dtype, device=device)
        self.qkv_weight = empty_matrix((num_qk_heads + self.num_kv_heads) * head_dim, hidden, dtype, device)
        self.qk_norm_JH = torch.empty(num_qk_heads, head_dim, dtype=dtype, device=device)
        self.out_weight = empty_matrix(hidden, self.num_heads * head_dim, dtype, device)
        self.ffn_norm_D = torch.empty(hidden, dtype=dtype, device=device)
        self.gate_up_weight = empty_matrix(2 * config.intermediate_size, hidden, dtype, device)
        self.down_weight = empty_matrix(hidden, config.intermediate_size, dtype, device)

    def forward_attention_stage(
        self, activations: Activations, batch: ForwardBatch, kv_P2BKH: Tensor, rope_C2H: Tensor
    ) -> Activations:
        """Norm, projections, rotary embedding, KV write, attention, output projection."""
        projected = self.forward_projections(activations, batch, kv_P2BKH, rope_C2H)
        return self.forward_output(self.forward_attention_core(projected, batch, kv_P2BKH))

    def forward_projections(
        self, activations: Activations, batch: ForwardBatch, kv_P2BKH: Tensor, rope_C2H: Tensor
    ) -> Projected:
        """Norm, projections, rotary embedding, KV write."""
        return Projected(
            *self.operations.add_norm_project(
                *activations,
                self.attention_norm_D,
                self.eps,
                self.qkv_weight,
                self.qk_norm_JH,
                rope_C2H,
                kv_P2BKH,
                batch,
            )
        )

    def forward_attention_core(self, projected: Projected, batch: ForwardBatch, kv_P2BKH: Tensor) -> Attended:
        """Attention proper: reads the cache and touches no weight."""
        q_TNH, residual_TD = projected
        return Attended(self.operations.paged_attention(q_TNH, kv_P2BKH, batch, self.scale), residual_TD)

    def forward_output(self, attended: Attended) -> Activations:
        """The output projection."""
        attended_TNH, residual_TD = attended
        return Activations(self.operations.linear(attended_TNH.flatten(1), self.out_weight), residual_TD)

    def forward_ffn_stage(self, activations: Activations) -> Activations:
        """Norm and the gated FFN."""
        operations = self.operations
        gated_TF, residual_TD = operations.add_norm_gated(*activations, self.ffn_norm_D, self.eps, self.gate_up_weight)
        return Activations(operations.linear(gated_TF, self.down_weight), residual_TD)

    def stored_tensors(self, prefix: str) -> Iterator[StoredTensor]:
        """Every tensor of this layer in a checkpoint."""
        num_heads, num_kv_heads, head_dim = self.num_heads, self.num_kv_heads, self.head_dim
        q, k, v = self.qkv_weight.split([num_heads * head_dim, num_kv_heads * head_dim, num_kv_heads * head_dim])
        q_norm_NH, k_norm_KH = self.qk_norm_JH.split([num_heads, num_kv_heads])
        gate, up = self.gate_up_weight.chunk(2)
        for name, destination in {
            "input_layernorm": self.attention_norm_D,
            "self_attn.q_proj": q,
            "self_attn.k_proj": k,
            "self_attn.v_proj": v,
            "self_attn.o_proj": self.out_weight,
            "post_attention_layernorm": self.ffn_norm_D,
            "mlp.gate_proj": gate,
            "mlp.up_proj": up,
            "mlp.down_proj": self.down_weight,
        }.items():
            yield StoredTensor(f"{prefix}.{name}.weight", tuple(destination.shape), destination)
        yield StoredTensor(f"{prefix}.self_attn.q_norm.weight", (head_dim,), q_norm_NH)
        yield StoredTensor(f"{prefix}.self_attn.k_norm.weight", (head_dim,), k_norm_KH)


class Qwen3Model:
    """Embedding, layers and final norm."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device, operations: Operations) -> None:
        self.operations = operations
        self.embedding_VD = empty_matrix(config.vocab_size, config.hidden_size, dtype, device)
        self.layers = [Qwen3Layer(config, dtype, device, operations) for _ in range(config.num_layers)]
        self.norm_D = torch.empty(config.hidden_size, dtype=dtype, device=device)
        rope_dtype = operations.rope_dtype or dtype
        self.rope_C2H = rope_table(config.context_length, config.head_dim, config.rope_theta, rope_dtype, device)
        self.eps = config.rms_norm_eps

    def forward_attention_stage(self, layer: int, state: State, batch: ForwardBatch, kv_cache: KvCache) -> Activations:
        """One layer's attention half. Layer 0 takes token_ids_T and embeds them, the others take activations."""
        activations = self._embedded(state)
        return self.layers[layer].forward_attention_stage(activations, batch, kv_cache.layers[layer], self.rope_C2H)

    def forward_ffn_stage(self, layer: int, activations: Activations, batch: ForwardBatch) -> State:
        """One layer's FFN half. The last layer computes the wanted rows alone and gives them normalised, hidden_RD."""
        if layer < len(self.layers) - 1:
            return self.layers[layer].forward_ffn_stage(activations)
        if batch.logit_rows is not None:
            rows_R, (hidden_TD, residual_TD) = batch.logit_rows, activations
            assert residual_TD is not None
            activations = Activations(hidden_TD.index_select(0, rows_R), residual_TD.index_select(0, rows_R))
        return self.operations.add_norm(*self.layers[layer].forward_ffn_stage(activations), self.norm_D, self.eps)[0]

    def forward_dense_stage(
        self, layer: int, state: Attended | Tensor, batch: ForwardBatch, kv_cache: KvCache
    ) -> Projected | Tensor:
        """What lies between the attention of the layer before and that of `layer`.

        The first takes token_ids_T; the one past the last layer gives the wanted rows normalised, hidden_RD.
        """
        between: State = state if isinstance(state, Tensor) else self.layers[layer - 1].forward_output(state)
        if isinstance(between, Activations):
            between = self.forward_ffn_stage(layer - 1, between, batch)
        if layer == len(self.layers):
            assert isinstance(between, Tensor)
            return between
        activations = self._embedded(between)
        return self.layers[layer].forward_projections(activations, batch, kv_cache.layers[layer], self.rope_C2H)

    def _embedded(self, state: State) -> Activations:
        return Activations(F.embedding(state, self.embedding_VD), None) if isinstance(state, Tensor) else state

    def stored_tensors(self) -> Iterator[StoredTensor]:
        yield StoredTensor("model.embed_tokens.weight", tuple(self.embedding_VD.shape), self.embedding_VD)
        for index, layer in enumerate(self.layers):
            yield from layer.stored_tensors(f"model.layers.{index}")
        yield StoredTensor("model.norm.weight", tuple(self.norm_D.shape), self.norm_D)


class Qwen3ForCausalLM:
    """The whole model with uninitialised weights; `common.model.loader.load_model` fills them."""

    def __init__(
        self, config: ModelConfig, *, dtype: torch.dtype, device: torch.device, operations: Operations | None = None
    ) -> None:
        self.config = config
        self.dtype = dtype
        self.device = device
        self.operations: Operations = operations or PlainOperations()
        self.model = Qwen3Model(config, dtype, device, self.operations)
        self.head_VD = self.model.embedding_VD
        if not config.tie_word_embeddings:
            self.head_VD = empty_matrix(config.vocab_size, config.hidden_size, dtype, device)

    @torch.inference_mode()
    def forward(
        self, batch: ForwardBatch, kv_cache: KvCache, after_layer: Callable[[int], None] | None = None
    ) -> Tensor:
        """Writes the batch's KV and returns logits_RV (float32) of the rows it asks for.

        `after_layer(layer)` is called, in order, once that layer's KV of this batch is written (on a GPU: enqueued).
        """
        state: State = batch.token_ids_T
        for layer in range(self.config.num_layers):
            activations = self.forward_attention_stage(layer, state, batch, kv_cache)
            if after_layer is not None:
                after_layer(layer)
            state = self.forward_ffn_stage(layer, activations, batch)
        assert isinstance(state, Tensor)
        return self.forward_head(state)

    def forward_head(self, hidden_RD: Tensor) -> Tensor:
        """logits_RV (float32) of what the last stage gives."""
        return self.operations.logits(hidden_RD, self.head_VD)

    def forward_attention_stage(self, layer: int, state: State, batch: ForwardBatch, kv_cache: KvCache) -> Activations:
        """One layer's attention half of one micro-batch; writes that layer's KV. Layer 0 takes token_ids_T."""
        return self.model.forward_attention_stage(layer, state, batch, kv_cache)

    def forward_ffn_stage(self, layer: int, activations: Activations, batch: ForwardBatch) -> State:
        """One layer's FFN half of one micro-batch: touches no KV. The last layer gives hidden_RD, normalised."""
        return self.model.forward_ffn_stage(layer, activations, batch)

    def forward_dense_stage(
        self, layer: int, state: Attended | Tensor, batch: ForwardBatch, kv_cache: KvCache
    ) -> Projected | Tensor:
        """Of the second cut: what lies between two attentions; writes the KV of `layer`.

        The first takes token_ids_T; the one past the last layer gives hidden_RD, normalised.
        """
        return self.model.forward_dense_stage(layer, state, batch, kv_cache)

    def forward_attention_core(
        self, layer: int, projected: Projected, batch: ForwardBatch, kv_cache: KvCache
    ) -> Attended:
        """Of the second cut: one layer's attention proper."""
        return self.model.layers[layer].forward_attention_core(projected, batch, kv_cache.layers[layer])

    def stored_tensors(self) -> Iterator[StoredTensor]:
        """Every tensor that a checkpoint of this model has, under its Hugging Face name."""
        yield from self.model.stored_tensors()
        if not self.config.tie_word_embeddings:
            yield StoredTensor("lm_head.weight", tuple(self.head_VD.shape), self.head_VD)


def empty_matrix(num_out: int, num_in: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A weight [out, in]. In float32 on a CPU its memory runs along `out`, where products of a few rows are faster."""
    if device.type == "cpu" and dtype == torch.float32:
        return torch.empty(num_in, num_out, dtype=dtype).t()
    return torch.empty(num_out, num_in, dtype=dtype, device=device)
