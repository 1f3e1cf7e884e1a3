"""A network of its own for processes that are to lose it: namespaces on a bridge. Needs root, and Linux.

It lives in a network namespace of the calling process, so that nothing of the machine's own network is touched.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import subprocess
from collections.abc import Iterator

_CLONE_NEWNET = 0x40000000
_PREFIX = "10.77.0"


def obstacle() -> str:
    """Why there can be none on this machine; empty if there can."""
    if os.geteuid() != 0:
        return "only root may make network namespaces"
    return "" if shutil.which("ip") else "there is no ip command (iproute2)"


class Host:
    """One namespace; what runs there is reached at `ip`."""

    def __init__(self, number: int) -> None:
        self.name = f"pdserve-{os.getpid()}-{number}"
        self.ip = f"{_PREFIX}.{number + 2}"
        self._link = f"host{number}"
        # Put before the command of a process.
        self.command = ["ip", "netns", "exec", self.name]

    def cut(self) -> None:
        """Packets vanish from here on, in both directions; nobody is told."""
        _ip("link", "set", self._link, "down")

    def mend(self) -> None:
        _ip("link", "set", self._link, "up")

    def reset(self) -> None:
        """Every TCP connection with the outside is reset at both ends."""
        subprocess.run([*self.command, "ss", "-K", "dst", f"{_PREFIX}.0/24"], check=True, capture_output=True)

    def add(self) -> None:
        _ip("netns", "add", self.name)
        _ip("link", "add", self._link, "type", "veth", "peer", "name", "eth0", "netns", self.name)
        _ip("link", "set", self._link, "master", "bridge", "up")
        _ip("-n", self.name, "addr", "add", f"{self.ip}/24", "dev", "eth0")
        for device in ("eth0", "lo"):
            _ip("-n", self.name, "link", "set", device, "up")

    def remove(self) -> None:
        _ip("netns", "del", self.name)


@contextlib.contextmanager
def private_network(num_hosts: int) -> Iterator[list[Host]]:
    """Moves this process, for good, into a namespace of its own, in which it reaches so many hosts."""
    if ctypes.CDLL(None, use_errno=True).unshare(_CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "a network namespace cannot be made")
    _ip("link", "set", "lo", "up")
    _ip("link", "add", "bridge", "type", "bridge")
    _ip("addr", "add", f"{_PREFIX}.1/24", "dev", "bridge")
    _ip("link", "set", "bridge", "up")
    with contextlib.ExitStack() as stack:
        hosts = [Host(number) for number in range(num_hosts)]
        for host in hosts:
            host.add()
            stack.callback(host.remove)
        yield hosts


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)
