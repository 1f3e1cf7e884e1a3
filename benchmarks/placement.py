"""What it takes a router to place one request among many workers: both choices, and the hashes of the prompt.

Every worker has something to do, a pace of its own and has got prompts of its own; one in a hundred has got the
beginning of this one. A load message is counted apart: it is what keeps the order that placing reads.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

from benchmarks.report import Report
from common.clock import monotonic
from common.load import Load
from router.explanation import PlacementLog
from router.local_prefill import LocalPrefill, Mode
from router.placement import DecodeTerms, Demand, PrefillTerms, choose_decode, choose_prefill
from router.ranking import Ranking
from router.workers import Kind, Role, Worker, WorkerState
from tests.router.values import identity, worker

PROMPT = tuple(range(2000))
TARGET_MS = 1.0
NUM_REPEATS = 200
NUM_BLOCKS = 10_000


def workers(role: Role, count: int) -> list[Worker]:
    draw = random.Random(count)
    made = []
    for number in range(count):
        who = identity(instance_id=f"{role.value}-{number}", num_total_blocks=NUM_BLOCKS, max_num_seqs=256)
        address = f"10.0.{number // 256}.{number % 256}:50053"
        num_running = draw.randrange(1, 200)
        load = Load(
            step_counter=1,
            num_free_blocks=draw.randrange(1000, 9000),
            num_running=num_running,
            num_waiting_tokens=draw.randrange(50_000),
            step_ms=draw.uniform(0.95, 1.05) * (10 + num_running / 20),
            token_ms=draw.uniform(0.095, 0.105),
        )
        one = worker(who, role=role, address=address, load=load)
        own = PROMPT[: draw.randrange(2000)] if number % 100 == 0 else [number] * draw.randrange(2000)
        one.prefixes.add(Demand(own).hashes(who))
        made.append(one)
    return made


def median_ms(place: Callable[[], object]) -> float:
    taken_ms = []
    for _ in range(NUM_REPEATS):
        begun_s = time.perf_counter()
        place()
        taken_ms.append((time.perf_counter() - begun_s) * 1e3)
    return statistics.median(taken_ms)


def median_ms_of_load_messages(workers: list[Worker]) -> float:
    draw, places = random.Random(1), iter(range(10**9))

    def tell() -> None:
        one = workers[next(places) % len(workers)]
        step = one.load.step_counter + 1
        load = one.load._replace(step_counter=step, num_running=draw.randrange(1, 200))
        one.hear(WorkerState.SERVING, load, 1, 0.0)

    return median_ms(tell)


def note(fleet: Any, kind: Kind) -> None:
    """Both choices, kept for whoever asks later."""
    demand, placings = Demand(PROMPT), PlacementLog(fleet, monotonic)
    demand.hashes(fleet.members(Role.DECODE)[0].cut)
    decode_terms, prefill_terms = DecodeTerms({kind}), PrefillTerms(kind)
    decode = choose_decode(fleet.ranking[Role.DECODE], demand, decode_terms)
    prefill = choose_prefill(fleet.ranking[Role.PREFILL], demand, prefill_terms)
    assert decode is not None
    placings.note_decode(demand, decode_terms, decode)
    placings.note_prefill(demand, prefill_terms, prefill, LocalPrefill(Mode.NEVER, monotonic).choose(None))


def main() -> None:
    report = Report("placement", "Placing one request of 2,000 tokens among many workers of each role")
    for count in (2, 64, 256, 1000):
        prefill, decode = workers(Role.PREFILL, count), workers(Role.DECODE, count)
        kind = decode[0].kind
        assert kind is not None
        ranked_prefill, ranked_decode = Ranking(prefill), Ranking(decode)
        anywhere = DecodeTerms({kind})

        def place_decode(ranked=ranked_decode, terms=anywhere) -> object:
            return choose_decode(ranked, Demand(PROMPT), terms)

        def place_prefill(ranked=ranked_prefill, kind=kind) -> object:
            return choose_prefill(ranked, Demand(PROMPT), PrefillTerms(kind))

        def hash_prompt(worker=decode[0]) -> object:
            return Demand(PROMPT).hashes(worker.cut)

        members = {Role.PREFILL: prefill, Role.DECODE: decode}
        fleet = SimpleNamespace(
            ranking={Role.PREFILL: ranked_prefill, Role.DECODE: ranked_decode}, members=members.__getitem__
        )
        hash_ms = median_ms(hash_prompt)
        decode_ms, prefill_ms = median_ms(place_decode) - hash_ms, median_ms(place_prefill) - hash_ms
        note_ms = median_ms(partial(note, fleet, kind)) - hash_ms - decode_ms - prefill_ms
        for one in decode:
            one.hear(WorkerState.SERVING, one.load._replace(num_free_blocks=0), 1, 0.0)
        report.add(
            workers=count,
            **{
                "hashes, ms": hash_ms,
                "decode, ms": decode_ms,
                "prefill, ms": prefill_ms,
                "kept to be explained, ms": note_ms,
                "in all, ms": hash_ms + decode_ms + 2 * prefill_ms + note_ms,
                "target, ms": TARGET_MS,
                "decode when no worker has room, ms": median_ms(place_decode) - hash_ms,
                "a load message, ms": median_ms_of_load_messages(decode),
            },
        )
    report.notes.append(
        "The hashes of a prompt are made once for all choices; the columns behind are without them. Prefill is chosen "
        "twice: when it is decided where to compute the prompt, and again when blocks are reserved."
    )
    report.save()


if __name__ == "__main__":
    main()
