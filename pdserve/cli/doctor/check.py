"""One line of the doctor's report."""

from __future__ import annotations

from typing import Literal, NamedTuple

# What needs it: everything ("cpu"), or serving on NVIDIA GPUs alone ("gpu").
Path = Literal["cpu", "gpu"]


class Check(NamedTuple):
    """`remedy` says what to do when the status is not "ok"; on the "gpu" path it may be nothing at all."""

    name: str
    path: Path
    status: Literal["ok", "missing", "failed"]
    detail: str
    remedy: str = ""
