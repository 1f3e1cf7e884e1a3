from __future__ import annotations

import random
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from common.kernels import flashinfer_attention, library_attention
from common.kernels.availability import why_not_half, why_not_imported
from common.kernels.flashinfer_attention import Heads, pages
from common.kernels.gather_kv import gather_kv
from common.kernels.library_attention import LIBRARIES, call_by_call, torch_cudnn
from common.model.attention import paged_attention
from common.model.batch import ForwardBatch

CPU = torch.device("cpu")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LENS = {
    "whole-prompt": ([40], [40]),
    "behind-a-prefix": ([9], [70]),
    "alike": ([17, 17, 17], [33, 33, 33]),
    "mixed": ([1, 21, 5, 1], [36, 21, 90, 1]),
}


class Case:
    """Sequences on shuffled blocks of their own. Everything in the cache that is not theirs is NaN."""

    def __init__(
        self,
        query_lens: Sequence[int],
        kv_lens: Sequence[int],
        *,
        heads: tuple[int, int] = (6, 2),
        head_dim: int = 16,
        block_size: int = 16,
        dtype: torch.dtype = torch.float32,
        device: torch.device = DEVICE,
    ) -> None:
        generator = torch.Generator().manual_seed(0)
        num_heads, num_kv_heads = heads
        counts = [-(-kv_len // block_size) for kv_len in kv_lens]
        free = random.Random(0).sample(range(1, sum(counts) + 4), sum(counts))
        self.tables = [[free.pop() for _ in range(count)] for count in counts]
        self.kv_lens, self.block_size, self.scale = kv_lens, block_size, head_dim**-0.5
        spans = [range(kv_len - query_len, kv_len) for query_len, kv_len in zip(query_lens, kv_lens, strict=True)]
        self.batch = ForwardBatch.build(
            token_ids=[0] * sum(query_lens),
            positions=[position for span in spans for position in span],
            slot_mapping=[
                table[position // block_size] * block_size + position % block_size
                for table, span in zip(self.tables, spans, strict=True)
                for position in span
            ],
            query_lens=query_lens,
            kv_lens=kv_lens,
            block_tables=self.tables,
            logit_rows=[],
            device=device,
        )
        kv = torch.full((sum(counts) + 4, 2, block_size, num_kv_heads, head_dim), torch.nan)
        for table, kv_len in zip(self.tables, kv_lens, strict=True):
            for index, block in enumerate(table):
                rows = kv[block, :, : kv_len - index * block_size]
                rows.copy_(torch.randn(rows.shape, generator=generator))
        self.kv = kv.to(device, dtype)
        # A strided part of a fused projection.
        fused = torch.randn(sum(query_lens), num_heads + 2 * num_kv_heads, head_dim, generator=generator)
        self.q = fused.to(device, dtype)[:, :num_heads]

    def reference(self, dtype: torch.dtype = torch.float64) -> Tensor:
        return paged_attention(self.q.to(dtype), self.kv.to(dtype), self.batch, self.scale)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected).norm() / expected.norm())


def plain(q_SNQH: Tensor, k_SKLH: Tensor, v_SKLH: Tensor, scale: float) -> Tensor:
    mask_QL = torch.ones(q_SNQH.shape[2], k_SKLH.shape[2], dtype=torch.bool, device=q_SNQH.device)
    mask_QL.tril_(k_SKLH.shape[2] - q_SNQH.shape[2])
    return F.scaled_dot_product_attention(q_SNQH, k_SKLH, v_SKLH, attn_mask=mask_QL, scale=scale, enable_gqa=True)


def plain_with_log_sum(
    q_SNQH: Tensor, k_SKLH: Tensor, v_SKLH: Tensor, scale: float, *, causal: bool
) -> tuple[Tensor, Tensor]:
    group = q_SNQH.shape[1] // k_SKLH.shape[1]
    scores = q_SNQH @ k_SKLH.repeat_interleave(group, 1).transpose(2, 3) * scale
    if causal:
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -torch.inf)
    return scores.softmax(-1) @ v_SKLH.repeat_interleave(group, 1), scores.logsumexp(-1, keepdim=True)


