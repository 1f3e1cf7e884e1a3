"""The prefill engine turned by hand, with a fake pair that keeps what it is given."""

import pytest
import torch

from common.clock import FakeClock
from common.config import PrefillConfig
from common.engine.setup import build
from common.errors import Aborted, Cancelled, DataLoss, DeadlineExceeded, InvalidArgument, PdserveError, Unavailable
from common.metrics import PrefillMetrics
from common.transport.messages import AttemptKey, AttemptOutcome, TransferStatus
from prefill_service.engine import PrefillEngine, PrefillResult, Task
from prefill_service.scheduler import Job, PrefillScheduler
from tests.support.models import dummy_model_folder, make_request

BLOCK = 16
NUM_LAYERS = 3


class FakeOutgoing:
    """Keeps what the engine ships; the test decides how the attempt ends."""

    def __init__(self, cache, on_done) -> None:
        self.cache = cache
        self.on_done = on_done
        self.gone = False
        self.shipped: list[tuple[int, int, list[int]]] = []
        self.committed = None
        self.abandoned = False

    @property
    def num_bytes(self) -> int:
        return sum(len(blocks) for _, _, blocks in self.shipped) * self.cache.block_bytes

    def ship(self, layer, first_block, block_ids, ready) -> None:
        self.shipped.append((layer, first_block, list(block_ids)))

    def commit(self, commit) -> None:
        self.committed = commit

    def abandon(self) -> None:
        self.abandoned = True

    def end(self, status=TransferStatus.OK, detail="") -> None:
        self.on_done(AttemptOutcome(status, detail, self.num_bytes))


class FakePair:
    transport = "fake"

    def __init__(self, cache) -> None:
        self.cache = cache
        self.attempts: dict[AttemptKey, FakeOutgoing] = {}

    def begin(self, key, on_done) -> FakeOutgoing:
        self.attempts[key] = FakeOutgoing(self.cache, on_done)
        return self.attempts[key]


class HandTurnedEngine(PrefillEngine):
    def __init__(self, *, num_blocks=64, max_batch_tokens=64) -> None:
        config = PrefillConfig(model=dummy_model_folder(), load_format="dummy", num_blocks=num_blocks, max_num_seqs=8)
        self.parts = parts = build(config)
        self.clock = FakeClock()
        self.results: dict[int, PrefillResult | PdserveError] = {}
        scheduler = PrefillScheduler(parts.pool, parts.prefix, max_batch_tokens, 8, 8, clock=self.clock)
        super().__init__(
            scheduler,
            parts.prefiller,
            clock=self.clock,
            metrics=PrefillMetrics(),
            on_load=lambda load: None,
            on_crash=lambda error: None,
        )
        self.pair = FakePair(parts.cache)

    def begin(self, token_ids, *, reservation=1, num_remote_cached_tokens=0, **request) -> Task:
        job = Job(make_request(token_ids, **request), num_remote_cached_tokens=num_remote_cached_tokens)
        key = AttemptKey(reservation, 1)
        task = Task(job, key, self.pair, lambda result: self.results.__setitem__(reservation, result))
        self.submit_task(task)
        self.turn()
        return task

    def outgoing(self, reservation=1) -> FakeOutgoing:
        return self.pair.attempts[AttemptKey(reservation, 1)]

    def turn_until_idle(self) -> None:
        while self.turn():
            pass


def test_each_layers_blocks_are_shipped_before_the_next_layer_is_computed():
    engine = HandTurnedEngine()
    engine.begin(range(40))
    order = []
    engine.outgoing().ship = lambda layer, first, blocks, ready: order.append((layer, first, len(blocks)))
    forward = engine.parts.model.model.layers
    for layer, module in enumerate(forward):
        stage = module.forward_ffn_stage
        module.forward_ffn_stage = lambda *a, _stage=stage, _layer=layer: (order.append(f"ffn {_layer}"), _stage(*a))[1]
    engine.turn_until_idle()
    assert order == [(0, 0, 3), "ffn 0", (1, 0, 3), "ffn 1", (2, 0, 3), "ffn 2"]


def test_the_load_tells_what_a_prompt_token_takes():
    engine = HandTurnedEngine()
    told = []
    engine._on_load = told.append
    module = engine.parts.model.model.layers[0]
    stage = module.forward_ffn_stage
    module.forward_ffn_stage = lambda *a: (engine.clock.advance(0.02), stage(*a))[1]
    engine.begin(range(40))
    engine.turn_until_idle()
    assert told[-1].token_ms == pytest.approx(0.5)


def test_a_long_prompt_is_shipped_while_it_is_still_computed():
    engine = HandTurnedEngine(max_batch_tokens=32)
    engine.begin(range(70))
    engine.turn()
    assert {(first, len(blocks)) for _, first, blocks in engine.outgoing().shipped} == {(0, 2)}
    engine.turn_until_idle()
    assert {(first, len(blocks)) for _, first, blocks in engine.outgoing().shipped} == {(0, 2), (2, 2), (4, 1)}


