from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from common.kernels import decode_plan
from common.kernels.decode_attention import decode_attention
from common.kernels.decode_plan import DecodePlan, plan_decode
from common.model.attention import paged_attention
from common.model.batch import ForwardBatch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# The interpreter rounds to bfloat16 by cutting off.
BEYOND_PLAIN = 1.5 if torch.cuda.is_available() else 3.5
MIXED_LENS = [37, 1, 0, 200, 16, 65]


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """What nobody writes shows."""
    empty = torch.empty

    def poisoned(*args: object, **kwargs: object) -> Tensor:
        tensor = empty(*args, **kwargs)  # type: ignore[call-overload]
        return tensor.fill_(float("nan") if tensor.is_floating_point() else 1_000_000)

    monkeypatch.setattr(torch, "empty", poisoned)


class Case:
    """Sequences on shuffled blocks of their own. Everything in the cache that is not theirs is NaN."""

    def __init__(
        self,
        kv_lens: Sequence[int],
        *,
        heads: tuple[int, int] = (8, 4),
        head_dim: int = 32,
        block_size: int = 16,
        dtype: torch.dtype = torch.float32,
        index_dtype: torch.dtype = torch.int32,
    ) -> None:
        random.seed(0)
        torch.manual_seed(0)
        (self.num_heads, self.num_kv_heads), self.head_dim = heads, head_dim
        self.kv_lens, self.block_size, self.scale = list(kv_lens), block_size, head_dim**-0.5
        num_blocks = [-(-kv_len // block_size) for kv_len in kv_lens]
        ids = random.sample(range(1, sum(num_blocks) + 4), sum(num_blocks))
        self.tables = [[ids.pop() for _ in range(count)] for count in num_blocks]
        self.kv = torch.full((sum(num_blocks) + 4, 2, block_size, self.num_kv_heads, head_dim), float("nan"))
        for table, kv_len in zip(self.tables, kv_lens, strict=True):
            for index, block in enumerate(table):
                self.kv[block, :, : kv_len - index * block_size] = torch.randn_like(
                    self.kv[block, :, : kv_len - index * block_size]
                )
        width = max(num_blocks) + 1
        padded = [table + [0] * (width - len(table)) for table in self.tables]
        self.q = torch.randn(len(kv_lens), self.num_heads, head_dim).to(DEVICE, dtype)
        self.kv = self.kv.to(DEVICE, dtype)
        self.table = torch.tensor(padded, dtype=index_dtype, device=DEVICE)
        self.lens = torch.tensor(kv_lens, dtype=index_dtype, device=DEVICE)

    def plan(self, **options: object) -> DecodePlan:
        return plan_decode(
            self.lens,
            num_kv_heads=self.num_kv_heads,
            num_query_heads=self.num_heads,
            head_dim=self.head_dim,
            num_programs=options.pop("num_programs", 4),  # type: ignore[arg-type]
            dtype=self.q.dtype,
            **options,  # type: ignore[arg-type]
        )

    def attend(self, settled: bool = False, **options: object) -> Tensor:
        return decode_attention(self.q, self.kv, self.table, self.plan(**options), self.scale, settled=settled)

    def reference(self, dtype: torch.dtype) -> Tensor:
        """Plain PyTorch; zeros for rows that are not in use."""
        rows = [row for row, kv_len in enumerate(self.kv_lens) if kv_len]
        lens, tables = [self.kv_lens[row] for row in rows], [self.tables[row] for row in rows]
        last_slots = [
            table[-1] * self.block_size + (kv_len - 1) % self.block_size
            for table, kv_len in zip(tables, lens, strict=True)
        ]
        batch = ForwardBatch.build(
            token_ids=[0] * len(rows),
            positions=[kv_len - 1 for kv_len in lens],
            slot_mapping=last_slots,
            query_lens=[1] * len(rows),
            kv_lens=lens,
            block_tables=tables,
            logit_rows=[],
            device=DEVICE,
        )
        out = torch.zeros(self.q.shape, dtype=dtype, device=DEVICE)
        out[rows] = paged_attention(self.q[rows].to(dtype), self.kv.to(dtype), batch, self.scale)
        return out

    def items(self, **options: object) -> list[tuple[int, int, int]]:
        """(sequence, first position, end) of every item."""
        plan = self.plan(**options)
        rows = plan.items_I8[: int(plan.num_items_1)].tolist()
        return [(row[0], row[1], row[2]) for row in rows]


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize(
    ("heads", "head_dim"),
    [((8, 4), 32), ((16, 8), 128), ((6, 2), 16), ((3, 3), 64), ((16, 1), 32), ((2, 1), 256)],
    ids=["tiny", "two-queries-a-head", "three-queries-a-head", "one-query-a-head", "sixteen-queries-a-head", "wide"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_decode_attention_is_plain_attention(heads: tuple[int, int], head_dim: int, dtype: torch.dtype) -> None:
    case = Case([37, 0, 90], heads=heads, head_dim=head_dim, dtype=dtype)
    expected = case.reference(torch.float64)
    error = relative_error(case.attend(), expected)
    assert error < (1e-5 if dtype == torch.float32 else 1e-2)
    assert dtype == torch.float32 or error < BEYOND_PLAIN * relative_error(case.reference(dtype), expected)


@pytest.mark.parametrize("block_size", [1, 8, 24, 32, 64])
def test_any_block_size_is_read(block_size: int) -> None:
    case = Case([37, 90], heads=(2, 1), block_size=block_size)
    assert relative_error(case.attend(), case.reference(torch.float64)) < 1e-5


@pytest.mark.parametrize("num_programs", [1, 40], ids=["whole", "cut"])
@pytest.mark.parametrize("settled", [False, True])
def test_rows_without_positions_give_zeros_and_nothing_is_read_past_an_end(num_programs: int, settled: bool) -> None:
    case = Case(MIXED_LENS)
    out_SNH = case.attend(settled, num_programs=num_programs)
    assert relative_error(out_SNH, case.reference(torch.float64)) < 1e-5
    assert not out_SNH[MIXED_LENS.index(0)].any()


def test_queries_may_be_a_strided_part_of_a_fused_projection_and_tables_64_bit() -> None:
    case = Case(MIXED_LENS, index_dtype=torch.int64)
    fused = torch.randn(len(MIXED_LENS), case.num_heads + 2 * case.num_kv_heads, case.head_dim, device=DEVICE)
    fused[:, : case.num_heads] = case.q
    case.q = fused[:, : case.num_heads]
    assert relative_error(case.attend(), case.reference(torch.float64)) < 1e-5


@pytest.mark.parametrize("chunk", [None, 32])
@pytest.mark.parametrize("num_programs", [1, 7, 132])
@pytest.mark.parametrize("kv_lens", [[1], [700], [0, 0, 0], MIXED_LENS, [50] * 40, [5] * 30 + [4000]])
def test_items_cover_every_position_once_within_the_room_made_for_them(
    kv_lens: list[int], num_programs: int, chunk: int | None
) -> None:
    lens = torch.tensor(kv_lens, device=DEVICE)
    plan = plan_decode(lens, num_kv_heads=8, num_query_heads=16, head_dim=128, num_programs=num_programs, chunk=chunk)
    num_items = int(plan.num_items_1)
    assert num_items <= len(plan.items_I8)
    items = plan.items_I8[:num_items].tolist()
    for seq, kv_len in enumerate(kv_lens):
        own = [item for item in items if item[0] == seq]
        assert [item[1] for item in own] == [0, *[item[2] for item in own[:-1]]]
        assert own[-1][2] == kv_len
        assert {(item[3], item[4]) for item in own} == {(items.index(own[0]), len(own))}
    assert not plan.arrived_SK.any()


def test_a_large_batch_of_like_sequences_stays_whole() -> None:
    kv_lens = [576] * 128
    assert Case(kv_lens, heads=(8, 8), head_dim=16).items(num_programs=132) == [
        (seq, 0, 576) for seq in range(len(kv_lens))
    ]


def test_one_long_sequence_among_short_ones_is_cut_to_twice_the_mean_length_at_most() -> None:
    kv_lens = [8192] + [200] * 127
    case = Case(kv_lens, heads=(8, 8), head_dim=16)
    items = case.items(num_programs=132)
    assert max(end - start for _, start, end in items) <= 2 * sum(kv_lens) / len(kv_lens) + case.plan().tiling.tile


@pytest.mark.parametrize("chunk", [None, 32])
def test_longer_items_come_before_shorter_ones(chunk: int | None) -> None:
    kv_lens = [random.Random(0).randrange(600) for _ in range(40)] + [3000, 0, 0]
    items = Case(kv_lens, heads=(8, 8), head_dim=16).items(num_programs=132, chunk=chunk)
    first_pieces = [end - start for _, start, end in items if start == 0]
    assert first_pieces == sorted(first_pieces, reverse=True)
    assert len(first_pieces) == len(kv_lens)


def test_a_single_sequence_is_cut_for_all_programs() -> None:
    items = Case([4096], heads=(8, 8), head_dim=16).items(num_programs=132)
    assert len(items) * 8 >= 3 * 132


def test_layers_share_a_plan_and_repeat_themselves_to_the_bit() -> None:
    case = Case(MIXED_LENS)
    plan = case.plan(num_programs=40)
    first, second = (decode_attention(case.q, case.kv, case.table, plan, case.scale) for _ in range(2))
    assert torch.equal(first, second)
    assert not plan.arrived_SK.any()


def test_with_fixed_pieces_a_sequence_gets_the_same_bits_alone_and_in_any_batch() -> None:
    case = Case(MIXED_LENS, dtype=torch.bfloat16)
    together = case.attend(chunk=32, num_programs=4)
    for row, kv_len in enumerate(MIXED_LENS):
        alone = Case([kv_len], dtype=torch.bfloat16)
        alone.q, alone.kv, alone.table = case.q[row : row + 1], case.kv, case.table[row : row + 1]
        assert torch.equal(alone.attend(chunk=32, num_programs=132)[0], together[row])


def test_programs_that_share_a_grid_smaller_than_the_items_do_them_all() -> None:
    case = Case(MIXED_LENS)
    plan = case.plan(num_programs=40)._replace(grid_items=3)
    assert int(plan.num_items_1) > 3
    out_SNH = decode_attention(case.q, case.kv, case.table, plan, case.scale)
    assert relative_error(out_SNH, case.reference(torch.float64)) < 1e-5


@pytest.mark.parametrize("num_seqs", [1, 7])
def test_the_room_for_fixed_pieces_is_what_a_plan_takes(num_seqs: int) -> None:
    plan = Case([40] * num_seqs, heads=(6, 2)).plan(chunk=32)
    room = decode_plan.fixed_piece_bytes(num_seqs, num_kv_heads=2, num_query_heads=6, head_dim=32)
    assert room == plan.partial_IKGH.nbytes + plan.max_sum_IK2G.nbytes


def test_a_long_sequence_has_a_bounded_number_of_fixed_pieces() -> None:
    items = Case([4000], heads=(1, 1), head_dim=16).items(chunk=32)
    assert len(items) <= decode_plan.MAX_FIXED_PIECES


def test_a_large_batch_whose_sequences_stay_whole_gets_the_bits_of_fixed_pieces(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case = Case(MIXED_LENS, heads=(6, 2), dtype=torch.bfloat16)
    cut = case.attend(chunk=32)
    monkeypatch.setattr(decode_plan, "MAX_CUT_SEQUENCES", 0)
    assert len(case.items(chunk=32)) == len(MIXED_LENS)
    assert torch.equal(case.attend(chunk=32), cut)
