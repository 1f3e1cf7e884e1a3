"""A router with fake workers, and its HTTP face."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tests.fakes.cluster import FakeCluster
from tests.support.http_face import Face, http_face


@pytest.fixture
async def cluster() -> AsyncIterator[FakeCluster]:
    async with FakeCluster().running() as cluster:
        yield cluster


@pytest.fixture
async def face(cluster: FakeCluster) -> AsyncIterator[Face]:
    async with http_face(cluster.router) as face:
        yield face
