"""The three services as processes of their own: what operators and strangers' clients see of them."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import grpc
import pytest

from pdserve.v1 import decode_pb2, decode_pb2_grpc, router_pb2, router_pb2_grpc, types_pb2, worker_pb2, worker_pb2_grpc
from tests.support.processes import ROOT, running_services

BUF = Path(sys.executable).parent / "buf"
GREEDY = types_pb2.SamplingParams(temperature=0)


@pytest.fixture(scope="module")
def services():
    with running_services() as running:
        yield running


def buf_curl(address: str, method: str, data: dict | None = None) -> list[dict]:
    """What grpcurl would print: one JSON object a message, by reflection alone."""
    command = [BUF, "curl", "--protocol", "grpc", "--http2-prior-knowledge", f"http://{address}/{method}"]
    done = subprocess.run(
        [*command, "-d", json.dumps(data or {})], capture_output=True, text=True, timeout=30, cwd="/tmp", check=True
    )
    decoder, text, messages = json.JSONDecoder(), done.stdout.strip(), []
    while text:
        message, end = decoder.raw_decode(text)
        messages.append(message)
        text = text[end:].lstrip()
    return messages


def test_a_completion_streams_through_reflection_alone(services):
    data = {"prompt": "Return a list of", "stopping": {"maxTokens": 8, "ignoreEos": True}}
    *chunks, last = buf_curl(services.router.address, "pdserve.v1.RouterService/Generate", data)
    assert "".join(message["chunk"].get("text", "") for message in chunks)
    assert last["completion"]["path"]["kvPath"] == "KV_PATH_REMOTE"
    assert int(last["completion"]["path"]["kvBytes"]) > 0


@pytest.mark.parametrize(
    ("name", "service"), [("router", "RouterService"), ("prefill", "PrefillService"), ("decode", "DecodeService")]
)
def test_every_service_lists_itself_and_is_healthy(services, name, service):
    address = getattr(services, name).address
    command = [BUF, "curl", "--protocol", "grpc", "--http2-prior-knowledge", "--list-services", f"http://{address}"]
    listed = subprocess.run(command, capture_output=True, text=True, timeout=30, cwd="/tmp", check=True).stdout.split()
    assert f"pdserve.v1.{service}" in listed
    assert "grpc.health.v1.Health" in listed
    for health in ("", "liveness", f"pdserve.v1.{service}"):
        (reply,) = buf_curl(address, "grpc.health.v1.Health/Check", {"service": health})
        assert reply == {"status": "SERVING"}


def test_the_router_process_has_no_torch_after_serving(services):
    request = {"prompt": "x", "stopping": {"maxTokens": 2}}
    buf_curl(services.router.address, "pdserve.v1.RouterService/Generate", request)
    mapped = Path(f"/proc/{services.router.process.pid}/maps").read_text()
    assert "grpc" in mapped
    assert "torch" not in mapped


def test_a_client_that_is_killed_leaves_no_block_on_either_side(services):
    command = [
        sys.executable, "-m", "pdserve", "generate", "--router", services.router.address,
        "--max-tokens", "1900", "--temperature", "1.5", "For ever and",
    ]  # fmt: skip
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as client:
        assert client.stdout is not None
        assert client.stdout.read(1)
        client.send_signal(signal.SIGKILL)
    for worker in (services.prefill, services.decode):
        with grpc.insecure_channel(worker.address) as channel:
            for load in worker_pb2_grpc.WorkerServiceStub(channel).WatchLoad(
                worker_pb2.WatchLoadRequest(), timeout=1.0
            ):
                if load.HasField("identity"):
                    total = load.identity.num_total_blocks
                if load.num_free_blocks == total and not load.num_running:
                    break


@pytest.mark.promise(4)
@pytest.mark.parametrize("stopped", [pytest.param("prefill", marks=pytest.mark.slow), "decode"])
def test_a_stopped_worker_is_noticed_and_comes_back(stopped):
    with (
        running_services(router_args=("--replace-wait-s", "0")) as services,
        grpc.insecure_channel(services.router.address) as channel,
    ):
        stub = router_pb2_grpc.RouterServiceStub(channel)
        request = router_pb2.GenerateRequest(prompt="Return", sampling=GREEDY)
        request.stopping.max_tokens = 1900
        request.stopping.ignore_eos = True
        stream = stub.Generate(request, timeout=60)
        next(stream)
        victim = getattr(services, stopped)
        os.kill(victim.process.pid, signal.SIGSTOP)
        wait_for_state(stub, victim.address, types_pb2.WORKER_STATE_UNREACHABLE, within_s=2.5)
        if stopped == "decode":
            with pytest.raises(grpc.RpcError) as raised:
                list(stream)
            assert raised.value.code() is grpc.StatusCode.UNAVAILABLE
        else:
            assert list(stream)[-1].HasField("completion"), "decode goes on with what it has"
            reply = stub.Generate(router_pb2.GenerateRequest(prompt="Again", sampling=GREEDY), timeout=20)
            assert list(reply)[-1].completion.path.kv_path == types_pb2.KV_PATH_LOCAL
        os.kill(victim.process.pid, signal.SIGCONT)
        wait_for_state(stub, victim.address, types_pb2.WORKER_STATE_SERVING, within_s=10)
        reply = stub.Generate(router_pb2.GenerateRequest(prompt="And on", sampling=GREEDY), timeout=20)
        assert list(reply)[-1].completion.path.kv_path == types_pb2.KV_PATH_REMOTE


def wait_for_state(stub, address: str, state: int, *, within_s: float) -> None:
    deadline = time.monotonic() + within_s
    while True:
        workers = stub.ListWorkers(router_pb2.ListWorkersRequest(), timeout=5).workers
        if any(worker.address == address and worker.state == state for worker in workers):
            return
        assert time.monotonic() < deadline, f"{address} was not seen as {state} within {within_s} s"
        time.sleep(0.02)


def test_decode_notices_a_stopped_prefill_worker_in_the_middle_of_a_transfer(services):
    """By hand: a reservation whose prefill worker stops gets prefill_needed, and the pair is remade afterwards."""
    with grpc.insecure_channel(services.decode.address) as channel:
        loads = worker_pb2_grpc.WorkerServiceStub(channel).WatchLoad(worker_pb2.WatchLoadRequest(), timeout=40)
        # The pair is made, or made again, by a request.
        buf_curl(services.router.address, "pdserve.v1.RouterService/Generate", {"prompt": "Return"})
        assert any(load.num_pairs == 1 for load in loads)
        os.kill(services.prefill.process.pid, signal.SIGSTOP)
        deadline = time.monotonic() + 2.5
        try:
            assert any(load.num_pairs == 0 for load in loads if time.monotonic() < deadline)
        finally:
            os.kill(services.prefill.process.pid, signal.SIGCONT)


def test_the_pipeline_tells_its_state(services):
    with grpc.insecure_channel(services.decode.address) as channel:
        stub = decode_pb2_grpc.DecodeServiceStub(channel)
        stub.SetPipeline(decode_pb2.SetPipelineRequest(decode_pipeline_profiling=True), timeout=5)
        data = {"prompt": "Return", "stopping": {"maxTokens": 20, "ignoreEos": True}}
        buf_curl(services.router.address, "pdserve.v1.RouterService/Generate", data)
        stats = stub.GetPipelineStats(decode_pb2.GetPipelineStatsRequest(), timeout=5)
    assert (stats.active, stats.fallback_reason) == (False, "NO_GPU")
    assert stats.total_tokens > 0
    assert min(stats.attention_ms, stats.ffn_ms, stats.total_ms) > 0


def run_service(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=60)


def test_a_port_in_use_is_one_clear_line(services):
    done = run_service("router", "--listen", services.router.address, "--metrics-listen", "")
    assert done.returncode == 2
    assert f"cannot listen on {services.router.address}: Address already in use" in done.stderr


def test_an_unknown_model_folder_is_one_clear_line():
    done = run_service("decode_service", "--model", "/no/such/model", "--metrics-listen", "")
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith("decode: ")
    assert "/no/such/model" in done.stderr


def test_an_unknown_key_names_the_nearest_valid_one(tmp_path):
    (tmp_path / "router.toml").write_text("max_queue_request = 5\n")
    done = run_service("router", "--config", str(tmp_path / "router.toml"))
    assert done.returncode == 2
    assert "did you mean 'max_queue_requests'?" in done.stderr


def test_sigterm_ends_a_service_in_order():
    with running_services() as running:
        running.decode.process.terminate()
        assert running.decode.process.wait(10) == 0
        running.prefill.process.terminate()
        assert running.prefill.process.wait(10) == 0
        running.router.process.terminate()
        assert running.router.process.wait(10) == 0
