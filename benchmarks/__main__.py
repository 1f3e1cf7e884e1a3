"""`python -m benchmarks [NAME ...]`: runs the named benchmarks, or all, and keeps their results."""

from __future__ import annotations

import importlib
import sys

NAMES = ("versus_transformers", "handover", "kv_transport", "router_cost", "memory_growth")


def main(names: list[str]) -> None:
    unknown = [name for name in names if name not in NAMES]
    if unknown:
        sys.exit(f"no benchmark {unknown[0]!r}; there are: {', '.join(NAMES)}")
    for name in names or NAMES:
        print(f"== {name}", flush=True)
        importlib.import_module(f"benchmarks.{name}").run()


if __name__ == "__main__":
    main(sys.argv[1:])
