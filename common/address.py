"""HOST:PORT, as it stands in configurations and on the wire."""

from __future__ import annotations

import contextlib
import ipaddress
import socket
from typing import NamedTuple


class Address(NamedTuple):
    """Where something listens or is dialled; prints as it is written: `10.0.0.7:50053`, `[::1]:50053`, `decode:53`."""

    host: str
    port: int

    @classmethod
    def parse(cls, text: str) -> Address:
        """A name, an IPv4 address or an IPv6 address in brackets, and a port. ValueError says what is wrong."""
        host, colon, port = text.rpartition(":")
        if not colon or not host:
            raise ValueError("the form is HOST:PORT")
        if host.startswith("[") and host.endswith("]"):
            host = host[1:-1]
            _check_ipv6(host)
        elif any(character.isspace() or character in "/[]@" for character in host):
            raise ValueError("the host is a name or an address, without scheme or path")
        elif ":" in host:
            raise ValueError("an IPv6 address stands in brackets, as in [::1]:50051")
        if not (port.isascii() and port.isdigit() and int(port) <= 65535):
            raise ValueError("the port is a number from 0 to 65535")
        return cls(host, int(port))

    @property
    def is_name(self) -> bool:
        """The host has to be looked up."""
        try:
            ipaddress.ip_address(self.host)
        except ValueError:
            return True
        return False

    @property
    def is_loopback(self) -> bool:
        """Only this machine gets there; of names this is known of `localhost` alone."""
        return self.host == "localhost" if self.is_name else ipaddress.ip_address(self.host).is_loopback

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    def check_free(self, *, reuse_port: bool = False) -> None:
        """Raises OSError, naming the address and the reason, unless this machine could listen on it."""
        try:
            family, kind, _, _, where = socket.getaddrinfo(
                self.host, self.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )[0]
            with contextlib.closing(socket.socket(family, kind)) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if reuse_port:
                    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
                probe.bind(where)
        except OSError as error:
            raise OSError(error.errno, f"cannot listen on {self}: {error.strerror}") from error


def _check_ipv6(host: str) -> None:
    try:
        socket.inet_pton(socket.AF_INET6, host.partition("%")[0])
    except OSError:
        raise ValueError(f"{host} is not an IPv6 address") from None
