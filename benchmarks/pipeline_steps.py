"""Decode steps over alike sequences, sequential or pipelined, for the benchmarks of the attention/FFN pipeline.

A step ends with the language model's head and draws the most likely token of each row. It feeds nothing back: every
replay computes the same.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from benchmarks.pipeline_device import Pair, Replay
from benchmarks.shapes import Shape
from common.engine.device import choose_operations
from common.engine.kv_cache import KvCache
from common.model.batch import ForwardBatch
from common.model.config import ModelConfig
from common.model.loader import load_model
from decode_service.pipeline.arrangements import Cell
from decode_service.pipeline.execution import Around, run_pipelined, untimed
from decode_service.pipeline.order import Cut, Order, order

BLOCK_SIZE = 16


class Workload:
    """One model with random weights, and the KV cache of one cell at a time."""

    def __init__(self, shape: Shape, device: torch.device) -> None:
        self.config = ModelConfig.from_folder(shape.folder)
        dtype = "bfloat16" if device.type == "cuda" else "float32"
        operations = choose_operations(self.config, device, deterministic=False)
        self.model = load_model(shape.folder, load_format="dummy", dtype=dtype, device=device, operations=operations)
        self.device = device
        self.cache: KvCache | None = None

    def fill(self, cell: Cell) -> ForwardBatch:
        """Sequences that compute their last position, in blocks that lie scattered; replaces those of another cell."""
        self.cache = None
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        batch, width = cell.num_seqs, -(-cell.context // BLOCK_SIZE)
        self.cache = KvCache(self.config, batch * width, BLOCK_SIZE, self.model.dtype, self.device)
        for layer in self.cache.layers:
            layer.normal_()
        self.tokens_S = torch.zeros(batch, dtype=torch.int64, device=self.device)
        table_SP = torch.randperm(batch * width, device=self.device).view(batch, width).int()
        lens_S = torch.full((batch,), cell.context, dtype=torch.int32, device=self.device)
        return ForwardBatch(
            token_ids_T=torch.randint(self.config.vocab_size, (batch,), dtype=torch.int32, device=self.device),
            positions_T=lens_S - 1,
            slot_mapping_T=table_SP[:, -1] * BLOCK_SIZE + (cell.context - 1) % BLOCK_SIZE,
            # Of these, kernels on a GPU need nothing.
            query_starts=tuple(range(batch + 1)),
            query_start_S1=None,
            kv_lens=(cell.context,) * batch,
            kv_len_S=lens_S,
            block_table_SP=table_SP,
            logit_rows=None,
        )

    def order(self, cut: Cut, num_micro_batches: int) -> Order:
        return order(cut, self.config.num_layers, num_micro_batches)

    def step(
        self,
        batch: ForwardBatch,
        order: Order,
        *,
        pair: Pair | None = None,
        attention_sm: int | None = None,
        around: Around = untimed,
    ) -> Replay:
        """A step to be captured. With a pair, on its streams, and attention cut for its SMs."""
        cache = self.cache
        assert cache is not None

        def run() -> Tensor:
            return run_pipelined(
                self.model,
                cache,
                batch,
                order,
                finish=self._finish,
                streams=None if pair is None else pair.streams,
                attention_sm=attention_sm if pair is None else pair.attention_sm,
                around=around,
            )

        return run

    def head(self, num_seqs: int) -> Replay:
        """The end of a step alone: the head and the draw."""
        hidden_SD = torch.randn(num_seqs, self.config.hidden_size, dtype=self.model.dtype, device=self.device)

        def run() -> Tensor:
            logits_SV = self.model.forward_head(hidden_SD)
            self._finish(logits_SV)
            return logits_SV

        return run

    def _finish(self, logits_SV: Tensor) -> None:
        torch.argmax(logits_SV, dim=-1, out=self.tokens_S[: len(logits_SV)])


@torch.inference_mode()
def compile_kernels(job: tuple[Shape, int, int]) -> None:
    """Runs steps of a model's first layers once: what Triton compiles for them lies in its cache from then on."""
    shape, batch, context = job
    device = torch.device("cuda", torch.cuda.current_device())
    with torch.cuda.stream(torch.cuda.Stream(device)):
        workload = Workload(replace(shape, num_layers=2, tied=True), device)
        whole = workload.fill(Cell(batch, context))
        for steps in (workload.order(Cut.LAYER, 1), *(workload.order(cut, 2) for cut in Cut)):
            workload.step(whole, steps, attention_sm=64)()
        torch.cuda.synchronize()


def compile_all(shape: Shape, batches: Sequence[int], context: int) -> None:
    """For all of these batches, each in a process of its own. Small models, a short context: all fit at once."""
    jobs = [(shape, batch, context) for batch in batches]
    with multiprocessing.get_context("spawn").Pool(min(len(jobs), os.cpu_count() or 1)) as pool:
        pool.map(compile_kernels, jobs, chunksize=1)
