"""Eight concurrent greedy requests through all three services, beside Transformers' `generate` on one padded batch."""

from __future__ import annotations

import asyncio
import statistics
import time

from benchmarks.prompts import prompts
from benchmarks.report import Report
from common import rpc
from common.config import TINY_MODEL
from pdserve.v1 import router_pb2, router_pb2_grpc, types_pb2
from tests.support.processes import running_services

BATCH = 8
NUM_TOKENS = 256
REPEATS = 5


async def services_rate(address: str) -> float:
    """Tokens per second of one round."""
    channel = rpc.connect(address)
    stub = router_pb2_grpc.RouterServiceStub(channel)

    async def complete(prompt: str) -> int:
        request = router_pb2.GenerateRequest(prompt=prompt, sampling=types_pb2.SamplingParams(temperature=0))
        request.stopping.max_tokens = NUM_TOKENS
        request.stopping.ignore_eos = True
        last = None
        async for response in stub.Generate(request, timeout=120):
            last = response
        assert last is not None
        return last.completion.usage.completion_tokens

    await complete("warm up")
    started = time.monotonic()
    counts = await asyncio.gather(*(complete(prompt) for prompt in prompts(BATCH)))
    elapsed = time.monotonic() - started
    await channel.close()
    assert counts == [NUM_TOKENS] * BATCH
    return sum(counts) / elapsed


def transformers_rate() -> list[float]:
    """Tokens per second of each round, fp32, all cores, the bundled model."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(TINY_MODEL, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(TINY_MODEL, dtype=torch.float32)
    batch = tokenizer(prompts(BATCH), padding=True, return_tensors="pt")
    options = {"do_sample": False, "min_new_tokens": NUM_TOKENS, "max_new_tokens": NUM_TOKENS}
    rates = []
    with torch.inference_mode():
        model.generate(**batch, do_sample=False, max_new_tokens=8)
        for _ in range(REPEATS):
            started = time.monotonic()
            model.generate(**batch, **options)
            rates.append(BATCH * NUM_TOKENS / (time.monotonic() - started))
    return rates


def run() -> None:
    report = Report("versus-transformers", "Eight concurrent greedy requests, bundled model, against Transformers")
    baseline = statistics.median(transformers_rate())
    with running_services(prefill_args=["--num-threads", "1"], decode_args=["--num-threads", "1"]) as services:
        rates = [asyncio.run(services_rate(services.router.address)) for _ in range(REPEATS)]
    ours = statistics.median(rates)
    report.add(what="Transformers generate, one padded batch of 8", tokens_per_s=baseline, ratio=1.0)
    report.add(what="router, prefill and decode, 8 streams", tokens_per_s=ours, ratio=ours / baseline, target=">= 1")
    report.notes = [f"Medians of {REPEATS} rounds; prompts of about 70 tokens, {NUM_TOKENS} tokens out, float32."]
    report.save()


if __name__ == "__main__":
    run()
