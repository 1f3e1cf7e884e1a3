from __future__ import annotations

import contextlib
import json
import socket
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest
import torch

from decode_service.sm.green_manager import GreenManager
from decode_service.sm.partitions import NoPartitions, State
from pdserve.cli import doctor
from pdserve.cli.doctor import cuda_probe, machine, requirements
from pdserve.cli.doctor.bounded import finished
from pdserve.cli.doctor.check import Check
from pdserve.cli.doctor.ports import grpc_port, metrics_port
from pdserve.cli.doctor.probe import Broken, Missing, Probe, check, probed
from pdserve.cli.doctor.torch_probe import PROBES
from tests.fakes.gpu import FakeGpu
from tests.pdserve.fakes import FakeRouter

OK = Check("gloo", "cpu", "ok", "fine")
NO_GPU = Check("driver", "gpu", "missing", "no nvidia-smi here", "install the driver")
BROKEN = Check("port 50051", "cpu", "failed", "another program has it", "end it")


@pytest.fixture
def sees(monkeypatch):
    """`sees(checks)`: what the doctor finds."""

    def find(*checks):
        async def found():
            return list(checks)

        monkeypatch.setattr(doctor, "all_checks", found)

    return find


async def test_a_machine_without_a_gpu_is_healthy(pdserve, sees):
    sees(OK, NO_GPU)
    exit_code, stdout, _ = await pdserve("doctor")
    assert exit_code == 0
    assert "missing  driver  no nvidia-smi here → install the driver" in stdout


async def test_what_the_cpu_path_needs_and_lacks_fails(pdserve, sees):
    sees(OK, BROKEN, NO_GPU)
    exit_code, stdout, _ = await pdserve("doctor")
    assert exit_code == 1
    assert "failed  port 50051  another program has it → end it" in stdout
    assert stdout.rstrip().endswith("broken: port 50051")


async def test_json_says_the_same(pdserve, sees):
    sees(OK, BROKEN)
    exit_code, stdout, _ = await pdserve("doctor", "--json")
    report = json.loads(stdout)
    assert (exit_code, report["ok"]) == (1, False)
    assert report["checks"][0] == {"name": "gloo", "path": "cpu", "status": "ok", "detail": "fine", "remedy": ""}


async def test_this_machine_serves_on_the_cpu(pdserve):
    """All but the ports, which belong to whoever runs services here."""
    _, stdout, _ = await pdserve("doctor", "--json")
    checks = {check["name"]: check for check in json.loads(stdout)["checks"]}
    for name in ("python", "grpcio", "protobuf", "stubs", "torch", "gloo", "model"):
        assert checks[name]["status"] == "ok", checks[name]
    assert {"driver", "torch on cuda", "nccl", "cuda-python", "cuInit", "green contexts"} < set(checks)
    assert len([name for name in checks if name.startswith("port")]) == 6
    if not torch.cuda.is_available():
        assert checks["green contexts"]["detail"] == "NO_GPU: computing on the CPU"


async def test_a_free_port_is_fine(unused_address):
    assert (await grpc_port("router", unused_address)).detail == "free, for the router"


async def test_a_port_where_the_service_itself_answers_is_fine(serve):
    found = await grpc_port("router", await serve(FakeRouter().add_to))
    assert (found.status, found.detail) == ("ok", "a pdserve router answers, not ready")


async def test_a_port_where_another_service_answers_is_taken(serve):
    found = await grpc_port("decode", await serve(FakeRouter().add_to))
    assert (found.status, found.detail) == ("failed", "another program has it; it is for the decode worker")
    assert "--listen" in found.remedy


@pytest.mark.parametrize("port_of", [grpc_port, metrics_port])
async def test_a_port_whose_owner_hangs_is_taken(port_of, monkeypatch):
    monkeypatch.setattr("pdserve.cli.doctor.ports.TIMEOUT_S", 0.2)
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as deaf:
        found = await port_of("router", f"127.0.0.1:{deaf.getsockname()[1]}")
    assert found.status == "failed"


@pytest.mark.parametrize(
    ("page", "status"), [(b"# TYPE pdserve_router_queue_requests gauge", "ok"), (b"<html>", "failed")]
)
async def test_a_metrics_port_is_known_by_its_page(page, status):
    class Page(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(page)

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Page) as server:
        Thread(target=server.serve_forever, args=(0.01,)).start()
        found = await metrics_port("router", f"127.0.0.1:{server.server_port}")
        server.shutdown()
    assert found.status == status


