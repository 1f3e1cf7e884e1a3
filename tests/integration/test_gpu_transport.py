"""Prompts through workers that are processes of their own on GPUs, by every way that KV can take between them."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest

from pdserve.v1 import router_pb2, router_pb2_grpc, types_pb2
from tests.support.cluster import RealCluster
from tests.support.device import needs_gpus
from tests.support.processes import running_services

# Two or three processes that each load a model, compile and capture.
pytestmark = [*needs_gpus(), pytest.mark.timeout(400)]
two_gpus = needs_gpus(2)[-1]

# Batch-invariant and in float32, so that tokens can be compared.
SETTINGS = {"dtype": "float32", "deterministic": True, "gpu_memory_fraction": 0.2, "max_num_seqs": 16}
ARGUMENTS = ["--dtype", "float32", "--deterministic", "--gpu-memory-fraction", "0.2", "--max-num-seqs", "16"]
# Of several blocks, alike at the beginning and of different lengths.
PROMPTS = ["Return a list of the names that are used in the module, and " + "sort it by key " * n for n in range(24)]
MAX_TOKENS = 48
# NCCL takes two workers on one GPU for two machines.
ONE_MACHINE, ANOTHER = {"NCCL_HOSTID": "prefill"}, {"NCCL_HOSTID": "decode"}
SOCKETS = {"NCCL_SOCKET_IFNAME": "lo", "NCCL_IB_DISABLE": "1"}


def generate(address: str, prompts: list[str]) -> list[tuple[list[int], types_pb2.ServingPath]]:
    """All at once: tokens and path of each."""
    with grpc.insecure_channel(address) as channel:
        stub = router_pb2_grpc.RouterServiceStub(channel)

        def one(prompt: str) -> tuple[list[int], types_pb2.ServingPath]:
            request = router_pb2.GenerateRequest(prompt=prompt, sampling=types_pb2.SamplingParams(temperature=0))
            request.stopping.max_tokens = MAX_TOKENS
            request.stopping.ignore_eos = True
            token_ids: list[int] = []
            for response in stub.Generate(request, timeout=120):
                token_ids += response.chunk.token_ids
                if response.HasField("completion"):
                    return token_ids, response.completion.path
            raise AssertionError("a stream without a completion")

        with ThreadPoolExecutor(len(prompts)) as threads:
            return list(threads.map(one, prompts))


async def local_tokens() -> list[list[int]]:
    """What one decode worker answers without any transport."""
    async with RealCluster(num_prefill=0, device="cuda:0", **SETTINGS).running() as cluster:
        options = {"max_tokens": MAX_TOKENS, "ignore_eos": True, "sampling": {"temperature": 0}, "timeout": 120.0}
        replies = [await cluster.generate(prompt, **options) for prompt in PROMPTS]
    assert all(reply.completion.path.kv_path == types_pb2.KV_PATH_LOCAL for reply in replies)
    return [list(reply.token_ids) for reply in replies]


def check(replies, expected, transport: str) -> None:
    assert [tokens for tokens, _ in replies] == expected
    paths = [path for _, path in replies]
    assert {path.kv_transport for path in paths if path.kv_bytes} == {transport}
    assert types_pb2.KV_PATH_REMOTE in {path.kv_path for path in paths}
    assert types_pb2.KV_PATH_LOCAL not in {path.kv_path for path in paths}


@pytest.mark.parametrize(
    ("transport", "arguments", "environments"),
    [
        ("cuda-ipc", [], ({}, {})),
        ("nccl:net", ["--kv-transports", "nccl"], (ONE_MACHINE | SOCKETS, ANOTHER | SOCKETS)),
        ("gloo", ["--kv-transports", "gloo"], ({}, {})),
    ],
)
# With few blocks, freed ones find new owners while steps and writes are in flight.
@pytest.mark.parametrize("num_blocks", ["512", "96"])
async def test_workers_on_one_gpu_answer_as_one_worker_does(transport, arguments, environments, num_blocks) -> None:
    arguments = ["--device", "cuda:0", *ARGUMENTS, *arguments]
    with running_services(
        prefill_args=arguments,
        decode_args=[*arguments, "--num-blocks", num_blocks],
        prefill_environment=environments[0],
        decode_environment=environments[1],
    ) as services:
        replies = [generate(services.router.address, PROMPTS) for _ in range(2)]
    expected = await local_tokens()
    check(replies[0], expected, transport)
    assert [tokens for tokens, _ in replies[1]] == expected


@two_gpus
async def test_workers_on_two_gpus_answer_as_one_worker_does() -> None:
    with running_services(
        prefill_args=["--device", "cuda:0", *ARGUMENTS], decode_args=["--device", "cuda:1", *ARGUMENTS]
    ) as services:
        replies = generate(services.router.address, PROMPTS)
    (transport,) = {path.kv_transport for _, path in replies if path.kv_bytes}
    assert transport in ("nccl:p2p", "nccl:host")
    check(replies, await local_tokens(), transport)


async def test_workers_of_one_process_use_gloo_through_pinned_memory() -> None:
    async with RealCluster(device="cuda:0", **SETTINGS).running() as cluster:
        options = {"max_tokens": MAX_TOKENS, "ignore_eos": True, "sampling": {"temperature": 0}, "timeout": 60.0}
        reply = await cluster.generate(PROMPTS[-1], **options)
    assert (reply.completion.path.kv_path, reply.completion.path.kv_transport) == (types_pb2.KV_PATH_REMOTE, "gloo")
    assert list(reply.token_ids) == (await local_tokens())[-1]
