"""What is asked: request number i of a workload is always the same, whoever sends it and when."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import NamedTuple

from pdserve.bench.lengths import Lengths
from pdserve.bench.prompt_file import FilePrompt
from pdserve.request import Options, Prompt

# Ordinary English, each a token or two in most vocabularies.
TEXT = (
    "the of and to in is that it for was on are as with they at be this from have or by one had not but what all were "
    "when we there can an your which their said if do will each about how up out them then she many some so these "
    "would other into has more her two like him see time could no make than first been its who now people my made over "
    "did down only way find use may water long little very after words called just where most know"
)
WORDS = TEXT.split()


class Ask(NamedTuple):
    """One request, ready to be sent."""

    prompt: Prompt
    options: Options


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Drawn prompts, or those of a file in their order, again and again."""

    seed: int
    prompt_tokens: Lengths
    output_tokens: Lengths
    vocab_size: int
    # All drawn prompts begin with so many equal tokens.
    shared_prefix: int = 0
    # Words instead of token ids; a length then counts words.
    as_text: bool = False
    ignore_eos: bool = True
    temperature: float = 0.0
    # Requests find cached prefixes only of the same salt, so that no run finds those of an earlier one.
    cache_salt: str = ""
    prompts: tuple[FilePrompt, ...] = ()

    def ask(self, index: int) -> Ask:
        generator = random.Random(f"{self.seed} request {index}")
        num_output = self.output_tokens.draw(generator)
        if self.prompts:
            prompt, max_tokens = self.prompts[index % len(self.prompts)]
            num_output = max_tokens or num_output
        else:
            prompt = self._drawn(generator)
        options = Options(
            max_tokens=num_output,
            ignore_eos=self.ignore_eos,
            temperature=self.temperature,
            seed=generator.getrandbits(32),
            cache_salt=self.cache_salt,
        )
        return Ask(prompt, options)

    def _drawn(self, generator: random.Random) -> Prompt:
        num_tokens = self.prompt_tokens.draw(generator)
        num_shared = min(self.shared_prefix, num_tokens)
        prefix = random.Random(f"{self.seed} prefix")
        if self.as_text:
            return " ".join(prefix.choices(WORDS, k=num_shared) + generator.choices(WORDS, k=num_tokens - num_shared))
        ids = range(self.vocab_size)
        return prefix.choices(ids, k=num_shared) + generator.choices(ids, k=num_tokens - num_shared)
