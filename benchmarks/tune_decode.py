"""Searches what `common.kernels.linear` and `decode_plan` have tables of: plans of products, tilings of attention.

A plan is judged by the whole decode step, captured as a graph: kernels overlap with their neighbours, so that the
fastest alone need not be the fastest in its place. Prints what improves a step; nothing is kept.
`python -m benchmarks.tune_decode [0.6B|8B] [BATCH ...] [PRODUCT ...]`: of the products named (members of `Product`),
and then not of attention.
"""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import statistics
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import torch

from benchmarks.shapes import SHAPES, Shape
from common.engine.graphs import capture
from common.engine.kv_cache import KvCache
from common.kernels import decode_plan, linear
from common.kernels.decode_plan import Tiling
from common.kernels.linear import Plan, Product
from common.kernels.operations import KernelOperations
from common.kernels.streamed_linear import ResidentPlan
from common.kernels.tiled_linear import TiledPlan
from common.model.batch import ForwardBatch
from common.model.config import ModelConfig
from common.model.loader import load_model

DEVICE = torch.device("cuda")
BATCHES = {"0.6B": (8, 32, 64, 128), "8B": (8, 32, 128, 256)}
CONTEXT, BLOCK_SIZE, REPEATS = 576, 16, 15
# A step must become faster by this share to count.
MARGIN = 0.004
COMPILERS = 14


class Place(NamedTuple):
    """Where a plan is used: one product of a model at one number of tokens."""

    product: Product
    num_rows: int
    num_in: int
    num_tokens: int

    def use(self, plan: Plan | None) -> None:
        """Puts a plan there, for this number of tokens alone."""
        key = self.product, self.num_rows, self.num_in
        kept = [(up_to, old) for up_to, old in linear._MEASURED.get(key, ()) if up_to != self.num_tokens]
        before = [entry for entry in kept if entry[0] < self.num_tokens]
        after = [entry for entry in kept if entry[0] > self.num_tokens]
        if before:
            # Fewer tokens than these are left to what they had.
            last_plan = after[0][1] if after else None
            before.append((self.num_tokens - 1, last_plan))
        linear._MEASURED[key] = (*before, (self.num_tokens, plan), *after)
        linear.choose_plan.cache_clear()

    @property
    def plan(self) -> Plan | None:
        return linear.choose_plan(self.product, self.num_tokens, self.num_rows, self.num_in, torch.bfloat16)

    def compile(self, plan: Plan) -> bool:
        """Runs it once; False if it cannot be."""
        self.use(plan)
        x = torch.randn(self.num_tokens, self.num_in, dtype=torch.bfloat16, device=DEVICE)
        weight = torch.randn(self.num_rows, self.num_in, dtype=torch.bfloat16, device=DEVICE)
        norm = torch.ones(self.num_in, dtype=torch.bfloat16, device=DEVICE)
        try:
            match self.product:
                case Product.PLAIN:
                    linear.linear(x, weight)
                case Product.NORMED:
                    linear.add_norm_linear(x, x.clone(), norm, 1e-6, weight)
                case Product.GATED:
                    linear.add_norm_gated(x, x.clone(), norm, 1e-6, weight)
            torch.cuda.synchronize()
        except Exception:
            return False
        return True


def places(shape: Shape, num_tokens: int) -> list[Place]:
    hidden, heads, ffn = shape.hidden_size, shape.num_heads * shape.head_dim, shape.intermediate_size
    qkv = heads + 2 * shape.num_kv_heads * shape.head_dim
    return [
        Place(Product.GATED, 2 * ffn, hidden, num_tokens),
        Place(Product.PLAIN, hidden, ffn, num_tokens),
        Place(Product.NORMED, qkv, hidden, num_tokens),
        Place(Product.PLAIN, hidden, heads, num_tokens),
    ]


def candidates(place: Place) -> Iterator[Plan]:
    tokens = max(16, place.num_tokens)
    wide = place.num_rows >= 4096
    if place.num_tokens <= 8 and place.num_in <= 4096:
        for rows, warps, depth in ((8, 4, 256), (16, 4, 256), (16, 8, 128), (32, 8, 128), (32, 4, 256), (16, 4, 128)):
            yield ResidentPlan(rows, warps, depth)
    if place.num_tokens <= 32:
        splits = (1,) if wide else (4, 8)
        for rows, stages, num_splits, prefetch in itertools.product((32, 64), (4, 6), splits, (0, 512)):
            yield TiledPlan(rows, tokens, 128, 4, stages, num_splits, prefetch)
        if wide:
            yield TiledPlan(128, tokens, 64, 4, 5)
            yield TiledPlan(128, tokens, 128, 4, 3)
        return
    for rows, block, depth, warps, stages in (
        (64, 64, 128, 4, 4),
        (64, 64, 64, 4, 6),
        (128, 64, 64, 4, 4),
        (64, 128, 64, 4, 4),
        (64, 128, 64, 4, 6),
        (64, 128, 128, 4, 3),
        (128, 128, 64, 8, 4),
        (32, 64, 128, 4, 4),
        (32, 128, 128, 4, 4),
    ):
        if block < 2 * tokens:
            for num_splits in (1,) if wide else (2, 4, 8):
                yield TiledPlan(rows, block, depth, warps, stages, num_splits)


