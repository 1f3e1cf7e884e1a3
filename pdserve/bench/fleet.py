"""The processes that send: one event loop each, so that the client is not what is measured."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from common.errors import Internal, Unavailable
from pdserve.bench.job import Done, Job, Progress
from pdserve.bench.load import Share

# All processes have heard by then when to start.
HEAD_START_S = 0.1
# A line has what became of all requests of a process.
LINE_BYTES = 2**31

OnProgress = Callable[[float, Progress], None]


class Ran(NamedTuple):
    """What became of one load: when it began on the monotonic clock, and what each process saw."""

    start_s: float
    parts: list[Done]


class Fleet:
    """`running` starts them; each `run` is one load."""

    def __init__(self, processes: Sequence[asyncio.subprocess.Process]) -> None:
        self.processes = processes

    @classmethod
    @contextlib.asynccontextmanager
    async def running(cls, num_processes: int) -> AsyncIterator[Fleet]:
        processes: list[asyncio.subprocess.Process] = []
        try:
            for _ in range(num_processes):
                processes.append(await _start())
            yield cls(processes)
        finally:
            for process in processes:
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
                await process.wait()

    async def run(self, job: Job, on_progress: OnProgress) -> Ran:
        """`on_progress` is given the seconds since the start, and all processes' progress.

        Raises:
            Unavailable: a process cannot reach its routers.
            Internal: a process ended; its stderr, which is this one's, says why.
        """
        of = len(self.processes)
        for place, process in enumerate(self.processes):
            _say(process, replace(job, share=Share(place=place, of=of)).to_line())
        for process in self.processes:
            told = await _hear(process)
            if "failed" in told:
                raise Unavailable(told["failed"], reason="UNREACHABLE")
        start_s = time.monotonic() + HEAD_START_S
        progress = [Progress()] * of

        async def follow(place: int, process: asyncio.subprocess.Process) -> Done:
            _say(process, repr(start_s))
            while True:
                told = await _hear(process)
                if "done" in told:
                    return Done.from_told(told["done"])
                progress[place] = Progress(**told["progress"])
                on_progress(time.monotonic() - start_s, _sum(progress))

        try:
            async with asyncio.TaskGroup() as group:
                following = [group.create_task(follow(place, one)) for place, one in enumerate(self.processes)]
        except ExceptionGroup as several:
            raise several.exceptions[0] from None
        return Ran(start_s, [task.result() for task in following])


async def _start() -> asyncio.subprocess.Process:
    pipe = asyncio.subprocess.PIPE
    # Ctrl-C is for the process that the user started; it ends these.
    return await asyncio.create_subprocess_exec(
        sys.executable, "-m", "pdserve.bench.child", stdin=pipe, stdout=pipe, limit=LINE_BYTES, start_new_session=True
    )


def _say(process: asyncio.subprocess.Process, line: str) -> None:
    assert process.stdin is not None
    process.stdin.write(line.encode() + b"\n")


async def _hear(process: asyncio.subprocess.Process) -> Mapping[str, Any]:
    assert process.stdout is not None
    line = await process.stdout.readline()
    if not line:
        raise Internal("a process of the benchmark ended before its time")
    return json.loads(line)


def _sum(progress: Sequence[Progress]) -> Progress:
    columns = zip(*((one.num_sent, one.num_ended, one.num_failed, one.num_tokens) for one in progress), strict=True)
    return Progress(*map(sum, columns))
