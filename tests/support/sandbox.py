"""One container of a rendered manifest as a local process: a read-only root, its mounts, its user, no capability.

bubblewrap makes it from this machine's Python and this working tree, which lies at /app as in the image. The network is
the machine's: who needs an address of his own gets one of loopback's.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.support.manifests import ROOT

# Of the machine's /etc: what the loader and TLS read.
_ETC = ("ld.so.cache", "ld.so.conf", "ld.so.conf.d", "ssl", "localtime")
# Names are those of the hosts file, with all their addresses; no DNS is asked, which would take seconds to fail.
_RESOLVER = Path(__file__).parent / "etc"
_USER = 10001


def obstacle() -> str:
    """Why this machine can run none; empty if it can."""
    if shutil.which("bwrap") is None:
        return "there is no bwrap (package bubblewrap)"
    if sys.prefix.startswith("/tmp/"):
        return "this Python lies in /tmp, in the place of which a container has a folder of its own"
    tried = subprocess.run([*_base(Path("/etc/hosts")), "true"], capture_output=True, text=True)
    return tried.stderr.strip()


@dataclass
class Sandbox:
    """A process that ends with whoever made it."""

    command: Sequence[str]
    environment: Mapping[str, str]
    # By path in the container: a folder, and whether it may be written.
    mounts: Mapping[str, tuple[Path, bool]]
    workdir: str
    hosts: Path
    log: Path
    # Put before it all: a network namespace, say.
    prefix: Sequence[str] = ()
    _process: subprocess.Popen = field(init=False)
    _pid: int = field(init=False)

    def start(self) -> None:
        told, tells = os.pipe()
        arguments = [*self.prefix, *_base(self.hosts), "--info-fd", str(tells), "--chdir", self.workdir, "--clearenv"]
        for name, value in (_image_environment() | dict(self.environment)).items():
            arguments += ["--setenv", name, value]
        for path, (folder, writable) in self.mounts.items():
            arguments += ["--bind" if writable else "--ro-bind", str(folder), path]
        arguments += ["--remount-ro", "/", *self.command]
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(arguments, stdout=log, stderr=log, pass_fds=[tells])
        os.close(tells)
        with open(told) as info:
            answer = info.read()
        if not answer:
            raise RuntimeError(f"no container was made:\n{self.log.read_text()}")
        self._pid = json.loads(answer)["child-pid"]

    @property
    def exit_code(self) -> int | None:
        """None while it runs."""
        return self._process.poll()

    def terminate(self) -> None:
        """SIGTERM to the container's first process, if it runs."""
        if self.exit_code is None:
            os.kill(self._pid, signal.SIGTERM)

    def stop(self, grace_s: float) -> int:
        """SIGTERM, SIGKILL when that takes longer than `grace_s`, and the exit code."""
        self.terminate()
        try:
            return self._process.wait(grace_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()


def _base(hosts: Path) -> list[str]:
    return [
        *(
            "bwrap",
            "--die-with-parent",
            "--unshare-user",
            "--unshare-pid",
            "--as-pid-1",
            "--unshare-ipc",
            "--new-session",
        ),
        *("--uid", str(_USER), "--gid", str(_USER), "--cap-drop", "ALL"),
        *_bound(["/usr", *_links(("/bin", "/lib", "/lib64", "/sbin")), *_python()]),
        *_bound(f"/etc/{name}" for name in _ETC if os.path.exists(f"/etc/{name}")),
        *("--ro-bind", str(hosts), "/etc/hosts", "--ro-bind", str(ROOT), "/app"),
        *("--ro-bind", f"{_RESOLVER}/nsswitch.conf", "/etc/nsswitch.conf"),
        *("--ro-bind", f"{_RESOLVER}/host.conf", "/etc/host.conf"),
        *("--proc", "/proc", "--dev", "/dev"),
    ]


def _bound(paths: Iterable[str]) -> list[str]:
    arguments: list[str] = []
    for path in paths:
        if os.path.islink(path):
            arguments += ["--symlink", os.readlink(path), path]
        else:
            arguments += ["--ro-bind", path, path]
    return arguments


def _links(paths: Iterable[str]) -> list[str]:
    return [path for path in paths if os.path.exists(path)]


def _python() -> list[str]:
    """Where this interpreter and its packages lie, outside of /usr."""
    found = {os.path.realpath(prefix) for prefix in (sys.prefix, sys.base_prefix)} | {sys.prefix}
    return sorted(one for one in found if not one.startswith("/usr"))


def _image_environment() -> dict[str, str]:
    """What the image would set; and what this machine's linear algebra needs to be right."""
    inherited = {name: value for name, value in os.environ.items() if name.startswith("OPENBLAS_")}
    return inherited | {"PATH": f"{sys.prefix}/bin:/usr/local/bin:/usr/bin:/bin"}
