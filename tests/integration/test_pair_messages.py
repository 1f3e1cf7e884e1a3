"""Messages between prefill and decode that are lost, come twice or are false: real processes, exact tokens."""

from __future__ import annotations

import pytest

from pdserve.v1 import types_pb2
from tests.support.control_link import Fault, control_link
from tests.support.processes import running_services
from tests.support.streams import PROMPT, Stream, wait_until_free

LONG_PROMPT = PROMPT * 60


@pytest.fixture(scope="module")
def link_and_services():
    with control_link() as link, running_services(decode_args=("--pair-endpoint", link.address)) as services:
        link.target = services.decode.address
        yield link, services


@pytest.mark.promise(7, 9, 12)
@pytest.mark.parametrize("fault", Fault, ids=lambda fault: fault.name.lower())
def test_one_bad_message_costs_an_attempt_and_no_token(link_and_services, fault):
    link, services = link_and_services
    expected = Stream(services.router, LONG_PROMPT, max_tokens=40, cache_salt="undisturbed").read()
    link.arm(fault)
    struck = Stream(services.router, LONG_PROMPT, max_tokens=40, cache_salt=fault.value).read()
    assert link.dealt[fault] == 1
    assert struck.token_ids == expected.token_ids
    # Over all attempts.
    assert struck.path.kv_bytes >= expected.path.kv_bytes
    wait_until_free([services.prefill, services.decode])
    # The pair that it was is none any more, or goes on: KV arrives either way.
    later = Stream(services.router, LONG_PROMPT, max_tokens=40, cache_salt=f"after {fault.value}").read()
    assert (later.token_ids, later.path.kv_path) == (expected.token_ids, types_pb2.KV_PATH_REMOTE)