async def test_an_address_of_another_machine_cannot_be_listened_on():
    found = await grpc_port("router", "192.0.2.1:50051")
    assert found.status == "failed"
    assert found.detail.startswith("cannot listen on 192.0.2.1:50051: Cannot assign requested address")


def test_a_model_folder_without_weights_is_missing(tmp_path):
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).touch()
    found = machine.model_folder(str(tmp_path))
    assert (found.status, found.detail) == ("missing", f"{tmp_path} has no model.safetensors")


@pytest.mark.parametrize(
    ("script", "trouble"),
    [
        ("echo seen", ""),
        ("echo seen; echo wrong >&2; exit 3", "it ended with exit code 3: wrong"),
        ("echo seen; exit 3", "it ended with exit code 3: seen"),
        ("echo seen; kill -SEGV $$", "it died of SIGSEGV"),
        ("echo seen; exec sleep 60", "it did not answer within 0.5 s"),
    ],
)
def test_a_program_that_fails_keeps_what_it_wrote(script, trouble):
    assert finished("sh", "-c", script, timeout_s=0.5) == ("seen\n", trouble)


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (None, ("x", "gpu", "ok", "here", "")),
        (Missing("not there", "get it"), ("x", "gpu", "missing", "not there", "get it")),
        (Broken("bent", "straighten it"), ("x", "gpu", "failed", "bent", "straighten it")),
        (OSError("first line\nsecond"), ("x", "gpu", "failed", "OSError: first line", "mend it")),
    ],
)
def test_a_probe_becomes_a_check(error, outcome):
    def run():
        if error is not None:
            raise error
        return "here"

    assert check("x", Probe("gpu", run, "mend it")) == outcome


def test_probes_that_a_hang_left_without_an_answer_have_failed():
    checks = probed("torch_probe", timeout_s=0.01)
    assert [one.name for one in checks] == list(PROBES)
    assert {one.status for one in checks} == {"failed"}
    assert "it did not answer within 0.01 s" in checks[0].detail


def partitions_of(monkeypatch, driver, gpu):
    manager = GreenManager(driver, gpu)
    monkeypatch.setattr(GreenManager, "of", lambda device: manager)


def test_partitions_that_work_are_fine_and_given_back(monkeypatch):
    gpu = FakeGpu()
    partitions_of(monkeypatch, gpu, gpu)
    found = check("green contexts", cuda_probe.PROBES["green contexts"])
    assert (found.status, found.detail) == ("ok", "device 0 splits its 132 SMs into 16 and 116, also in graphs")
    assert (gpu.contexts, gpu.streams) == ({}, {})


def test_partitions_that_overlap_have_failed(monkeypatch):
    gpu = FakeGpu()
    gpu.graphs_forget = True
    partitions_of(monkeypatch, gpu, gpu)
    found = check("green contexts", cuda_probe.PROBES["green contexts"])
    assert found.status == "failed"
    assert found.detail.startswith("VERIFICATION_FAILED: kernels of both partitions ran on SMs 0")
    assert found.remedy == State.VERIFICATION_FAILED.remedy


def test_a_driver_without_partitions_is_missing_them(monkeypatch):
    partitions_of(monkeypatch, NoPartitions(State.DRIVER_TOO_OLD, "CUDA 12.4"), FakeGpu())
    found = check("green contexts", cuda_probe.PROBES["green contexts"])
    assert (found.status, found.detail) == ("missing", "DRIVER_TOO_OLD: CUDA 12.4")
    assert found.remedy == State.DRIVER_TOO_OLD.remedy


def test_versions_are_those_that_the_package_asks_for():
    assert requirements.unmet("protobuf", "7.36.2") == ""
    assert requirements.unmet("torch", "2.13.0+cpu") == ""
    assert requirements.unmet("protobuf", "5.0") == "<8,>=6.33"
    assert requirements.unmet("unheard-of", "1") == ""


def test_the_doctor_starts_without_grpc_and_torch(spawn):
    """They are what may be missing."""
    code = """
import sys
for name in ("grpc", "google.protobuf", "torch"):
    sys.modules[name] = None
from pdserve.cli import parse
from pdserve.cli.doctor.machine import software
parse(["doctor"])
print(*[f"{check.name} {check.status}" for check in software()], sep=", ")
"""
    stdout, stderr = spawn("-c", code).communicate(timeout=60)
    assert stdout.strip() == "python ok, grpcio ok, protobuf ok, stubs missing", stderr
