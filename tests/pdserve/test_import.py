"""`import pdserve`: its names, and what they do not bring along."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import pdserve

# Of the services, the command or the extras: no client needs any of it.
HEAVY = "torch numpy transformers safetensors triton tokenizers jinja2 uvloop prometheus_client xxhash rich"


def imported_by(code: str) -> set[str]:
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys; print(*sys.modules)"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_every_name_that_is_offered_is_there():
    assert "Client" in pdserve.__all__
    for name in pdserve.__all__:
        assert getattr(pdserve, name).__name__ == name
    assert set(pdserve.__all__) <= set(dir(pdserve))


def test_type_checkers_see_the_same_names():
    tree = ast.parse(Path(pdserve.__file__).read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    seen = {(alias.asname, node.module) for node in block.body for alias in node.names}
    assert seen == {(name, pdserve._MODULE_OF[name]) for name in pdserve.__all__}


def test_a_name_that_there_is_not_is_an_attribute_error():
    with pytest.raises(AttributeError, match="'Clinet'"):
        pdserve.Clinet  # noqa: B018


@pytest.mark.parametrize(
    "names", ["Client, AsyncClient, PdserveError, RetryPolicy, WorkerClient", "LLM, SamplingParams"]
)
def test_clients_bring_neither_torch_nor_what_only_services_need(names):
    assert imported_by(f"from pdserve import {names}").isdisjoint(HEAVY.split())


def test_the_stubs_alone_need_grpc_and_protobuf():
    modules = imported_by("from pdserve.v1 import router_pb2_grpc")
    assert not {name for name in modules if name.startswith(("common", "grpc_status", "google.rpc"))}
