"""The life of one request, from the queue to its completion, over as many decode workers as it takes."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import NamedTuple

from common.errors import PdserveError, Unavailable
from common.tracing import DECODE, NO_SPAN, Span
from router.decode_stream import DecodeCompletion
from router.dispatcher import Placement
from router.failures import Failures
from router.leg import Leg
from router.meter import Meter
from router.output import Ending, Output, Piece
from router.parts import Parts
from router.path import PathRecord, ServingPath
from router.placement import Demand
from router.request import Request

log = logging.getLogger(__name__)

PutOut = Callable[[Piece], Awaitable[None]]


class Usage(NamedTuple):
    """Counts of tokens; the fields mean what Usage of the protocol says."""

    prompt_tokens: int
    completion_tokens: int
    cached_prompt_tokens: int


class Completed(NamedTuple):
    """How a request ended well."""

    ending: Ending
    usage: Usage
    path: ServingPath


class Session:
    """Runs once. Cancelling `run` ends the work on every worker."""

    def __init__(self, request: Request, parts: Parts, span: Span = NO_SPAN) -> None:
        """`span`: what the request's parts are recorded under."""
        model = parts.fleet.model
        assert model is not None, "requests are held against a model"
        eos = frozenset() if request.stopping.ignore_eos else model.eos_token_ids
        self._request = request
        self._output = Output(request.stopping, eos.union(request.stopping.stop_token_ids), parts.tokenizer)
        self._parts = parts
        self._span = span
        self._path = PathRecord()
        self._failures = Failures()

    async def run(self, put_out: PutOut) -> Completed:
        """Hands every piece of output to `put_out`, which may take its time: meanwhile tokens gather.

        Raises the PdserveError that ends the request.
        """
        with self._span.child("queue", start_s=self._request.arrival.received_s):
            placement = await self._parts.dispatcher.place(self._request)
        queued_s = self._parts.clock() - self._request.arrival.received_s
        self._path.queue_ms = queued_s * 1e3
        self._parts.metrics.queue_s.observe(queued_s)
        with (
            Meter(self._request, self._parts.dispatcher.queue, self._parts.clock) as meter,
            self._parts.metrics.running_requests.track_inprogress(),
            self._parts.pacer.stream(),
        ):
            completion = await self._serve(placement, meter, put_out)
        ending = self._output.finish(completion.ending)
        await self._put_out_ready(put_out)
        path = self._path.completed(completion)
        num_cached = min(self._path.num_cached_tokens or 0, self._request.num_prompt_tokens)
        usage = Usage(self._request.num_prompt_tokens, len(self._output.token_ids), num_cached)
        return Completed(ending, usage, path)

    async def _serve(self, placement: Placement, meter: Meter, put_out: PutOut) -> DecodeCompletion:
        while True:
            self._path.begin_leg()
            call = self._span.call(DECODE, placement.worker.address)
            leg = Leg(self._request, self._output, placement, self._parts, self._path, self._failures, meter, call)
            try:
                with call, leg:
                    return await self._follow(leg, put_out)
            except PdserveError as error:
                await self._put_out_ready(put_out)
                ending = self._output.ending
                if ending is not None:
                    return leg.presumed_completion(ending)
                placement = await self._place_elsewhere(placement, error)

    async def _follow(self, leg: Leg, put_out: PutOut) -> DecodeCompletion:
        while True:
            completion = await leg.advance()
            if completion is not None:
                if leg.lacks_prefill_answer:
                    await self._put_out_ready(put_out)
                    await leg.prefill_answer()
                return completion
            if await self._put_out_ready(put_out):
                leg.pause(self._parts.pacer.pause_s)

    async def _put_out_ready(self, put_out: PutOut) -> bool:
        piece = self._output.take()
        if piece is None:
            return False
        await put_out(piece)
        return True

    async def _place_elsewhere(self, placement: Placement, error: PdserveError) -> Placement:
        """A decode worker to go on with. Raises PdserveError when there is none, or when going on cannot help."""
        self._parts.fleet.heed(placement.worker, error)
        self._failures.add(error)
        self._failures.decode_workers[placement.worker] = placement.generation
        has_begun = bool(self._output.token_ids)
        self._output.resume()
        demand = Demand(
            [*self._request.prompt_token_ids, *self._output.token_ids],
            cache_salt=self._request.cache_salt,
            kind=placement.identity.kind if has_begun else None,
            request_id=self._request.request_id,
        )
        # What a worker refuses before anything has come, is refused.
        can_wait = has_begun or isinstance(error, Unavailable)
        found = await self._parts.dispatcher.place_again(demand, self._failures, error, can_wait=can_wait)
        log.info("going on at another decode worker: %s", error, extra={"worker": found.worker.address})
        self._span.event("going_on_elsewhere", cause=error.reason, has_begun=has_begun)
        if has_begun:
            self._path.num_resumptions += 1
            self._parts.metrics.resumptions.labels(cause=error.reason).inc()
        return found
