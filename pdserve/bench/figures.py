"""What one point of load comes to. Every figure here is defined in docs/bench.md.

Latencies are those of requests that were due in the window and ended OK, and count from when they were due. What was
not OK has no latency, and no part in the goodput.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from pdserve.bench.following import Sent
from pdserve.bench.job import Done
from pdserve.bench.load import Point
from pdserve.bench.observer import Observed
from pdserve.bench.percentiles import percentile, spread

# Statuses that say: not now. Others are failures.
REFUSALS = (
    "RESOURCE_EXHAUSTED",
    "DEADLINE_EXCEEDED PREDICTED_TOO_LATE",
    "UNAVAILABLE DRAINING",
    "UNAVAILABLE NO_WORKER",
)
STAGES = ("queue_ms", "prefill_ms", "kv_transfer_ms", "first_decode_ms")
# A client that sends or hears later than this, or whose event loop has less time left, measures itself as well.
LATE_MS = 10.0
BUSY_SHARE = 0.85


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Of a good request, in milliseconds; None: any will do. Inter-token is the mean of the request's."""

    ttft_ms: float | None = None
    inter_token_ms: float | None = None
    e2e_ms: float | None = None

    def are_met_by(self, sent: Sent) -> bool:
        if not sent.is_ok:
            return False
        gaps = inter_token_ms(sent)
        pairs = (
            (self.ttft_ms, ttft_ms(sent)),
            (self.inter_token_ms, sum(gaps) / len(gaps) if gaps else 0.0),
            (self.e2e_ms, e2e_ms(sent)),
        )
        return all(limit is None or (value is not None and value <= limit) for limit, value in pairs)


def ttft_ms(sent: Sent) -> float | None:
    """From due to the first message with tokens; None when none came."""
    return (sent.messages[0][0] - sent.due_s) * 1e3 if sent.messages else None


def e2e_ms(sent: Sent) -> float:
    return (sent.ended_s - sent.due_s) * 1e3


def message_gap_ms(sent: Sent) -> list[float]:
    """From one message with tokens to the next: how long a user sees nothing move."""
    return [(after - before) * 1e3 for (before, _), (after, _) in itertools.pairwise(sent.messages)]


def inter_token_ms(sent: Sent) -> list[float]:
    """One value for each token behind the first message: k tokens in a message share the gap before it evenly."""
    return [
        (after - before) * 1e3 / num_tokens
        for (before, _), (after, num_tokens) in itertools.pairwise(sent.messages)
        for _ in range(num_tokens)
    ]


def figures(point: Point, start_s: float, parts: Sequence[Done], limits: Limits) -> dict[str, Any]:
    """As they stand in the JSON file."""
    sent = [one for part in parts for one in part.sent]
    measured = [one for one in sent if one.is_measured]
    ok = [one for one in measured if one.is_ok]
    opened_s = start_s + point.warmup_s
    if point.duration_s is not None:
        window_s = point.duration_s
    else:
        window_s = max((one.ended_s for one in measured), default=opened_s) - opened_s
    window_s = max(window_s, 1e-9)
    good = [one for one in measured if limits.are_met_by(one)]
    in_window = [
        num_tokens for one in sent for at_s, num_tokens in one.messages if opened_s <= at_s <= opened_s + window_s
    ]
    ended = [one for one in sent if one.is_ok and opened_s <= one.ended_s <= opened_s + window_s]
    times = [value for one in ok if (value := ttft_ms(one)) is not None]
    return {
        "load": point.name,
        "rate": point.rate,
        "arrivals": point.arrivals if point.rate is not None else None,
        "concurrency": point.concurrency,
        "warmup_s": point.warmup_s,
        "window_s": window_s,
        "requests": _counts(sent, measured, ok),
        "throughput": {
            "output_tokens_per_s": sum(in_window) / window_s,
            "prompt_tokens_per_s": sum(one.answer["prompt_tokens"] for one in ended) / window_s,
            "requests_per_s": len(ended) / window_s,
            "offered_requests_per_s": len(measured) / window_s,
        },
        "goodput": {
            "requests_per_s": len(good) / window_s,
            "output_tokens_per_s": sum(one.num_tokens for one in good) / window_s,
            "share": len(good) / len(measured) if measured else 0.0,
        },
        "ttft_ms": spread(times),
        "inter_token_ms": spread(value for one in ok for value in inter_token_ms(one)),
        "message_gap_ms": spread(value for one in ok for value in message_gap_ms(one)),
        "e2e_ms": spread(e2e_ms(one) for one in ok),
        "tokens": _tokens(ok),
        "paths": dict(Counter(one.answer["kv_path"] for one in ok)),
        "workers": dict(Counter(_workers(one) for one in ok)),
        "num_resumptions": sum(one.answer["num_resumptions"] for one in ok),
        "stages_ms": {stage.removesuffix("_ms"): spread(one.answer[stage] for one in ok) for stage in STAGES},
        "client": _client(point, sent, [part.observed for part in parts]),
    }


def _counts(sent: Sequence[Sent], measured: Sequence[Sent], ok: Sequence[Sent]) -> dict[str, Any]:
    statuses = Counter(one.status for one in measured)
    refused = sum(number for status, number in statuses.items() if status.startswith(REFUSALS))
    return {
        "warmup": len(sent) - len(measured),
        "measured": len(measured),
        "ok": len(ok),
        "refused": refused,
        "failed": len(measured) - len(ok) - refused,
        "by_status": dict(statuses.most_common()),
    }


def _tokens(ok: Sequence[Sent]) -> dict[str, float]:
    def mean(values: Iterable[int]) -> float:
        return sum(values) / len(ok) if ok else 0.0

    return {
        "prompt_mean": mean(one.answer["prompt_tokens"] for one in ok),
        "cached_mean": mean(one.answer["cached_prompt_tokens"] for one in ok),
        "output_mean": mean(one.num_tokens for one in ok),
        "per_message_mean": sum(one.num_tokens for one in ok) / max(1, sum(len(one.messages) for one in ok)),
    }


def _workers(sent: Sent) -> str:
    path = sent.answer
    return f"{path['prefill_worker']} → {path['decode_worker']}"


def _client(point: Point, sent: Sequence[Sent], observed: Sequence[Observed]) -> dict[str, Any]:
    """Whether the client itself was too slow for this load."""
    late = sorted((one.sent_s - one.due_s) * 1e3 for one in sent if one.sent_s)
    lags = sorted(lag_s * 1e3 for one in observed for lag_s in one.lags_s)
    late_p99 = percentile(late, 99) if late and point.rate is not None else 0.0
    lag_p99 = percentile(lags, 99) if lags else 0.0
    loop_share = max((one.loop_share for one in observed), default=0.0)
    return {
        "processes": len(observed),
        "late_p99_ms": late_p99,
        "loop_lag_p99_ms": lag_p99,
        "loop_lag_max_ms": lags[-1] if lags else 0.0,
        "busiest_loop_share": loop_share,
        "cpu_cores": sum(one.process_share for one in observed),
        "is_bottleneck": max(late_p99, lag_p99) > LATE_MS or loop_share > BUSY_SHARE,
    }
