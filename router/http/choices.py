"""Runs the choices of one HTTP request, each a generation of its own.

All are admitted before any of them runs, so that a request that cannot be served is refused whole. Of several choices
of one prompt the first computes it, and the others, which begin with its first token, find it in the prefix cache.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from common.errors import Internal
from pdserve.v1 import router_pb2
from router.generation import Generations
from router.http.asked import Asked
from router.output import Piece
from router.request import Arrival
from router.session import Completed


@dataclass(eq=False, slots=True)
class Prompt:
    """What the choices of one prompt share."""

    message: router_pb2.GenerateRequest
    # Known from the first choice's admission on.
    token_ids: Sequence[int] = ()
    # From its first piece on; empty unless asked for.
    logprobs: list[object] = field(default_factory=list)
    is_admitted: asyncio.Event = field(default_factory=asyncio.Event)
    has_begun: asyncio.Event = field(default_factory=asyncio.Event)


@dataclass(eq=False, slots=True)
class Choice:
    """One completion of a reply."""

    index: int
    # Among the choices of its prompt.
    number: int
    prompt: Prompt
    request_id: str
    # Set when it has ended well.
    completed: Completed | None = None

    @property
    def is_first(self) -> bool:
        return self.number == 0

    def message(self) -> router_pb2.GenerateRequest:
        """What is to be generated. The choices of a prompt have seeds in a row, from the one that was given on."""
        message = router_pb2.GenerateRequest()
        message.CopyFrom(self.prompt.message)
        message.request_id = self.request_id
        if message.sampling.HasField("seed"):
            message.sampling.seed = (message.sampling.seed + self.number) % 2**64
        if not self.is_first:
            # Tokenised once, and its own log-probabilities computed once.
            message.prompt_token_ids.ids[:] = self.prompt.token_ids
            message.ClearField("num_prompt_logprobs")
        return message


class Sink(Protocol):
    """Where choices go. Told of several at a time, and of each in order."""

    async def put_out(self, choice: Choice, piece: Piece) -> None: ...

    async def choice_ended(self, choice: Choice) -> None: ...


def choices_of(asked: Asked, request_id: str) -> list[Choice]:
    """Of each prompt its choices in a row, as OpenAI numbers them."""
    prompts = [Prompt(message) for message in asked.prompts]
    places = [(prompt, number) for prompt in prompts for number in range(asked.num_choices)]
    ids = [request_id] if len(places) == 1 else [f"{request_id}-{index}" for index in range(len(places))]
    return [Choice(index, number, prompt, ids[index]) for index, (prompt, number) in enumerate(places)]


async def run(choices: Sequence[Choice], generations: Generations, arrival: Arrival, sink: Sink) -> None:
    """Returns when all have ended well.

    Raises the errors of those that fail as a group, and ends the work of the others on every worker, as being cancelled
    does.
    """
    all_admitted = asyncio.Barrier(len(choices))
    async with asyncio.TaskGroup() as group:
        for choice in choices:
            group.create_task(_run(choice, generations, arrival, all_admitted, sink))
    if any(choice.completed is None for choice in choices):
        # A group takes a task that was cancelled from inside for one that has ended.
        raise Internal("a generation was cancelled by nobody")


async def _run(
    choice: Choice, generations: Generations, arrival: Arrival, all_admitted: asyncio.Barrier, sink: Sink
) -> None:
    prompt = choice.prompt
    if not choice.is_first:
        await prompt.is_admitted.wait()
    async with generations.admitted(choice.message(), arrival) as generation:
        if choice.is_first:
            prompt.token_ids = generation.request.prompt_token_ids
            prompt.is_admitted.set()
        await all_admitted.wait()
        if not choice.is_first:
            await prompt.has_begun.wait()

        async def put_out(piece: Piece) -> None:
            if choice.is_first:
                prompt.logprobs += piece.prompt_logprobs
                prompt.has_begun.set()
            await sink.put_out(choice, piece)

        choice.completed = await generation.run(put_out)
        # One may end without a piece.
        prompt.has_begun.set()
        await sink.choice_ended(choice)
