"""The attention/FFN pipeline, on and off: the same prompts, the same tokens, what each cost.

    $ make serve                                          # in another terminal
    $ .venv/bin/python examples/decode_pipeline.py
    $ .venv/bin/python examples/decode_pipeline.py --attention-sm 64 --ffn-sm 68 --cut attention-core --streams 128

Where the decode worker's device cannot be split, it says so and why, and runs sequentially.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from typing import NamedTuple

from common.errors import FailedPrecondition
from pdserve.client import AsyncClient
from pdserve.results import Chunk, PipelineStats
from pdserve.worker_client import WorkerClient

PROMPTS = (
    "The for statement is used to iterate over",
    "Return a list of",
    "A class definition is an executable statement",
    "Raised when an operation",
)


class Run(NamedTuple):
    """What one mode did."""

    tokens: list[tuple[int, ...]]
    seconds: float
    before: PipelineStats
    after: PipelineStats

    @property
    def tokens_per_s(self) -> float:
        return sum(map(len, self.tokens)) / self.seconds

    @property
    def step_ms(self) -> float:
        """Mean of this run's steps."""
        num_steps = self.after.num_steps - self.before.num_steps
        total_ms = self.after.total_ms * self.after.num_steps - self.before.total_ms * self.before.num_steps
        return total_ms / num_steps if num_steps else 0.0

    @property
    def num_pipelined(self) -> int:
        return self.after.num_pipelined_steps - self.before.num_pipelined_steps


async def tokens_of(client: AsyncClient, prompt: str, max_tokens: int) -> tuple[int, ...]:
    token_ids: list[int] = []
    async for event in client.generate(prompt, temperature=0.0, max_tokens=max_tokens, ignore_eos=True):
        if isinstance(event, Chunk):
            token_ids += event.token_ids
    return tuple(token_ids)


async def run(client: AsyncClient, worker: WorkerClient, streams: int, max_tokens: int) -> Run:
    """All streams at once, twice: what is captured or compiled at first use is in the first."""
    for _ in range(2):
        before, started_s = await worker.get_pipeline_stats(), time.monotonic()
        prompts = (PROMPTS[index % len(PROMPTS)] for index in range(streams))
        tokens = await asyncio.gather(*(tokens_of(client, prompt, max_tokens) for prompt in prompts))
        seconds = time.monotonic() - started_s
    return Run(list(tokens), seconds, before, await worker.get_pipeline_stats())


def show(name: str, run: Run) -> None:
    stats = run.after
    print(
        f"{name:>10}  {run.tokens_per_s:9,.0f} tokens/s  {run.step_ms:8.3f} ms a step  {run.num_pipelined:5} pipelined",
        end="",
    )
    print(f"  {stats.cut} {stats.attention_sm}:{stats.ffn_sm}" if run.num_pipelined else "")


async def main(options: argparse.Namespace) -> None:
    async with AsyncClient(options.router) as client, WorkerClient(options.decode) as worker:
        was = await worker.get_pipeline_stats()
        try:
            await worker.set_pipeline(mode="disabled", profiling=True)
            sequential = await run(client, worker, options.streams, options.max_tokens)
            show("off", sequential)
            try:
                await worker.set_pipeline(
                    mode="static", cut=options.cut, attention_sm=options.attention_sm, ffn_sm=options.ffn_sm
                )
            except FailedPrecondition as error:
                print(f"{'on':>10}  not possible here: {error}")
                return
            pipelined = await run(client, worker, options.streams, options.max_tokens)
            show("on", pipelined)
            same = sum(one == other for one, other in zip(sequential.tokens, pipelined.tokens, strict=True))
            print(f"\nsame tokens: {same} of {len(pipelined.tokens)} streams")
            print(f"gain: {sequential.step_ms / pipelined.step_ms:.3f} x sequential steps")
            stats = pipelined.after
            print(
                f"attention {stats.attention_stage_p50_ms:.3f} ms a stage, busy {stats.attention_occupancy:.0%}; "
                f"FFN {stats.ffn_stage_p50_ms:.3f} ms a stage, busy {stats.ffn_occupancy:.0%}; "
                f"bubbles {stats.bubble_share:.0%}"
            )
        finally:
            await worker.set_pipeline(mode=was.mode.lower(), profiling=False)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--router", default="127.0.0.1:50051", metavar="HOST:PORT")
    parser.add_argument("--decode", default="127.0.0.1:50053", metavar="HOST:PORT", help="the router's decode worker")
    parser.add_argument("--cut", default="layer", choices=("layer", "attention-core"))
    parser.add_argument("--attention-sm", type=int, default=64)
    parser.add_argument("--ffn-sm", type=int, default=68)
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--max-tokens", type=int, default=200)
    return parser.parse_args()


if __name__ == "__main__":
    asyncio.run(main(arguments()))
