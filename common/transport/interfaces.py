"""The name of a network interface, for libraries that want it instead of an address."""

from __future__ import annotations

import fcntl
import socket
import struct

_SIOCGIFADDR = 0x8915


def interface_name(address: str) -> str | None:
    """Of the interface with this IPv4 address or host name, as in `ip link`; None when there is none."""
    try:
        wanted = socket.gethostbyname(address)
    except OSError:
        return None
    names = [name for _, name in socket.if_nameindex()]
    # Every 127.x.y.z is the loopback interface.
    return next((name for name in names if _address(name) == wanted), "lo" if wanted.startswith("127.") else None)


def _address(name: str) -> str | None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        request = struct.pack("256s", name.encode())
        try:
            return socket.inet_ntoa(fcntl.ioctl(probe, _SIOCGIFADDR, request)[20:24])
        except OSError:
            return None
