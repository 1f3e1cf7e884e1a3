"""What a client shows and believes: a token, a certificate of its own, and whose certificates services may show."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from common.address import Address
from common.settings import ConfigError
from common.tls import Tls

# By field. The token has a file as well, since a token on a command line is shown to every user of the machine.
VARIABLES = {
    "tls_ca": "PDSERVE_TLS_CA",
    "tls_certificate": "PDSERVE_TLS_CERTIFICATE",
    "tls_key": "PDSERVE_TLS_KEY",
    "tls_server_name": "PDSERVE_TLS_SERVER_NAME",
    "token": "PDSERVE_TOKEN",
}
TOKEN_FILE = "PDSERVE_TOKEN_FILE"


@dataclass(frozen=True, kw_only=True)
class Access:
    """Without `tls_ca` calls are plaintext; with it, services have to show a certificate of one of those authorities.

    `tls_certificate` and `tls_key` are for services that ask for a certificate; `tls_server_name` is whom theirs are
    made out to, when that is not the host that is dialled. `token` goes with every call. Raises ConfigError for half of
    TLS and for files that cannot be used.
    """

    tls_ca: str = ""
    tls_certificate: str = ""
    tls_key: str = ""
    tls_server_name: str = ""
    token: str = ""

    def __post_init__(self) -> None:
        if bool(self.tls_certificate) != bool(self.tls_key):
            missing = "tls_key" if self.tls_certificate else "tls_certificate"
            raise ConfigError(f"{missing}: expected a PEM file, since the other of certificate and key is set")
        if not self.tls_ca and (self.tls_certificate or self.tls_server_name):
            raise ConfigError("tls_ca: expected a PEM file, since other settings of TLS are set; without it: plaintext")
        self.tls()

    @classmethod
    def from_environment(cls, *, token_file: str = "", **given: str) -> Access:
        """What is not given is taken from the environment: PDSERVE_TLS_CA, PDSERVE_TLS_CERTIFICATE, PDSERVE_TLS_KEY,
        PDSERVE_TLS_SERVER_NAME, and PDSERVE_TOKEN or PDSERVE_TOKEN_FILE."""
        fields = {name: os.environ.get(variable, "") for name, variable in VARIABLES.items()}
        fields |= {name: value for name, value in given.items() if value}
        token_file = token_file or ("" if fields["token"] else os.environ.get(TOKEN_FILE, ""))
        if token_file:
            try:
                fields["token"] = Path(token_file).read_text().strip()
            except OSError as error:
                raise ConfigError(f"token file {token_file!r}: {error.strerror}") from None
        return cls(**fields)

    def tls(self) -> Tls | None:
        """None: plaintext."""
        if not self.tls_ca:
            return None
        return Tls(ca=self.tls_ca, certificate=self.tls_certificate, key=self.tls_key, server_name=self.tls_server_name)

    def metadata_for(self, target: str) -> tuple[tuple[str, str], ...]:
        """What goes with every call to HOST:PORT.

        Raises:
            ConfigError: a token would cross a network in plaintext.
        """
        if not self.token:
            return ()
        if not self.tls_ca and not Address.parse(target).is_loopback:
            raise ConfigError(f"the token would cross the network in plaintext to {target}: give tls_ca as well")
        return (("authorization", f"Bearer {self.token}"),)
