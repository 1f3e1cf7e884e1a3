"""Which routers a client may ask, and whose turn it is. Knows addresses and a clock; nothing of gRPC."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet

from common.address import Address
from common.clock import Clock
from common.settings import ConfigError

# A router that could not serve is passed over for so long while there is another.
AVOID_S = 1.0


def targets_of(target: str | Sequence[str]) -> list[str]:
    """Each HOST:PORT, once. Raises ConfigError naming the one that cannot be dialled."""
    given = target.split(",") if isinstance(target, str) else target
    targets = list(dict.fromkeys(one.strip() for one in given))
    for one in targets:
        try:
            port = Address.parse(one).port
        except ValueError as error:
            raise ConfigError(f"target={one!r}: {error}") from None
        if port == 0:
            raise ConfigError(f"target={one!r}: port 0 cannot be dialled")
    if not targets:
        raise ConfigError("target: expected at least one HOST:PORT")
    return targets


class Rotation:
    """Routers taking turns; one that could not serve of late comes last."""

    def __init__(self, targets: Sequence[str], clock: Clock, chance: Callable[[], float]) -> None:
        self.targets = tuple(targets)
        self._clock = clock
        # Clients that start together do not all begin with the first.
        self._next = int(chance() * len(self.targets))
        self._avoid_until_s: dict[str, float] = {}

    def next(self, asked: AbstractSet[str] = frozenset()) -> str:
        """Whose turn it is, of those that were not `asked` if there are any."""
        now_s, count = self._clock(), len(self.targets)
        in_turn = [self.targets[(self._next + step) % count] for step in range(count)]
        waiting = [target for target in in_turn if target not in asked] or in_turn
        chosen = min(waiting, key=lambda target: self._avoid_until_s.get(target, 0.0) > now_s)
        self._next = self.targets.index(chosen) + 1
        return chosen

    def failed(self, target: str) -> None:
        self._avoid_until_s[target] = self._clock() + AVOID_S
