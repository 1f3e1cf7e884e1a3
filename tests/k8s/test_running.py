"""The rendered manifests, run as processes: each container's command, environment, mounts, user and probes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from pdserve.v1 import router_pb2, router_pb2_grpc, types_pb2, worker_pb2, worker_pb2_grpc
from tests.support import network
from tests.support.certificates import Authority
from tests.support.kubelet import Pod
from tests.support.kubernetes import Kubernetes
from tests.support.manifests import ROOT, UPDATE_ORDER, Manifests, render
from tests.support.streams import Stream

ONE_OF_EACH = {"router": 1, "prefill": 1, "decode": 1}
NEW_MODEL = tuple((role, 0, flag) for role in ("prefill", "decode") for flag in ("--load-format=dummy", "--seed=7"))


def health_of(pod: Pod, port: int, service: str) -> int | None:
    """None when the service is not known there."""
    with grpc.insecure_channel(f"{pod.ip}:{port}") as channel:
        try:
            request = health_pb2.HealthCheckRequest(service=service)
            return health_pb2_grpc.HealthStub(channel).Check(request, timeout=10).status
        except grpc.RpcError as error:
            if error.code() is not grpc.StatusCode.NOT_FOUND:
                raise
            return None


def test_the_cpu_overlay_serves_a_prompt_through_its_service(cluster, router):
    cluster.apply(render("overlays/cpu"), replicas=ONE_OF_EACH)
    stream = Stream(router(), max_tokens=8).read()
    assert len(stream.token_ids) == 8
    assert (stream.path.prefill_worker, stream.path.decode_worker) == ("prefill-0", "decode-0")
    assert stream.path.kv_path == types_pb2.KV_PATH_REMOTE
    for pod in cluster.all_pods:
        [container] = pod.containers
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            asked = container.spec[probe]["grpc"]
            assert health_of(pod, asked["port"], asked.get("service", "")) == health_pb2.HealthCheckResponse.SERVING
        assert health_of(pod, container.ports["health"], "livenes") is None
        with urllib.request.urlopen(f"http://{pod.ip}:{container.ports['metrics']}/metrics", timeout=10) as page:
            assert b"pdserve_" in page.read()
    # Workers first: a router that is told to end is waited for by preStop.
    assert [cluster.pods[role][0].delete() for role in ("prefill", "decode")] == [[0], [0]]
    assert [pod.failures for pod in cluster.all_pods] == [[], [], []]


@pytest.mark.slow
@pytest.mark.timeout(420)
def test_an_update_to_another_model_in_the_documented_order_loses_no_request_and_mixes_no_tokens(cluster, router):
    """Plain gRPC clients that keep their connection and try nothing twice."""
    old, new = render("overlays/cpu"), render("overlays/cpu", more_arguments=NEW_MODEL)
    cluster.apply(old)
    address = cluster.address("router")
    tokens_of_old = tuple(Stream(router(), max_tokens=40).read().token_ids)
    is_over, failures, replies = threading.Event(), [], [[] for _ in range(4)]

    def client(number: int) -> None:
        with grpc.insecure_channel(address) as channel:
            stub = router_pb2_grpc.RouterServiceStub(channel)
            # With breath between, so that the new processes start beside it.
            while not is_over.wait(0.1):
                try:
                    replies[number].append(one_reply(stub))
                except Exception as error:
                    failures.append(error)
                    return

    clients = [threading.Thread(target=client, args=(number,)) for number in range(len(replies))]
    for one in clients:
        one.start()
    for role in UPDATE_ORDER:
        cluster.update(new, role)
    tokens_of_new = one_reply_at(address)
    is_over.set()
    for one in clients:
        one.join(60)
    assert failures == []
    counts = [len(one) for one in replies]
    print(f"{sum(counts)} requests, of each client: {counts}")
    assert min(counts) > 10
    assert {tokens for one in replies for tokens in one} == {tokens_of_old, tokens_of_new}
    assert tokens_of_new != tokens_of_old
    # Every former process ended by itself within its grace period, and every probe passed.
    assert cluster.exit_codes == [0] * 6
    assert cluster.failures + [why for pod in cluster.all_pods for why in pod.failures] == []


def one_reply(stub: router_pb2_grpc.RouterServiceStub) -> tuple[int, ...]:
    request = router_pb2.GenerateRequest(prompt="Return a list of the names in the")
    request.sampling.temperature = 0
    request.stopping.max_tokens = 40
    request.stopping.ignore_eos = True
    responses = list(stub.Generate(request, timeout=60))
    assert responses[-1].HasField("completion")
    return tuple(token for response in responses for token in response.chunk.token_ids)


def one_reply_at(address: str) -> tuple[int, ...]:
    with grpc.insecure_channel(address) as channel:
        return one_reply(router_pb2_grpc.RouterServiceStub(channel))


@pytest.mark.slow
def test_two_containers_of_one_pod_serve_a_prompt_from_the_models_volume(containers):
    """The overlay for one GPU, computing on CPUs."""
    on_cpu = tuple(("pair", index, "--device=cpu") for index in (0, 1))
    with Kubernetes(claims={"model": ROOT / "models" / "tiny"}) as cluster:
        cluster.apply(render("overlays/one-gpu", more_arguments=on_cpu), replicas={"router": 1})
        stream = Stream(SimpleNamespace(address=cluster.address("router")), max_tokens=8).read()
        assert (stream.path.prefill_worker, stream.path.decode_worker) == ("prefill-pair-0", "decode-pair-0")
        assert stream.path.kv_path == types_pb2.KV_PATH_REMOTE
        assert cluster.pods["pair"][0].delete() == [0, 0]


@pytest.mark.slow
def test_with_mtls_users_are_served_probes_pass_and_nobody_gets_in_without_a_certificate(containers, tmp_path):
    manifests = render("overlays/cpu", "mtls")
    secrets, authority = issued(manifests, tmp_path)
    with Kubernetes(secrets=secrets) as cluster:
        cluster.apply(manifests, replicas=ONE_OF_EACH)
        # As by the name of its Service.
        named = [("grpc.ssl_target_name_override", "router.pdserve.svc")]
        believing = grpc.ssl_channel_credentials(authority.ca.read_bytes())
        with grpc.secure_channel(cluster.address("router"), believing, options=named) as channel:
            assert len(one_reply(router_pb2_grpc.RouterServiceStub(channel))) == 40
        # Neither in plaintext nor without showing anything.
        with grpc.insecure_channel(cluster.address("router")) as channel, pytest.raises(grpc.RpcError):
            one_reply(router_pb2_grpc.RouterServiceStub(channel))
        decode = cluster.pods["decode"][0]
        named = [("grpc.ssl_target_name_override", "workers.pdserve")]
        request = worker_pb2.WatchLoadRequest()
        with (
            grpc.secure_channel(f"{decode.ip}:50053", believing, options=named) as channel,
            pytest.raises(grpc.RpcError),
        ):
            next(worker_pb2_grpc.WorkerServiceStub(channel).WatchLoad(request, timeout=10))
        operator = secrets["operator-tls"]
        key, certificate = (operator / "tls.key").read_bytes(), (operator / "tls.crt").read_bytes()
        showing = grpc.ssl_channel_credentials(authority.ca.read_bytes(), key, certificate)
        with grpc.secure_channel(f"{decode.ip}:50053", showing, options=named) as channel:
            load = next(worker_pb2_grpc.WorkerServiceStub(channel).WatchLoad(request, timeout=10))
        assert load.identity.instance_id == "decode-0"
        assert [pod.failures for pod in cluster.all_pods] == [[], [], []]


def issued(manifests: Manifests, folder: Path) -> tuple[dict[str, Path], Authority]:
    """What cert-manager writes into Secrets for the Certificates, and who signed it."""
    authority, secrets = Authority(folder / "authority"), {}
    for certificate in (one["spec"] for one in manifests.of_kind("Certificate")):
        if certificate.get("isCA"):
            continue
        names = ",".join(f"DNS:{name}" for name in certificate["dnsNames"])
        files = authority.issue(certificate["commonName"], hosts=names)
        secret = secrets[certificate["secretName"]] = folder / certificate["secretName"]
        secret.mkdir()
        for name, setting in (("tls.crt", "tls_certificate"), ("tls.key", "tls_key"), ("ca.crt", "tls_ca")):
            shutil.copy(files[setting], secret / name)
    return secrets, authority


@pytest.mark.slow
def test_under_the_network_policies_kv_travels_on_the_ports_that_they_name_and_nobody_else_gets_there(containers):
    if why := network.obstacle() or ("" if shutil.which("iptables") else "there is no iptables"):
        pytest.skip(why)
    done = subprocess.run(
        [sys.executable, "-m", "tests.k8s.walled"], cwd=ROOT, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    print(seen)
    assert (seen["kv_path"], seen["kv_transport"]) == ("KV_PATH_REMOTE", "gloo")
    chosen = seen["chosen_ports"]["prefill"] + seen["chosen_ports"]["decode"]
    assert len(chosen) >= 2
    assert all(40000 <= port <= 40999 for port in chosen)
    assert seen["stranger_reaches"] == {"router": True, "prefill": False, "decode": False}
    assert not any(seen["stranger_reaches_kv"] + seen["router_reaches_kv"])
