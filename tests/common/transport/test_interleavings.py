"""Both protocol machines on in-order channels, with a small model of the decode engine: every interleaving is walked.

A world is one state of everything. From each world that can be reached, every enabled event is tried once; what must
hold is asserted inside the events, and in each world from which nothing but a fault can go on.
"""

from __future__ import annotations

import pickle
from dataclasses import dataclass, field

import pytest

from common.transport.messages import (
    AbandonAttempt,
    AttemptBegin,
    AttemptKey,
    AttemptOutcome,
    ChunkHeader,
    Commit,
    Goodbye,
    TransferStatus,
)
from common.transport.protocol import Deliver, End, Finish, Free, Receive, Send
from common.transport.receiving_protocol import ReceivingProtocol
from common.transport.sending_protocol import SendingProtocol

GOOD, FLIPPED = 0, 1
A, B, A_AGAIN = AttemptKey(1, 1), AttemptKey(2, 1), AttemptKey(1, 2)
OK, FENCED, CORRUPT = TransferStatus.OK, TransferStatus.FENCED, TransferStatus.CORRUPT


@dataclass
class Engine:
    """Decode's books: each reservation's newest attempt, chunks written to live blocks, and who committed."""

    newest: dict[int, int]
    num_written: dict[AttemptKey, int] = field(default_factory=dict)
    committed: dict[int, AttemptKey] = field(default_factory=dict)
    over: set[AttemptKey] = field(default_factory=set)

    def is_live(self, key: AttemptKey) -> bool:
        return self.newest[key.reservation] == key.attempt and key.reservation not in self.committed


@dataclass
class World:
    window: int
    num_chunks: dict[AttemptKey, int]
    # Faults that may still happen, by name.
    faults: list[str]
    engine: Engine
    sender: SendingProtocol
    receiver: ReceivingProtocol
    # Chunks that each attempt still has to announce before it commits.
    chunks_left: dict[AttemptKey, int] = field(default_factory=dict)
    # Control stream each way, payloads sent, receives posted, the engine's inbox: all in order.
    down: list = field(default_factory=list)
    up: list = field(default_factory=list)
    sends: list[int] = field(default_factory=list)
    receives: list[int] = field(default_factory=list)
    inbox: list = field(default_factory=list)
    used_slots: set[int] = field(default_factory=set)
    outcomes: dict[AttemptKey, AttemptOutcome] = field(default_factory=dict)
    ends: list[str] = field(default_factory=list)

    @classmethod
    def start(cls, window: int, num_chunks: dict[AttemptKey, int], faults: list[str]) -> World:
        machines = SendingProtocol(window, max_chunk_bytes=8), ReceivingProtocol(window, max_chunk_bytes=8)
        world = cls(window, num_chunks, faults, Engine({key.reservation: 1 for key in num_chunks}), *machines)
        for key in num_chunks:
            if key.attempt == 1:
                world.begin(key)
        return world

    def begin(self, key: AttemptKey) -> None:
        self.chunks_left[key] = self.num_chunks[key]
        self.prefill_does(self.sender.begin(key))

    def enabled(self) -> list[tuple]:
        events: list[tuple] = []
        for key, left in self.chunks_left.items():
            if self.sender.is_open(key) and (not left or self.sender.num_credits):
                events.append(("announce" if left else "commit", key))
        events += [(name,) for name in ("down", "up", "inbox") if getattr(self, name)]
        if self.sends and self.receives:
            events.append(("transfer", GOOD))
        if len(self.ends) == 1:
            events.append(("notice",))
        return events

    def enabled_faults(self) -> list[tuple]:
        events: list[tuple] = []
        for fault in self.faults:
            if fault == "cancel":
                events += [("fault", fault, key) for key in self.chunks_left if key not in self.outcomes]
            elif fault != "corrupt" or (self.sends and self.receives):
                events.append(("fault", fault))
        return events

    def run(self, event: tuple) -> None:
        match event:
            case ("announce", key):
                self.chunks_left[key] -= 1
                self.prefill_does(self.sender.announce(key, **SHAPE, checksum=GOOD))
            case ("commit", key):
                self.prefill_does(self.sender.commit(Commit(key, self.num_chunks[key], first_token_id=5)))
            case ("down",):
                self.decode_does(self.receiver.handle(self.down.pop(0)))
            case ("up",):
                self.prefill_does(self.sender.handle(self.up.pop(0)))
            case ("transfer", checksum):
                sent, received = self.sends.pop(0), self.receives.pop(0)
                assert sent == received, "a payload met another chunk's receive"
                self.decode_does(self.receiver.received(received, checksum))
            case ("inbox",):
                self.decode_does(self.judge(self.inbox.pop(0)))
            case ("notice",):
                self.prefill_does(self.sender.end("lost"))
                self.decode_does(self.receiver.end("lost"))
            case ("fault", fault, *details):
                self.faults.remove(fault)
                self.strike(fault, *details)
        assert 0 <= self.sender.num_credits <= self.window
        assert 0 <= self.receiver.num_credits <= self.window

    def strike(self, fault: str, key: AttemptKey | None = None) -> None:
        match fault:
            case "cancel":
                self.prefill_does(self.sender.abandon(key))
            case "corrupt":
                self.run(("transfer", FLIPPED))
            case "fence":
                self.engine.newest[1] = 2
                self.decode_does(self.receiver.reservation_gone(AttemptKey(1, 1)))
                self.begin(AttemptKey(1, 2))
            case "break at prefill":
                self.prefill_does(self.sender.end("broken"))
            case "break at decode":
                self.decode_does(self.receiver.end("broken"))

    def prefill_does(self, actions: list) -> None:
        for action in actions:
            match action:
                case Send(message):
                    self.down.append(message)
                    if isinstance(message, ChunkHeader):
                        self.sends.append(message.sequence_number)
                case Finish(key, outcome):
                    assert key not in self.outcomes, "an attempt ended twice"
                    self.outcomes[key] = outcome
                case End():
                    self.end("prefill")
                    self.down.append(Goodbye("broken"))

    def decode_does(self, actions: list) -> None:
        for action in actions:
            match action:
                case Send(message):
                    self.up.append(message)
                case Receive(header):
                    self.used_slots.add(header.sequence_number)
                    assert len(self.used_slots) <= self.window, "a receive without a free slot"
                    self.receives.append(header.sequence_number)
                case Free(sequence_number):
                    self.used_slots.remove(sequence_number)
                case Deliver(event):
                    self.inbox.append(event)
                case End():
                    self.end("decode")
                    self.up.append(Goodbye("broken"))

    def end(self, side: str) -> None:
        assert side not in self.ends, "a pair ended twice"
        self.ends.append(side)

    def judge(self, event: AttemptBegin | ChunkHeader | Commit | AbandonAttempt) -> list:
        """What the decode engine does: the fence check and the write are one step."""
        engine, key = self.engine, event.key
        assert key not in engine.over, "something of an attempt arrived after its end"
        live = engine.is_live(key)
        match event:
            case AttemptBegin():
                return [] if live else self.receiver.reservation_gone(key)
            case ChunkHeader():
                engine.num_written[key] = engine.num_written.get(key, 0) + live
                return self.receiver.landed(event.sequence_number, OK if live else FENCED, "")
            case Commit():
                engine.over.add(key)
                if live:
                    assert engine.num_written.get(key, 0) == self.num_chunks[key], "a commit without all of its bytes"
                    engine.committed[key.reservation] = key
                return self.receiver.committed(key, OK if live else FENCED, "")
            case AbandonAttempt():
                engine.over.add(key)
                return []

    def check_at_rest(self) -> None:
        """Nothing but a fault can go on from here: everything has ended, and everything is back."""
        assert set(self.outcomes) == set(self.chunks_left), "deadlock"
        for key, outcome in self.outcomes.items():
            committed = self.engine.committed.get(key.reservation) == key
            assert outcome.status is None or committed == (outcome.status is OK)
        if self.ends:
            assert set(self.ends) == {"prefill", "decode"}
            return
        assert self.engine.over == set(self.outcomes), "decode was never told of an end"
        assert [*self.sends, *self.receives, *self.used_slots] == []
        assert self.sender.num_credits == self.receiver.num_credits == self.window


