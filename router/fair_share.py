"""What each client has been given: whoever was given least is next. A policy, no I/O.

Virtual token counters (Sheng et al., "Fairness in Serving Large Language Models", OSDI 2024): a client is charged for
a prompt when it is taken and for output as it comes, so nothing has to be guessed. One that comes, or comes back, is
set level with those that are served: nobody saves up a share by not asking, and nobody pays for having been alone.
Between two clients that always wait, what they are given differs by no more than all workers hold at once.
"""

from __future__ import annotations

# An output token costs as much as so many prompt tokens.
OUTPUT_WEIGHT = 2
# So many clients are remembered, those that were charged last.
MAX_CLIENTS = 10_000


class FairShare:
    """In prompt tokens, or as many as output is worth."""

    def __init__(self) -> None:
        # Whoever was charged longest ago comes first.
        self._given: dict[str, int] = {}
        # What whoever was taken last had been given before.
        self._level = 0

    def __len__(self) -> int:
        """Clients that are remembered."""
        return len(self._given)

    def given(self, client: str) -> int:
        return self._given.get(client, self._level)

    def enter(self, client: str) -> None:
        """It asks for something, and waits for nothing yet."""
        self._set(client, max(self.given(client), self._level))

    def take(self, client: str, *, num_prompt_tokens: int) -> None:
        """A request of it goes to a worker."""
        self._level = max(self._level, self.given(client))
        self._set(client, self.given(client) + num_prompt_tokens)

    def put_out(self, client: str, *, num_tokens: int) -> None:
        """A request of it has got so many tokens more."""
        self._set(client, self.given(client) + OUTPUT_WEIGHT * num_tokens)

    def _set(self, client: str, given: int) -> None:
        self._given.pop(client, None)
        self._given[client] = given
        if len(self._given) > MAX_CLIENTS:
            del self._given[next(iter(self._given))]
