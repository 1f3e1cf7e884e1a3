"""README and docs say what is so: links lead somewhere, commands parse, settings exist. test_commands.py runs them."""

from __future__ import annotations

import dataclasses
import functools
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from common import errors
from common.config import DecodeConfig, PrefillConfig, RouterConfig
from common.engine.philox import gumbel_noise
from pdserve import cli
from tests.support.pages import PAGES, README, blocks, prose
from tests.support.pages import commands as shown_commands
from tests.support.processes import ROOT

CONFIGS = {"router": RouterConfig, "prefill_service": PrefillConfig, "decode_service": DecodeConfig}


def commands(first_word: str) -> Iterator[list[str]]:
    """The arguments of every command line in a console block or between backticks."""
    in_prose = [line for page in PAGES for line in re.findall(r"`([^`\n]+)`", prose(page))]
    for line in [*(shown.text for shown in shown_commands()), *in_prose]:
        command, _, rest = line.removeprefix(".venv/bin/").partition(" ")
        if command == first_word and rest:
            yield shlex.split(rest, comments=True)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_relative_link_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if not target.startswith(("http://", "https://")):
            path, _, anchor = target.partition("#")
            linked = (page.parent / path).resolve() if path else page
            assert linked.exists(), target
            assert not anchor or anchor in anchors(linked), target


@functools.cache
def anchors(page: Path) -> set[str]:
    titles = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_every_make_command_exists():
    makefile = (ROOT / "Makefile").read_text()
    known = set(re.findall(r"^([a-z-]+):|^(\w+) \?=", makefile, re.MULTILINE))
    targets, variables = ({pair[place] for pair in known} for place in (0, 1))
    shown = [word for arguments in commands("make") for word in arguments]
    assert {"run", "test", "install"} <= set(shown)
    for word in shown:
        name, is_variable, _ = word.partition("=")
        assert name in (variables if is_variable else targets), word


def test_every_pdserve_command_parses():
    shown = list(commands("pdserve"))
    assert ["workers"] in shown
    for arguments in shown:
        if len(arguments) > 1:
            cli.parse(arguments)
        else:
            assert arguments[0] in cli.COMMANDS


def test_every_flag_of_a_service_is_a_setting():
    shown = list(commands("python"))
    assert {arguments[1] for arguments in shown} >= set(CONFIGS)
    for flag, module, *arguments in shown:
        assert flag == "-m"
        path = ROOT / module.replace(".", "/")
        assert (path / "__main__.py").is_file() or path.with_suffix(".py").is_file()
        if module in CONFIGS:
            known = {field.name for field in dataclasses.fields(CONFIGS[module])} | {"config", "help"}
            flags = {word[2:].replace("-", "_") for word in arguments if word.startswith("--")}
            assert flags <= known, flags - known


def test_settings_in_the_table_have_the_defaults_that_it_shows():
    fields = [field for cls in CONFIGS.values() for field in dataclasses.fields(cls)]
    section = prose(README).partition("\n## Settings\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (`[^|]+`) \| [^|]+ \| ([^|]+) \|", section, re.MULTILINE)
    assert rows
    for names, shown in rows:
        defaults = {text(field.default) for field in fields if field.name in re.findall(r"`(\w+)`", names)}
        assert set(re.findall(r"`([^`]+)`", shown)) == defaults, names


def text(default: object) -> str:
    return " ".join(default) if isinstance(default, tuple) else str(default).removeprefix(f"{ROOT}/")


def test_the_noise_on_the_page_about_sampling_is_the_services_noise():
    (code,) = blocks(ROOT / "docs" / "sampling.md", "python")
    page: dict = {}
    exec(code, page)
    for seed, position in [(7, 5), (2**63 + 11, 2**32 + 3)]:
        (row,) = gumbel_noise(torch.tensor([[seed & 0xFFFFFFFF, seed >> 32]]), torch.tensor([position]), 9).tolist()
        assert row == pytest.approx([page["noise"](seed, position, token_id) for token_id in range(9)], abs=2e-6)


def test_the_page_about_errors_names_every_reason_that_is_given():
    listed = set(re.findall(r"`([A-Z][A-Z_]+)`", (ROOT / "docs" / "errors.md").read_text()))
    sources = [path for folder in ("pdserve", "common", *CONFIGS) for path in (ROOT / folder).rglob("*.py")]
    given = {reason for path in sources for reason in re.findall(r'\breason="([A-Z_]+)"', path.read_text())}
    assert given <= listed, given - listed


def test_the_page_about_errors_has_a_row_for_every_status_that_is_raised():
    rows = set(re.findall(r"^\| `([A-Z_]+)` \|", (ROOT / "docs" / "errors.md").read_text(), re.MULTILINE))
    assert rows == {code.name for code in errors.BY_CODE}
