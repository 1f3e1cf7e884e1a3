from __future__ import annotations

import itertools
import json

import pytest

from benchmarks import summary
from benchmarks.decode_step_plot import apart

DECODE_STEP = [
    {"model": "Qwen3-8B", "batch": 1, "step_ms": 4.0, "target_ms": 4.4, "vllm_ms": 5.15, "floor_ms": 3.6},
    {"model": "Qwen3-8B", "batch": 1024, "step_ms": 50.6, "target_ms": 46.0, "vllm_ms": 52.9, "floor_ms": 40.1},
]


@pytest.fixture
def keep(tmp_path):
    """Writes a result as `Report.save` does."""

    def write(stem: str, rows: list[dict[str, object]], *, slug: str = "some-gpu") -> None:
        content = {"slug": slug, "hardware": "Some GPU, driver 1", "versions": "torch 2", "commit": "abc", "rows": rows}
        (tmp_path / f"{slug}-{stem}.json").write_text(json.dumps(content))

    return write


def row_of(results, what: str) -> dict[str, str]:
    rows = summary.summary(summary.load(results, "some-gpu"))
    return next(row for row in rows if row["what"] == what)


def test_a_missed_target_says_by_how_much(tmp_path, keep):
    keep("decode-step-8b", DECODE_STEP)
    assert row_of(tmp_path, "decode step, Qwen3-8B, batch 1")["outcome"] == "met"
    assert row_of(tmp_path, "decode step, Qwen3-8B, batch 1,024")["outcome"] == "missed by 10.0 %"
    assert row_of(tmp_path, "decode step, Qwen3-8B, batch 1")["commit"] == "abc"


def test_what_was_not_measured_is_named(tmp_path, keep):
    keep("decode-step-8b", DECODE_STEP)
    assert row_of(tmp_path, "mixed workload")["measured"] == "not run"


def test_rates_must_reach_their_target_and_times_stay_within(tmp_path, keep):
    rate = {"model": "Qwen3-8B", "what": "16 x 2,048 tokens/s", "ours": 42_000.0, "target": 43_000}
    first = {"model": "Qwen3-8B", "what": "first token of 512, ms", "ours": 13.0, "target": 14}
    keep("prefill-8b", [one | {"vllm": 1.0, "floor": 1.0} for one in (rate, first)])
    assert row_of(tmp_path, "prefill, Qwen3-8B, 16 x 2,048 tokens/s")["outcome"] == "missed by 2.3 %"
    assert row_of(tmp_path, "prefill, Qwen3-8B, first token of 512")["measured"] == "13 ms"


def test_labels_keep_their_distance_and_their_order():
    places = apart({"floor": 17.6, "target": 20.0, "ours": 20.1, "other": 22.9}, least=0.08)
    assert list(places) == ["floor", "target", "ours", "other"]
    values = list(places.values())
    assert all(high / low > 10**0.079 for low, high in itertools.pairwise(values))


def test_the_only_gpu_with_results_is_the_one(tmp_path, keep, monkeypatch):
    monkeypatch.setattr(summary, "environment", lambda: {"slug": "cpu-2-cores"})
    keep("handover", [], slug="cpu-2-cores")
    keep("decode-step-8b", DECODE_STEP)
    assert summary.chosen_hardware([], tmp_path) == "some-gpu"
    with pytest.raises(SystemExit, match="name one hardware of cpu-2-cores, some-gpu"):
        summary.chosen_hardware(["another-gpu"], tmp_path)


def test_table_and_plot_are_kept(tmp_path, keep):
    pytest.importorskip("matplotlib")
    keep("decode-step-8b", DECODE_STEP)
    text = summary.write(tmp_path, "some-gpu").read_text()
    assert "some-gpu-decode-step.png" in text
    assert (tmp_path / "some-gpu-decode-step.png").stat().st_size > 10_000


def test_services_are_compared_with_the_engine_alone(tmp_path, keep):
    alone = {"streams": 64, "routers": 0, "clients": 0}
    served = {
        "streams": 64,
        "routers": 1,
        "clients": 1,
        "tokens_per_s": 19_000.0,
        "ratio": 0.9,
        "idle_share": 0.1,
        "first_token_added_ms": 4.5,
    }
    keep("through-services", [alone, served])
    how = "64 streams, 1 router, 1 client process"
    assert row_of(tmp_path, f"through the services, {how}")["outcome"] == "missed by 5.3 %"
    assert row_of(tmp_path, f"first token through the services, {how}")["outcome"] == "missed by 1.5 ms"


def test_every_kind_of_result_has_its_lines(tmp_path, keep):
    keep("mixed-workload", [{"model": "M", "tokens_per_s": 28_000.0, "vllm": 23_400, "target": 27_000}])
    handover = {"p50_ms": 2.0, "p99_ms": 3.0, "router_p50_ms": 4.0, "router_p99_ms": 5.0}
    keep("handover-gpu", [{"transport": "cuda-ipc", "prompt_tokens": 512} | handover])
    gaps = {"largest_ms": 9.0, "p99_ms": 8.0, "ratio": 1.2, "target_ratio": 1.3, "vllm_ms": None}
    keep("interference", [{"what": "KV arrives"} | gaps])
    keep("determinism-cost", [{"model": "M", "batch": 1, "deterministic_ms": 2.0, "ratio": 1.5}])
    apart = {"first_divergence_min": 3, "first_divergence_median": 10.5, "must_be_identical": False}
    keep("agreement", [{"what": "ours", "identical": 60, "prompts": 64, "tokens": 64} | apart])
    step = {"model": "Qwen3-8B", "context": 1024, "what": "attention-core 64:68", "pipelined": True}
    pipelined = [
        step | {"batch": batch, "ms": ms, "gain": 5 / ms} for batch, ms in ((256, 4.0), (512, 5.0), (512, 6.0))
    ]
    keep("decode-pipeline-8b", pipelined)
    rows = summary.summary(summary.load(tmp_path, "some-gpu"))
    measured = {row["what"]: (row["measured"], row["outcome"]) for row in rows if row["commit"]}
    assert measured == {
        "mixed workload, M": ("28,000 tokens/s", "met"),
        "hand-over on one GPU over cuda-ipc, 512 tokens": (
            "p50 2, p99 3 ms; at a client of the router 4, 5 ms",
            "",
        ),
        "64 decodes of Qwen3-8B, KV arrives: largest gap between tokens": (
            "9 ms, p99 8 ms, 1.2 × the undisturbed step",
            "met",
        ),
        "decode step with deterministic, M, batch 1": ("2 ms, 1.5 × the step without", ""),
        "greedy tokens, ours": (
            "60 of 64 prompts alike in all 64 tokens; the others until token 3 at the earliest, median 10.5",
            "",
        ),
        "attention/FFN pipeline, Qwen3-8B, best of 1 cell: batch 512, context 1,024, attention-core 64:68": (
            "1 × as fast as the sequential step",
            "missed by 9.1 %",
        ),
    }
