"""The certificates of one process, read from PEM files: what it shows, and whom it believes.

Files may be replaced while the process runs, as cert-manager and a mounted Secret do. A server reads them at each
handshake when they have changed; a channel has what they held when it was made, so whoever keeps channels makes a new
one when `version` is another. Connections that stand are not ended.
"""

from __future__ import annotations

import logging
import os
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, TypeVar

import grpc

from common.config import ServiceConfig
from common.settings import ConfigError

log = logging.getLogger(__name__)

# Modification time, size and inode of each file.
Version = tuple[tuple[int, int, int], ...]
T = TypeVar("T")


class _Pem(NamedTuple):
    certificate: bytes | None
    key: bytes | None
    ca: bytes

    def for_server(self) -> grpc.ServerCertificateConfiguration:
        return grpc.ssl_server_certificate_configuration([(self.key, self.certificate)], root_certificates=self.ca)


class Tls:
    """PEM files; `certificate` and `key` are empty for a client that shows none."""

    def __init__(self, *, ca: str, certificate: str = "", key: str = "", server_name: str = "") -> None:
        """`ca`: whose certificates are believed. `server_name`: what the certificates of those that are dialled must be
        made out to; empty: the host that is dialled.

        Raises:
            ConfigError: a file cannot be read or is not what it should be; names the setting.
        """
        self._files = {"tls_certificate": certificate, "tls_key": key, "tls_ca": ca}
        self.server_name = server_name
        self._version = self._look()
        self._pem = self._read()
        # What could not be used, said once.
        self._complaint = ""

    @property
    def version(self) -> Version:
        """Changes when a file is replaced by one that can be used."""
        self._refresh()
        return self._version

    def server_credentials(self, *, require_client: bool) -> grpc.ServerCredentials:
        """With `require_client` nobody gets through who does not show a certificate of `ca`."""

        def newest() -> grpc.ServerCertificateConfiguration | None:
            # Called at each handshake, in a thread of gRPC; None: as before.
            return self._pem.for_server() if self._refresh() else None

        return grpc.dynamic_ssl_server_credentials(self._pem.for_server(), newest, require_client)

    def channel_credentials(self) -> grpc.ChannelCredentials:
        """Of the files as they are."""
        self._refresh()
        return grpc.ssl_channel_credentials(self._pem.ca, self._pem.key, self._pem.certificate)

    def _refresh(self) -> bool:
        """Whether the files were read anew. Those that cannot be used are left for the next time, and what was read
        before holds on."""
        try:
            version = self._look()
            if version == self._version:
                return False
            pem = self._read()
        except ConfigError as error:
            if str(error) != self._complaint:
                log.error("going on with the certificates as they were: %s", error)
            self._complaint = str(error)
            return False
        self._version, self._pem, self._complaint = version, pem, ""
        log.info("certificates have been read again")
        return True

    def _look(self) -> Version:
        return tuple(
            (stat.st_mtime_ns, stat.st_size, stat.st_ino)
            for name, path in self._files.items()
            if path
            for stat in [_reading(name, path, os.stat)]
        )

    def _read(self) -> _Pem:
        """Checks what gRPC would only complain about at the first handshake."""
        certificate, key, ca = self._files.values()
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        _reading("tls_ca", ca, lambda path: context.load_verify_locations(path))
        if certificate:
            _reading("tls_certificate", certificate, lambda path: context.load_verify_locations(path))
            _reading("tls_key", key, lambda path: context.load_cert_chain(certificate, path, _no_password))
        contents = [Path(path).read_bytes() if path else None for path in (certificate, key, ca)]
        return _Pem(contents[0], contents[1], contents[2] or b"")


def tls_of(config: ServiceConfig) -> Tls | None:
    """The files of a service; None: plaintext. Raises ConfigError as `Tls` does."""
    if not config.tls_certificate:
        return None
    return Tls(
        ca=config.tls_ca,
        certificate=config.tls_certificate,
        key=config.tls_key,
        server_name=config.tls_server_name,
    )


def server_credentials_of(config: ServiceConfig) -> grpc.ServerCredentials | None:
    """What a service listens with; None: plaintext. Raises ConfigError as `Tls` does."""
    tls = tls_of(config)
    return tls and tls.server_credentials(require_client=config.tls_client_certificates)


def _reading(name: str, path: str, read: Callable[[str], T]) -> T:
    try:
        return read(path)
    except ssl.SSLError as error:
        what = "not the key of tls_certificate" if name == "tls_key" else "not certificates in PEM form"
        raise ConfigError(f"{name}={path!r}: {what} ({error.reason or error})") from None
    except OSError as error:
        raise ConfigError(f"{name}={path!r}: {error.strerror}") from None


def _no_password() -> str:
    # Without it OpenSSL would ask at the terminal.
    raise ConfigError("tls_key: the key is encrypted; write it without a password, and keep the file to yourself")