SHAPE = {"first_layer": 0, "num_layers": 1, "first_block": 0, "num_blocks": 1, "num_bytes": 1}


def walk(world: World) -> tuple[int, set[frozenset]]:
    """Visits every world that can be reached. Returns how many there are, and all the ways that attempts ended."""
    start = pickle.dumps(world)
    seen, waiting, endings = {start}, [start], set()
    while waiting:
        frozen = waiting.pop()
        world = pickle.loads(frozen)
        events = world.enabled()
        if not events:
            world.check_at_rest()
            endings.add(frozenset((key, outcome.status) for key, outcome in world.outcomes.items()))
        for event in events + world.enabled_faults():
            after = pickle.loads(frozen)
            after.run(event)
            key = pickle.dumps(after)
            if key not in seen:
                seen.add(key)
                waiting.append(key)
    return len(seen), endings


def test_without_faults_everything_commits() -> None:
    for window in (1, 2, 4):
        _, endings = walk(World.start(window, {A: 2, B: 1}, []))
        assert endings == {frozenset({(A, OK), (B, OK)})}


@pytest.mark.parametrize("fault", ["cancel", "corrupt", "break at prefill", "break at decode"])
@pytest.mark.parametrize("window", [1, 2])
def test_one_fault_ends_every_attempt_once_and_leaves_the_others_alone(window: int, fault: str) -> None:
    num_worlds, endings = walk(World.start(window, {A: 2, B: 1} if window == 1 else {A: 3}, [fault]))
    status = {"cancel": FENCED, "corrupt": CORRUPT}.get(fault)
    assert num_worlds > 200
    assert {outcome for ending in endings for _, outcome in ending} == {OK, status}


@pytest.mark.parametrize("window", [1, 2])
def test_a_fence_stops_the_older_attempt_and_lets_the_newer_commit(window: int) -> None:
    _, endings = walk(World.start(window, {A: 3 - window, A_AGAIN: 1}, ["fence"]))
    never = frozenset({(A, OK)})
    in_time = frozenset({(A, FENCED), (A_AGAIN, OK)})
    too_late = frozenset({(A, OK), (A_AGAIN, FENCED)})
    assert endings == {never, in_time, too_late}


@pytest.mark.parametrize(
    "other", ["corrupt", *(pytest.param(one, marks=pytest.mark.slow) for one in ("cancel", "break at decode"))]
)
def test_a_fence_together_with_another_fault(other: str) -> None:
    num_worlds, _ = walk(World.start(1, {A: 1, A_AGAIN: 1}, ["fence", other]))
    assert num_worlds > 1000


def test_both_sides_break_at_once() -> None:
    num_worlds, endings = walk(World.start(2, {A: 2}, ["break at prefill", "break at decode"]))
    assert num_worlds > 1000
    assert endings == {frozenset({(A, OK)}), frozenset({(A, None)})}
