"""Who calls, and what they may call, where the operator has a file that says so.

A TOML file with up to three sections, one for each kind of caller. Each line is a name and how it is recognised:

    [clients]                          # Generate, GetModel
    alice = "sha256:5f2b…"             # shows the token with this hash: `pdserve token alice` makes both
    [services]                         # Decode, Prefill, ConnectPair, WatchLoad: routers and prefill workers
    router = "certificate"             # shows a certificate made out to this name (mTLS)
    [operators]                        # Drain, SetPipeline, GetPipelineStats, ListWorkers, Explain; what clients may
    ops = "sha256:9c1e…"
    guest = "anyone"                   # nobody has to show anything

Without a file nobody is asked. With one, what no line allows is refused. The file is read again when it changes.
"""

from __future__ import annotations

import contextvars
import difflib
import hashlib
import re
import secrets
import tomllib
from collections.abc import Iterable
from enum import Enum
from pathlib import Path
from typing import NamedTuple

import grpc.aio

from common.address import Address
from common.config import ServiceConfig
from common.errors import PermissionDenied, Unauthenticated
from common.reloading import Reloading
from common.settings import ConfigError

MAX_NAME_BYTES = 128
MAX_TOKEN_BYTES = 1024
_CERTIFICATE, _ANYONE = "certificate", "anyone"
# Tokens are drawn, not chosen: with 256 random bits there is nothing to guess, so one plain hash is enough.
_HASH = re.compile(r"sha256:([0-9a-f]{64})")


class Kind(Enum):
    """Of a caller; a section of the file."""

    CLIENT = "clients"
    SERVICE = "services"
    OPERATOR = "operators"


class Caller(NamedTuple):
    """Who a call comes from. The name is empty for who was let in as anyone."""

    name: str
    kind: Kind


_USERS = frozenset({Kind.CLIENT, Kind.OPERATOR})
_SERVICES = frozenset({Kind.SERVICE})
_OPERATORS = frozenset({Kind.OPERATOR})

# Who may call what. None: everybody, since probes and `grpcurl list` have nothing to show.
ALLOWED: dict[str, frozenset[Kind] | None] = {
    "/pdserve.v1.RouterService/Generate": _USERS,
    "/pdserve.v1.RouterService/GetModel": _USERS,
    "/pdserve.v1.RouterService/ListWorkers": _OPERATORS,
    "/pdserve.v1.RouterService/Explain": _OPERATORS,
    "/pdserve.v1.PrefillService/Prefill": _SERVICES,
    "/pdserve.v1.DecodeService/Decode": _SERVICES,
    "/pdserve.v1.DecodeService/ConnectPair": _SERVICES,
    "/pdserve.v1.DecodeService/GetPipelineStats": _OPERATORS,
    "/pdserve.v1.DecodeService/SetPipeline": _OPERATORS,
    "/pdserve.v1.WorkerService/WatchLoad": _SERVICES | _OPERATORS,
    "/pdserve.v1.WorkerService/Drain": _OPERATORS,
    "/grpc.health.v1.Health/Check": None,
    "/grpc.health.v1.Health/Watch": None,
    "/grpc.health.v1.Health/List": None,
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": None,
}

# Of the call that is being handled. None: nobody is asked here.
CALLER: contextvars.ContextVar[Caller | None] = contextvars.ContextVar("caller", default=None)


class _File(NamedTuple):
    by_hash: dict[str, list[Caller]]
    by_certificate: dict[str, list[Caller]]
    anyone: list[Caller]


