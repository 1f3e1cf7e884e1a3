"""Workers and routers that are killed or stopped under requests: real processes, real gloo, exact tokens."""

from __future__ import annotations

import os
import signal

import grpc
import pytest

from pdserve.v1 import types_pb2
from tests.support.streams import GREEDY, PROMPT, Stream, serving, wait_until_listed

LONG_PROMPT = PROMPT * 200
SAMPLED = types_pb2.SamplingParams(temperature=0.9, top_p=0.95, seed=7, presence_penalty=0.3)
KILLED = pytest.param(signal.SIGKILL, id="killed")
STOPPED = pytest.param(signal.SIGSTOP, id="stopped", marks=pytest.mark.slow)


@pytest.mark.promise(12)
@pytest.mark.parametrize("sampling", [pytest.param(GREEDY, marks=pytest.mark.slow), SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("fault", [KILLED, STOPPED])
def test_a_stream_goes_on_where_its_decode_worker_was_lost_and_no_token_differs(whole, fault, sampling):
    router = whole.routers[0]
    undisturbed = Stream(router, max_tokens=200, sampling=sampling).read()
    stream = Stream(router, max_tokens=200, sampling=sampling).read(20)
    victim = whole.named(serving(stream, types_pb2.ROLE_DECODE))
    os.kill(victim.process.pid, fault)
    stream.read()
    if fault == signal.SIGSTOP:
        os.kill(victim.process.pid, signal.SIGCONT)
    else:
        victim.process.wait(10)
    assert (stream.token_ids, stream.text) == (undisturbed.token_ids, undisturbed.text)
    assert (stream.path.num_resumptions, stream.path.kv_path) == (1, types_pb2.KV_PATH_RECOMPUTED)
    assert whole.named(stream.path.decode_worker) is not victim


@pytest.mark.promise(2, 12)
@pytest.mark.parametrize("fault", [KILLED, STOPPED])
def test_a_prompt_is_computed_elsewhere_where_its_prefill_worker_was_lost(whole, fault):
    router = whole.routers[0]
    undisturbed = Stream(router, LONG_PROMPT[1:], max_tokens=20).read()
    stream = Stream(router, LONG_PROMPT[1:] + " ", max_tokens=1)
    victim = whole.named(serving(stream, types_pb2.ROLE_PREFILL))
    os.kill(victim.process.pid, fault)
    stream.read()
    again = Stream(router, LONG_PROMPT[1:], max_tokens=20).read()
    if fault == signal.SIGSTOP:
        os.kill(victim.process.pid, signal.SIGCONT)
    else:
        victim.process.wait(10)
    assert whole.named(stream.path.prefill_worker) is not victim
    assert again.token_ids == undisturbed.token_ids
    assert whole.named(again.path.prefill_worker) is not victim


@pytest.mark.slow
@pytest.mark.promise(4, 10)
def test_without_a_prefill_worker_decode_stays_ready_and_prefills_until_one_comes_back(whole):
    router = whole.routers[0]
    expected = Stream(router, max_tokens=20).read()
    for prefill in whole.prefills:
        prefill.kill()
    wait_until_listed(router, whole.prefills, types_pb2.WORKER_STATE_UNREACHABLE)
    degraded = Stream(router, max_tokens=20).read()
    assert (degraded.path.kv_path, degraded.token_ids) == (types_pb2.KV_PATH_LOCAL, expected.token_ids)
    for decode in whole.decodes:
        decode.wait_ready(timeout_s=0.0)
    whole.prefills[0].start()
    wait_until_listed(router, whole.prefills[:1], types_pb2.WORKER_STATE_SERVING)
    recovered = Stream(router, max_tokens=20).read()
    assert recovered.path.prefill_worker == "prefill-0"
    assert recovered.path.kv_path != types_pb2.KV_PATH_LOCAL


@pytest.mark.promise(1, 5)
def test_a_router_that_is_killed_costs_its_own_requests_and_leaves_no_block_behind(whole):
    own, other = whole.routers
    lost, kept = Stream(own, max_tokens=300), Stream(other, max_tokens=300)
    lost.read(20)
    kept.read(20)
    own.kill()
    with pytest.raises(grpc.RpcError) as caught:
        lost.read()
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    kept.read()
    assert (len(kept.token_ids), kept.path.num_resumptions) == (300, 0)
