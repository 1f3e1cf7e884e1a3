from types import SimpleNamespace

from common.metrics import DecodeMetrics
from common.pipeline_metrics import FAMILIES, LANES, PREFIX

STATS = SimpleNamespace(
    mode=SimpleNamespace(value="static"),
    active=True,
    fallback_reason="",
    num_steps=10,
    num_pipelined_steps=7,
    num_profiled_steps=1,
    num_switches=3,
    num_rebalances=2,
    gain=1.05,
    bubble_share=0.25,
    handoff_bytes=4096,
    **{
        f"{lane}_{name}": value
        for lane, value in zip(LANES, (64, 68), strict=True)
        for name in ("sm", "sm_asked", "occupancy", "queue_depth", "stage_p50_ms", "stage_p99_ms")
    },
)


def value(metrics, name, **labels):
    return metrics.registry.get_sample_value(PREFIX + name, labels)


def test_statistics_are_read_once_for_each_scrape():
    metrics, calls = DecodeMetrics(), []
    metrics.pipeline.stats = lambda: calls.append(1) or STATS
    families = [family for family in metrics.registry.collect() if family.name.startswith(PREFIX)]
    assert len(calls) == 1
    assert {family.name for family in families} == {PREFIX + family.name for family in FAMILIES}


def test_lanes_steps_and_quantiles_are_labels():
    metrics = DecodeMetrics()
    metrics.pipeline.stats = lambda: STATS
    assert (value(metrics, "sm", lane="attention"), value(metrics, "sm_asked", lane="ffn")) == (64, 68)
    assert value(metrics, "steps_total", how="pipelined") == 7
    assert value(metrics, "steps_total", how="sequential") == 3
    assert value(metrics, "stage_seconds", lane="ffn", quantile="0.99") == 0.068
    assert value(metrics, "active") == 1
    assert value(metrics, "mode", mode="static") == 1


def test_the_reason_of_sequential_steps_is_a_label_and_none_when_pipelined():
    metrics = DecodeMetrics()
    metrics.pipeline.stats = lambda: SimpleNamespace(**{**vars(STATS), "fallback_reason": "NO_GPU"})
    assert value(metrics, "fallback", reason="NO_GPU") == 1
    metrics.pipeline.stats = lambda: STATS
    assert value(metrics, "fallback", reason="NO_GPU") is None


def test_without_statistics_there_are_no_samples():
    assert not [family for family in DecodeMetrics().registry.collect() if family.name.startswith(PREFIX)]
