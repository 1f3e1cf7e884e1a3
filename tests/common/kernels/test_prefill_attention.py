from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from common.kernels.prefill_attention import prefill_attention
from common.kernels.prefill_plan import QUERY_TILE, plan_prefill
from common.model.attention import paged_attention
from common.model.batch import ForwardBatch
from tests.common.kernels.test_decode_attention import DEVICE, relative_error

BEYOND_PLAIN = 1.5 if torch.cuda.is_available() else 3.5


class Chunks:
    """Prompt chunks, (cached before, queries) each, on shuffled blocks. Everything else in the cache is NaN."""

    def __init__(
        self,
        chunks: Sequence[tuple[int, int]],
        *,
        heads: tuple[int, int] = (4, 2),
        head_dim: int = 32,
        block_size: int = 16,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        random.seed(0)
        torch.manual_seed(0)
        self.scale = head_dim**-0.5
        num_heads, num_kv_heads = heads
        kv_lens = [before + queries for before, queries in chunks]
        num_blocks = [-(-kv_len // block_size) for kv_len in kv_lens]
        ids = random.sample(range(sum(num_blocks) + 3), sum(num_blocks))
        tables = [[ids.pop() for _ in range(count)] for count in num_blocks]
        kv = torch.full((sum(num_blocks) + 3, 2, block_size, num_kv_heads, head_dim), float("nan"))
        for table, kv_len in zip(tables, kv_lens, strict=True):
            for index, block in enumerate(table):
                used = kv[block, :, : kv_len - index * block_size]
                used.copy_(torch.randn_like(used))
        num_tokens = sum(queries for _, queries in chunks)
        self.kv = kv.to(DEVICE, dtype)
        self.q = torch.randn(num_tokens, num_heads, head_dim).to(DEVICE, dtype)
        self.batch = ForwardBatch.build(
            token_ids=[0] * num_tokens,
            positions=[before + index for before, queries in chunks for index in range(queries)],
            slot_mapping=[0] * num_tokens,
            query_lens=[queries for _, queries in chunks],
            kv_lens=kv_lens,
            block_tables=tables,
            logit_rows=[],
            device=DEVICE,
        )

    def attend(self) -> Tensor:
        batch = self.batch
        assert batch.query_start_S1 is not None
        plan = plan_prefill(batch.query_start_S1, len(self.q))
        return prefill_attention(
            self.q, self.kv, batch.query_start_S1, batch.kv_len_S, batch.block_table_SP, plan, self.scale
        )

    def reference(self, dtype: torch.dtype) -> Tensor:
        return paged_attention(self.q.to(dtype), self.kv.to(dtype), self.batch, self.scale)


@pytest.mark.parametrize(
    ("heads", "head_dim"),
    [((4, 2), 32), ((4, 1), 128), ((3, 3), 16), ((2, 1), 256)],
    ids=["tiny", "four-queries-a-head", "one-query-a-head", "wide"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_prefill_attention_is_plain_attention(heads: tuple[int, int], head_dim: int, dtype: torch.dtype) -> None:
    chunks = Chunks([(0, 37), (70, 20)], heads=heads, head_dim=head_dim, dtype=dtype)
    expected = chunks.reference(torch.float64)
    error = relative_error(chunks.attend(), expected)
    assert error < (1e-5 if dtype == torch.float32 else 1e-2)
    assert dtype == torch.float32 or error < BEYOND_PLAIN * relative_error(chunks.reference(dtype), expected)


@pytest.mark.parametrize("block_size", [1, 8, 24, 64])
def test_any_block_size_is_read(block_size: int) -> None:
    chunks = Chunks([(0, 21), (40, 9)], heads=(1, 1), block_size=block_size)
    assert relative_error(chunks.attend(), chunks.reference(torch.float64)) < 1e-5


@pytest.mark.parametrize(
    "lens",
    [
        [(0, 1)],
        [(5, 1), (0, 1), (64, 1)],
        [(0, QUERY_TILE)],
        [(0, QUERY_TILE + 1), (3, QUERY_TILE - 1), (QUERY_TILE, 2 * QUERY_TILE)],
        [(63, 1), (64, 2), (62, 3), (128, 65), (1, 64)],
        [(7, 3)] * 9,
    ],
)
def test_every_query_of_any_mix_of_chunks_sees_its_positions_and_no_others(lens: list[tuple[int, int]]) -> None:
    chunks = Chunks(lens, heads=(2, 1))
    assert relative_error(chunks.attend(), chunks.reference(torch.float64)) < 1e-5


def test_queries_may_be_a_strided_part_of_a_fused_projection() -> None:
    chunks = Chunks([(0, 20), (9, 5)])
    fused = torch.randn(25, 8, 32, device=DEVICE)
    fused[:, :4] = chunks.q
    expected = chunks.attend()
    chunks.q = fused[:, :4]
    assert torch.equal(chunks.attend(), expected)


def test_every_tile_comes_once_and_those_at_the_ends_of_their_chunks_first() -> None:
    lens = [QUERY_TILE + 1, 1, 0, 3 * QUERY_TILE]
    starts = torch.tensor([0, *lens], device=DEVICE).cumsum(0)
    plan = plan_prefill(starts, sum(lens) + 40)
    items = plan.items_I2[: int(plan.num_items_1)].tolist()
    assert items == [[0, QUERY_TILE], [1, 0], [3, 2 * QUERY_TILE], [0, 0], [3, QUERY_TILE], [3, 0]]
