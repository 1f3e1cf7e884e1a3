"""The decode batch on the device: keeps its rows in step with the scheduler, launches steps, brings tokens back."""

from __future__ import annotations

from bisect import bisect_left

import torch
from torch import Tensor

from common.engine.buckets import batch_buckets
from common.engine.drawn_tokens import DrawnTokens
from common.engine.graphs import Progress
from common.engine.kv_cache import KvCache
from common.engine.prefiller import add_to_state
from common.engine.sampling_state import SamplingState
from common.engine.special_rows import PackedLogprobs, SpecialRows
from common.kernels.sampling import sample
from common.params import is_special
from decode_service.pipeline.execution import bounds
from decode_service.pipeline.order import NUM_MICRO_BATCHES
from decode_service.pipeline.scheduler import PipelineScheduler
from decode_service.reservations import Reservation
from decode_service.rows import DecodeRows, TokenSource

# The KV of two micro-batches is compared once in so many steps, and one pair of rows exchanged at most: lengths differ
# slowly, and an exchange is a copy to the device.
BALANCE_EVERY = 64
# Of the batch's KV, how much of it one micro-batch may have beyond its half.
MOST_EXCESS = 0.05


class DeviceStep(DrawnTokens):
    """See `decode_service.runner.Step`."""

    def __init__(self, rows: list[tuple[Reservation, int]], drawn: Tensor, logprobs: PackedLogprobs | None) -> None:
        super().__init__(drawn, len(rows), logprobs)
        self.rows = rows


