"""Messages between prefill and decode that are lost, come twice or are false: real processes, exact tokens."""

from __future__ import annotations

import pytest

from pdserve.v1 import types_pb2
from tests.support.control_link import Fault, control_link
from tests.support.processes import Services, running_services
from tests.support.streams import PROMPT, Stream, wait_until_free

LONG_PROMPT = PROMPT * 60


def read(services: Services, salt: str) -> Stream:
    return Stream(services.router, LONG_PROMPT, max_tokens=40, cache_salt=salt).read()


@pytest.fixture(scope="module")
def link_and_services():
    with control_link() as link, running_services(decode_args=("--pair-endpoint", link.address)) as services:
        link.target = services.decode.address
        yield link, services


@pytest.fixture(scope="module")
def undisturbed(link_and_services) -> Stream:
    return read(link_and_services[1], "undisturbed")


@pytest.mark.promise(7, 9, 12)
@pytest.mark.parametrize("fault", Fault, ids=lambda fault: fault.name.lower())
def test_one_bad_message_costs_an_attempt_at_most_and_no_token(link_and_services, undisturbed, fault):
    link, services = link_and_services
    link.arm(fault)
    struck = read(services, fault.value)
    assert link.dealt[fault] == 1
    assert (struck.token_ids, struck.path.kv_path) == (undisturbed.token_ids, types_pb2.KV_PATH_REMOTE)
    # What was written in all attempts. A second acknowledgement ends the pair; a lost one may be answered for by a
    # later one, and a chunk with another checksum is not written.
    assert struck.path.kv_bytes >= undisturbed.path.kv_bytes > 0
    if fault is Fault.DUPLICATED_ACKNOWLEDGEMENT:
        assert struck.path.kv_bytes > undisturbed.path.kv_bytes
    wait_until_free([services.prefill, services.decode])
    later = read(services, f"after {fault.value}")
    assert (later.token_ids, later.path.kv_path) == (undisturbed.token_ids, types_pb2.KV_PATH_REMOTE)
