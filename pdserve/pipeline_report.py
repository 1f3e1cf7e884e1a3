"""The statistics of a decode worker's attention/FFN pipeline in words, as `pdserve stats` and `LLM` print them."""

from __future__ import annotations

from pdserve.results import PipelineStats

_REASONS = {
    "DISABLED": "the mode says so",
    "PLAIN_KERNELS": "the model or the GPU is beyond the kernels of pdserve; the log of its start says why",
}


def report_lines(stats: PipelineStats) -> list[str]:
    """A header, the figures, and what mode and device make of them."""
    return ["Pipeline statistics", *("  " + line for line in (*_figures(stats), *_state(stats), *_lanes(stats)))]


def _figures(stats: PipelineStats) -> list[str]:
    return [
        f"Total tokens: {stats.total_tokens}",
        f"Avg attention time: {stats.attention_ms:.2f} ms",
        f"Avg FFN time: {stats.ffn_ms:.2f} ms",
        f"Avg total time: {stats.total_ms:.2f} ms",
        f"Attention SMs: {stats.attention_sm}",
        f"FFN SMs: {stats.ffn_sm}",
    ]


def _state(stats: PipelineStats) -> list[str]:
    lines = [f"Mode: {stats.mode.lower()}", f"Active: {_active(stats)}", _steps(stats)]
    if stats.num_pipelined_steps:
        gain = f"{stats.gain:.2f} x sequential" if stats.gain else "not measured yet"
        lines.append(f"Gain: {gain}; {stats.num_switches} switches, {stats.num_rebalances} rebalances")
    if (stats.attention_sm_asked, stats.ffn_sm_asked) != (stats.attention_sm, stats.ffn_sm):
        lines.append(f"SMs asked for: {stats.attention_sm_asked} attention, {stats.ffn_sm_asked} FFN")
    return lines


def _lanes(stats: PipelineStats) -> list[str]:
    if not stats.num_profiled_steps:
        return []
    return [
        f"Attention stages: p50 {stats.attention_stage_p50_ms:.3f} ms, p99 {stats.attention_stage_p99_ms:.3f} ms; "
        f"busy {stats.attention_occupancy:.0%} of a step, {stats.attention_queue_depth:.2f} waiting",
        f"FFN stages: p50 {stats.ffn_stage_p50_ms:.3f} ms, p99 {stats.ffn_stage_p99_ms:.3f} ms; "
        f"busy {stats.ffn_occupancy:.0%} of a step, {stats.ffn_queue_depth:.2f} waiting",
        f"Bubbles: {stats.bubble_share:.0%} of both lanes' time",
        f"From attention to FFN: {stats.handoff_bytes:,} bytes a layer and token",
    ]


def _active(stats: PipelineStats) -> str:
    if stats.active:
        return f"yes, cut {stats.cut}"
    words = stats.fallback_detail or _REASONS.get(stats.fallback_reason)
    reason = f"{stats.fallback_reason}: {words}" if words else stats.fallback_reason
    return f"no, attention and FFN take turns on the whole device ({reason})"


def _steps(stats: PipelineStats) -> str:
    steps = f"Steps: {stats.num_steps}, {stats.num_pipelined_steps} of them pipelined"
    if stats.num_profiled_steps:
        return f"{steps}, {stats.num_profiled_steps} profiled"
    return f"{steps}, none profiled (attention and FFN times need decode_pipeline_profiling)"
