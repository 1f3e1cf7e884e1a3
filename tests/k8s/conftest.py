"""What the tests of running manifests need of the machine."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from tests.support import sandbox
from tests.support.kubernetes import Kubernetes


@pytest.fixture(scope="session")
def containers() -> None:
    """Skips where no container can be made."""
    if why := sandbox.obstacle():
        pytest.skip(why)


@pytest.fixture
def cluster(containers):
    with Kubernetes() as running:
        yield running


@pytest.fixture
def router(cluster):
    """The Service that users reach, as what `tests.support.streams` dials."""
    return lambda: SimpleNamespace(address=cluster.address("router"))
