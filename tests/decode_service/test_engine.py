"""The decode engine turned by hand, without threads or transport."""

import random

import pytest
import torch

from common.engine.kv_cache import KvCache
from common.params import TokenLogprob
from common.transport.messages import AttemptKey, ChunkHeader, Commit, TransferStatus
from decode_service.events import Completed, Lost, Reserved
from decode_service.reservations import Verdict
from tests.support.engine import HandTurnedEngine
from tests.support.models import VOCAB, make_request

BLOCK = 16


def prompts(count, *, seed=0, longest=60):
    draw = random.Random(seed)
    return [[draw.randrange(VOCAB - 1) for _ in range(draw.randrange(1, longest))] for _ in range(count)]


def test_a_batch_gives_each_sequence_the_tokens_it_gets_alone():
    engine = HandTurnedEngine()
    params = [
        {},
        {"temperature": 0.8, "seed": 7},
        {"temperature": 1.2, "top_p": 0.9, "seed": 3, "presence_penalty": 0.5},
    ]
    requests = [(ids, params[i % 3]) for i, ids in enumerate(prompts(12))]
    together = engine.run_all([make_request(ids, max_tokens=5 + i, **p) for i, (ids, p) in enumerate(requests)])
    alone = [
        HandTurnedEngine(prefix_cache=False).run_all([make_request(ids, max_tokens=5 + i, **p)])[0]
        for i, (ids, p) in enumerate(requests)
    ]
    assert together == alone
    assert engine.scheduler.pool.num_held == 0


def test_preempted_sequences_go_on_exactly_where_they_were():
    params = [{}, {"temperature": 0.9, "seed": 5, "frequency_penalty": 0.3}]
    requests = [(ids, params[i % 2]) for i, ids in enumerate(prompts(6, longest=30))]
    calm = HandTurnedEngine().run_all([make_request(ids, max_tokens=60, **p) for ids, p in requests])
    tight = HandTurnedEngine(num_blocks=12)
    sequences = [make_request(ids, max_tokens=60, **p) for ids, p in requests]
    assert tight.run_all(sequences) == calm
    assert tight.scheduler.num_preemptions > 0
    recomputed = [tight.events(sequence, Completed)[0].kv_path is Verdict.RECOMPUTED for sequence in sequences]
    assert any(recomputed)


def test_a_resumed_sequence_continues_the_same_tokens():
    ids, params = prompts(1)[0], {"temperature": 1.0, "seed": 11, "repetition_penalty": 1.3}
    (whole,) = HandTurnedEngine().run_all([make_request(ids, max_tokens=20, **params)])
    resumed = make_request([*ids, *whole[:8]], num_prompt_tokens=len(ids), max_tokens=20, **params)
    engine = HandTurnedEngine()
    assert engine.run_all([resumed]) == [whole[8:]]
    completed = engine.events(resumed, Completed)[0]
    assert (completed.num_output_tokens, completed.kv_path) == (20, Verdict.RECOMPUTED)


def test_a_repeated_prompt_is_found_in_the_prefix_cache():
    engine = HandTurnedEngine()
    ids = prompts(1, longest=200)[0] * 3
    first, second = make_request(ids), make_request(ids)
    assert engine.run_all([first]) == engine.run_all([second])
    assert engine.events(second, Reserved)[0].num_cached_tokens == (len(ids) - 1) // BLOCK * BLOCK


def test_salts_keep_prefixes_apart():
    engine = HandTurnedEngine()
    ids = list(range(50))
    engine.run_all([make_request(ids, cache_salt="a")])
    other = make_request(ids, cache_salt="b")
    engine.run_all([other])
    assert engine.events(other, Reserved)[0].num_cached_tokens == 0


def test_an_end_token_ends_the_completion_and_is_named():
    engine = HandTurnedEngine()
    eos = VOCAB - 1
    sequence = make_request([1, 2, 3], ignore_eos=False, logit_bias={eos: 100.0}, min_tokens=3, max_tokens=9)
    (tokens,) = engine.run_all([sequence])
    assert len(tokens) == 4
    assert eos not in tokens[:3]
    assert tokens[3] == eos
    completed = engine.events(sequence, Completed)[0]
    assert (completed.stop_token_id, completed.by_length) == (eos, False)


