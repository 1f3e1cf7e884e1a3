"""Runs images as a strict cluster would: read-only root, no capabilities, a number for a user, 64 MiB of /tmp."""

from __future__ import annotations

import contextlib
import json
import subprocess
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.images import Store, command
from tests.support.processes import Service, free_port


@dataclass
class Container:
    """An image's files, mounted, and the image's own word on how to run it."""

    root: str
    config: dict[str, Any]

    def run(self, *arguments: str, entrypoint: Sequence[str] | None = None, timeout_s: float = 60) -> str:
        """Output of one command in the image. Raises RuntimeError when it fails."""
        with self._bundle(self._words(arguments, entrypoint)) as words:
            return command(*words, timeout_s=timeout_s)

    @contextlib.contextmanager
    def service(self, name: str, log: Path, *arguments: str) -> Iterator[Service]:
        """The image's entry point with these arguments, on a free loopback port; gone at the end."""
        address = f"127.0.0.1:{free_port()}"
        flags = (name, "--listen", address, "--metrics-listen", "", *arguments)
        with self._bundle(self._words(flags)) as words:
            service = _Contained(name, words, address, log, {})
            service.start()
            try:
                yield service
            finally:
                service.stop()

    def _words(self, arguments: Sequence[str], entrypoint: Sequence[str] | None = None) -> list[str]:
        return [*(self.config["Entrypoint"] if entrypoint is None else entrypoint), *arguments]

    @contextlib.contextmanager
    def _bundle(self, words: list[str]) -> Iterator[list[str]]:
        """The command line that runs these words in a container, which is gone afterwards."""
        name = f"pdserve-{uuid.uuid4().hex[:12]}"
        folder = Path("/run") / name
        folder.mkdir()
        try:
            command("runc", "spec", "--bundle", folder)
            spec = json.loads((folder / "config.json").read_text())
            (folder / "config.json").write_text(json.dumps(self._restricted(spec, words)))
            yield ["runc", "run", "--bundle", str(folder), name]
        finally:
            subprocess.run(["runc", "delete", "--force", name], capture_output=True)
            (folder / "config.json").unlink()
            folder.rmdir()

    def _restricted(self, spec: dict[str, Any], words: list[str]) -> dict[str, Any]:
        user, _, group = self.config["User"].partition(":")
        process = {
            "terminal": False,
            "user": {"uid": int(user), "gid": int(group)},
            "args": words,
            "env": self.config["Env"],
            "cwd": self.config["WorkingDir"],
            "capabilities": {kind: [] for kind in spec["process"]["capabilities"]},
            "noNewPrivileges": True,
        }
        spec["process"] = process
        spec["root"] = {"path": self.root, "readonly": True}
        # The host's network: services and tests meet on loopback. Its control groups and devices stay out.
        spec["linux"]["namespaces"] = [
            one for one in spec["linux"]["namespaces"] if one["type"] not in ("network", "cgroup")
        ]
        spec["mounts"] = [one for one in spec["mounts"] if not one["destination"].startswith("/sys")]
        options = ["nosuid", "nodev", "mode=1777", "size=65536k"]
        spec["mounts"].append({"destination": "/tmp", "type": "tmpfs", "source": "tmpfs", "options": options})
        return spec


class _Contained(Service):
    """SIGTERM goes to the process in the container, and its exit code comes from there."""

    def start(self) -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(self.arguments, stdout=log, stderr=log)


@contextlib.contextmanager
def mounted(store: Store, image: str) -> Iterator[Container]:
    container = store.buildah("from", "--pull-never", image)
    try:
        yield Container(store.buildah("mount", container), store.described(image)["config"])
    finally:
        store.buildah("rm", container)
