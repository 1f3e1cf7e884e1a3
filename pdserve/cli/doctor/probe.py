"""Trying what may be missing, hang or crash: in a process of its own.

`probed("torch_probe")` runs the `PROBES` of `pdserve.cli.doctor.torch_probe` in a new Python, in which `report` prints
one check as JSON a line, each as soon as it is known.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import NamedTuple

from pdserve.cli.doctor.bounded import finished
from pdserve.cli.doctor.check import Check, Path


class Missing(Exception):
    """What is tried is not there. Any other exception: it is there and does not work."""

    def __init__(self, detail: str, remedy: str = "") -> None:
        super().__init__(detail)
        self.remedy = remedy


class Broken(Exception):
    """It is there and does not work, for a reason that has a remedy of its own."""

    def __init__(self, detail: str, remedy: str) -> None:
        super().__init__(detail)
        self.remedy = remedy


class Probe(NamedTuple):
    """`run` returns the detail of an "ok". `remedy` goes with a failure."""

    path: Path
    run: Callable[[], str]
    remedy: str


def probed(module: str, *, timeout_s: float = 60.0) -> list[Check]:
    """One check for each probe of the module, also for those that a crash or a hang left without an answer. Blocks."""
    module = f"pdserve.cli.doctor.{module}"
    probes: Mapping[str, Probe] = import_module(module).PROBES
    code = f"from pdserve.cli.doctor.probe import report; from {module} import PROBES; report(PROBES)"
    child = finished(sys.executable, "-c", code, timeout_s=timeout_s)
    known = {check.name: check for check in (Check(**json.loads(line)) for line in child.stdout.splitlines())}
    unknown = f"its trial gave no answer: {child.trouble}"
    return [known.get(name, Check(name, probe.path, "failed", unknown, probe.remedy)) for name, probe in probes.items()]


def report(probes: Mapping[str, Probe]) -> None:
    """What the new process does."""
    # Libraries print where they like; only checks go to the parent.
    with os.fdopen(os.dup(sys.stdout.fileno()), "w") as parent:
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
        for name, probe in probes.items():
            print(json.dumps(check(name, probe)._asdict()), file=parent, flush=True)


def check(name: str, probe: Probe) -> Check:
    """What comes of one probe, here and now."""
    try:
        return Check(name, probe.path, "ok", probe.run())
    except Missing as missing:
        return Check(name, probe.path, "missing", str(missing), missing.remedy)
    except Broken as broken:
        return Check(name, probe.path, "failed", str(broken), broken.remedy)
    except Exception as error:
        message = f"{type(error).__name__}: {error}".strip().partition("\n")[0]
        return Check(name, probe.path, "failed", message, probe.remedy)
