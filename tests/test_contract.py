"""The contract in protos/: what every rpc and field must have, and that the stubs in use were made from it."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
from google.protobuf import descriptor_pb2

ROOT = Path(__file__).resolve().parent.parent
Field = descriptor_pb2.FieldDescriptorProto

RPCS = {
    "RouterService": ["Generate", "GetModel", "ListWorkers", "Explain"],
    "PrefillService": ["Prefill"],
    "DecodeService": ["Decode", "ConnectPair", "GetPipelineStats", "SetPipeline"],
    "WorkerService": ["WatchLoad", "Drain"],
}


@pytest.fixture(scope="module")
def files():
    """The protos as descriptors, comments included."""
    buf = Path(sys.executable).with_name("buf")
    built = subprocess.run(
        [buf, "build", "--as-file-descriptor-set", "-o", "-"], cwd=ROOT, check=True, capture_output=True, timeout=60
    )
    return [
        file for file in descriptor_pb2.FileDescriptorSet.FromString(built.stdout).file if file.package == "pdserve.v1"
    ]


def fields(files, *names):
    """(message name, field) of the messages called `names`, or of all."""
    return [
        (message.name, field)
        for file in files
        for message in file.message_type
        for field in message.field
        if not names or message.name in names
    ]


def test_the_rpcs_are_the_public_ones(files):
    found = {service.name: [rpc.name for rpc in service.method] for file in files for service in file.service}
    assert found == RPCS


def test_every_rpc_says_whether_it_may_be_repeated(files):
    for file in files:
        comments = {tuple(place.path): place.leading_comments for place in file.source_code_info.location}
        for i, service in enumerate(file.service):
            for j, rpc in enumerate(service.method):
                assert re.search(r"repeat|again", comments[6, i, 2, j]), f"{service.name}.{rpc.name}"


def test_every_knob_of_a_user_tells_unset_from_zero(files):
    for message, field in fields(files, "GenerateRequest", "SamplingParams", "StoppingParams", "SetPipelineRequest"):
        is_scalar = field.type != Field.TYPE_MESSAGE and field.label != Field.LABEL_REPEATED
        assert not is_scalar or field.HasField("oneof_index"), f"{message}.{field.name}"


def test_a_time_is_a_double_with_its_unit_in_the_name(files):
    for message, field in fields(files):
        if field.name.endswith(("_ms", "_s")):
            assert field.type == Field.TYPE_DOUBLE, f"{message}.{field.name}"


def test_counts_are_uint32_and_bytes_and_seeds_uint64(files):
    for message, field in fields(files):
        name = field.name
        if name.endswith("_bytes") or name == "seed":
            assert field.type == Field.TYPE_UINT64, f"{message}.{name}"
        elif name.startswith(("num_", "max_", "min_")) and field.type not in (Field.TYPE_DOUBLE, Field.TYPE_UINT64):
            assert field.type == Field.TYPE_UINT32, f"{message}.{name}"


def test_the_stubs_in_use_were_made_from_these_protos(files):
    for file in files:
        stubs = importlib.import_module(file.name.removesuffix(".proto").replace("/", ".") + "_pb2")
        in_use = descriptor_pb2.FileDescriptorProto()
        stubs.DESCRIPTOR.CopyToProto(in_use)
        assert names_and_numbers(in_use) == names_and_numbers(file), f"{file.name}: run `make protos`"


def names_and_numbers(file):
    """What goes over the wire."""
    return {
        message.name: [(field.name, field.number, field.type, field.label) for field in message.field]
        for message in file.message_type
    } | {enum.name: [(value.name, value.number) for value in enum.value] for enum in file.enum_type}
