"""One trace for one request, over the real servicers; and what happens to it when something goes wrong."""

from __future__ import annotations

import itertools

import grpc.aio
import pytest

from common.errors import Unavailable
from pdserve.v1 import decode_pb2
from tests.fakes.cluster import FakeCluster, Reply, eventually, generate_request
from tests.support.cluster import RealCluster
from tests.support.spans import Spans

PROMPT = "The for statement is used to iterate over the elements of a sequence"
TRACE_ID, SPAN_ID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
PARENT = f"00-{TRACE_ID}-{SPAN_ID}-01"

WORKER_DECODE = ("Decode", ["queue", "first_decode", "stream"])
WORKER_PREFILL = ("Prefill", ["connect", "queue", "prefill", "transfer"])


async def generate(cluster, *metadata: tuple[str, str | bytes], timeout: float = 30.0, **fields) -> Reply:
    request = generate_request(PROMPT, **fields)
    return await Reply.of(cluster.stub.Generate(request, timeout=timeout, metadata=metadata))


async def test_a_request_is_one_trace_over_all_three_services():
    spans = Spans()
    async with RealCluster(tracer=spans.tracer).running() as cluster:
        reply = await generate(cluster, request_id="mine", max_tokens=8, ignore_eos=True)
    root = spans.root()
    assert root.outline() == ("Generate", ["queue", ("Decode", [WORKER_DECODE, ("Prefill", [WORKER_PREFILL])])])
    path = reply.completion.path
    assert (
        root.attributes
        | {
            "request_id": "mine",
            "prefill_worker": "prefill-0",
            "decode_worker": "decode-0",
            "kv_path": "remote",
            "kv_bytes": path.kv_bytes,
            "kv_transport": "gloo",
            "num_resumptions": 0,
            "finish_reason": "length",
            "gen_ai.usage.input_tokens": reply.completion.usage.prompt_tokens,
            "gen_ai.usage.output_tokens": 8,
            "rpc.grpc.status_code": 0,
        }
        == root.attributes
    )
    assert root.events == ["first_token"]
    assert all(node.error is None for node in root.walk())
    assert len({span.context.trace_id for span in spans.recorded}) == 1


async def test_spans_lie_within_their_parents_and_take_as_long_as_the_path_says():
    spans = Spans()
    async with RealCluster(tracer=spans.tracer).running() as cluster:
        path = (await generate(cluster, max_tokens=8, ignore_eos=True)).completion.path
    [prefill] = spans.root().named("Decode", "Prefill", "Prefill")
    [decode] = spans.root().named("Decode", "Decode")
    for node in spans.root().walk():
        for child in node.children:
            assert child.span.start_time >= node.span.start_time
    stages = {stage.name: stage.span for stage in (*prefill.children, *decode.named("first_decode"))}
    for one, following in itertools.pairwise([stages["queue"], stages["prefill"], stages["transfer"]]):
        assert one.end_time == following.start_time
    told = {"prefill": path.prefill_ms, "transfer": path.kv_transfer_ms, "first_decode": path.first_decode_ms}
    for name, milliseconds in told.items():
        assert (stages[name].end_time - stages[name].start_time) / 1e6 == pytest.approx(milliseconds, abs=0.001)


async def test_a_prompt_that_decode_computes_itself_has_its_prefill_span_there():
    spans = Spans()
    async with RealCluster(num_prefill=0, tracer=spans.tracer).running() as cluster:
        await generate(cluster, max_tokens=8, ignore_eos=True)
    decode = ("Decode", ["queue", "prefill", "first_decode", "stream"])
    assert spans.root().outline() == ("Generate", ["queue", ("Decode", [decode])])
    assert spans.root().attributes["kv_path"] == "local"
    [call] = spans.root().named("Decode")
    assert (call.attributes["prefill_way"], call.attributes["prefill_way_reason"]) == ("local", "degraded")


async def test_a_completion_of_one_token_has_no_step_of_decode():
    spans = Spans()
    async with RealCluster(tracer=spans.tracer).running() as cluster:
        await generate(cluster, max_tokens=1)
    [decode] = spans.root().named("Decode", "Decode")
    assert decode.outline() == ("Decode", ["queue"])


async def test_a_client_that_leaves_ends_all_spans_and_none_has_failed():
    spans = Spans()
    async with RealCluster(tracer=spans.tracer).running() as cluster:
        call = cluster.start(PROMPT, max_tokens=1900, ignore_eos=True)
        await call.read()
        call.cancel()
        await cluster.settled()
        await eventually(lambda: any(span.name.endswith("Generate") for span in spans.recorded))
        await eventually(lambda: len(spans.root().named("Decode", "Decode")) == 1)
    root = spans.root()
    assert root.attributes["cancelled"] is True
    assert all(node.error is None for node in root.walk())


async def test_the_clients_span_is_the_parent():
    spans = Spans(sample_ratio=0.0)
    async with RealCluster(tracer=spans.tracer).running() as cluster:
        await generate(cluster, ("traceparent", PARENT), ("tracestate", "vendor=1"), max_tokens=4)
    root = spans.root()
    assert root.span.parent is not None
    assert root.span.parent.span_id == int(SPAN_ID, 16)
    assert {span.context.trace_id for span in spans.recorded} == {int(TRACE_ID, 16)}
    assert {span.context.trace_state.get("vendor") for span in spans.recorded} == {"1"}
    assert root.named("Decode", "Prefill", "Prefill", "transfer")


