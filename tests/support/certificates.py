"""An authority of a test's own, and certificates from it, made by `openssl`."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from common.tls import Tls


class Authority:
    """Its files lie in `folder`, its own certificate in `ca`."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._key = folder / "ca.key"
        self.ca = folder / "ca.pem"
        _openssl("-subj", "/CN=authority of a test", key=self._key, certificate=self.ca)

    def issue(self, name: str, *, hosts: str = "DNS:localhost,IP:127.0.0.1") -> dict[str, str]:
        """A certificate made out to `name` and `hosts`, as the settings of a service. Issued again under a name, it
        replaces the files."""
        certificate, key = self._folder / f"{name}.pem", self._folder / f"{name}.key"
        new = [path.with_suffix(path.suffix + ".new") for path in (certificate, key)]
        extensions = [f"subjectAltName=DNS:{name},{hosts}", "basicConstraints=critical,CA:FALSE"]
        options = [word for extension in extensions for word in ("-addext", extension)]
        options += ["-CA", str(self.ca), "-CAkey", str(self._key)]
        _openssl("-subj", f"/CN={name}", *options, key=new[1], certificate=new[0])
        for path, target in zip(new, (certificate, key), strict=True):
            path.replace(target)
        return {"tls_certificate": str(certificate), "tls_key": str(key), "tls_ca": str(self.ca)}

    def trust_also(self, other: Authority) -> None:
        """Whoever reads `ca` from here on believes `other` too, as in the middle of a change of authorities."""
        both = self._folder / "both.pem"
        both.write_bytes(self.ca.read_bytes() + other.ca.read_bytes())
        shutil.move(both, self.ca)

    def tls(self, name: str = "") -> Tls:
        """What somebody dials with who believes this authority, and shows a certificate made out to `name`."""
        if not name:
            return Tls(ca=str(self.ca))
        files = self.issue(name)
        return Tls(ca=files["tls_ca"], certificate=files["tls_certificate"], key=files["tls_key"])


def _openssl(*options: str, key: Path, certificate: Path) -> None:
    made = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-noenc", "-days", "2"]
    written = ["-keyout", str(key), "-out", str(certificate)]
    subprocess.run(["openssl", "req", "-x509", *made, *options, *written], check=True, capture_output=True)
