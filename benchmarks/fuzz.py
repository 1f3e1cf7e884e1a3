"""`make fuzz`: random requests at a router and random headers at decode's end of a pair, ten thousand of each.

No process may crash, no call may hang, and no block, descriptor, thread or task may stay behind. Where `atheris` is
installed, what parses and judges them is fuzzed by coverage as well.
"""

from __future__ import annotations

import asyncio
import importlib.util
import random
import subprocess
import sys
import time

from benchmarks.report import Report
from tests.support.fuzzed import Fuzzed, footprint

CONCURRENCY = 32
HEADERS_IN_A_PAIR = 12
# The first tenth warms up caches and pools; what is taken is compared from there on.
WARM_UP = 10
MAX_GROWTH_MIB = 64.0
COVERAGE_RUNS = 1_000_000


async def requests(fuzzed: Fuzzed, first: int, last: int) -> None:
    seeds = iter(range(first, last))

    async def ask() -> None:
        for seed in seeds:
            await fuzzed.request(random.Random(seed))

    await asyncio.gather(*(ask() for _ in range(CONCURRENCY)))


async def headers(fuzzed: Fuzzed, most: int) -> None:
    while fuzzed.num_headers < most:
        await fuzzed.pair(random.Random(fuzzed.num_pairs), most=min(HEADERS_IN_A_PAIR, most - fuzzed.num_headers))


async def fuzz(count: int, report: Report) -> list[str]:
    """The promises that were broken."""
    broken: list[str] = []
    async with Fuzzed.running() as fuzzed:
        for name, run in (
            ("requests", lambda first, last: requests(fuzzed, first, last)),
            ("headers", lambda first, last: headers(fuzzed, last)),
        ):
            begun_s = time.monotonic()
            await run(0, count // WARM_UP)
            before = footprint()
            await run(count // WARM_UP, count)
            after = await settled_footprint(before)
            for what, value in after.items():
                if value > before[what] + (MAX_GROWTH_MIB if what == "memory, MiB" else 0):
                    broken.append(f"{what} grew from {before[what]:g} to {value:g} over random {name}")
            report.add(
                what=name,
                count=count if name == "requests" else fuzzed.num_headers,
                seconds=time.monotonic() - begun_s,
                **{f"{what}, before": before[what] for what in before},
                **{f"{what}, after": after[what] for what in after},
            )
    codes = ", ".join(f"{number:,} {code}" for code, number in fuzzed.codes.most_common())
    report.notes.append(f"Answers to requests: {codes}.")
    report.notes.append(f"The headers were said on {fuzzed.num_pairs:,} pairs, each to one live reservation.")
    return broken


async def settled_footprint(before: dict[str, float]) -> dict[str, float]:
    """Threads of a pair that has ended take a moment to do so themselves."""
    for _ in range(100):
        after = footprint()
        if all(after[what] <= before[what] for what in after if what != "memory, MiB"):
            break
        await asyncio.sleep(0.1)
    return after


def fuzz_by_coverage(report: Report) -> list[str]:
    if importlib.util.find_spec("atheris") is None:
        report.notes.append("atheris is not installed: nothing was fuzzed by coverage.")
        return []
    begun_s = time.monotonic()
    command = [sys.executable, "-m", "benchmarks.fuzz_coverage", f"-runs={COVERAGE_RUNS}", "-max_len=4096"]
    done = subprocess.run(command, capture_output=True, text=True)
    report.add(what="inputs by coverage", count=COVERAGE_RUNS, seconds=time.monotonic() - begun_s)
    if done.returncode == 0:
        return []
    return [f"by coverage: {done.stdout[-2000:]}{done.stderr[-2000:]}"]


def main(count: int) -> int:
    report = Report("fuzz", "Random requests and random headers")
    broken = [*asyncio.run(fuzz(count, report)), *fuzz_by_coverage(report)]
    report.notes.append("No crash, no hang, nothing left behind." if not broken else f"Broken: {'; '.join(broken)}")
    report.save()
    for one in broken:
        print(one)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 10_000))
