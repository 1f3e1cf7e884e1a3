from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from common import settings_page
from common.config import DecodeConfig, PrefillConfig, RouterConfig

SECTIONS = {
    RouterConfig: ("All three services", "Router"),
    PrefillConfig: ("All three services", "Both workers", "Prefill worker"),
    DecodeConfig: ("All three services", "Both workers", "Decode worker"),
}


def test_the_page_in_docs_is_up_to_date():
    committed = Path(__file__).resolve().parents[2] / "docs" / "settings.md"
    assert committed.read_text() == settings_page.page(), "run `make docs`"


@pytest.mark.parametrize(("cls", "titles"), SECTIONS.items())
def test_the_sections_of_a_service_show_each_of_its_settings_once(cls, titles):
    text = "".join(re.search(rf"## {title}\n(.*?)(?=\n## |\Z)", settings_page.page(), re.DOTALL)[1] for title in titles)
    shown = re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE)
    assert sorted(shown) == sorted(field.name for field in dataclasses.fields(cls))
