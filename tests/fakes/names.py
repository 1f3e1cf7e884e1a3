"""Names that lead to many addresses, as a headless Service's does; faults are attributes."""

from __future__ import annotations

from common.address import Address


class FakeNames:
    """Looks names up for a router."""

    def __init__(self) -> None:
        # HOST:PORT, and what it leads to.
        self.answers: dict[str, list[str]] = {}
        # Nobody can say.
        self.is_failing = False
        self.num_asked = 0

    async def __call__(self, name: Address) -> list[Address]:
        self.num_asked += 1
        if self.is_failing:
            raise OSError("no answer from any server")
        return [Address.parse(address) for address in self.answers.get(str(name), [])]
