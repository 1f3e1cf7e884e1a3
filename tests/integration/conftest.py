"""Two of each as processes, for tests that strike some of them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from pdserve.v1 import types_pb2
from tests.support.processes import Cluster, running_cluster
from tests.support.streams import wait_until_free, wait_until_listed


@pytest.fixture(scope="session")
def two_of_each() -> Iterator[Cluster]:
    # In small chunks a prompt is long enough under way to be struck, and it has to be under way from prefill.
    with running_cluster(
        num_routers=2,
        worker_args=["--num-blocks", "1024", "--max-batch-tokens", "32"],
        router_args=["--local-prefill", "never"],
    ) as cluster:
        yield cluster


@pytest.fixture
def whole(two_of_each: Cluster) -> Iterator[Cluster]:
    """Two of each; after the test whoever has ended is started again, and no worker may hold a block."""
    yield two_of_each
    two_of_each.restore()
    wait_until_free(two_of_each.workers)
    for router in two_of_each.routers:
        wait_until_listed(router, two_of_each.workers, types_pb2.WORKER_STATE_SERVING)
