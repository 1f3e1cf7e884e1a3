"""Where workers may be: addresses as configured, and what the names among them lead to, looked up again and again.

A name says where to look, no more: whether a worker is there, and alive, its load stream says. So a name that cannot be
looked up, or has lost an address, costs nobody a worker that answers.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Awaitable, Callable, Iterable, Sequence

from common.address import Address

log = logging.getLogger(__name__)

# Raises OSError when nobody can say; an answer without addresses is an answer.
LookUp = Callable[[Address], Awaitable[Sequence[Address]]]

_NO_SUCH_NAME = {socket.EAI_NONAME, socket.EAI_NODATA}


class Directory:
    """The addresses of one role. Belongs to the event loop."""

    def __init__(self, targets: Iterable[str], look_up: LookUp) -> None:
        """`targets`: HOST:PORT each."""
        self._targets = [Address.parse(target) for target in targets]
        self._look_up = look_up
        # What each name led to when it was last known.
        self._found: dict[Address, Sequence[Address]] = {name: () for name in self._targets if name.is_name}
        self._failing: set[Address] = set()

    @property
    def addresses(self) -> list[str]:
        """Every address, once, in the order of the targets."""
        found = [address for target in self._targets for address in self._found.get(target, (target,))]
        return list(dict.fromkeys(map(str, found)))

    @property
    def unknown_names(self) -> list[str]:
        """Names that lead nowhere."""
        return [str(name) for name, addresses in self._found.items() if not addresses]

    async def refresh(self) -> None:
        """Looks every name up once."""
        await asyncio.gather(*map(self._refresh, self._found))

    async def _refresh(self, name: Address) -> None:
        try:
            self._found[name] = await self._look_up(name)
        except OSError as error:
            if name not in self._failing:
                log.warning("cannot look up %s, going on with what is known of it: %s", name, error.strerror or error)
            self._failing.add(name)
            return
        if name in self._failing:
            log.info("%s can be looked up again", name)
        self._failing.discard(name)


async def look_up(name: Address) -> list[Address]:
    """What the resolver of this machine knows: IPv4 addresses where there are any, else IPv6 ones, sorted.

    One family alone, since a worker that has both is one worker.
    """
    try:
        found = await asyncio.get_running_loop().getaddrinfo(name.host, name.port, type=socket.SOCK_STREAM)
    except socket.gaierror as error:
        if error.errno in _NO_SUCH_NAME:
            return []
        raise
    hosts: dict[int, set[str]] = {}
    for family, _, _, _, where in found:
        hosts.setdefault(family, set()).add(str(where[0]))
    family = socket.AF_INET if socket.AF_INET in hosts else socket.AF_INET6
    return sorted(Address(host, name.port) for host in hosts.get(family, ()))