def test_the_context_ends_a_completion_by_length():
    engine = HandTurnedEngine(num_blocks=5)
    sequence = make_request(list(range(40)), max_tokens=24)
    (tokens,) = engine.run_all([sequence])
    assert len(tokens) == 24
    assert engine.events(sequence, Completed)[0].by_length


@pytest.mark.promise(5)
@pytest.mark.parametrize("steps", [0, 1, 3])
def test_closing_a_stream_frees_its_blocks_whatever_it_was_doing(steps):
    engine = HandTurnedEngine()
    sequence = make_request(list(range(40)))
    engine.open(sequence, local=True)
    for _ in range(steps):
        engine.turn()
    engine.close(sequence)
    engine.turn()
    assert engine.scheduler.pool.num_held == 0
    engine.check()


def test_finish_completes_with_what_was_put_out():
    engine = HandTurnedEngine()
    sequence = make_request(list(range(40)), max_tokens=50)
    engine.open(sequence, local=True)
    # On a GPU tokens land some steps after theirs.
    while len(engine.tokens(sequence)) < 3:
        engine.turn()
    engine.finish(sequence)
    engine.turn()
    completed = engine.events(sequence, Completed)[0]
    assert completed.num_output_tokens == len(engine.tokens(sequence)) > 0
    assert (completed.stop_token_id, completed.by_length) == (None, False)
    engine.check()