def tilings() -> Iterator[tuple[Tiling, int]]:
    for tile, warps, stages in ((32, 2, 2), (32, 2, 3), (32, 2, 4), (64, 4, 2), (64, 4, 3), (64, 2, 2), (128, 4, 2)):
        for programs in (2, 3, 4, 6, 9):
            yield Tiling(tile, warps, stages), programs


def compile_one(job: tuple[Place, Plan]) -> bool:
    return job[0].compile(job[1])


class Step:
    """A decode step over alike sequences."""

    def __init__(self, shape: Shape, largest: int) -> None:
        self.config = ModelConfig.from_folder(shape.folder)
        self.operations = KernelOperations(self.config, DEVICE)
        self.model = load_model(
            shape.folder, load_format="dummy", dtype="bfloat16", device=DEVICE, operations=self.operations
        )
        self.width = -(-CONTEXT // BLOCK_SIZE)
        self.cache = KvCache(self.config, largest * self.width, BLOCK_SIZE, torch.bfloat16, DEVICE)
        for layer in self.cache.layers:
            layer.normal_()
        self.table = torch.randperm(largest * self.width, device=DEVICE).view(largest, self.width).int()

    def ms(self, batch: int) -> float:
        """Median of replays."""
        table = self.table[:batch]
        lens = torch.full((batch,), CONTEXT, dtype=torch.int32, device=DEVICE)

        def step() -> torch.Tensor:
            forward = ForwardBatch(
                token_ids_T=torch.arange(batch, dtype=torch.int32, device=DEVICE),
                positions_T=lens - 1,
                slot_mapping_T=table[:, -1] * BLOCK_SIZE + (CONTEXT - 1) % BLOCK_SIZE,
                query_starts=None,
                query_start_S1=None,
                kv_lens=None,
                kv_len_S=lens,
                block_table_SP=table,
                logit_rows=None,
            )
            return self.model.forward(forward, self.cache)

        step()
        torch.cuda.current_stream().synchronize()
        graph, _ = capture(step, torch.cuda.graph_pool_handle())
        times = []
        for _ in range(REPEATS):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
        return statistics.median(times[3:])


def compiled(jobs: list[tuple[Place, Plan]]) -> dict[tuple[Place, Plan], bool]:
    """Whether each plan can be used; compiled by many processes at once, before anything is timed."""
    with multiprocessing.get_context("spawn").Pool(COMPILERS) as pool:
        return dict(zip(jobs, pool.map(compile_one, jobs, chunksize=2), strict=True))


def tune(
    shape: Shape, batches: tuple[int, ...], products: list[Product], usable: dict[tuple[Place, Plan], bool]
) -> None:
    step = Step(shape, max(batches))
    for batch in batches:
        best = step.ms(batch)
        print(f"{shape.name} batch {batch}: {best:.4f} ms, again {step.ms(batch):.4f}", flush=True)
        chosen = None
        for tiling, programs in () if products else tilings():
            with attention(tiling, programs):
                ms = step.ms(batch)
            if ms < best * (1 - MARGIN):
                best, chosen = ms, (tiling, programs)
                print(f"  {ms:.4f} attention {tiling} programs_per_sm {programs}", flush=True)
        with attention(*chosen) if chosen else contextlib.nullcontext():
            tune_products(step, shape, batch, best, usable)


def tune_products(step: Step, shape: Shape, batch: int, best: float, usable: dict[tuple[Place, Plan], bool]) -> None:
    for place in places(shape, batch):
        kept = place.plan
        for candidate in candidates(place):
            if not usable.get((place, candidate), False):
                continue
            place.use(candidate)
            ms = step.ms(batch)
            if ms < best * (1 - MARGIN):
                best, kept = ms, candidate
                print(f"  {ms:.4f} {place.product.name} {place.num_rows} x {place.num_in}: {candidate}", flush=True)
        place.use(kept)


@contextlib.contextmanager
def attention(tiling: Tiling, programs_per_sm: int) -> Iterator[None]:
    """Every plan made meanwhile is of this tiling."""
    plan, defaults = decode_plan.default_tiling, decode_plan.plan_decode.__kwdefaults__
    kept = defaults["programs_per_sm"]
    decode_plan.default_tiling = lambda *_, **__: tiling
    defaults["programs_per_sm"] = programs_per_sm
    try:
        yield
    finally:
        decode_plan.default_tiling, defaults["programs_per_sm"] = plan, kept


@torch.inference_mode()
def main() -> None:
    names = [name for name in SHAPES if name in sys.argv] or list(SHAPES)
    asked = tuple(int(word) for word in sys.argv[1:] if word.isdigit())
    products = [product for product in Product if product.name in sys.argv]
    batches = {name: asked or BATCHES[name] for name in names}
    jobs = [
        (place, plan)
        for name in names
        for batch in batches[name]
        for place in places(SHAPES[name], batch)
        if place.product in (products or Product)
        for plan in candidates(place)
    ]
    usable = compiled(jobs)
    print(f"{sum(usable.values())} of {len(jobs)} plans can be used", flush=True)
    for name in names:
        # Layers are alike: some of a large model's tell as much as all.
        shape = replace(SHAPES[name], num_layers=min(SHAPES[name].num_layers, 28 if name == "0.6B" else 12))
        with torch.cuda.stream(torch.cuda.Stream()):
            tune(shape, batches[name], products, usable)


if __name__ == "__main__":
    main()
