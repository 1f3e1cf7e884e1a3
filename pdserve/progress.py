"""The bar that `LLM.generate` shows: prompts done, and tokens a second of prefill and decode."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn
from rich.text import Text

from common.clock import Clock, monotonic
from pdserve.cli.terminal import console
from pdserve.results import Chunk, Reply


class Throughput:
    """Counts what comes, since its making; prompts when they are done, output as it comes."""

    def __init__(self, clock: Clock = monotonic) -> None:
        self._clock = clock
        self._started_s = self._last_s = clock()
        self._num_prompt_tokens = 0
        self._num_output_tokens = 0

    def add(self, chunk: Chunk) -> None:
        self._num_output_tokens += len(chunk.token_ids)
        self._last_s = self._clock()

    def finish(self, reply: Reply) -> None:
        self._num_prompt_tokens += reply.usage.prompt_tokens
        self._last_s = self._clock()

    def __str__(self) -> str:
        """Means over all of the time until something came last."""
        elapsed_s = self._last_s - self._started_s
        if elapsed_s <= 0:
            return ""
        prefill, decode = self._num_prompt_tokens / elapsed_s, self._num_output_tokens / elapsed_s
        return f"prefill {prefill:,.0f} tok/s, decode {decode:,.0f} tok/s"


@contextlib.contextmanager
def progress_bar(total: int, throughput: Throughput, *, visible: bool) -> Iterator[Callable[[], None]]:
    """Yields what to call for each prompt that is done, from any thread. On stderr: a bar that lives on a terminal, in
    a file or a pipe its last state alone."""

    class Speed(ProgressColumn):
        def render(self, task: Task) -> Text:
            return Text(str(throughput))

    columns = (TextColumn("generating"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), Speed())
    with Progress(*columns, console=console(stderr=True), disable=not visible) as bar:
        task = bar.add_task("", total=total)
        yield lambda: bar.advance(task)
