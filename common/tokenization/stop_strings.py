"""Finds stop strings in text that arrives in pieces, without ever letting the beginning of one pass.

The automaton of Aho and Corasick, "Efficient string matching" (1975): each state is the longest ending of the text that
begins some stop string. The match that is completed first wins; of those completed together, the longest. So the result
does not depend on how the text was cut into pieces.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

MAX_STOP_STRING_LENGTH = 1024


class StopMatch(NamedTuple):
    """A stop string, and where it stands in the text: characters [start, end)."""

    stop: str
    start: int
    end: int


class StopStrings:
    """The automaton of some stop strings, none of them empty. Immutable; the position in a text is a StopMatcher's."""

    def __init__(self, stops: Sequence[str]) -> None:
        self.next: list[dict[str, int]] = [{}]
        # The longest stop string that ends in this state.
        self.match: list[str | None] = [None]
        depth = [0]
        for stop in stops:
            state = 0
            for character in stop:
                if character not in self.next[state]:
                    self.next[state][character] = len(self.next)
                    self.next.append({})
                    self.match.append(None)
                    depth.append(depth[state] + 1)
                state = self.next[state][character]
            self.match[state] = stop
        # The state of the longest proper ending that begins a stop string too.
        self.fall = [0] * len(depth)
        # How much of the text's end may still become a stop string.
        self.held = [0] * len(depth)
        states = list(self.next[0].values())
        for state in states:  # by growing depth: `states` grows while it is read
            shorter = self.fall[state]
            self.match[state] = self.match[state] or self.match[shorter]
            self.held[state] = depth[state] if self.next[state] else self.held[shorter]
            for character, longer in self.next[state].items():
                self.fall[longer] = self.step(shorter, character)
                states.append(longer)
        self.begins = re.compile("[" + re.escape("".join(self.next[0])) + "]")

    def step(self, state: int, character: str) -> int:
        """The state after one more character."""
        while state and character not in self.next[state]:
            state = self.fall[state]
        return self.next[state].get(character, 0)


class StopMatcher:
    """Reads one text. Positions count characters from its beginning."""

    def __init__(self, stops: StopStrings) -> None:
        self._stops = stops
        self._state = 0
        self.num_read = 0

    @property
    def num_settled(self) -> int:
        """Characters that no match can reach back to any more."""
        return self.num_read - self._stops.held[self._state]

    def feed(self, text: str, *, may_match: bool = True) -> StopMatch | None:
        """Reads on, up to the first match. Where the text may not stop yet, matches that end in it are passed over."""
        stops, state = self._stops, self._state
        if not state and not stops.begins.search(text):
            self.num_read += len(text)
            return None
        for count, character in enumerate(text, start=1):
            state = stops.step(state, character)
            stop = stops.match[state]
            if stop is not None and may_match:
                self._state = state
                end = self.num_read + count
                self.num_read = end
                return StopMatch(stop, end - len(stop), end)
        self._state = state
        self.num_read += len(text)
        return None
