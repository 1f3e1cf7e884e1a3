"""CUDA graphs of prompt chunks: without them a short prompt takes as long as the host needs to launch its kernels.

A step of up to a bucket's tokens is padded to it. Each bucket is a row of graphs of a few layers, so that after each of
them the caller hears which layers' KV is on its way. All buckets read the same tensors, filled in one copy a step.

Shapes: T tokens, S sequences, R rows whose logits are wanted, P blocks of a block table.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.engine.batches import PrefillNumbers
from common.engine.graphs import Progress, capture
from common.engine.kv_cache import KvCache
from common.model.batch import ForwardBatch
from common.model.qwen3 import Qwen3ForCausalLM, State

# Beyond this many tokens the device is slower than the host that launches its kernels.
MOST_TOKENS = 4096
MOST_SEQS = 32
LAYERS_A_GRAPH = 6

AfterLayer = Callable[[int], None]


def token_buckets(max_tokens: int) -> list[int]:
    """Ascending sizes of steps; beyond 64 tokens a step is padded by less than a quarter, beyond 256 by an eighth."""
    largest = min(max_tokens, MOST_TOKENS)
    sizes = [16, 32, 64]
    while sizes[-1] < largest:
        last = sizes[-1]
        sizes.append(last + (32 if last < 256 else 64 if last < 512 else 128 if last < 1024 else 256))
    return [size for size in sizes if size < largest] + [largest]


class PrefillGraphs:
    """Belongs to the engine's thread, whose stream it captures and replays on."""

    def __init__(self, model: Qwen3ForCausalLM, cache: KvCache, *, max_tokens: int, table_width: int) -> None:
        self._model = model
        self._cache = cache
        self._buckets = token_buckets(max_tokens)
        self._segments = range(0, model.config.num_layers, LAYERS_A_GRAPH)
        # Every part begins on 16 bytes.
        num_tokens = -(-self._buckets[-1] // 4) * 4
        widths = {
            "token_ids": num_tokens,
            "positions": num_tokens,
            "slot_mapping": num_tokens,
            "query_starts": MOST_SEQS + 4,
            "kv_lens": MOST_SEQS,
            "logit_rows": MOST_SEQS,
            "block_table": MOST_SEQS * table_width,
        }
        self._host = torch.zeros(sum(widths.values()), dtype=torch.int32).pin_memory()
        self._words = torch.zeros_like(self._host, device=cache.device)
        host, words = self._host.split([*widths.values()]), self._words.split([*widths.values()])
        self._numbers = {name: part.numpy() for name, part in zip(widths, host, strict=True)}
        self._tensors = dict(zip(widths, words, strict=True))
        self._table_width = table_width
        self._copied = torch.cuda.Event()
        self._graphs: dict[int, tuple[list[torch.cuda.CUDAGraph], Tensor]] = {}

    def capture(self, progress: Progress) -> None:
        """Captures every bucket, the largest first."""
        pool = torch.cuda.graph_pool_handle()
        for done, num_tokens in enumerate(reversed(self._buckets)):
            progress(done, len(self._buckets))
            self._fill(_no_tokens())
            self._forward(num_tokens)
            torch.cuda.current_stream().synchronize()
            self._graphs[num_tokens] = self._capture(num_tokens, pool)
        progress(len(self._buckets), len(self._buckets))

    def run(self, numbers: PrefillNumbers, after_layer: AfterLayer | None = None) -> Tensor | None:
        """Enqueues a step; logits_RV (float32), until the next step. None: it fits no graph.

        `after_layer(layer)` is called, in order, once the graph that writes that layer's KV is enqueued.
        """
        num_tokens, num_rows = len(numbers.token_ids), len(numbers.logit_rows)
        index = bisect_left(self._buckets, num_tokens)
        if index == len(self._buckets) or max(len(numbers.query_lens), num_rows) > MOST_SEQS or not self._graphs:
            return None
        self._fill(numbers)
        graphs, logits_RV = self._graphs[self._buckets[index]]
        for first, graph in zip(self._segments, graphs, strict=True):
            graph.replay()
            if after_layer is not None:
                for layer in self._layers(first):
                    after_layer(layer)
        return logits_RV[:num_rows]

    def _capture(self, num_tokens: int, pool: Any) -> tuple[list[torch.cuda.CUDAGraph], Tensor]:
        graphs = []
        batch = self._batch(num_tokens)
        state: State = batch.token_ids_T
        for first in self._segments:
            graph, state = capture(lambda first=first, state=state: self._run(first, state, batch), pool)  # type: ignore[misc]
            graphs.append(graph)
        assert isinstance(state, Tensor)
        return graphs, state

    def _forward(self, num_tokens: int) -> None:
        batch = self._batch(num_tokens)
        state: State = batch.token_ids_T
        for first in self._segments:
            state = self._run(first, state, batch)

    def _run(self, first: int, state: State, batch: ForwardBatch) -> State:
        for layer in self._layers(first):
            activations = self._model.forward_attention_stage(layer, state, batch, self._cache)
            state = self._model.forward_ffn_stage(layer, activations, batch)
        return self._model.forward_head(state) if isinstance(state, Tensor) else state

    def _layers(self, first: int) -> range:
        return range(first, min(first + LAYERS_A_GRAPH, self._model.config.num_layers))

    def _batch(self, num_tokens: int) -> ForwardBatch:
        tensors = self._tensors
        return ForwardBatch(
            token_ids_T=tensors["token_ids"][:num_tokens],
            positions_T=tensors["positions"][:num_tokens],
            slot_mapping_T=tensors["slot_mapping"][:num_tokens],
            query_starts=None,
            query_start_S1=tensors["query_starts"][: MOST_SEQS + 1],
            kv_lens=None,
            kv_len_S=tensors["kv_lens"],
            block_table_SP=tensors["block_table"].view(MOST_SEQS, self._table_width),
            logit_rows=tensors["logit_rows"],
        )

    def _fill(self, numbers: PrefillNumbers) -> None:
        # The host's copy may still be on its way to the device.
        self._copied.synchronize()
        num_tokens, num_seqs = len(numbers.token_ids), len(numbers.query_lens)
        host = self._numbers
        for name, values, padding in (
            ("token_ids", numbers.token_ids, 0),
            ("positions", numbers.positions, 0),
            ("slot_mapping", numbers.slot_mapping, self._cache.scratch_block * self._cache.block_size),
            ("query_starts", np.cumsum([0, *numbers.query_lens]), num_tokens),
            ("kv_lens", numbers.kv_lens, 0),
            ("logit_rows", numbers.logit_rows, 0),
        ):
            host[name][: len(values)] = values
            host[name][len(values) :] = padding
        table_SP = host["block_table"].reshape(MOST_SEQS, self._table_width)
        for row, table in zip(table_SP[:num_seqs], numbers.block_tables, strict=True):
            row[: len(table)] = table
        self._words.copy_(self._host, non_blocking=True)
        self._copied.record()


def _no_tokens() -> PrefillNumbers:
    empty = np.zeros(0, dtype=np.int64)
    return PrefillNumbers(empty, empty, empty, [], [], [], [])
