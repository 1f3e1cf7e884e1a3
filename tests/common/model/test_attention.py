from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from common.model.attention import paged_attention, write_kv
from common.model.attention_plan import group_by_length, plan_attention
from common.model.batch import ForwardBatch

N, K, H, B, P = 6, 2, 8, 4, 64
SCALE = H**-0.5
CPU = torch.device("cpu")


def batch_of(query_lens: Sequence[int], kv_lens: Sequence[int], seed: int = 0) -> ForwardBatch:
    """Sequences on shuffled blocks of their own; the last `query_len` of `kv_len` positions are the batch's."""
    blocks = random.Random(seed).sample(range(P), P)
    tables = [[blocks.pop() for _ in range(-(-kv_len // B))] for kv_len in kv_lens]
    spans = [range(kv_len - query_len, kv_len) for query_len, kv_len in zip(query_lens, kv_lens, strict=True)]
    return ForwardBatch.build(
        token_ids=[0] * sum(query_lens),
        positions=[position for span in spans for position in span],
        slot_mapping=[
            table[position // B] * B + position % B
            for table, span in zip(tables, spans, strict=True)
            for position in span
        ],
        query_lens=query_lens,
        kv_lens=kv_lens,
        block_tables=tables,
        logit_rows=[],
        device=CPU,
    )


def naive_attention(q_TNH: Tensor, kv_P2BKH: Tensor, batch: ForwardBatch) -> Tensor:
    """One token and one head at a time, in float64, straight from the definition."""
    out_TNH = torch.empty(q_TNH.shape, dtype=torch.float64)
    for seq in range(batch.num_seqs):
        for token in range(*batch.query_starts[seq : seq + 2]):
            positions = range(int(batch.positions_T[token]) + 1)
            cached = [kv_P2BKH[batch.block_table_SP[seq, p // B], :, p % B].double() for p in positions]
            k_LKH, v_LKH = torch.stack(cached, 1)
            for head in range(N):
                scores_L = k_LKH[:, head // (N // K)] @ q_TNH[token, head].double() * SCALE
                out_TNH[token, head] = scores_L.softmax(0) @ v_LKH[:, head // (N // K)]
    return out_TNH


@pytest.mark.parametrize(
    ("query_lens", "kv_lens"),
    [
        pytest.param([1], [1], id="one-token"),
        pytest.param([1, 1, 1], [7, 7, 7], id="decode-alike"),
        pytest.param([1, 1, 1, 1], [1, 40, 3, 17], id="decode-uneven"),
        pytest.param([9], [9], id="whole-prompt"),
        pytest.param([5], [14], id="chunk-in-the-middle"),
        pytest.param([1, 6, 1, 3], [20, 6, 5, 30], id="mixed"),
    ],
)
@pytest.mark.parametrize("group_bytes", [1, 1 << 20])
def test_attention_is_what_its_definition_says(
    query_lens: list[int], kv_lens: list[int], group_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("common.model.attention_plan.GROUP_BYTES", group_bytes)
    batch = batch_of(query_lens, kv_lens)
    q_TNH, kv_P2BKH = torch.randn(sum(query_lens), N, H), torch.randn(P, 2, B, K, H)
    out_TNH = paged_attention(q_TNH, kv_P2BKH, batch, SCALE)
    torch.testing.assert_close(out_TNH.double(), naive_attention(q_TNH, kv_P2BKH, batch), atol=1e-5, rtol=0)


def test_queries_may_be_a_strided_part_of_a_fused_projection() -> None:
    batch = batch_of([1, 1, 3], [5, 9, 3])
    fused, kv_P2BKH = torch.randn(5, N + 2 * K, H), torch.randn(P, 2, B, K, H)
    out_TNH = paged_attention(fused[:, :N], kv_P2BKH, batch, SCALE)
    assert torch.equal(out_TNH, paged_attention(fused[:, :N].contiguous(), kv_P2BKH, batch, SCALE))


def test_nothing_outside_a_sequences_own_positions_is_read() -> None:
    """Everything else is NaN: other blocks, the padding's block 0 among them, and the unwritten end of the last one."""
    batch = batch_of([1, 1, 4], [6, 13, 9])
    q_TNH = torch.randn(6, N, H)
    kv_P2BKH = torch.full((P, 2, B, K, H), torch.nan)
    for seq, kv_len in enumerate(batch.kv_lens):
        for position in range(kv_len):
            kv_P2BKH[batch.block_table_SP[seq, position // B], :, position % B] = torch.randn(2, K, H)
    out_TNH = paged_attention(q_TNH, kv_P2BKH, batch, SCALE)
    torch.testing.assert_close(out_TNH.double(), naive_attention(q_TNH, kv_P2BKH, batch), atol=1e-5, rtol=0)


def test_write_kv_puts_key_and_value_into_the_tokens_slot() -> None:
    batch = batch_of([3, 1], [3, 10])
    kv_T2KH, kv_P2BKH = torch.randn(4, 2, K, H), torch.zeros(P, 2, B, K, H)
    write_kv(kv_T2KH, kv_P2BKH, batch)
    for token, slot in enumerate(batch.slot_mapping_T.tolist()):
        assert torch.equal(kv_P2BKH[slot // B, :, slot % B], kv_T2KH[token])
    assert kv_P2BKH.count_nonzero() == kv_T2KH.count_nonzero()


def test_the_plan_is_made_once_for_all_layers() -> None:
    batch = batch_of([1, 1], [5, 9])
    assert batch.once(plan_attention, B, K * H, torch.float32) is batch.once(plan_attention, B, K * H, torch.float32)


@settings(max_examples=200, deadline=None)
@given(kv_lens=st.lists(st.integers(1, 500), min_size=1, max_size=40), max_positions=st.integers(1, 1000))
def test_groups_hold_every_sequence_once_and_stay_under_the_limit(kv_lens: list[int], max_positions: int) -> None:
    groups = group_by_length(list(range(len(kv_lens))), tuple(kv_lens), max_positions)
    assert sorted(seq for group in groups for seq in group) == list(range(len(kv_lens)))
    for group in groups:
        assert len(group) == 1 or len(group) * max(kv_lens[seq] for seq in group) <= max_positions


def test_a_batch_wants_all_logits_when_its_rows_are_all_rows_in_order() -> None:
    def logit_rows(rows: Sequence[int]) -> Tensor | None:
        return ForwardBatch.build(
            token_ids=[1, 2, 3],
            positions=[0, 1, 0],
            slot_mapping=[0, 1, 4],
            query_lens=[2, 1],
            kv_lens=[2, 1],
            block_tables=[[0], [1]],
            logit_rows=rows,
            device=CPU,
        ).logit_rows

    assert logit_rows(range(3)) is None
    reordered, partial = logit_rows([2, 1, 0]), logit_rows([1, 2])
    assert reordered is not None
    assert reordered.tolist() == [2, 1, 0]
    assert partial is not None
    assert partial.tolist() == [1, 2]


def test_a_batch_is_decode_only_when_each_sequence_has_one_query_token() -> None:
    assert batch_of([1, 1], [3, 9]).decode_only
    assert not batch_of([1, 2], [3, 9]).decode_only
