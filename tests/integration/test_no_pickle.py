"""Nothing that comes from outside is loaded by pickle, nor could be."""

from __future__ import annotations

import ast
import pickle
import sys

import pytest

from tests.support.cluster import RealCluster
from tests.support.processes import ROOT

PACKAGES = ("common", "router", "prefill_service", "decode_service", "pdserve")
# Modules that build objects from bytes, and calls of torch that do.
MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
CALLS = {
    "send_object_list",
    "recv_object_list",
    "broadcast_object_list",
    "all_gather_object",
    "gather_object",
    "scatter_object_list",
    "TCPStore",
    "rpc_async",
}


def test_no_module_of_the_services_names_pickle_or_what_uses_it():
    files = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    assert len(files) > 100
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())):
            named = {
                ast.Import: lambda node: {alias.name.partition(".")[0] for alias in node.names},
                ast.ImportFrom: lambda node: {(node.module or "").partition(".")[0]},
            }.get(type(node), lambda node: set())(node)
            assert not named & MODULES, path
            if isinstance(node, ast.Attribute):
                assert node.attr not in CALLS, f"{path}: {node.attr}"
                loads_torch = node.attr == "load" and isinstance(node.value, ast.Name) and node.value.id == "torch"
                assert not loads_torch, path


# An audit hook cannot be taken away again, so it listens only while a test has it do so.
_found: list[str] | None = None


def _listen(event: str, arguments: tuple) -> None:
    if event == "pickle.find_class" and _found is not None:
        _found.append(".".join(map(str, arguments)))


sys.addaudithook(_listen)


@pytest.fixture
def unpickled():
    """What pickle looked up meanwhile: a name for each."""
    global _found
    _found = found = []
    yield found
    _found = None


def test_the_listener_hears_of_pickle(unpickled):
    pickle.loads(pickle.dumps(ROOT))
    assert unpickled


@pytest.mark.promise(20)
async def test_a_prompt_crosses_all_services_and_nothing_is_unpickled(unpickled):
    async with RealCluster().running() as cluster:
        reply = await cluster.generate(list(range(100, 164)), max_tokens=4, num_logprobs=2, num_prompt_logprobs=1)
        assert reply.completion.path.kv_bytes
    assert unpickled == []
