"""What all sessions of a router share."""

from __future__ import annotations

from typing import NamedTuple

from common.clock import Clock
from common.metrics import RouterMetrics
from common.tokenization import Tokenizer
from common.tracing import Tracer
from router.dispatcher import Dispatcher
from router.explanation import PlacementLog
from router.fleet import Fleet
from router.local_prefill import LocalPrefill
from router.pacer import Pacer


class Parts(NamedTuple):
    fleet: Fleet
    dispatcher: Dispatcher
    local_prefill: LocalPrefill
    placings: PlacementLog
    pacer: Pacer
    # None: token ids alone go in and out.
    tokenizer: Tokenizer | None
    metrics: RouterMetrics
    tracer: Tracer
    clock: Clock
