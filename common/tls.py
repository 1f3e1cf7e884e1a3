"""The certificates of one process, read from PEM files: what it shows, and whom it believes.

Files may be replaced while the process runs, as cert-manager and a mounted Secret do. A server reads them at each
handshake when they have changed; a channel has what they held when it was made, so whoever keeps channels makes a new
one when `version` is another. Connections that stand are not ended.
"""

from __future__ import annotations

import contextlib
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import grpc

from common.config import ServiceConfig
from common.reloading import Reloading, Version
from common.settings import ConfigError


class _Pem(NamedTuple):
    certificate: bytes | None
    key: bytes | None
    ca: bytes
    # The same for a server that is not gRPC's.
    context: ssl.SSLContext


class Tls:
    """PEM files; `certificate` and `key` are empty for a client that shows none."""

    def __init__(self, *, ca: str, certificate: str = "", key: str = "", server_name: str = "") -> None:
        """`ca`: whose certificates are believed. `server_name`: what the certificates of those that are dialled must be
        made out to; empty: the host that is dialled.

        Raises:
            ConfigError: a file cannot be read or is not what it should be; names the setting.
        """
        self.server_name = server_name
        self._paths = certificate, key, ca
        files = {"tls_ca": ca} | ({"tls_certificate": certificate, "tls_key": key} if certificate else {})
        self._pem = Reloading(files, self._read)

    @property
    def version(self) -> Version:
        """Another one when a file has been replaced by one that can be used."""
        return self._pem.version

    def server_credentials(self, *, require_client: bool) -> grpc.ServerCredentials:
        """With `require_client` nobody gets through who does not show a certificate of `ca`."""

        told = self._pem.version

        def newest() -> grpc.ServerCertificateConfiguration | None:
            # Called at each handshake, in a thread of gRPC; None: as before.
            nonlocal told
            if self._pem.version == told:
                return None
            told = self._pem.version
            return _for_server(self._pem.value)

        return grpc.dynamic_ssl_server_credentials(_for_server(self._pem.value), newest, require_client)

    def server_context(self, *, require_client: bool) -> ssl.SSLContext:
        """What `server_credentials` are to a server that is not gRPC's; files that have changed count from the next
        handshake on, here too."""
        context = self._read().context
        context.verify_mode = ssl.CERT_REQUIRED if require_client else ssl.CERT_NONE

        def newest(connection: ssl.SSLObject, name: str | None, initial: ssl.SSLContext) -> None:
            # Called at each handshake, with a name or without one. Who is asked for a certificate was settled before,
            # but one that was shown is read by the mode of the context.
            connection.context = self._pem.value.context
            connection.context.verify_mode = initial.verify_mode

        context.sni_callback = newest
        return context

    def channel_credentials(self) -> grpc.ChannelCredentials:
        """Of the files as they are."""
        pem = self._pem.value
        return grpc.ssl_channel_credentials(pem.ca, pem.key, pem.certificate)

    def _read(self) -> _Pem:
        """Finds what gRPC would only complain about at the first handshake."""
        certificate, key, ca = self._paths
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        # One that shows its own certificate is not believed for that.
        believers = {"tls_certificate": ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), "tls_ca": context}
        for (name, believer), path in zip(believers.items(), (certificate, ca), strict=True):
            if path:
                with _explained(f"{name}={path!r}", "not certificates in PEM form"):
                    believer.load_verify_locations(path)
        if certificate:
            with _explained(f"tls_key={key!r}", "not the key of tls_certificate"):
                context.load_cert_chain(certificate, key, _no_password)
        contents = [Path(path).read_bytes() if path else None for path in self._paths]
        return _Pem(contents[0], contents[1], contents[2] or b"", context)


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


def server_context_of(config: ServiceConfig) -> ssl.SSLContext | None:
    """What a service listens with where it speaks something else than gRPC; None: plaintext. Raises ConfigError as
    `Tls` does."""
    tls = tls_of(config)
    return None if tls is None else tls.server_context(require_client=config.tls_client_certificates)


def server_credentials_of(config: ServiceConfig) -> grpc.ServerCredentials | None:
    """What a service listens with; None: plaintext. Raises ConfigError as `Tls` does."""
    tls = tls_of(config)
    return tls and tls.server_credentials(require_client=config.tls_client_certificates)


def _for_server(pem: _Pem) -> grpc.ServerCertificateConfiguration:
    return grpc.ssl_server_certificate_configuration([(pem.key, pem.certificate)], root_certificates=pem.ca)


@contextlib.contextmanager
def _explained(setting: str, what: str) -> Iterator[None]:
    try:
        yield
    except ssl.SSLError as error:
        raise ConfigError(f"{setting}: {what} ({error.reason or error})") from None
    except OSError as error:
        raise ConfigError(f"{setting}: {error.strerror}") from None


def _no_password() -> str:
    # Without it OpenSSL would ask at the terminal.
    raise ConfigError("tls_key: the key has a password; write it without one, and keep the file to its owner")
