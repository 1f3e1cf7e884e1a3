import pytest

from common.errors import InvalidArgument
from pdserve.v1 import decode_pb2
from pdserve.worker_client import WorkerClient
from tests.pdserve.fakes import FakeWorker


async def test_only_what_is_given_is_changed(serve):
    worker = FakeWorker()
    async with WorkerClient(await serve(worker.add_to)) as client:
        stats = await client.set_pipeline(mode="static", attention_sm=64, ffn_sm=68, cut="attention-core")
        await client.set_pipeline(profiling=False)
    first, second = worker.pipeline_requests
    assert (first.mode, first.decode_pipeline_cut) == (decode_pb2.PIPELINE_MODE_STATIC, "attention-core")
    assert (first.decode_attention_sm, first.decode_ffn_sm) == (64, 68)
    assert not first.HasField("decode_pipeline_profiling")
    assert [field.name for field, _ in second.ListFields()] == ["decode_pipeline_profiling"]
    assert (stats.mode, stats.total_tokens) == ("STATIC", 256)


async def test_a_mode_that_there_is_not_is_refused_before_it_is_sent(serve):
    worker = FakeWorker()
    async with WorkerClient(await serve(worker.add_to)) as client:
        with pytest.raises(InvalidArgument, match="'fast', not 'auto', 'static' or 'disabled'") as caught:
            await client.set_pipeline(mode="fast")
    assert caught.value.field == "mode"
    assert worker.pipeline_requests == []
