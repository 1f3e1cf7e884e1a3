"""What may be tried again after a failure, and how often."""

from __future__ import annotations

from common.errors import (
    Aborted,
    Cancelled,
    DataLoss,
    Internal,
    PdserveError,
    ResourceExhausted,
    Unavailable,
)
from router.workers import Worker

# Another worker, or the same one later, may succeed where one failed in this way.
RETRIABLE = (Unavailable, DataLoss, Aborted, Internal, ResourceExhausted, Cancelled)
# And another worker may where this one was started anew with another model, which the router had yet to hear.
RETRIABLE_REASONS = {"FINGERPRINT_MISMATCH", "MODEL_FINGERPRINT_MISMATCH"}
MAX_FAILURES = 3
# What a worker on its way out of service says, of new work and of what it can no longer finish.
DRAINING, HANDED_OVER = "DRAINING", "HANDED_OVER"


class Failures:
    """Those of one request since its last token."""

    def __init__(self) -> None:
        self._num_since_token = 0
        # To be avoided from now on.
        self.prefill_workers: set[Worker] = set()
        # To be avoided until it is met anew: the generation in which it failed.
        self.decode_workers: dict[Worker, int] = {}

    @property
    def excluded(self) -> list[Worker]:
        """Decode workers that have not been met anew since they failed."""
        return [worker for worker, generation in self.decode_workers.items() if worker.generation == generation]

    def add(self, error: PdserveError) -> None:
        """Raises `error` when trying again cannot help, or has been tried `MAX_FAILURES` times without a token.

        Work that is handed over has not failed.
        """
        if error.reason == HANDED_OVER:
            return
        self._num_since_token += 1
        may_help = isinstance(error, RETRIABLE) or error.reason in RETRIABLE_REASONS
        if self._num_since_token > MAX_FAILURES or not may_help:
            raise error

    def progressed(self) -> None:
        """A token came."""
        self._num_since_token = 0
