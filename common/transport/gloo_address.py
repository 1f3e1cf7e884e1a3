"""Reads and writes the one key that a gloo process sets in its store: where it listens, as a C++ struct.

gloo trusts what it reads there and crashes on nonsense, and what it writes has uninitialised memory in it. So peers
tell one another HOST:PORT, and each builds the peer's key from its own. The layout, in native byte order: length of the
host name (u64), host name, length of the address (u64, 136), sockaddr_storage (128), -1 (i64), an i64 for each rank.
"""

from __future__ import annotations

import ipaddress
import socket
import struct
import sys

from common.address import Address
from common.transport.group import PairBroken

_SOCKADDR_BYTES = 128
_RANKS = struct.pack("=qq", 0, 1)


def listening_address(key: bytes) -> Address:
    """Where the process that wrote `key` listens.

    Raises:
        PairBroken: this version of gloo writes something else.
    """
    start = _sockaddr_start(key)
    family, port = struct.unpack_from("=H", key, start)[0], struct.unpack_from("!H", key, start + 2)[0]
    if family == socket.AF_INET:
        return Address(socket.inet_ntop(family, key[start + 4 : start + 8]), port)
    if family == socket.AF_INET6:
        return Address(socket.inet_ntop(family, key[start + 8 : start + 24]), port)
    raise PairBroken(f"gloo listens on the unknown address family {family}")


def key_listening_at(text: bytes, own_key: bytes) -> bytes:
    """The key of a process that listens at HOST:PORT, HOST being an IP address; everything else is as in `own_key`.

    Raises:
        PairBroken: `text` is not of that form.
    """
    try:
        address = Address.parse(text.decode("ascii"))
        ip = ipaddress.ip_address(address.host)
    except ValueError as error:
        raise PairBroken(f"the peer's process group is not at an IP address and port, but {text[:80]!r}") from error
    if ip.version == 4:
        sockaddr = struct.pack("=H", socket.AF_INET) + struct.pack("!H", address.port) + ip.packed
    else:
        flow = scope = bytes(4)
        sockaddr = struct.pack("=H", socket.AF_INET6) + struct.pack("!H", address.port) + flow + ip.packed + scope
    start = _sockaddr_start(own_key)
    return own_key[:start] + sockaddr.ljust(_SOCKADDR_BYTES, b"\0") + own_key[start + _SOCKADDR_BYTES :]


def _sockaddr_start(key: bytes) -> int:
    start = 16 + int.from_bytes(key[:8], sys.byteorder)
    expected = struct.pack("=Q", _SOCKADDR_BYTES + 8), struct.pack("=q", -1) + _RANKS
    if (key[start - 8 : start], key[start + _SOCKADDR_BYTES :]) != expected:
        raise PairBroken(
            "this version of gloo writes its address in an unknown form; use a torch that the README names"
        )
    return start