@pytest.mark.parametrize(("query_lens", "kv_lens"), LENS.values(), ids=LENS)
@pytest.mark.parametrize("block_size", [8, 16, 24])
def test_gathered_keys_and_values_are_the_cached_ones_end_to_end(
    query_lens: list[int], kv_lens: list[int], block_size: int
) -> None:
    case = Case(query_lens, kv_lens, block_size=block_size)
    expected = [
        torch.stack([case.kv[table[p // block_size], :, p % block_size] for p in range(kv_len)], 1)
        for table, kv_len in zip(case.tables, kv_lens, strict=True)
    ]
    assert torch.equal(torch.stack(gather_kv(case.kv, case.batch)), torch.cat(expected, 1))


def test_a_block_larger_than_what_a_program_moves_at_a_time_is_gathered_whole() -> None:
    case = Case([3], [100], heads=(8, 8), head_dim=80, block_size=64)
    k_LKH, v_LKH = gather_kv(case.kv, case.batch)
    whole_2LKH = case.kv[case.tables[0]].transpose(0, 1).flatten(1, 2)[:, :100]
    assert torch.equal(torch.stack((k_LKH, v_LKH)), whole_2LKH)


@pytest.mark.parametrize(("query_lens", "kv_lens"), LENS.values(), ids=LENS)
def test_call_by_call_is_paged_attention(query_lens: list[int], kv_lens: list[int]) -> None:
    case = Case(query_lens, kv_lens)
    out_TNH = call_by_call(plain, case.q, case.kv, case.batch, case.scale)
    assert relative_error(out_TNH, case.reference()) < 1e-5


@pytest.mark.parametrize(("query_lens", "kv_lens"), LENS.values(), ids=LENS)
def test_a_prefix_and_a_chunk_attended_apart_are_weighted_together(
    query_lens: list[int], kv_lens: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(library_attention, "_cudnn", plain_with_log_sum)
    case = Case(query_lens, kv_lens)
    out_TNH = call_by_call(torch_cudnn, case.q, case.kv, case.batch, case.scale)
    assert relative_error(out_TNH, case.reference()) < 1e-5


def test_pages_are_listed_end_to_end_with_the_length_of_each_last_one() -> None:
    case = Case([1, 1, 1], [32, 7, 33], device=CPU)
    listed = pages(case.batch, case.block_size)
    assert listed.start_S1.tolist() == [0, 2, 3, 6]
    assert listed.page_ids.tolist() == [block for table in case.tables for block in table]
    assert listed.last_len_S.tolist() == [16, 7, 1]


def test_a_missing_library_and_one_that_cannot_be_loaded_are_told_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "built_for_another_torch.py").write_text("raise ImportError('undefined symbol: _ZN3c10')")
    (tmp_path / "without_its_extension.py").write_text("import no_such_extension")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    assert why_not_imported("some-library", "no_such_module") == "some-library is not installed"
    assert why_not_imported("this-one", "built_for_another_torch").startswith("this-one cannot be imported: undefined")
    assert "No module named 'no_such_extension'" in why_not_imported("that-one", "without_its_extension")


def test_reasons_name_what_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library_attention, "why_not_imported", lambda package, module: "")
    monkeypatch.setattr(flashinfer_attention, "why_not_imported", lambda package, module: "")
    assert why_not_half(torch.bfloat16, CPU) == "there is no CUDA device"
    assert "head_dim is 300" in LIBRARIES["flash-attn-3"].why_not(300, torch.bfloat16, CPU)
    assert "head_dim is 300" in LIBRARIES["flash-attn"].why_not(300, torch.bfloat16, CPU)
    assert "head_dim is 80" in LIBRARIES["flashinfer-fa2"].why_not(80, torch.bfloat16, CPU)


@pytest.mark.parametrize("name", LIBRARIES)
def test_without_a_gpu_every_library_has_a_reason(name: str) -> None:
    assert LIBRARIES[name].why_not(128, torch.bfloat16, CPU)


def usable(name: str, head_dim: int, dtype: torch.dtype) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if reason := LIBRARIES[name].why_not(head_dim, dtype, DEVICE):
        pytest.skip(f"{name}: {reason}")


@pytest.mark.gpu
@pytest.mark.timeout(900)
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(("query_lens", "kv_lens"), LENS.values(), ids=LENS)
@pytest.mark.parametrize("name", LIBRARIES)
def test_a_library_is_as_near_to_float64_as_plain_pytorch(name: str, query_lens: list[int], kv_lens: list[int]) -> None:
    usable(name, 128, torch.bfloat16)
    case = Case(query_lens, kv_lens, heads=(8, 2), head_dim=128, dtype=torch.bfloat16)
    expected = case.reference()
    error = relative_error(LIBRARIES[name].attend(case.q, case.kv, case.batch, case.scale), expected)
    assert error < 1e-2
    assert error < 2 * relative_error(case.reference(torch.bfloat16), expected)


@pytest.mark.gpu
@pytest.mark.timeout(900)
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("tensor_cores", [False, True])
def test_decode_by_flashinfer_is_plain_attention_eager_and_replayed(tensor_cores: bool) -> None:
    usable("flashinfer-fa2", 128, torch.bfloat16)
    case = Case([1, 1, 1], [37, 200, 1], heads=(8, 2), head_dim=128, dtype=torch.bfloat16)
    case.q = case.q.contiguous()
    expected = case.reference()
    out_SNH = flashinfer_attention.decode(case.q, case.kv, case.batch, case.scale, tensor_cores=tensor_cores)
    assert relative_error(out_SNH, expected) < 1e-2
    replayed = flashinfer_attention.GraphDecode(3, 32, DEVICE, tensor_cores=tensor_cores)
    replayed.plan(case.batch, Heads.of(case.q, case.kv, case.scale))
    replayed.attend(case.q, case.kv)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out_SNH = replayed.attend(case.q, case.kv)
    graph.replay()
    assert relative_error(out_SNH, expected) < 1e-2
