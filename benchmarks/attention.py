"""Attention kernels alone, ours beside libraries': decode by the KV that it reads a second, prefill by operations.

Each measurement is a CUDA graph of one call for each of several layers' caches, together far larger than the L2 cache.
What a step's layers share (plans, tile counts) is computed before. `python -m benchmarks.attention MODEL
[decoding|prompts] [LIBRARY ...]` measures a part.
"""

from __future__ import annotations

import math
import random
import statistics
import sys
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.report import Report
from benchmarks.shapes import MEMORY_RATE, SHAPES, Shape, one_model
from common.kernels import flashinfer_attention
from common.kernels.library_attention import LIBRARIES, Library
from common.kernels.operations import KernelOperations
from common.model.batch import ForwardBatch
from common.model.config import ModelConfig

DEVICE, DTYPE, BLOCK_SIZE = torch.device("cuda"), torch.bfloat16, 16
BATCHES, CONTEXTS = (1, 8, 32, 64, 128, 256, 512), (576, 2048)
PROMPTS, CACHED = ((1, 512), (1, 2048), (1, 8192), (16, 2048)), (0, 2048)
# Of all layers' caches; an H200's L2 has 60 MB.
CACHE_BYTES = 320 << 20
MAX_LAYERS = 128
REPEATS = 15

DECODE_LIBRARIES = {
    "flashinfer": Library(flashinfer_attention.decode, flashinfer_attention.why_not),
    "flashinfer-tensor-cores": Library(
        partial(flashinfer_attention.decode, tensor_cores=True), flashinfer_attention.why_not
    ),
}


class Case(NamedTuple):
    """One batch, and several layers' caches under the same block table."""

    batch: ForwardBatch
    q_TNH: Tensor
    layers: list[Tensor]
    scale: float

    @classmethod
    def of(cls, shape: Shape, num_seqs: int, num_queries: int, kv_len: int) -> Case:
        """Sequences that are alike, on shuffled blocks."""
        width = -(-kv_len // BLOCK_SIZE)
        blocks = random.Random(0).sample(range(num_seqs * width), num_seqs * width)
        tables = [blocks[seq * width : (seq + 1) * width] for seq in range(num_seqs)]
        positions = range(kv_len - num_queries, kv_len)
        batch = ForwardBatch.build(
            token_ids=[0] * num_seqs * num_queries,
            positions=[*positions] * num_seqs,
            slot_mapping=[table[p // BLOCK_SIZE] * BLOCK_SIZE + p % BLOCK_SIZE for table in tables for p in positions],
            query_lens=[num_queries] * num_seqs,
            kv_lens=[kv_len] * num_seqs,
            block_tables=tables,
            logit_rows=[],
            device=DEVICE,
        )
        cache_shape = (len(blocks), 2, BLOCK_SIZE, shape.num_kv_heads, shape.head_dim)
        num_layers = min(max(2, math.ceil(CACHE_BYTES / (math.prod(cache_shape) * DTYPE.itemsize))), MAX_LAYERS)
        layers = [torch.randn(cache_shape, dtype=DTYPE, device=DEVICE) for _ in range(num_layers)]
        q_TNH = torch.randn(num_seqs * num_queries, shape.num_heads, shape.head_dim, dtype=DTYPE, device=DEVICE)
        return cls(batch, q_TNH, layers, shape.head_dim**-0.5)

    def call_s(self, attend: Callable[[Tensor, Tensor, ForwardBatch, float], Tensor]) -> float:
        """Median seconds of one call."""
        for kv_P2BKH in self.layers[:2]:
            attend(self.q_TNH, kv_P2BKH, self.batch, self.scale)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for kv_P2BKH in self.layers:
                attend(self.q_TNH, kv_P2BKH, self.batch, self.scale)
        graph.replay()
        times = []
        for _ in range(REPEATS):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) * 1e-3 / len(self.layers))
        return statistics.median(times)

    def rates(self, libraries: dict[str, Library], amount: float) -> dict[str, object]:
        """`amount` a second for each library, or what went wrong, which is not a reason to lose the others."""
        rates: dict[str, object] = {}
        expected: Tensor | None = None
        for name, library in libraries.items():
            try:
                actual = library.attend(self.q_TNH, self.layers[0], self.batch, self.scale)
                expected = actual if expected is None else expected
                error = float((actual.float() - expected.float()).norm() / expected.float().norm())
                rates[name] = amount / self.call_s(library.attend) if error < 0.02 else f"differs by {error:.2g}"
            except Exception as error:
                print(f"  {name}: {error!r}", flush=True)
                rates[name] = f"failed: {type(error).__name__}"
        return rates


def measured(name: str, shape: Shape, libraries: dict[str, Library], report: Report) -> dict[str, Library]:
    """Ours and the libraries that can be used and were asked for; the others are noted."""
    operations = KernelOperations(ModelConfig.from_folder(shape.folder), DEVICE)
    chosen = {"ours": Library(operations.paged_attention, lambda *_: "")}
    for library_name, library in libraries.items():
        if LIBRARY_NAMES.isdisjoint(sys.argv) or library_name in sys.argv:
            if reason := library.why_not(shape.head_dim, DTYPE, DEVICE):
                report.notes.append(f"- {name}, {library_name}: not measured, {reason}.")
                print(report.notes[-1], flush=True)
            else:
                chosen[library_name] = library
    return chosen


def decode(model: str) -> None:
    report = Report("attention-decode", "Decode attention alone: GB/s of keys and values read", model=model)
    shape = SHAPES[model]
    libraries = measured(model, shape, DECODE_LIBRARIES, report)
    for batch in BATCHES:
        for context in CONTEXTS:
            num_bytes = batch * context * 2 * shape.num_kv_heads * shape.head_dim * DTYPE.itemsize
            rates = Case.of(shape, batch, 1, context).rates(libraries, num_bytes * 1e-9)
            share = rates["ours"] * 1e9 / MEMORY_RATE if isinstance(rates["ours"], float) else ""
            report.add(model=shape.name, batch=batch, context=context, **rates, our_share_of_4_2_TB_s=share)
    report.save()


def prefill(model: str) -> None:
    report = Report("attention-prefill", "Prompt attention alone: TFLOP/s, causal", model=model)
    shape = SHAPES[model]
    libraries = measured(model, shape, LIBRARIES, report)
    for num_seqs, length in PROMPTS:
        for cached in CACHED:
            pairs = num_seqs * (length * cached + length * (length + 1) / 2)
            operations = 4 * shape.num_heads * shape.head_dim * pairs
            rates = Case.of(shape, num_seqs, length, cached + length).rates(libraries, operations * 1e-12)
            report.add(model=shape.name, sequences=num_seqs, tokens=length, cached=cached, **rates)
    report.save()


LIBRARY_NAMES = {*DECODE_LIBRARIES, *LIBRARIES}
PARTS = {"decoding": decode, "prompts": prefill}


def run() -> None:
    arguments = sys.argv[1:]
    model = one_model([word for word in arguments if word not in PARTS and word not in LIBRARY_NAMES])
    for name, part in PARTS.items():
        if name in arguments or PARTS.keys().isdisjoint(arguments):
            part(model)


if __name__ == "__main__":
    run()
