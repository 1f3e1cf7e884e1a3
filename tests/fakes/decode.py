"""A decode worker without a model: its tokens come from a script, its faults from attributes."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

import grpc.aio

from common.errors import Aborted, PdserveError, Unavailable
from pdserve.v1 import decode_pb2, decode_pb2_grpc, prefill_pb2, types_pb2
from tests.fakes.worker import FakeWorker


@dataclass(eq=False)
class FakeReservation:
    """One stream: `token_ids` is the prompt and what was put out."""

    opening: decode_pb2.Open
    token_ids: list[int]
    attempt: int = 0
    is_filled: bool = False
    commands: asyncio.Queue = field(default_factory=asyncio.Queue)

    @property
    def num_output(self) -> int:
        return len(self.token_ids) - self.opening.num_prompt_tokens


class FakeDecode(FakeWorker, decode_pb2_grpc.DecodeServiceServicer):
    """Token number n of any output is `script[n]`, or 100 + n beyond the script, whichever worker puts it out."""

    role = types_pb2.ROLE_DECODE

    def __init__(self, script: Sequence[int] = (), **identity: object) -> None:
        super().__init__(**identity)
        self.script = list(script)
        self.chunk_size = 1
        # Raised when a stream opens.
        self.refusal: PdserveError | None = None
        # While clear, no attempt begins.
        self.may_reserve = asyncio.Event()
        self.may_reserve.set()
        # While clear, no token comes beyond `pause_at`.
        self.go = asyncio.Event()
        self.go.set()
        self.pause_at = 0
        # Each happens once, at that number of output tokens: the stream dies; the KV is lost for that reason.
        self.die_at: list[int] = []
        self.dies_with: PdserveError = Unavailable("this worker died")
        self.lose_at: list[tuple[int, int]] = []
        # Ends without saying so, once every token is out.
        self.die_before_completion = False
        self.num_cached_tokens = 0
        self.pair_endpoint = ""
        # What happened, for tests to look at.
        self.opened: list[decode_pb2.Open] = []
        self.retries: list[decode_pb2.Retry] = []
        self.time_remaining_s: float | None = None
        self.num_finishes = 0
        self.num_cut_off = 0
        self._reservations: dict[int, FakeReservation] = {}
        self._ids = itertools.count(1)

    def add_to(self, server: grpc.aio.Server) -> None:
        super().add_to(server)
        decode_pb2_grpc.add_DecodeServiceServicer_to_server(self, server)

    def token(self, place: int) -> int:
        return self.script[place] if place < len(self.script) else 100 + place

    def commit(self, request: prefill_pb2.PrefillRequest) -> None:
        """What a pair does: the KV of a Prefill call has arrived. Raises Aborted when it is fenced off."""
        reservation = self._reservations.get(request.reservation)
        if reservation is None or request.attempt != reservation.attempt:
            raise Aborted(f"attempt {request.attempt} is fenced off")
        opening = reservation.opening
        expected = (reservation.token_ids, opening.num_prompt_tokens, opening.sampling.seed, opening.stopping)
        given = (list(request.token_ids.ids), request.num_prompt_tokens, request.sampling.seed, request.stopping)
        if expected != given:
            self.violations.append(f"decode expects {expected}, prefill was given {given}")
        reservation.is_filled = True
        reservation.commands.put_nowait("filled")

    async def Decode(
        self, request_iterator: AsyncIterator[decode_pb2.DecodeRequest], context: grpc.aio.ServicerContext
    ) -> AsyncIterator[decode_pb2.DecodeResponse]:
        opening = (await anext(request_iterator)).open
        self.opened.append(opening)
        self.time_remaining_s = context.time_remaining()
        if self.refusal is not None:
            raise self.refusal
        number = next(self._ids)
        reservation = self._reservations[number] = FakeReservation(opening, list(opening.token_ids.ids))
        reader = asyncio.create_task(self._read(request_iterator, reservation))
        is_complete = False
        with self._working(opening.model_fingerprint):
            try:
                async for response in self._serve(number, reservation):
                    is_complete = response.HasField("completion")
                    yield response
            finally:
                self.num_cut_off += not is_complete
                del self._reservations[number]
                reader.cancel()

    async def _serve(self, number: int, reservation: FakeReservation) -> AsyncIterator[decode_pb2.DecodeResponse]:
        is_local = reservation.opening.local_prefill
        is_recomputed = reservation.num_output > 0
        while True:
            await self.may_reserve.wait()
            reservation.attempt += 1
            reservation.is_filled = is_local
            yield self._reserved(number, reservation)
            while not reservation.is_filled:
                command = await reservation.commands.get()
                if isinstance(command, decode_pb2.Retry):
                    is_local = command.local_prefill
                    break
            else:
                async for response in self._put_out(reservation):
                    yield response
                    if response.HasField("prefill_needed"):
                        break
                else:
                    yield self._completion(reservation, is_local, is_recomputed)
                    return
                is_recomputed = True
                retry = await self._next_retry(reservation)
                if retry is None:
                    yield self._completion(reservation, is_local, is_recomputed)
                    return
                is_local = retry.local_prefill

    async def _put_out(self, reservation: FakeReservation) -> AsyncIterator[decode_pb2.DecodeResponse]:
        chunk = decode_pb2.DecodeChunk()
        stopping = reservation.opening.stopping
        while not (self._has_ended(reservation) or self._is_finished(reservation)):
            if reservation.num_output in self.die_at:
                self.die_at.remove(reservation.num_output)
                raise self.dies_with
            for fault in self.lose_at:
                if fault[0] == reservation.num_output:
                    self.lose_at.remove(fault)
                    needed = decode_pb2.PrefillNeeded(attempt=reservation.attempt, reason=fault[1], detail="a fault")
                    yield decode_pb2.DecodeResponse(prefill_needed=needed)
                    return
            if reservation.num_output >= self.pause_at:
                await self.go.wait()
            token_id = self.token(reservation.num_output)
            reservation.token_ids.append(token_id)
            chunk.token_ids.append(token_id)
            if reservation.opening.HasField("num_logprobs"):
                chunk.logprobs.add(token_id=token_id, logprob=-1.0, rank=1)
            if reservation.opening.HasField("num_prompt_logprobs") and reservation.num_output == 1:
                for prompt_id in reservation.token_ids[1 : reservation.opening.num_prompt_tokens]:
                    chunk.prompt_logprobs.add(token_id=prompt_id, logprob=-2.0, rank=1)
            if len(chunk.token_ids) == self.chunk_size or reservation.num_output == stopping.max_tokens:
                yield decode_pb2.DecodeResponse(chunk=chunk)
                chunk = decode_pb2.DecodeChunk()
            await asyncio.sleep(0)
        if chunk.token_ids:
            yield decode_pb2.DecodeResponse(chunk=chunk)
        if self.die_before_completion:
            raise Unavailable("this worker died before it was done")

    def _has_ended(self, reservation: FakeReservation) -> bool:
        return self._stop_token(reservation) is not None or (
            reservation.num_output >= reservation.opening.stopping.max_tokens
        )

    def _stop_token(self, reservation: FakeReservation) -> int | None:
        stopping = reservation.opening.stopping
        ids = {*stopping.stop_token_ids, *(() if stopping.ignore_eos else self.identity.eos_token_ids)}
        if reservation.num_output < max(stopping.min_tokens, 1) or reservation.token_ids[-1] not in ids:
            return None
        return reservation.token_ids[-1]

    def _is_finished(self, reservation: FakeReservation) -> bool:
        while not reservation.commands.empty():
            if isinstance(reservation.commands.get_nowait(), decode_pb2.Finish):
                return True
        return False

    async def _next_retry(self, reservation: FakeReservation) -> decode_pb2.Retry | None:
        """None: finish came instead."""
        while True:
            command = await reservation.commands.get()
            if isinstance(command, decode_pb2.Finish):
                return None
            if isinstance(command, decode_pb2.Retry) and command.attempt == reservation.attempt:
                return command

    async def _read(self, requests: AsyncIterator[decode_pb2.DecodeRequest], reservation: FakeReservation) -> None:
        async for request in requests:
            if request.HasField("retry"):
                self.retries.append(request.retry)
                reservation.commands.put_nowait(request.retry)
            elif request.HasField("finish"):
                self.num_finishes += 1
                reservation.commands.put_nowait(request.finish)
            else:
                self.violations.append(f"a second open or nothing at all: {request}")

    def _reserved(self, number: int, reservation: FakeReservation) -> decode_pb2.DecodeResponse:
        return decode_pb2.DecodeResponse(
            reserved=decode_pb2.Reserved(
                reservation=number,
                attempt=reservation.attempt,
                pair_endpoint=self.pair_endpoint,
                num_cached_tokens=self.num_cached_tokens,
                queue_ms=1.0,
            )
        )

    def _completion(
        self, reservation: FakeReservation, is_local: bool, is_recomputed: bool
    ) -> decode_pb2.DecodeResponse:
        path = types_pb2.KV_PATH_LOCAL if is_local else types_pb2.KV_PATH_REMOTE
        by_length = reservation.num_output >= reservation.opening.stopping.max_tokens
        stop_token_id = self._stop_token(reservation)
        return decode_pb2.DecodeResponse(
            completion=decode_pb2.DecodeCompletion(
                finish_reason=types_pb2.FINISH_REASON_LENGTH
                if by_length and stop_token_id is None
                else types_pb2.FINISH_REASON_STOP,
                stop_token_id=stop_token_id,
                num_output_tokens=reservation.num_output,
                kv_path=types_pb2.KV_PATH_RECOMPUTED if is_recomputed else path,
                kv_bytes=0 if is_local else 4096,
                kv_transport="" if is_local else "fake",
                first_decode_ms=4.0,
                decode_worker=self.identity.instance_id,
                num_cached_tokens=self.num_cached_tokens if is_local else 0,
                local_prefill_ms=5.0 if is_local else 0.0,
            )
        )
