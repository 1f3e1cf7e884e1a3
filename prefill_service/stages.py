"""The stages of one prompt as spans (`common.tracing`), from the times that its job keeps."""

from __future__ import annotations

import itertools

from common.tracing import Span
from prefill_service.engine import PrefillResult
from prefill_service.scheduler import Job


def record_stages(
    span: Span, job: Job, now_s: float, outcome: PrefillResult | BaseException, *, transport: str = ""
) -> None:
    """Each stage ends where the next begins; the last one ended with `outcome`, an error just now."""
    if not span.is_recorded:
        return
    result = outcome if isinstance(outcome, PrefillResult) else None
    error = outcome if isinstance(outcome, BaseException) else None
    end_s = job.first_token_s + result.kv_transfer_ms / 1e3 if result else now_s
    begun = [("queue", job.arrived_s), ("prefill", job.started_s), ("transfer", job.first_token_s)]
    # A job that was given up early has no times for the later ones.
    stages = [(name, start_s) for name, start_s in begun if start_s]
    attributes = _attributes(job, result, transport)
    for (name, start_s), (_, next_s) in itertools.pairwise([*stages, ("", end_s)]):
        is_last = name == stages[-1][0]
        span.stage(name, start_s, next_s, error if is_last else None, **attributes[name])


def _attributes(job: Job, result: PrefillResult | None, transport: str) -> dict[str, dict[str, int | str]]:
    prefill: dict[str, int | str] = {"num_tokens": job.sequence.num_tokens, "num_cached_tokens": job.num_cached_tokens}
    transfer: dict[str, int | str] = {"kv_bytes": result.kv_bytes, "kv_transport": transport} if result else {}
    return {"queue": {}, "prefill": prefill, "transfer": transfer}