async def test_what_the_client_does_not_sample_is_recorded_nowhere():
    spans = Spans()
    async with RealCluster(tracer=spans.tracer).running() as cluster:
        await generate(cluster, ("traceparent", PARENT.removesuffix("01") + "00"), max_tokens=4)
    assert not spans.recorded


async def test_no_request_is_recorded_at_a_ratio_of_zero():
    spans = Spans(sample_ratio=0.0)
    async with RealCluster(tracer=spans.tracer).running() as cluster:
        await generate(cluster, max_tokens=4)
    assert not spans.recorded


@pytest.fixture
async def fakes():
    spans = Spans()
    async with FakeCluster(num_decode=2, tracer=spans.tracer).running() as cluster:
        cluster.spans = spans
        yield cluster


@pytest.mark.parametrize(
    "metadata",
    [
        [("traceparent", "nonsense")],
        [("traceparent", "")],
        [("traceparent", PARENT * 40)],
        [("traceparent", PARENT.replace(TRACE_ID, "0" * 32))],
        [("traceparent", "ff" + PARENT[2:])],
        [("traceparent-bin", b"\x00\xff")],
        [("tracestate", "vendor=1")],
    ],
)
async def test_a_header_that_means_nothing_is_ignored(fakes, metadata):
    reply = await generate(fakes, *metadata, max_tokens=3)
    assert len(reply.token_ids) == 3
    root = fakes.spans.root()
    assert root.span.parent is None
    assert root.error is None


async def test_a_bad_tracestate_leaves_the_parent_as_it_is(fakes):
    await generate(fakes, ("traceparent", PARENT), ("tracestate", "==,,;" * 200), max_tokens=3)
    assert fakes.spans.root().span.parent.span_id == int(SPAN_ID, 16)


async def test_an_attempt_that_fails_is_a_failed_span_and_the_next_one_stands_beside_it(fakes):
    fakes.prefill.failures = [Unavailable("the pair broke", reason="PAIR_LOST")]
    await generate(fakes, max_tokens=3)
    [call] = fakes.spans.root().named("Decode")
    first, second = call.named("Prefill")
    assert (first.attributes["attempt"], first.error) == (1, "the pair broke")
    assert (first.attributes["error.type"], first.attributes["rpc.grpc.status_code"]) == ("PAIR_LOST", 14)
    assert (second.attributes["attempt"], second.error) == (2, None)
    assert call.events == ["attempt_given_up"]
    assert call.error is None


async def test_a_stream_that_goes_on_elsewhere_has_a_span_for_each_worker(fakes):
    fakes.decodes[0].die_at = fakes.decodes[1].die_at = [2]
    await generate(fakes, max_tokens=6)
    root = fakes.spans.root()
    first, second = root.named("Decode")
    assert first.error == "this worker died"
    assert second.error is None
    assert first.attributes["worker"] != second.attributes["worker"]
    assert root.attributes["num_resumptions"] == 1
    assert "going_on_elsewhere" in root.events
    assert [len(call.named("Prefill")) for call in (first, second)] == [1, 1]


async def test_kv_that_is_lost_shows_as_an_event_and_another_attempt(fakes):
    lost = [(2, decode_pb2.PREFILL_NEEDED_REASON_PREEMPTED)]
    fakes.decodes[0].lose_at = fakes.decodes[1].lose_at = lost
    await generate(fakes, max_tokens=6)
    [call] = fakes.spans.root().named("Decode")
    [event] = call.span.events
    assert (event.name, event.attributes["pdserve.cause"]) == ("attempt_given_up", "PREEMPTED")
    assert [attempt.attributes["attempt"] for attempt in call.named("Prefill")] == [1, 2]


async def test_a_request_that_fails_is_a_failed_span_with_its_status_and_reason(fakes):
    with pytest.raises(grpc.aio.AioRpcError):
        await generate(fakes, max_tokens=0)
    root = fakes.spans.root()
    assert "max_tokens" in root.error
    assert (root.attributes["rpc.grpc.status_code"], root.attributes["error.type"]) == (3, "INVALID_ARGUMENT")


async def test_a_request_that_waits_in_vain_fails_in_the_queue():
    spans = Spans()
    async with FakeCluster(max_num_seqs=1, tracer=spans.tracer).running(max_queue_requests=1) as cluster:
        cluster.decode.go.clear()
        running = cluster.start()
        await eventually(lambda: cluster.decode.num_active)
        waiting = cluster.start()
        await eventually(lambda: len(cluster.router.parts.dispatcher.queue) == 1)
        with pytest.raises(grpc.aio.AioRpcError):
            await generate(cluster)
        [root] = [root for root in spans.roots() if root.name == "Generate"]
        running.cancel()
        waiting.cancel()
    assert root.outline() == ("Generate", ["queue"])
    assert root.named("queue")[0].error == root.error
    assert (root.attributes["error.type"], root.attributes["rpc.grpc.status_code"]) == ("QUEUE_FULL", 8)
