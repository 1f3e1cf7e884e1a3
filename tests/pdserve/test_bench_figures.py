"""What a load comes to, from requests whose times are given."""

from __future__ import annotations

import numpy
import pytest
from rich.console import Console

from pdserve.bench import comparison, tables
from pdserve.bench.figures import Limits, figures, inter_token_ms, message_gap_ms
from pdserve.bench.following import Sent
from pdserve.bench.job import Done
from pdserve.bench.load import Point
from pdserve.bench.observer import Observed
from pdserve.bench.percentiles import spread

POINT = Point(rate=2.0, warmup_s=1.0, duration_s=4.0)
ANSWER = {
    "prompt_tokens": 8,
    "completion_tokens": 3,
    "cached_prompt_tokens": 0,
    "prefill_worker": "p",
    "decode_worker": "d",
    "kv_path": "REMOTE",
    "num_resumptions": 0,
    "queue_ms": 1.0,
    "prefill_ms": 2.0,
    "kv_transfer_ms": 3.0,
    "first_decode_ms": 4.0,
}


def sent(due_s: float, *messages: tuple[float, int], status: str = "OK", late_s: float = 0.0, measured=True) -> Sent:
    """Messages as (seconds after due, tokens); it ends with the last one."""
    times = [(due_s + after_s, number) for after_s, number in messages]
    ended_s = times[-1][0] if times else due_s + 0.001
    answer = ANSWER if status == "OK" else {}
    return Sent(0, measured, due_s, due_s + late_s, ended_s, times, status, answer)


def of(*requests: Sent, limits: Limits | None = None, point: Point = POINT, observed: Observed | None = None):
    return figures(point, 0.0, [Done(list(requests), observed or Observed([0.0], 0.1, 0.2))], limits or Limits())


def test_percentiles_are_numpys():
    values = [float(value * value % 37) for value in range(101)]
    expected = {f"p{percent}": numpy.percentile(values, percent) for percent in (50, 90, 95, 99)}
    measured = spread(values)
    assert {name: measured[name] for name in expected} == pytest.approx(expected)
    assert (measured["mean"], measured["max"]) == pytest.approx((numpy.mean(values), max(values)))


def test_no_value_has_no_percentile():
    assert spread([]) is None


def test_tokens_of_one_message_share_the_gap_before_it():
    one = sent(0.0, (0.1, 2), (0.2, 1), (0.5, 3))
    assert inter_token_ms(one) == pytest.approx([100.0, 100.0, 100.0, 100.0])
    assert message_gap_ms(one) == pytest.approx([100.0, 300.0])


def test_latencies_count_from_when_a_request_was_due():
    point = of(sent(1.0, (0.25, 1), (0.5, 1), late_s=0.2))
    assert point["ttft_ms"]["p50"] == pytest.approx(250.0)
    assert point["e2e_ms"]["p50"] == pytest.approx(500.0)


def test_warm_up_counts_for_nothing_but_tokens_that_come_in_the_window():
    point = of(sent(0.5, (0.1, 1), (0.7, 5), measured=False), sent(2.0, (0.1, 4)))
    assert point["requests"]["measured"] == 1
    assert point["ttft_ms"]["max"] == pytest.approx(100.0)
    assert point["throughput"]["output_tokens_per_s"] == pytest.approx((5 + 4) / 4.0)


def test_tokens_behind_the_window_are_no_throughput():
    point = of(sent(4.9, (0.05, 1), (0.5, 9)))
    assert point["throughput"]["output_tokens_per_s"] == pytest.approx(1 / 4.0)
    assert point["throughput"]["requests_per_s"] == 0
    assert point["requests"]["ok"] == 1


def test_a_window_of_so_many_requests_ends_with_the_last_of_them():
    counted = Point(concurrency=2, warmup_s=1.0, num_requests=2)
    point = of(sent(1.0, (0.5, 4)), sent(1.0, (1.5, 6)), point=counted)
    assert point["window_s"] == pytest.approx(1.5)
    assert point["throughput"]["output_tokens_per_s"] == pytest.approx(10 / 1.5)
    assert point["throughput"]["requests_per_s"] == pytest.approx(2 / 1.5)


def test_goodput_is_what_keeps_every_limit():
    limits = Limits(ttft_ms=100, inter_token_ms=50, e2e_ms=1000)
    good = sent(1.0, (0.05, 1), (0.09, 1))
    late, slow, long = sent(1.0, (0.2, 1)), sent(1.0, (0.1, 1), (0.2, 1)), sent(1.0, (0.05, 1), (1.5, 99))
    failed = sent(1.0, (0.1, 1), status="UNAVAILABLE WORKER_LOST")
    point = of(good, late, slow, long, failed, limits=limits)
    assert point["goodput"]["share"] == pytest.approx(1 / 5)
    assert point["goodput"]["requests_per_s"] == pytest.approx(1 / 4.0)
    assert point["goodput"]["output_tokens_per_s"] == pytest.approx(2 / 4.0)


def test_an_inter_token_limit_is_kept_by_the_mean_of_a_request():
    uneven = sent(1.0, (0.1, 1), (0.11, 1), (0.2, 1))
    assert of(uneven, limits=Limits(inter_token_ms=50))["goodput"]["share"] == 1
    assert of(uneven, limits=Limits(inter_token_ms=49))["goodput"]["share"] == 0


def test_what_is_refused_is_told_from_what_failed_and_has_no_latency():
    refused = sent(1.0, status="RESOURCE_EXHAUSTED QUEUE_FULL")
    predicted = sent(1.0, status="DEADLINE_EXCEEDED PREDICTED_TOO_LATE")
    failed = sent(1.0, (0.1, 1), status="DEADLINE_EXCEEDED")
    point = of(sent(1.0, (0.5, 1)), refused, predicted, failed)
    counts = point["requests"]
    assert (counts["measured"], counts["ok"], counts["refused"], counts["failed"]) == (4, 1, 2, 1)
    assert counts["by_status"]["DEADLINE_EXCEEDED PREDICTED_TOO_LATE"] == 1
    assert point["ttft_ms"]["p50"] == pytest.approx(500.0)


@pytest.mark.parametrize(
    ("late_s", "observed"),
    [(0.05, None), (0.0, Observed([0.05] * 100, 0.1, 0.2)), (0.0, Observed([0.0], 0.95, 1.2))],
)
def test_a_client_that_does_not_keep_up_says_so(late_s, observed):
    slow = of(sent(1.0, (0.5, 1), late_s=late_s), observed=observed)
    assert slow["client"]["is_bottleneck"]
    assert any("did not keep up at 2/s" in line.plain for line in tables.remarks([slow], {}))
    assert not of(sent(1.0, (0.5, 1)))["client"]["is_bottleneck"]


def test_a_comparison_matches_points_by_their_load(capsys):
    before, after = (
        {
            "points": [of(sent(1.0, (first_s, 1), (1.0, 1)))],
            "settings": {"prompt_tokens": prompts},
            "client": {"cores": 2, "cpu": "c", "versions": {}},
            "targets": [],
        }
        for first_s, prompts in ((0.2, "8"), (0.1, "16"))
    )
    Console(width=100).print(comparison.comparison(before, after, ("a.json", "b.json")))
    shown = capsys.readouterr().out
    assert "prompt_tokens differs: 8 and 16" in shown
    assert any(line.split() == ["first", "token,", "ms", "p50", "200", "100", "-50.0%"] for line in shown.splitlines())


def test_a_change_from_nothing_is_none():
    assert comparison.change(0.0, 5.0) is None
    assert comparison.change(2.0, 3.0) == 0.5
