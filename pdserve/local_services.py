"""Router, prefill and decode as child processes of this one, on free loopback ports, with their logs in a folder.

They end with `stop`, and when this process ends, however it ends (`pdserve.tied`).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import common
from common.errors import PdserveError, Unavailable
from common.settings import ConfigError
from pdserve.access import Access
from pdserve.connection import Connection
from pdserve.llm_settings import Settings, flags_of

MODULES = {"prefill": "prefill_service", "decode": "decode_service", "router": "router"}
STOP_S = 10.0
POLL_S = 0.05
# Of a log, in an error.
NUM_LAST_LINES = 8
# What a service ends with when its configuration cannot work.
MISCONFIGURED = 2


@dataclass
class _Service:
    role: str
    address: str
    log: Path
    process: subprocess.Popen[bytes]

    def error(self) -> ConfigError | Unavailable | None:
        """Why it has ended; None while it runs."""
        code = self.process.poll()
        if code is None:
            return None
        lines = self.log.read_text(errors="replace").splitlines()
        if code == MISCONFIGURED and lines:
            return ConfigError(f"{lines[-1]} (log: {self.log})")
        how = f"exit code {code}" if code >= 0 else f"signal {-code}"
        message = f"{self.role} ended with {how}; its log, {self.log}, ends so:"
        return Unavailable("\n  ".join([message, *lines[-NUM_LAST_LINES:]]), reason="SERVICE_ENDED")


class LocalServices:
    """Started by the constructor; `wait_until_ready` before use."""

    def __init__(self, settings: Settings, *, start_timeout_s: float, log_folder: str | None = None) -> None:
        self._start_timeout_s = start_timeout_s
        self._own_folder = log_folder is None
        self.log_folder = Path(log_folder or tempfile.mkdtemp(prefix="pdserve-llm-"))
        self.log_folder.mkdir(parents=True, exist_ok=True)
        self._pid = os.getpid()
        self._services: dict[str, _Service] = {}
        # Held until the services listen there themselves: nobody else is given these ports meanwhile.
        self._held_ports = contextlib.ExitStack()
        try:
            addresses = {role: self._held_ports.enter_context(_free_address()) for role in MODULES}
            # A router that is ready has met both workers, however long they take: it would serve without prefill.
            routing = {"startup_grace_s": start_timeout_s, "prefill": (addresses["prefill"],)}
            routing |= {"decode": (addresses["decode"],)}
            for role in MODULES:
                values = {"listen": addresses[role], **getattr(settings, role), **(routing if role == "router" else {})}
                self._start(role, addresses[role], flags_of(values))
        except BaseException:
            self.stop()
            raise

    @property
    def router_address(self) -> str:
        return self._services["router"].address

    @property
    def decode_address(self) -> str:
        return self._services["decode"].address

    async def wait_until_ready(self) -> None:
        """Raises ConfigError or Unavailable, naming the log, when one of them ended or was not ready in time."""
        deadline_s = time.monotonic() + self._start_timeout_s
        for service in self._services.values():
            await self._ready(service, deadline_s)
        self._held_ports.close()

    def error(self) -> ConfigError | PdserveError | None:
        """Why one of them has ended; None while all run."""
        errors = (service.error() for service in self._services.values())
        return next((error for error in errors if error is not None), None)

    def stop(self) -> None:
        """Returns when all have ended. Their logs are removed if none had trouble, unless the folder was given."""
        if os.getpid() != self._pid:
            # A fork of the owner is not the owner.
            return
        self._held_ports.close()
        had_trouble = self.error() is not None
        processes = [service.process for service in self._services.values()]
        for process in processes:
            process.terminate()
        deadline_s = time.monotonic() + STOP_S
        for process in processes:
            try:
                process.wait(max(0.0, deadline_s - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        if self._own_folder and not had_trouble:
            shutil.rmtree(self.log_folder, ignore_errors=True)

    def _start(self, role: str, address: str, flags: list[str]) -> None:
        log = self.log_folder / f"{role}.log"
        root = str(Path(common.__file__).parent.parent)
        path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
        with log.open("wb") as output:
            process = subprocess.Popen(
                # -P: a module of the working folder does not stand in for a service's.
                [sys.executable, "-P", "-m", "pdserve.tied", str(os.getpid()), MODULES[role], *flags],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env={**os.environ, "PYTHONPATH": path},
                # Ctrl-C in a terminal is for this process, which cancels what it waits for and keeps its services.
                start_new_session=True,
            )
        self._services[role] = _Service(role, address, log, process)

    async def _ready(self, service: _Service, deadline_s: float) -> None:
        left_s = max(0.1, deadline_s - time.monotonic())
        async with Connection(service.address, access=Access()) as connection:
            waiting = asyncio.ensure_future(connection.wait_until_ready(left_s))
            try:
                while not waiting.done():
                    if error := self.error():
                        raise error
                    await asyncio.wait([waiting], timeout=POLL_S)
                await waiting
            except Unavailable as error:
                if error.reason != "NOT_READY":
                    raise
                message = f"{service.role} was not ready within {self._start_timeout_s:g} s; its log: {service.log}"
                raise Unavailable(message, reason="NOT_READY") from None
            finally:
                waiting.cancel()


@contextlib.contextmanager
def _free_address() -> Iterator[str]:
    """HOST:PORT on loopback, bound but not listened on, so that one that asks for it by name may still have it."""
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{holder.getsockname()[1]}"
