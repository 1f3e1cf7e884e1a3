"""Both ends of a pair over a real process group; the control stream is a call from one to the other."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import torch

from common.engine.kv_cache import KvCache
from common.params import TokenLogprob
from common.transport.messages import AttemptKey, ChunkHeader, Commit, TransferStatus
from common.transport.outgoing import OutgoingAttempt
from common.transport.receiving import ReceivingPair
from common.transport.sending import SendingPair
from tests.common.transport.fakes import (
    NUM_LAYERS,
    WAIT_S,
    FakeEngine,
    FakeReservation,
    FaultyGroup,
    Outcomes,
    gloo_groups,
    small_cache,
    until,
)

OK, FENCED, CORRUPT, INVALID = TransferStatus
A = AttemptKey(7, 1)
PAIR_ID = 4


class Bench:
    """A pair between two caches."""

    def __init__(self, groups, source: KvCache, *, num_slots: int = 4, max_chunk_bytes: int = 64 * 1024) -> None:
        self.source = source
        self.engine = FakeEngine(small_cache(source.num_blocks, num_layers=source.num_layers))
        self.outcomes = Outcomes()
        self.wire = FaultyGroup(groups[0])
        self.announced: list[ChunkHeader] = []
        self.ends: list[str] = []
        sizes = {"max_chunk_bytes": max_chunk_bytes}
        self.decode = ReceivingPair(
            PAIR_ID,
            "decode",
            groups[1],
            self.engine,
            num_slots=num_slots,
            post=lambda message: self.prefill.handle(message),
            on_end=self.ends.append,
            **sizes,
        )
        self.prefill = SendingPair(
            "prefill", self.wire, source, num_credits=num_slots, post=self._post, on_end=self.ends.append, **sizes
        )
        self.engine.on_gone = lambda pair_id, key: self.decode.reservation_gone(key)

    def _post(self, message) -> None:
        if isinstance(message, ChunkHeader):
            self.announced.append(message)
        self.decode.handle(message)

    def reserve(self, key: AttemptKey, block_ids: list[int]) -> OutgoingAttempt:
        """An attempt on a reservation of decode's blocks."""
        self.engine.reservations[key.reservation] = FakeReservation(key.attempt, block_ids)
        return self.prefill.begin(key, self.outcomes.of(key))

    def close(self) -> None:
        self.engine.resume()
        self.prefill.end("the test is over")
        assert self.prefill.wait_released(WAIT_S)
        assert self.decode.wait_released(WAIT_S)
        self.engine.close()
        assert len(self.ends) == 2
        assert self.engine.words().count("lost") == 1


@pytest.fixture
async def make_bench() -> AsyncIterator:
    benches: list[Bench] = []

    async def make(**options) -> Bench:
        source = options.pop("source", None) or small_cache(random=True)
        benches.append(Bench(await gloo_groups(), source, **options))
        return benches[-1]

    yield make
    for bench in benches:
        bench.close()


def ship_all(attempt: OutgoingAttempt, block_ids: list[int]) -> None:
    for layer in range(NUM_LAYERS):
        attempt.ship(layer, 0, block_ids)


def commit(attempt: OutgoingAttempt, **fields) -> Commit:
    commit = Commit(attempt.key, attempt.num_bytes, first_token_id=42, **fields)
    attempt.commit(commit)
    return commit


def same(source: KvCache, source_ids: list[int], target: KvCache, target_ids: list[int]) -> bool:
    return all(torch.equal(a[source_ids], b[target_ids]) for a, b in zip(source.layers, target.layers, strict=True))


@pytest.mark.parametrize(
    ("source_ids", "target_ids"),
    [([3, 4, 5, 6], [0, 1, 2, 3]), ([9, 2, 5], [1, 8, 4]), ([3, 4, 5], [7, 2, 3]), ([6], [0]), ([8, 1, 2], [4, 5, 6])],
)
async def test_blocks_arrive_bit_for_bit_wherever_they_lie(make_bench, source_ids, target_ids) -> None:
    bench = await make_bench()
    attempt = bench.reserve(A, target_ids)
    ship_all(attempt, source_ids)
    sent = commit(attempt, first_token_logprob=TokenLogprob(42, -0.5, 1, ()))
    outcome = bench.outcomes.wait(A)
    assert outcome == (OK, "", NUM_LAYERS * len(source_ids) * bench.source.block_bytes)
    assert same(bench.source, source_ids, bench.engine.cache, target_ids)
    assert bench.engine.reservations[7].committed == sent
    assert attempt.gone


async def test_blocks_that_nobody_shipped_stay_as_they_are(make_bench) -> None:
    bench = await make_bench()
    ship_all(attempt := bench.reserve(A, [1, 2]), [5, 6])
    commit(attempt)
    assert bench.outcomes.wait(A).status is OK
    others = [0, *range(3, 16)]
    assert all(layer[others].count_nonzero() == 0 for layer in bench.engine.cache.layers)