class Remote:
    """What a prefill worker does for one reservation, without a worker: computes the KV in a cache of its own."""

    def __init__(self, engine: HandTurnedEngine, sequence) -> None:
        self.engine = engine
        self.answers: list = []
        self.has_begun = False
        self.reserved = engine.events(sequence, Reserved)[-1]
        self.num_blocks = -(-sequence.num_tokens // BLOCK)
        sender = HandTurnedEngine()
        twin = make_request(sequence.request.token_ids, max_tokens=1)
        sender.open(twin, local=True)
        while not sender.tokens(twin):
            sender.turn()
        self.cache: KvCache = sender.parts.cache
        self.first_token = sender.tokens(twin)[0]
        # The blocks are free again but not overwritten.
        self.blocks = list(range(self.num_blocks))

    @property
    def key(self):
        return AttemptKey(self.reserved.reservation, self.reserved.attempt)

    def ship(self, *, attempt=None, layers=None, pair_id=1, **changes):
        if not self.has_begun:
            self.has_begun = True
            self.engine.attempt_begun(1, self.key)
        num_layers = layers or self.cache.num_layers
        out = torch.empty(num_layers * self.num_blocks * self.cache.block_bytes, dtype=torch.uint8)
        payload = self.cache.gather(0, num_layers, self.blocks, out)
        key = self.key if attempt is None else self.key._replace(attempt=attempt)
        fields = {"first_layer": 0, "num_layers": num_layers, "first_block": 0, "num_blocks": self.num_blocks}
        header = ChunkHeader(0, key, **{**fields, "num_bytes": payload.numel(), "checksum": 0, **changes})
        self.engine.chunk_landed(pair_id, header, payload, lambda status, *_: self.answers.append(status))
        self.engine.turn()
        return self.answers[-1]

    def commit(self, *, pair_id=1, **changes):
        num_bytes = self.cache.num_layers * self.num_blocks * self.cache.block_bytes
        commit = Commit(**{"key": self.key, "num_bytes": num_bytes, "first_token_id": self.first_token, **changes})
        self.engine.commit_received(pair_id, commit, lambda status, *_: self.answers.append(status))
        self.engine.turn()
        return self.answers[-1]


def reserve(engine, sequence):
    engine.open(sequence, local=False)
    engine.turn()


def test_shipped_kv_decodes_like_local_kv():
    ids = list(range(1, 40))
    (expected,) = HandTurnedEngine().run_all([make_request(ids)])
    engine, sequence = HandTurnedEngine(), make_request(ids)
    reserve(engine, sequence)
    remote = Remote(engine, sequence)
    assert remote.ship() is TransferStatus.OK
    assert remote.commit() is TransferStatus.OK
    while not engine.events(sequence, Completed):
        engine.turn()
    assert engine.tokens(sequence) == expected
    completed = engine.events(sequence, Completed)[0]
    assert completed.kv_path is Verdict.REMOTE
    assert completed.kv_bytes == 3 * 3 * engine.parts.cache.block_bytes


@pytest.mark.promise(11)
def test_late_write_of_an_older_attempt_never_reaches_live_blocks():
    engine, sequence = HandTurnedEngine(), make_request(list(range(1, 40)))
    reserve(engine, sequence)
    remote = Remote(engine, sequence)
    engine.retry(sequence, 1, local=False)
    engine.turn()
    before = [layer.clone() for layer in engine.parts.cache.layers]
    assert remote.ship() is TransferStatus.FENCED
    assert all(layer.equal(old) for layer, old in zip(engine.parts.cache.layers, before, strict=True))
    assert remote.commit() is TransferStatus.FENCED


def test_a_write_into_a_reservation_that_is_gone_is_dropped():
    engine, sequence = HandTurnedEngine(), make_request(list(range(1, 40)))
    reserve(engine, sequence)
    remote = Remote(engine, sequence)
    engine.close(sequence)
    engine.turn()
    assert remote.ship() is TransferStatus.FENCED
    assert not any(layer.any() for layer in engine.parts.cache.layers)


def test_a_commit_before_all_layers_have_landed_is_refused():
    engine, sequence = HandTurnedEngine(), make_request(list(range(1, 40)))
    reserve(engine, sequence)
    remote = Remote(engine, sequence)
    assert remote.ship(layers=2) is TransferStatus.OK
    assert remote.commit() is TransferStatus.INVALID
    assert not engine.tokens(sequence)


def test_what_a_model_cannot_have_drawn_is_no_commit():
    engine, sequence = HandTurnedEngine(), make_request(list(range(1, 40)))
    reserve(engine, sequence)
    remote = Remote(engine, sequence)
    assert remote.ship() is TransferStatus.OK
    logprob = TokenLogprob(1, 0.0, 1, ())
    assert remote.commit(first_token_id=VOCAB) is TransferStatus.INVALID
    assert remote.commit(first_token_id=2**32 - 1) is TransferStatus.INVALID
    assert remote.commit(prompt_logprobs=(logprob,) * 39) is TransferStatus.INVALID
    assert not engine.tokens(sequence)
    assert remote.commit(prompt_logprobs=(logprob,) * 38) is TransferStatus.OK


def test_no_pair_writes_into_what_another_one_fills():
    engine, sequence = HandTurnedEngine(), make_request(list(range(1, 40)))
    reserve(engine, sequence)
    remote = Remote(engine, sequence)
    assert remote.ship(pair_id=2) is TransferStatus.INVALID, "pair 1 has begun it"
    engine.attempt_begun(2, remote.key)
    assert remote.ship(pair_id=2) is TransferStatus.INVALID
    assert engine.gone == [(2, remote.key)]
    assert not any(layer.any() for layer in engine.parts.cache.layers)
    assert remote.ship() is TransferStatus.OK
    assert remote.commit(pair_id=2) is TransferStatus.INVALID
    assert remote.commit() is TransferStatus.OK


def test_a_lost_pair_asks_for_prefill_and_the_next_attempt_completes():
    engine, sequence = HandTurnedEngine(), make_request(list(range(1, 40)))
    reserve(engine, sequence)
    remote = Remote(engine, sequence)
    engine.attempt_begun(1, remote.key)
    engine.turn()
    engine.pair_lost(1, "it died")
    engine.turn()
    (lost,) = engine.events(sequence, Lost)
    assert (lost.attempt, lost.preempted, lost.detail) == (1, False, "it died")
    assert engine._metrics.registry.get_sample_value("pdserve_decode_attempts_lost_total") == 1
    engine.retry(sequence, 1, local=False)
    engine.turn()
    again = Remote(engine, sequence)
    assert again.reserved.attempt == 2
    assert again.ship() is TransferStatus.OK
    assert again.commit() is TransferStatus.OK


def test_a_sender_is_told_when_its_reservation_goes():
    engine, sequence = HandTurnedEngine(), make_request(list(range(1, 40)))
    reserve(engine, sequence)
    remote = Remote(engine, sequence)
    engine.attempt_begun(4, remote.key)
    engine.turn()
    engine.close(sequence)
    engine.turn()
    assert engine.gone == [(4, remote.key)]
    engine.attempt_begun(4, remote.key)
    engine.turn()
    assert engine.gone == [(4, remote.key)] * 2, "a sender that begins too late is told at once"
