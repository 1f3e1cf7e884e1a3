"""`python -m common.settings_page` prints docs/settings.md, the table of all settings."""

from __future__ import annotations

import dataclasses
import math
import typing
from typing import Any

from common.config import TINY_MODEL, DecodeConfig, PrefillConfig, RouterConfig

HEAD = """\
# Settings

Every setting has a default that works on one machine. Each can be given in two ways; a flag stands over the file:

- As a flag: `--max-num-seqs 64`. `true` and `false` are `--prefix-cache` and `--no-prefix-cache`; a flag that is
  repeatable is given once for each value.
- In a TOML file that `--config FILE` names, under the name in the table: `max_num_seqs = 64`, `prefix_cache = false`,
  `decode = ["127.0.0.1:50053", "127.0.0.1:50063"]`.

An unknown key, or a value that cannot work, ends the service at its start with one line that names the key, the value
and what was expected. `--help` shows the same as this page, which is printed from `common/config.py` by `make docs`.
"""

SERVICES = {"Router": RouterConfig, "Prefill worker": PrefillConfig, "Decode worker": DecodeConfig}
ADDRESS = {"listen": "HOST:PORT", "target": "HOST:PORT", "listen or empty": "HOST:PORT or empty"}
ADDRESS["target or empty"] = ADDRESS["listen or empty"]


def page() -> str:
    """A setting that several services share, default and all, is shown once."""
    of_service = {title: _rows(cls) for title, cls in SERVICES.items()}
    router, *workers = of_service.values()
    of_workers = [row for row in workers[0] if row in workers[1]]
    of_all = [row for row in of_workers if row in router]
    shared = {*of_all, *of_workers}
    sections = {
        "All three services": of_all,
        "Both workers": [row for row in of_workers if row not in of_all],
        **{title: [row for row in rows if row not in shared] for title, rows in of_service.items()},
    }
    return "\n".join([HEAD, *(_section(title, rows) for title, rows in sections.items())])


def _section(title: str, rows: list[str]) -> str:
    return "\n".join([f"## {title}", "", "| name | default | allowed | what it does |", "|---|---|---|---|", *rows, ""])


def _rows(cls: type) -> list[str]:
    types = typing.get_type_hints(cls)
    return [_row(field, types[field.name]) for field in dataclasses.fields(cls)]


def _row(field: dataclasses.Field[Any], kind: Any) -> str:
    declared = field.metadata["setting"]
    cells = [f"`{field.name}`", _default(field.default), _allowed(declared, kind), declared.help]
    return f"| {' | '.join(cells)} |"


def _default(value: Any) -> str:
    if value == TINY_MODEL:
        return "`models/tiny`"
    if isinstance(value, bool):
        return f"`{value}`".lower()
    if isinstance(value, tuple):
        return " ".join(f"`{one}`" for one in value)
    return "empty" if value == "" else f"`{value}`"


def _allowed(declared: Any, kind: Any) -> str:
    repeatable = ", repeatable" if typing.get_origin(kind) is tuple else ""
    if declared.choices:
        return ", ".join(f"`{choice}`" for choice in declared.choices) + repeatable
    if declared.form:
        return ADDRESS[declared.form] + repeatable
    if kind is bool:
        return "`true`, `false`"
    bounds = [
        f"more than {declared.above:g}" if declared.above > -math.inf else "",
        f"at least {declared.minimum:.10g}" if declared.minimum > -math.inf else "",
        f"at most {declared.maximum:.10g}" if declared.maximum < math.inf else "",
    ]
    return ", ".join(filter(None, bounds)) or "text"


if __name__ == "__main__":
    print(page(), end="")