@pytest.mark.promise(17)
def test_the_commit_carries_the_first_token_and_all_bytes():
    engine = HandTurnedEngine()
    engine.begin(range(40), num_logprobs=2, num_prompt_logprobs=1)
    engine.turn_until_idle()
    commit = engine.outgoing().committed
    assert commit.num_bytes == NUM_LAYERS * 3 * engine.parts.cache.block_bytes
    assert commit.first_token_logprob.token_id == commit.first_token_id
    assert commit.first_token_logprob.rank == 1
    assert len(commit.first_token_logprob.top) == 2
    assert [entry.token_id for entry in commit.prompt_logprobs] == list(range(1, 40))


def test_chunks_do_not_change_the_first_token_or_the_prompt_logprobs():
    commits = []
    for budget in (16, 48, 64):
        engine = HandTurnedEngine(max_batch_tokens=budget)
        engine.begin(range(60), num_prompt_logprobs=0, temperature=0.7, seed=3)
        engine.turn_until_idle()
        commits.append(engine.outgoing().committed)
    assert len({commit.first_token_id for commit in commits}) == 1
    logprobs = [torch.tensor([entry.logprob for entry in commit.prompt_logprobs]) for commit in commits]
    assert logprobs[0].allclose(logprobs[1], atol=1e-5)
    assert logprobs[0].allclose(logprobs[2], atol=1e-5)


def test_blocks_that_decode_has_are_not_shipped():
    engine = HandTurnedEngine()
    engine.begin(range(40), num_remote_cached_tokens=32)
    engine.turn_until_idle()
    assert engine.outgoing().shipped == [(layer, 2, engine.outgoing().shipped[0][2]) for layer in range(NUM_LAYERS)]
    assert engine.outgoing().committed.num_bytes == NUM_LAYERS * engine.parts.cache.block_bytes


def test_blocks_cached_here_are_shipped_all_the_same():
    engine = HandTurnedEngine()
    engine.begin(range(40), reservation=1)
    engine.turn_until_idle()
    engine.outgoing(1).end()
    engine.begin(range(40), reservation=2)
    engine.turn_until_idle()
    assert {(first, len(blocks)) for _, first, blocks in engine.outgoing(2).shipped} == {(0, 3)}
    engine.outgoing(2).end()
    engine.turn()
    assert engine.results[2].num_cached_tokens == 32


def test_blocks_are_held_until_decode_has_acknowledged():
    engine = HandTurnedEngine()
    engine.begin(range(40))
    engine.turn_until_idle()
    assert engine.scheduler.pool.num_held == 3
    engine.outgoing().end()
    engine.turn()
    assert isinstance(engine.results[1], PrefillResult)
    assert engine.scheduler.pool.num_held == 0
    engine.check()


@pytest.mark.promise(3)
@pytest.mark.parametrize(
    ("status", "error"),
    [
        (TransferStatus.FENCED, Aborted),
        (TransferStatus.CORRUPT, DataLoss),
        (TransferStatus.INVALID, InvalidArgument),
        (None, Unavailable),
    ],
)
def test_an_attempt_that_fails_while_computing_says_why_and_frees_its_blocks(status, error):
    engine = HandTurnedEngine(max_batch_tokens=16)
    engine.begin(range(60))
    engine.turn()
    engine.outgoing().end(status, "why")
    engine.turn()
    assert isinstance(engine.results[1], error)
    assert engine.results[1].message == "why"
    assert engine.scheduler.pool.num_held == 0
    assert not engine.has_work()


@pytest.mark.promise(5)
def test_cancel_stops_between_two_chunks_and_waits_for_what_is_announced():
    engine = HandTurnedEngine(max_batch_tokens=16)
    task = engine.begin(range(60))
    engine.turn()
    engine.cancel(task, Cancelled("the caller left"))
    engine.turn()
    assert engine.outgoing().abandoned
    assert engine.scheduler.pool.num_held == 4, "a chunk may still be read from these blocks"
    engine.outgoing().end(TransferStatus.FENCED)
    engine.turn()
    assert isinstance(engine.results[1], Cancelled)
    engine.check()
    assert engine.scheduler.pool.num_held == 0


def test_a_deadline_acts_between_two_chunks():
    engine = HandTurnedEngine(max_batch_tokens=16)
    engine.begin(range(60), deadline_s=1001.0)
    engine.turn()
    engine.clock.advance(2)
    engine.turn()
    assert engine.outgoing().abandoned
    engine.outgoing().end(TransferStatus.FENCED)
    engine.turn()
    assert isinstance(engine.results[1], DeadlineExceeded)
    assert engine.scheduler.pool.num_held == 0


def test_a_fenced_attempt_is_not_computed_further():
    engine = HandTurnedEngine(max_batch_tokens=16)
    engine.begin(range(60))
    engine.turn()
    engine.outgoing().gone = True
    before = len(engine.outgoing().shipped)
    engine.turn()
    assert len(engine.outgoing().shipped) == before
    assert not engine.has_work()