class DeviceRunner:
    """See `decode_service.runner.DecodeRunner`."""

    max_in_flight = 2

    def __init__(
        self, pipeline: PipelineScheduler, cache: KvCache, *, max_num_seqs: int, vocab_size: int, context_length: int
    ) -> None:
        self._pipeline = pipeline
        self._block_size = cache.block_size
        self._buckets = batch_buckets(max_num_seqs)
        self._rows = DecodeRows(
            max_num_seqs,
            table_width=-(-context_length // cache.block_size),
            block_size=cache.block_size,
            scratch_block=cache.scratch_block,
            device=cache.device,
        )
        self._drawn = torch.zeros(2 * max_num_seqs, dtype=torch.int32, device=cache.device)
        self._token_ids_S = self._drawn[:max_num_seqs]
        self._scores_S = self._drawn[max_num_seqs:].view(torch.float32)
        # Of special rows alone.
        self._state = SamplingState(max_num_seqs, vocab_size, cache.device)
        # With their slots in the state.
        self._special: dict[Reservation, int] = {}
        self._special_rows: SpecialRows | None = None
        self._order: list[Reservation] = []
        self._row_of: dict[Reservation, int] = {}
        # Runs no more, or not in this row: its row is cleared with the next launch.
        self._left: set[Reservation] = set()
        # Blocks of each row's table that the device knows.
        self._num_blocks: list[int] = []
        self._until_balance = 0

    def warm_up(self) -> None:
        """Runs a step of every batch bucket over rows out of use, so that what is compiled or allocated lazily exists.

        `capture` does so too.
        """
        self._warm_up_edits()
        for size in reversed(self._buckets):
            self._pipeline.warm_up(self._rows.batch(size), self._finish)

    def capture(self, progress: Progress) -> None:
        """Captures a graph for every batch bucket, the largest first."""
        self._warm_up_edits()
        for done, size in enumerate(reversed(self._buckets)):
            progress(done, len(self._buckets))
            self._pipeline.capture(self._rows.batch(size), self._finish)
        progress(len(self._buckets), len(self._buckets))

    def launch(self, decoding: list[Reservation]) -> DeviceStep:
        self._arrange(decoding)
        num_rows = len(self._order)
        size = self._buckets[bisect_left(self._buckets, num_rows)]
        self._until_balance -= 1
        if self._until_balance <= 0 and self._pipeline.is_pipelined:
            self._until_balance = BALANCE_EVERY
            self._balance(size)
            self._find_special_rows()
        self._rows.flush()
        logits_SV = self._pipeline.decode_token(
            self._rows.batch(size),
            self._finish,
            num_seqs=num_rows,
            # To the block, which is near enough.
            mean_context=sum(self._num_blocks) * self._block_size / num_rows,
        )
        logprobs = None
        if self._special_rows is not None:
            sampling = self._rows.sampling(slice(size))
            logprobs = self._special_rows.draw(
                logits_SV, sampling, self._rows.positions_S[:size], self._token_ids_S, self._scores_S
            )
            self._rows.token_ids_S[:num_rows].copy_(self._token_ids_S[:num_rows])
        rows = [(reservation, reservation.attempt) for reservation in self._order]
        return DeviceStep(rows, self._drawn, logprobs)

    def leave(self, reservation: Reservation) -> None:
        if reservation in self._row_of:
            self._left.add(reservation)

    def _warm_up_edits(self) -> None:
        self._rows.clear(0)
        self._rows.flush()

    def _finish(self, logits_SV: Tensor) -> None:
        """The end of every step, captured with it: draws each row's token and makes it the next step's input."""
        rows = slice(len(logits_SV))
        tokens_S = self._token_ids_S[rows]
        sample(logits_SV, self._rows.sampling(rows), self._rows.positions_S[rows] + 1, tokens_S, self._scores_S[rows])
        self._rows.advance(tokens_S)

    def _arrange(self, decoding: list[Reservation]) -> None:
        """Makes the rows in use those of `decoding`: holes close, newcomers go to the end, tables grow."""
        staying = set(decoding) - self._left
        # From the end, so that the row that closes a hole is one that stays.
        for reservation in [r for r in reversed(self._order) if r not in staying]:
            self._remove(reservation)
        self._left.clear()
        for row, (reservation, num_blocks) in enumerate(zip(self._order, self._num_blocks, strict=True)):
            table = reservation.sequence.block_table
            if len(table) != num_blocks:
                self._rows.grow(row, table, num_blocks, reservation.next_position)
                self._num_blocks[row] = len(table)
        for reservation in [r for r in decoding if r not in self._row_of]:
            self._append(reservation)
        self._find_special_rows()

    def _find_special_rows(self) -> None:
        if self._special and self._special_rows is None:
            rows = [self._row_of[reservation] for reservation in self._special]
            self._special_rows = SpecialRows(self._state, rows, list(self._special.values()))

    def _append(self, reservation: Reservation) -> None:
        row, sequence = len(self._order), reservation.sequence
        request = sequence.request
        special = is_special(request.sampling, request.stopping.min_tokens, request.num_logprobs)
        if special:
            add_to_state(self._state, reservation.slot, sequence)
            self._special[reservation] = reservation.slot
            self._special_rows = None
        self._rows.put(row, sequence, position=reservation.next_position, stops_here=not special)
        self._order.append(reservation)
        self._row_of[reservation] = row
        self._num_blocks.append(len(sequence.block_table))

    def _move(self, reservation: Reservation, token: TokenSource, row: int) -> None:
        stops_here = reservation not in self._special
        self._rows.move(token, row, reservation.sequence, position=reservation.next_position, stops_here=stops_here)
        self._order[row], self._row_of[reservation] = reservation, row
        self._num_blocks[row] = len(reservation.sequence.block_table)

    def _balance(self, num_rows: int) -> None:
        """Exchanges two rows of two micro-batches, if that brings their KV nearer to each other by much.

        `num_rows`: of the step, those out of use among them.
        """
        boundary = bounds(num_rows, NUM_MICRO_BATCHES)[1]
        first, second = self._num_blocks[:boundary], self._num_blocks[boundary:]
        excess = (sum(first) - sum(second)) // 2
        if not first or not second or abs(excess) <= MOST_EXCESS * sum(self._num_blocks):
            return
        # Of each row in the first, the one in the second that is nearest to what would even them out.
        by_size = sorted(range(len(second)), key=second.__getitem__)
        sizes = [second[index] for index in by_size]
        nearest = (
            (row, by_size[min(max(bisect_left(sizes, size - excess) + step, 0), len(sizes) - 1)])
            for row, size in enumerate(first)
            for step in (-1, 0)
        )
        row, index = min(nearest, key=lambda pair: abs(first[pair[0]] - second[pair[1]] - excess))
        if abs(first[row] - second[index] - excess) < abs(excess):
            self._exchange(row, boundary + index)

    def _exchange(self, row: int, other_row: int) -> None:
        reservation, other = self._order[row], self._order[other_row]
        token, other_token = self._rows.token_of(row), self._rows.token_of(other_row)
        self._move(reservation, token, other_row)
        self._move(other, other_token, row)
        self._special_rows = None

    def _remove(self, reservation: Reservation) -> None:
        """Moves the last row into the hole. The host may not know its newest token yet."""
        row = self._row_of.pop(reservation)
        last = self._order.pop()
        self._num_blocks.pop()
        if last is not reservation:
            self._move(last, self._rows.token_of(len(self._order)), row)
        self._rows.clear(len(self._order))
        if reservation in self._special:
            self._state.remove(self._special.pop(reservation))
        # The rows of those that remain may have changed.
        self._special_rows = None