class Gate:
    """What a server asks before it handles a call. Raises ConfigError for a file that cannot be used."""

    def __init__(self, path: str, *, has_certificates: bool) -> None:
        """`has_certificates`: callers show certificates, so names may be recognised by them."""
        self._path = path
        self._has_certificates = has_certificates
        self._file = Reloading({"identities": path}, self._read)

    def admit(self, method: str, context: grpc.aio.ServicerContext) -> None:
        """Sets CALLER for the rest of the call. Raises as `caller` does."""
        if ALLOWED[method] is not None:
            CALLER.set(self.caller(method, _token(context), _names(context)))

    def caller(self, method: str, token: str | None, names: Iterable[str]) -> Caller:
        """Who shows `token` and a certificate made out to `names`, to call a `method` that not everybody may.

        Raises:
            Unauthenticated: the caller shows nothing that is known here.
            PermissionDenied: it is known, and may not call this.
        """
        allowed = ALLOWED[method]
        assert allowed is not None, "nobody is asked for what everybody may call"
        file = self._file.value
        known = [caller for name in names for caller in file.by_certificate.get(name, ())]
        if token is not None:
            with_token = file.by_hash.get(hash_of(token))
            if with_token is None:
                raise Unauthenticated("the token is not known here", reason="UNKNOWN_TOKEN")
            known += with_token
        for caller in (*known, *file.anyone):
            if caller.kind in allowed:
                return caller
        wanted = " or ".join(sorted(kind.value for kind in allowed))
        call = method.rpartition("/")[2]
        if known:
            raise PermissionDenied(f"{known[0].name!r} is of {known[0].kind.value}; {call} is for {wanted}")
        raise Unauthenticated(
            f"{call} is for {wanted}: show a token (metadata `authorization: Bearer …`) or a certificate of one",
            reason="UNAUTHENTICATED",
        )

    def _read(self) -> _File:
        where = f"identities={self._path!r}"
        try:
            table = tomllib.loads(Path(self._path).read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"{where}: {error.strerror}") from None
        except ValueError as error:
            raise ConfigError(f"{where}: not a TOML file: {error}") from None
        file = _File({}, {}, [])
        sections = [kind.value for kind in Kind]
        for section, lines in table.items():
            if section not in sections or not isinstance(lines, dict):
                near = difflib.get_close_matches(section, sections, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise ConfigError(f"{where}: {section!r} is none of the sections {', '.join(sections)}{hint}")
            for name, how in lines.items():
                self._enter(file, Caller(name, Kind(section)), how, f"{where}: [{section}] {name}={how!r}")
        return file

    def _enter(self, file: _File, caller: Caller, how: object, where: str) -> None:
        if not 0 < len(caller.name.encode()) <= MAX_NAME_BYTES:
            raise ConfigError(f"{where}: a name has 1 to {MAX_NAME_BYTES} bytes")
        match = _HASH.fullmatch(how) if isinstance(how, str) else None
        if match:
            file.by_hash.setdefault(match[1], []).append(caller)
        elif how == _CERTIFICATE:
            if not self._has_certificates:
                raise ConfigError(
                    f"{where}: nobody has to show a certificate here; set tls_certificate, tls_key, tls_ca and "
                    "tls_client_certificates"
                )
            file.by_certificate.setdefault(caller.name, []).append(caller)
        elif how == _ANYONE:
            file.anyone.append(Caller("", caller.kind))
        else:
            raise ConfigError(f'{where}: expected "sha256:" and 64 hex digits, "{_CERTIFICATE}" or "{_ANYONE}"')


def gate_of(config: ServiceConfig, *, listen: str = "") -> Gate | None:
    """What a service asks its callers, at `listen` where it listens at more than one address; None: nothing. Raises
    ConfigError for a file that cannot be used."""
    if not config.identities:
        return None
    has_tls = bool(config.tls_certificate)
    listen = listen or config.listen
    if not has_tls and not Address.parse(listen).is_loopback:
        raise ConfigError(
            f"identities={config.identities!r}: tokens would cross the network in plaintext to {listen}; set "
            "tls_certificate, tls_key and tls_ca, or listen on 127.0.0.1"
        )
    return Gate(config.identities, has_certificates=has_tls and config.tls_client_certificates)


def bound_salt(caller: Caller | None, cache_salt: str) -> str:
    """The salt of a caller's prefixes: where callers are told apart no two share any, whatever salt they ask for."""
    if caller is None:
        return cache_salt
    return f"{len(caller.name)}:{caller.name}{cache_salt}"


def new_token() -> str:
    """A token that nobody has yet."""
    return secrets.token_urlsafe(32)


def hash_of(token: str) -> str:
    """As it stands in the file, behind `sha256:`."""
    return hashlib.sha256(token.encode()).hexdigest()


def _token(context: grpc.aio.ServicerContext) -> str | None:
    """None when the caller shows none."""
    for key, value in context.invocation_metadata() or ():
        if key == "authorization":
            return bearer_token(str(value))
    return None


def bearer_token(value: str) -> str:
    """The token of an `authorization` header. Raises Unauthenticated for a value of another form."""
    scheme, _, token = value.partition(" ")
    if scheme.lower() != "bearer" or not 0 < len(token) <= MAX_TOKEN_BYTES:
        raise Unauthenticated("the metadata is not of the form `authorization: Bearer TOKEN`", reason="UNAUTHENTICATED")
    return token


def _names(context: grpc.aio.ServicerContext) -> set[str]:
    """The common name and the alternative names of a verified certificate; none without one."""
    shown = context.auth_context()
    raw = [*shown.get("x509_common_name", ()), *shown.get("x509_subject_alternative_name", ())]
    return {name.decode("utf-8", errors="replace") for name in raw}
