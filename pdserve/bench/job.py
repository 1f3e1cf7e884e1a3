"""What one process is told to do, and what it tells: lines of JSON both ways."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from pdserve.access import Access
from pdserve.bench.following import Sent
from pdserve.bench.lengths import Lengths
from pdserve.bench.load import Point, Share
from pdserve.bench.observer import Observed
from pdserve.bench.prompt_file import read_prompts
from pdserve.bench.workload import Workload


@dataclass(frozen=True, kw_only=True)
class Job:
    """A point of load on `routers`, in turn. `prompts_path` is empty for drawn prompts."""

    routers: tuple[str, ...]
    access: Access
    point: Point
    share: Share
    workload: Workload
    prompts_path: str = ""
    timeout_s: float = 600.0

    def to_line(self) -> str:
        # Each process reads the file itself.
        return json.dumps(asdict(self) | {"workload": {**_flat(self.workload), "prompts": ()}})

    @classmethod
    def from_line(cls, line: str) -> Job:
        told = json.loads(line)
        workload = told["workload"]
        lengths = {name: Lengths(*workload[name]) for name in ("prompt_tokens", "output_tokens")}
        prompts = read_prompts(told["prompts_path"]) if told["prompts_path"] else ()
        return cls(
            routers=tuple(told["routers"]),
            access=Access(**told["access"]),
            point=Point(**told["point"]),
            share=Share(**told["share"]),
            workload=Workload(**workload | lengths | {"prompts": prompts}),
            prompts_path=told["prompts_path"],
            timeout_s=told["timeout_s"],
        )


@dataclass(frozen=True, slots=True)
class Progress:
    """Of one process, so far."""

    num_sent: int = 0
    num_ended: int = 0
    num_failed: int = 0
    num_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Done:
    """Of one process, in the end."""

    sent: list[Sent]
    observed: Observed

    def to_line(self) -> str:
        return json.dumps({"done": {"sent": [asdict(one) for one in self.sent], "observed": self.observed._asdict()}})

    @classmethod
    def from_told(cls, told: Mapping[str, Any]) -> Done:
        return cls([Sent(**one) for one in told["sent"]], Observed(**told["observed"]))


def _flat(workload: Workload) -> dict[str, Any]:
    return {name: getattr(workload, name) for name in workload.__dataclass_fields__}
