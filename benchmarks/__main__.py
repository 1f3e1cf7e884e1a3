"""`python -m benchmarks [NAME ...] [ARGUMENT ...]`: runs the named benchmarks, or all of this machine, and keeps their
results.

Each runs in a process of its own, and what measures several models in one for each: an engine's memory on the GPU goes
only with its process. Models among the arguments choose, whatever else there is goes to every benchmark named. One that
fails does not keep the others from running.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence

from benchmarks.shapes import PIPELINE_SHAPES, SHAPES

ON_CPU = (
    "versus_transformers",
    "handover",
    "kv_transport",
    "router_cost",
    "http_cost",
    "placement",
    "memory_growth",
    "overload",
)
ON_GPU = (
    "decode_step",
    "prefill",
    "mixed_workload",
    "through_services",
    "handover_gpu",
    "interference",
    "agreement",
    "determinism_cost",
    "kv_transport_gpu",
    "overlap_trace",
    "attention",
    "step_profile",
    "decode_pipeline",
    "pipeline_auto",
    "pipeline_ideas",
    "pipeline_power",
    "pipeline_trace",
    "summary",
)
NAMES = ON_CPU + ON_GPU
# Those that are told a model, and the models that they measure.
OF_MODELS = {
    "decode_step": tuple(SHAPES),
    "prefill": tuple(SHAPES),
    "attention": tuple(SHAPES),
    "step_profile": tuple(SHAPES),
    "decode_pipeline": tuple(PIPELINE_SHAPES),
    "pipeline_power": tuple(PIPELINE_SHAPES),
    "pipeline_auto": tuple(SHAPES),
}


def plan(arguments: Sequence[str], *, has_gpu: bool) -> list[tuple[str, ...]]:
    """What to run, each as the name of a benchmark and its arguments.

    Raises:
        SystemExit: an argument is no benchmark where one is due, or a benchmark does not measure the model asked for.
    """
    num_names = next((index for index, word in enumerate(arguments) if word not in NAMES), len(arguments))
    names, rest = arguments[:num_names], arguments[num_names:]
    if rest and not names:
        raise SystemExit(f"no benchmark {rest[0]!r}; there are: {', '.join(NAMES)}")
    # What follows an option is its value.
    is_model = [
        word in PIPELINE_SHAPES and not before.startswith("--") for before, word in zip(["", *rest], rest, strict=False)
    ]
    models = [word for word, chosen in zip(rest, is_model, strict=True) if chosen]
    others = [word for word, chosen in zip(rest, is_model, strict=True) if not chosen]
    runs: list[tuple[str, ...]] = []
    for name in names or (ON_GPU if has_gpu else ON_CPU):
        if name in OF_MODELS:
            if unknown := [model for model in models if model not in OF_MODELS[name]]:
                raise SystemExit(f"{name} does not measure {', '.join(unknown)}")
            runs += [(name, model, *others) for model in models or OF_MODELS[name]]
        elif models:
            raise SystemExit(f"{name} is not told a model; those that are: {', '.join(OF_MODELS)}")
        else:
            runs.append((name, *others))
    return runs


def run(runs: Sequence[Sequence[str]]) -> list[str]:
    """Those that failed."""
    failed = []
    for name, *arguments in runs:
        title = " ".join([name, *arguments])
        print(f"== {title}", flush=True)
        started_s = time.monotonic()
        # What is measured on a CPU is kept as a CPU's, also where there is a GPU.
        environment = os.environ | ({"CUDA_VISIBLE_DEVICES": ""} if name in ON_CPU else {})
        command = [sys.executable, "-u", "-m", f"benchmarks.{name}", *arguments]
        code = subprocess.run(command, env=environment).returncode
        outcome = f"FAILED with exit code {code}" if code else "done"
        print(f"== {title}: {outcome} after {time.monotonic() - started_s:.0f} s", flush=True)
        if code:
            failed.append(title)
    return failed


def has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def main(arguments: list[str]) -> None:
    if failed := run(plan(arguments, has_gpu=not arguments and has_gpu())):
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main(sys.argv[1:])
