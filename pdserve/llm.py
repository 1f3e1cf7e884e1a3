"""Offline use: prompts in, completions out, with services of its own on this machine.

llm = LLM("~/models/Qwen3-0.6B")
for output in llm.generate(["Hello!", "What is AI?"], SamplingParams(temperature=0.7, max_tokens=64)):
    print(output.text)

Keywords: `pdserve.llm_settings`. Processes: `pdserve.local_services`.
"""

from __future__ import annotations

import asyncio
import os
import weakref
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Self, cast

from common.config import TINY_MODEL
from common.errors import InvalidArgument, PdserveError, Unavailable
from pdserve.access import Access
from pdserve.background import BackgroundLoop, background_loop
from pdserve.client import AsyncClient
from pdserve.gpus import num_gpus
from pdserve.llm_settings import settings_of
from pdserve.local_services import LocalServices
from pdserve.pipeline_report import report_lines
from pdserve.request import Chat, Message, Prompt, Turn
from pdserve.results import Chunk, PipelineStats, Reply
from pdserve.retrying import RetryPolicy
from pdserve.sampling import SamplingParams
from pdserve.worker_client import WorkerClient

# Loading a large model, compiling kernels.
START_TIMEOUT_S = 600.0
# Of one prompt, in a batch of thousands.
TIMEOUT_S = 3600.0
# KV that is full for a while is no failure of a batch; each prompt has its deadline.
RETRIES = RetryPolicy(retries=1000, max_wait_s=1.0)


class LLM:
    """Router, prefill and decode, from the making of this object until `close`, the end of `with`, its collection, or
    the end of this process, whatever ends it."""

    def __init__(
        self,
        model: str | os.PathLike[str] = TINY_MODEL,
        *,
        start_timeout_s: float = START_TIMEOUT_S,
        log_folder: str | None = None,
        **keywords: Any,
    ) -> None:
        """Returns when all three are ready.

        `model`: a Hugging Face folder. `log_folder`: where the services' logs go and stay; None: a temporary folder,
        removed if nothing failed. `keywords`: as `pdserve.llm_settings` lists them.

        Raises:
            ConfigError: a keyword or a value cannot work.
            Unavailable: a service ended or was not ready within `start_timeout_s`; the message names its log.
        """
        settings = settings_of(model, keywords, num_gpus)
        self._max_in_flight = settings.max_in_flight
        self._loop = background_loop()
        self._services = LocalServices(settings, start_timeout_s=start_timeout_s, log_folder=log_folder)
        self._client = AsyncClient(self._services.router_address, access=Access(), retries=RETRIES)
        self._end = weakref.finalize(self, _end, self._loop, self._client, self._services)
        self.decode_runner = DecodeRunner(self._services.decode_address, self._loop)
        try:
            self._loop.run(self._services.wait_until_ready())
        except BaseException:
            self._end()
            raise

    @property
    def router_address(self) -> str:
        """HOST:PORT, for other clients and for `pdserve`."""
        return self._services.router_address

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Cancels what is under way and ends the services; returns when they have ended."""
        self._end()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        *,
        timeout_s: float = TIMEOUT_S,
    ) -> list[Reply]:
        """Completes texts or lists of token ids; outputs are in the order of the prompts.

        `sampling_params`: one for all, or one for each. `use_tqdm`: show a bar. `timeout_s` is each prompt's deadline,
        from when it is sent. Ctrl-C cancels all that is under way, and the services stay.

        Raises:
            PdserveError: the first that a prompt met, when all others are cancelled; its notes name the prompt.
            Unavailable: with reason SERVICE_ENDED, naming the log, when a service has died.
        """
        batch = _prompts_of(prompts)
        params = _params_of(sampling_params, len(batch))
        # Here, since a bar needs more than the rest of this module.
        from pdserve.progress import Throughput, progress_bar

        throughput = Throughput()
        with progress_bar(len(batch), throughput, visible=use_tqdm) as advance:

            def finish(reply: Reply) -> None:
                throughput.finish(reply)
                advance()

            try:
                return self._loop.run(self._complete_all(batch, params, timeout_s, throughput.add, finish))
            except Unavailable as error:
                raise self._services.error() or error from error

    def chat(
        self,
        messages: Sequence[Turn] | Sequence[Sequence[Turn]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        *,
        template_kwargs: Mapping[str, Any] | None = None,
        timeout_s: float = TIMEOUT_S,
    ) -> list[Reply]:
        """Answers one conversation or several, each a list of {"role": ..., "content": ...}, through the model's chat
        template; otherwise as `generate`."""
        is_one = bool(messages) and isinstance(messages[0], Message | Mapping)
        conversations = cast("Sequence[Sequence[Turn]]", [messages] if is_one else messages)
        chats = [Chat(one, template_kwargs or {}) for one in conversations]
        return self.generate(chats, sampling_params, use_tqdm, timeout_s=timeout_s)

    async def _complete_all(
        self,
        prompts: Sequence[Prompt],
        params: Sequence[SamplingParams],
        timeout_s: float,
        on_chunk: Callable[[Chunk], None],
        on_reply: Callable[[Reply], None],
    ) -> list[Reply]:
        places = asyncio.Semaphore(self._max_in_flight)

        async def complete(index: int) -> Reply:
            async with places:
                try:
                    reply = await self._client.complete(
                        prompts[index], timeout_s=timeout_s, on_chunk=on_chunk, **params[index].options()
                    )
                except PdserveError as error:
                    error.add_note(f"prompt {index} of {len(prompts)}, counted from 0")
                    raise
            on_reply(reply)
            return reply

        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(complete(index)) for index in range(len(prompts))]
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from None
        return [task.result() for task in tasks]


class DecodeRunner:
    """The decode service's attention/FFN pipeline."""

    def __init__(self, address: str, loop: BackgroundLoop) -> None:
        self._address = address
        self._loop = loop

    def get_pipeline_statistics(self) -> PipelineStats:
        async def ask() -> PipelineStats:
            async with WorkerClient(self._address, access=Access()) as worker:
                return await worker.get_pipeline_stats()

        return self._loop.run(ask())

    def print_pipeline_statistics(self) -> None:
        print(*report_lines(self.get_pipeline_statistics()), sep="\n")


def _end(loop: BackgroundLoop, client: AsyncClient, services: LocalServices) -> None:
    # Collection may happen in the loop's own thread: nothing here waits for it.
    loop.submit(client.close())
    services.stop()


def _prompts_of(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str | Chat):
        return [prompts]
    batch = list(prompts)
    return [cast("Sequence[int]", batch)] if batch and isinstance(batch[0], int) else cast("list[Prompt]", batch)


def _params_of(params: SamplingParams | Sequence[SamplingParams] | None, count: int) -> list[SamplingParams]:
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * count
    if len(params) != count:
        raise InvalidArgument(
            f"sampling_params: expected one for all or one for each of {count} prompts, got {len(params)}",
            field="sampling_params",
        )
    return list(params)
