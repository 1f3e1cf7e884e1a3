from __future__ import annotations

import re
from pathlib import Path

import pytest

from common import rpc_page
from pdserve.v1 import decode_pb2, prefill_pb2, router_pb2, types_pb2, worker_pb2

FILES = [module.DESCRIPTOR for module in (router_pb2, types_pb2, decode_pb2, prefill_pb2, worker_pb2)]


@pytest.fixture(scope="module")
def page() -> str:
    return rpc_page.page()


def test_the_page_in_docs_is_up_to_date(page):
    committed = Path(__file__).resolve().parents[2] / "docs" / "rpc.md"
    assert committed.read_text() == page, "run `make docs`"


def rows(page: str, title: str) -> list[str]:
    section = re.search(rf"^### {title}\n(.*?)(?=^###? |\Z)", page, re.DOTALL | re.MULTILINE)
    assert section, title
    return re.findall(r"^\| `(\w+)` \|", section[1], re.MULTILINE)


def test_every_call_field_and_value_has_a_row(page):
    for file in FILES:
        for service in file.services_by_name.values():
            assert rows(page, service.name) == [method.name for method in service.methods]
        for message in file.message_types_by_name.values():
            assert rows(page, message.name) == [field.name for field in message.fields]
        for enum in file.enum_types_by_name.values():
            assert rows(page, enum.name) == [value.name for value in enum.values]


def test_a_row_has_type_limits_and_default_of_its_field(page):
    assert "| `max_tokens` | optional uint32 | At most this many output tokens, at least 1. Default 256" in page
    assert "| `logit_bias` | map from uint32 to float |" in page
    assert "| `prompt` | string, one of `input` |" in page
    assert "stream of [DecodeRequest](#decoderequest) → stream of [DecodeResponse](#decoderesponse)" in page


def test_every_call_says_what_it_does(page):
    for file in FILES:
        for service in file.services_by_name.values():
            for method in service.methods:
                assert re.search(rf"^\| `{method.name}` \| [^|]+ \| \S[^|]{{40,}} \|$", page, re.MULTILINE), method.name