async def test_parts_of_a_prompt_arrive_at_their_places(make_bench) -> None:
    bench = await make_bench()
    attempt = bench.reserve(A, [9, 8, 7, 6])
    for first in (0, 1, 3):
        blocks = {0: [4], 1: [11, 2], 3: [5]}[first]
        for layer in range(NUM_LAYERS):
            attempt.ship(layer, first, blocks)
    commit(attempt)
    assert bench.outcomes.wait(A).status is OK
    assert same(bench.source, [4, 11, 2, 5], bench.engine.cache, [9, 8, 7, 6])


async def test_layers_that_wait_together_share_a_chunk(make_bench) -> None:
    bench = await make_bench(num_slots=1)
    bench.engine.pause()
    blocker = bench.reserve(AttemptKey(1, 1), [0])
    blocker.ship(0, 0, [0])
    attempt = bench.reserve(A, [1, 2])
    ship_all(attempt, [5, 9])
    bench.engine.resume()
    commit(attempt)
    assert bench.outcomes.wait(A).status is OK
    assert [(header.first_layer, header.num_layers) for header in bench.announced if header.key == A] == [(0, 3)]


async def test_a_layer_larger_than_a_chunk_is_split(make_bench) -> None:
    bench = await make_bench(max_chunk_bytes=5 * 2048 + 100)
    source_ids, target_ids = list(range(12)), list(range(15, 3, -1))
    ship_all(attempt := bench.reserve(A, target_ids), source_ids)
    commit(attempt)
    assert bench.outcomes.wait(A).status is OK
    assert max(header.num_bytes for header in bench.announced) == 5 * 2048
    assert same(bench.source, source_ids, bench.engine.cache, target_ids)


async def test_a_large_run_is_sent_without_a_copy(make_bench, monkeypatch) -> None:
    bench = await make_bench(source=small_cache(256, random=True), max_chunk_bytes=1 << 20)
    monkeypatch.setattr(bench.source, "gather", None)
    blocks = list(range(10, 210))
    ship_all(attempt := bench.reserve(A, blocks), blocks)
    commit(attempt)
    assert bench.outcomes.wait(A).status is OK
    assert same(bench.source, blocks, bench.engine.cache, blocks)


async def test_no_more_chunks_are_under_way_than_there_are_slots(make_bench) -> None:
    bench = await make_bench(num_slots=2, max_chunk_bytes=2048)
    bench.engine.pause()
    ship_all(attempt := bench.reserve(A, list(range(8))), list(range(8)))
    commit(attempt)
    until(lambda: len(bench.announced) == 2 and "chunk" in bench.engine.words())
    assert not bench.outcomes.has(A)
    assert len(bench.announced) == 2
    bench.engine.resume()
    assert bench.outcomes.wait(A).status is OK
    assert len(bench.announced) == 24
    assert bench.decode._staging.num_bytes == 2 * 2048
    assert bench.decode._staging.num_free == 2


async def test_many_attempts_share_a_pair_and_none_starves(make_bench) -> None:
    bench = await make_bench(num_slots=2, max_chunk_bytes=2048)
    keys = [AttemptKey(number, 1) for number in range(8)]
    attempts = [bench.reserve(key, [2 * number, 2 * number + 1]) for number, key in enumerate(keys)]
    for attempt in attempts:
        ship_all(attempt, [attempt.key.reservation, 15 - attempt.key.reservation])
        commit(attempt)
    assert [bench.outcomes.wait(key).status for key in keys] == [OK] * 8
    for number in range(8):
        assert same(bench.source, [number, 15 - number], bench.engine.cache, [2 * number, 2 * number + 1])


@pytest.mark.promise(12)
async def test_a_flipped_bit_is_found_and_the_pair_goes_on(make_bench) -> None:
    bench = await make_bench(max_chunk_bytes=2048)
    bench.wire.corrupt_send = 2
    ship_all(attempt := bench.reserve(A, [0, 1, 2]), [4, 7, 1])
    commit(attempt)
    outcome = bench.outcomes.wait(A)
    assert outcome.status is CORRUPT
    assert "chunk 2: checksum" in outcome.detail
    assert bench.engine.reservations[7].committed is None
    again = AttemptKey(7, 2)
    ship_all(attempt := bench.reserve(again, [0, 1, 2]), [4, 7, 1])
    commit(attempt)
    assert bench.outcomes.wait(again).status is OK
    assert same(bench.source, [4, 7, 1], bench.engine.cache, [0, 1, 2])


@pytest.mark.parametrize(("first_block", "layer"), [(2, 0), (0, NUM_LAYERS - 1)])
async def test_what_does_not_fit_the_reservation_is_invalid(make_bench, first_block, layer) -> None:
    bench = await make_bench()
    bench.engine.cache = small_cache(num_layers=NUM_LAYERS - 1)
    attempt = bench.reserve(A, [0, 1])
    attempt.ship(layer, first_block, [3])
    assert bench.outcomes.wait(A)[:2] == (INVALID, "does not fit")
    assert attempt.gone


