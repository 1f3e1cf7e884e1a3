"""What it takes a router to place one request among many workers: both choices, and the hashes of the prompt.

Every worker has something to do and has got prompts of its own; one in a hundred has got the beginning of this one.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable

from benchmarks.report import Report
from common.load import Load
from router.placement import Demand, choose_decode, choose_prefill
from router.workers import Identity, Role, Worker, WorkerState

PROMPT = tuple(range(2000))
TARGET_MS = 1.0
NUM_REPEATS = 200
NUM_BLOCKS = 10_000


def workers(role: Role, count: int) -> list[Worker]:
    draw = random.Random(count)
    made = []
    for number in range(count):
        identity = Identity(
            instance_id=f"{role.value}-{number}",
            boot_id=f"boot-{number}",
            model_id="model",
            model_fingerprint="fingerprint",
            protocol_version=1,
            context_length=32_768,
            vocab_size=151_936,
            block_size=16,
            num_total_blocks=NUM_BLOCKS,
            max_num_seqs=256,
            eos_token_ids=(2,),
        )
        one = Worker(role, f"10.0.{number // 256}.{number % 256}:50053", wedged_after_s=10.0)
        one.meet(identity, 0.0)
        load = Load(
            num_free_blocks=draw.randrange(1000, 9000),
            num_running=draw.randrange(1, 200),
            num_waiting_tokens=draw.randrange(50_000),
        )
        one.hear(WorkerState.SERVING, load, 1, 0.0)
        own = PROMPT[: draw.randrange(2000)] if number % 100 == 0 else [number] * draw.randrange(2000)
        one.prefixes.add(Demand(own).hashes(identity))
        made.append(one)
    return made


def median_ms(place: Callable[[], object]) -> float:
    taken_ms = []
    for _ in range(NUM_REPEATS):
        begun_s = time.perf_counter()
        place()
        taken_ms.append((time.perf_counter() - begun_s) * 1e3)
    return statistics.median(taken_ms)


def main() -> None:
    report = Report("placement", "Placing one request of 2,000 tokens among many workers of each role")
    for count in (2, 64, 256, 1000):
        prefill, decode = workers(Role.PREFILL, count), workers(Role.DECODE, count)
        kind = decode[0].kind
        assert kind is not None

        def place_decode(decode=decode, kind=kind) -> object:
            return choose_decode(decode, Demand(PROMPT), prefill_kinds={kind})

        def place_prefill(prefill=prefill, kind=kind) -> object:
            return choose_prefill(prefill, Demand(PROMPT), kind=kind)

        def hash_prompt(worker=decode[0]) -> object:
            return Demand(PROMPT).hashes(worker.identity)

        hash_ms = median_ms(hash_prompt)
        report.add(
            workers=count,
            **{
                "hashes, ms": hash_ms,
                "decode, ms": median_ms(place_decode) - hash_ms,
                "prefill, ms": median_ms(place_prefill) - hash_ms,
                "target, ms": TARGET_MS,
            },
        )
    report.notes.append("The hashes of a prompt are made once for both choices; the columns behind are without them.")
    report.save()


if __name__ == "__main__":
    main()
