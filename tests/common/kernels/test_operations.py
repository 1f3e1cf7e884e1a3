from __future__ import annotations

import dataclasses

import pytest
import torch

from common.model.batch import ForwardBatch
from common.model.config import ModelConfig
from tests.support.models import dummy_model_folder

pytest.importorskip("triton")

from common.kernels.decode_plan import default_tiling
from common.kernels.operations import KernelOperations, why_not

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def model_config(**changes):
    return dataclasses.replace(ModelConfig.from_folder(dummy_model_folder()), **changes)


def decode_batch(num_seqs):
    zeros = torch.zeros(num_seqs, dtype=torch.int32, device=DEVICE)
    return ForwardBatch(
        token_ids_T=zeros,
        positions_T=zeros,
        slot_mapping_T=zeros,
        query_starts=None,
        query_start_S1=None,
        kv_lens=None,
        kv_len_S=zeros,
        block_table_SP=zeros.view(num_seqs, 1),
        logit_rows=None,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decode_attention_is_tiled_for_the_models_dtype(dtype, monkeypatch):
    plans = []
    monkeypatch.setattr(
        "common.kernels.operations.decode_attention", lambda q, kv, table, plan, scale, **_: plans.append(plan)
    )
    operations = KernelOperations(model_config(head_dim=128), DEVICE)
    queries = torch.empty(3, 4, 128, dtype=dtype, device=DEVICE)
    operations.paged_attention(queries, torch.empty(0, device=DEVICE), decode_batch(3), 1.0)
    assert plans[0].tiling == default_tiling(3, 8, 128, dtype, fixed_pieces=False)


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"num_heads": 34, "num_kv_heads": 2}, "query heads of one kv head: 17"),
        ({"hidden_size": 16392}, "hidden_size: 16392"),
        ({"vocab_size": 2**19 + 1}, "vocab_size"),
        ({"head_dim": 96}, "head_dim"),
    ],
)
def test_a_model_that_the_kernels_cannot_run_is_told_apart_before_they_run(changes, what):
    assert what in why_not(model_config(**changes), DEVICE)


def test_the_kernels_run_the_tests_model():
    assert not why_not(model_config(), DEVICE)


def test_only_layers_after_the_first_read_the_plan_early(monkeypatch):
    settled = []
    monkeypatch.setattr(
        "common.kernels.operations.decode_attention", lambda *_, **options: settled.append(options["settled"])
    )
    operations = KernelOperations(model_config(), DEVICE)
    batch, queries = decode_batch(2), torch.empty(2, 4, 32, device=DEVICE)
    for _ in range(3):
        operations.paged_attention(queries, torch.empty(0, device=DEVICE), batch, 1.0)
    assert settled == [False, True, True]
