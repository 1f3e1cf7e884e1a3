"""Requests of a fake cluster as tests of failures follow them, step by step."""

import grpc.aio
import pytest

from common import errors
from common.errors import from_rpc_error
from pdserve.v1 import decode_pb2
from tests.fakes.cluster import FakeCluster, Reply, eventually

PREEMPTED = decode_pb2.PREFILL_NEEDED_REASON_PREEMPTED
PAIR_LOST = decode_pb2.PREFILL_NEEDED_REASON_PAIR_LOST
SCRIPT = list(range(100, 110))
HANDED_OVER = errors.Unavailable("drained before this ended", reason="HANDED_OVER")


async def error_of(call) -> errors.PdserveError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await Reply.of(call)
    return from_rpc_error(caught.value)


async def idle(cluster: FakeCluster) -> None:
    """Nothing is left at any worker."""
    await eventually(lambda: not any(worker.num_active for worker in [*cluster.decodes, *cluster.prefills]))
    for worker in cluster.router.fleet.workers:
        assert (worker._num_seqs, worker._num_blocks, worker._num_uncounted_blocks, worker._num_tokens) == (0, 0, 0, 0)


async def running(cluster: FakeCluster, **fields) -> tuple[grpc.aio.UnaryStreamCall, Reply]:
    """A stream of ten tokens, of which four have come; the rest does when its worker may go on."""
    cluster.decode.go.clear()
    cluster.decode.pause_at = 4
    call, reply = cluster.start(max_tokens=10, **fields), Reply()
    while len(reply.token_ids) < 4:
        reply.add(await call.read())
    return call, reply


async def rest(call: grpc.aio.UnaryStreamCall, reply: Reply) -> None:
    while reply.completion is None:
        reply.add(await call.read())