@pytest.mark.promise(11)
async def test_late_write_of_an_older_attempt_never_reaches_live_blocks(make_bench) -> None:
    bench = await make_bench()
    bench.engine.pause()
    old = bench.reserve(A, [0, 1])
    ship_all(old, [4, 5])
    until(lambda: "chunk" in bench.engine.words())
    new_key = AttemptKey(7, 2)
    ship_all(new := bench.reserve(new_key, [0, 1]), [8, 9])
    bench.engine.resume()
    commit(old)
    commit(new)
    assert bench.outcomes.wait(A).status is FENCED
    assert bench.outcomes.wait(new_key).status is OK
    assert same(bench.source, [8, 9], bench.engine.cache, [0, 1])


async def test_an_unknown_reservation_stops_the_attempt_before_anything_is_computed(make_bench) -> None:
    bench = await make_bench()
    attempt = bench.prefill.begin(A, bench.outcomes.of(A))
    assert bench.outcomes.wait(A).status is FENCED
    assert attempt.gone
    ship_all(attempt, [1])
    commit(attempt)
    attempt.abandon()
    assert bench.announced == []
    assert attempt.num_bytes == 0


async def test_an_abandoned_attempt_ends_after_what_was_announced(make_bench) -> None:
    bench = await make_bench(num_slots=1, max_chunk_bytes=2048)
    bench.engine.pause()
    ship_all(attempt := bench.reserve(A, [0, 1]), [4, 5])
    until(lambda: "chunk" in bench.engine.words())
    attempt.abandon()
    assert attempt.gone
    assert not bench.outcomes.has(A)
    bench.engine.resume()
    assert bench.outcomes.wait(A) == (FENCED, "abandoned by prefill", 2048)
    assert bench.engine.words() == ["begun", "chunk", "abandoned"]


async def test_the_same_attempt_twice_is_refused_and_the_first_goes_on(make_bench) -> None:
    bench = await make_bench()
    attempt = bench.reserve(A, [0])
    twin_ended = Outcomes()
    twin = bench.prefill.begin(A, twin_ended.of(A))
    assert twin_ended.wait(A).status is FENCED
    ship_all(twin, [9])
    ship_all(attempt, [3])
    commit(attempt)
    assert bench.outcomes.wait(A).status is OK
    assert same(bench.source, [3], bench.engine.cache, [0])


@pytest.mark.parametrize("side", ["prefill", "decode"])
async def test_a_broken_pair_ends_every_attempt_once(make_bench, side) -> None:
    bench = await make_bench(num_slots=1, max_chunk_bytes=2048)
    bench.engine.pause()
    other = AttemptKey(8, 1)
    ship_all(attempt := bench.reserve(A, [0, 1]), [4, 5])
    commit(attempt)
    bench.reserve(other, [2])
    getattr(bench, side).end("pulled the plug")
    assert bench.outcomes.wait(A)[:2] == (None, "pulled the plug")
    assert bench.outcomes.wait(other)[:2] == (None, "pulled the plug")
    late = AttemptKey(9, 1)
    assert bench.prefill.begin(late, bench.outcomes.of(late)).gone
    assert bench.outcomes.wait(late).status is None
    assert bench.engine.heard[-1] == ("lost", "pulled the plug")


async def test_a_process_group_that_dies_breaks_both_sides(make_bench) -> None:
    bench = await make_bench()
    bench.reserve(A, [0])
    bench.wire.close()
    assert bench.outcomes.wait(A).status is None
    assert bench.decode.wait_released(WAIT_S)
    assert bench.engine.words()[-1] == "lost"


async def test_a_bug_in_a_callback_hurts_nobody_else(make_bench, caplog) -> None:
    bench = await make_bench()

    def explode(outcome) -> None:
        raise ZeroDivisionError

    bench.engine.reservations[1] = FakeReservation(1, [0])
    broken = bench.prefill.begin(AttemptKey(1, 1), explode)
    ship_all(attempt := bench.reserve(A, [1]), [4])
    commit(broken)
    commit(attempt)
    assert bench.outcomes.wait(A).status is OK
    assert "ZeroDivisionError" in caplog.text


async def test_silence_of_decode_is_measured_only_while_an_answer_is_due(make_bench) -> None:
    bench = await make_bench()
    assert bench.prefill.unanswered_s == 0
    bench.engine.pause()
    ship_all(attempt := bench.reserve(A, [0]), [4])
    until(lambda: bench.announced)
    assert bench.prefill.unanswered_s > 0
    assert bench.prefill.idle_s == 0
    bench.engine.resume()
    commit(attempt)
    bench.outcomes.wait(A)
    assert bench.prefill.unanswered_s == 0
    assert bench.prefill.idle_s > 0
