"""Which transports a worker has, and which one a pair takes."""

from __future__ import annotations

import pytest
import torch

from common.config import ConfigError, DecodeConfig, PrefillConfig, load
from common.transport import transports
from common.transport.interfaces import interface_name
from common.transport.limits import chunk_bytes
from common.transport.places import Place, place_of
from common.transport.transports import Transports, name_of

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
ALL = ("cuda-ipc", "nccl", "gloo")
HERE = Place("gpu-a", "machine-1", "machine-1", "ns-1", "100")
BESIDE = HERE._replace(process="200")
OTHER_GPU = BESIDE._replace(gpu="gpu-b")
OTHER_MACHINE = Place("gpu-c", "machine-2", "machine-2", "ns-9", "100")


def choice_between(prefill: Place, decode: Place, *, offered=ALL, had=ALL) -> tuple[str, tuple[str, ...]]:
    choice = Transports(had, CUDA, decode).choose(Transports(offered, CUDA, prefill).offers)
    assert choice is not None
    return choice


@pytest.fixture(autouse=True)
def _devices(monkeypatch):
    monkeypatch.setattr(transports, "_reaches", lambda device, gpu: {"gpu-b": True, "gpu-d": False}.get(gpu))


@pytest.mark.parametrize(
    ("prefill", "label", "refused"),
    [
        (BESIDE, "cuda-ipc", ()),
        (OTHER_GPU, "nccl:p2p", ("cuda-ipc: the workers are on different GPUs",)),
        (OTHER_GPU._replace(gpu="gpu-d"), "nccl:host", ("cuda-ipc: the workers are on different GPUs",)),
        (OTHER_GPU._replace(gpu="gpu-e"), "nccl", ("cuda-ipc: the workers are on different GPUs",)),
        (OTHER_MACHINE, "nccl:net", ("cuda-ipc: the workers are on different GPUs",)),
        (
            BESIDE._replace(namespaces="ns-2"),
            "gloo",
            ("cuda-ipc: the workers are in different containers", "nccl: the workers are on one GPU"),
        ),
        (HERE, "gloo", ("cuda-ipc: the workers are one process", "nccl: the workers are one process")),
        (
            HERE._replace(gpu="gpu-b"),
            "gloo",
            ("cuda-ipc: the workers are one process", "nccl: the workers are one process"),
        ),
    ],
)
def test_a_pair_takes_the_best_that_works_between_the_two_places(prefill, label, refused) -> None:
    assert choice_between(prefill, HERE) == (label, refused)


def test_nccl_takes_workers_on_one_gpu_for_two_machines_when_they_are_named_so() -> None:
    prefill, decode = BESIDE._replace(nccl_machine="one"), HERE._replace(nccl_machine="two")
    assert choice_between(prefill, decode, offered=("nccl",))[0] == "nccl:net"


def test_prefills_order_decides_and_decode_takes_only_what_it_has() -> None:
    assert choice_between(BESIDE, HERE, offered=("gloo", "cuda-ipc"))[0] == "gloo"
    assert choice_between(BESIDE, HERE, had=("gloo",)) == (
        "gloo",
        ("cuda-ipc: decode does not have it", "nccl: decode does not have it"),
    )


def test_what_another_version_offers_is_refused_and_never_fatal() -> None:
    decode = Transports(ALL, CUDA, HERE)
    assert decode.choose(("nixl", "nccl@elsewhere", "cuda-ipc", "gloo")) == (
        "gloo",
        (
            "nixl: decode does not know it",
            "nccl: prefill names its place in another way",
            "cuda-ipc: prefill names its place in another way",
        ),
    )
    assert decode.choose(("nixl",)) is None


def test_a_choice_says_why_not_something_better() -> None:
    choice = Transports(ALL, CUDA, HERE).choose(Transports(ALL, CUDA, OTHER_GPU).offers)
    assert str(choice) == "nccl:p2p (not cuda-ipc: the workers are on different GPUs)"


def test_a_worker_on_a_cpu_has_gloo() -> None:
    assert Transports.of(ALL, CPU).offers == ("gloo",)


def test_a_worker_without_any_transport_does_not_start() -> None:
    with pytest.raises(ConfigError, match="none can be used: nccl: the worker computes on a CPU"):
        Transports.of(("nccl",), CPU)


def test_a_place_survives_its_journey(monkeypatch) -> None:
    properties = type("Properties", (), {"uuid": "1b2c-3d"})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setenv("NCCL_HOSTID", "any / text")
    place = place_of(CUDA)
    assert Place.parse(str(place)) == place
    assert place.gpu == "1b2c-3d"
    assert place.nccl_machine != place.machine
    assert place.is_process_of(place._replace(gpu="another"))
    assert Place.parse("a/b") is None


def test_the_name_of_an_offer_or_a_label_is_its_transport() -> None:
    assert [name_of(text) for text in ("gloo", "nccl@a/b:c", "nccl:p2p", "cuda-ipc@x")] == [
        "gloo", "nccl", "nccl", "cuda-ipc",
    ]  # fmt: skip


@pytest.mark.parametrize("cls", [PrefillConfig, DecodeConfig])
def test_the_setting_takes_a_list_and_names_what_it_knows(cls) -> None:
    assert cls().kv_transports == ALL
    assert load(cls, ["--kv-transports", "nccl", "--kv-transports", "gloo"]).kv_transports == ("nccl", "gloo")
    with pytest.raises(ConfigError, match="kv_transports='rdma': expected one of cuda-ipc, nccl, gloo"):
        cls(kv_transports=("rdma",))


@pytest.mark.parametrize(
    ("transport", "limit", "expected"),
    [("gloo", 0, 4 << 20), ("gloo", 8 << 20, 4 << 20), ("gloo", 5000, 5000), ("nccl", 0, 16 << 20), ("nccl", 9, 9)],
)
def test_chunks_are_as_large_as_the_transport_likes_and_the_operator_allows(transport, limit, expected) -> None:
    assert chunk_bytes(transport, limit) == expected


def test_a_chunk_limit_is_none_or_of_some_size() -> None:
    with pytest.raises(ConfigError, match="max_chunk_bytes=4095: expected 0 or at least 4096"):
        DecodeConfig(max_chunk_bytes=4095)


def test_an_interface_is_named_by_its_address() -> None:
    assert interface_name("127.0.0.1") == interface_name("localhost") == "lo"
    assert interface_name("192.0.2.1") is None
