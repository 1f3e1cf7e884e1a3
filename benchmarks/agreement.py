"""Greedy tokens of the bundled model on a GPU, beside Transformers' and beside themselves in another batch.

In bfloat16 two ways of computing part where the best two logits are nearly alike, and never meet again. How soon, is
compared with how soon Transformers' own bfloat16 parts from its float32; how near the two logits were in float32 tells
rounding from a mistake. With `deterministic` a sequence alone and in a batch of all must be alike to the last token.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import torch

from benchmarks.offline import OfflineEngine
from benchmarks.prompts import prompts
from benchmarks.report import Report
from benchmarks.shapes import TINY
from common.config import TINY_MODEL
from common.tokenization import Tokenizer

NUM_PROMPTS, PROMPT_TOKENS, OUTPUT = 64, 48, 64

Outputs = list[list[int]]


def token_prompts(count: int, length: int) -> list[list[int]]:
    """All of one length, so that Transformers needs no padding."""
    tokenizer = Tokenizer.load(TINY_MODEL)
    assert tokenizer is not None, "the bundled model has one"
    encoded = [tokenizer.encode(text)[:length] for text in prompts(count, num_characters=8 * length)]
    assert {len(one) for one in encoded} == {length}
    return encoded


def ours(token_ids: Sequence[list[int]], device: str, *, deterministic: bool) -> tuple[Outputs, Outputs]:
    """All in one batch, and each alone."""
    engine = OfflineEngine(
        TINY,
        model=TINY_MODEL,
        load_format="auto",
        dtype="bfloat16",
        device=device,
        deterministic=deterministic,
        max_num_seqs=len(token_ids),
        max_batch_tokens=4096,
        num_blocks=1024,
        gpu_memory_fraction=0.4,
    )
    print(f"  deterministic={deterministic}: ready after {engine.ready_s:.1f} s", flush=True)
    engine.run([(prompt, OUTPUT) for prompt in token_ids])
    together = engine.outputs
    alone = []
    for prompt in token_ids:
        engine.run([(prompt, OUTPUT)])
        alone += engine.outputs
    return together, alone


def transformers_outputs(
    token_ids: Sequence[list[int]], dtype: torch.dtype, device: str
) -> tuple[Outputs, list[list[float]]]:
    """Tokens, and how far the best logit was above the second; without a KV cache, which is no matter for so few."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(TINY_MODEL, dtype=dtype).to(device).eval()
    tokens, margins = [], []
    ids = torch.tensor(token_ids, device=device)
    with torch.inference_mode():
        for _ in range(OUTPUT):
            best = model(input_ids=ids, use_cache=False).logits[:, -1].float().topk(2)
            tokens.append(best.indices[:, 0])
            margins.append(best.values[:, 0] - best.values[:, 1])
            ids = torch.cat([ids, tokens[-1][:, None]], dim=1)
    return torch.stack(tokens, dim=1).tolist(), torch.stack(margins, dim=1).tolist()


def divergences(some: Outputs, others: Outputs) -> list[int | None]:
    """Of each pair of outputs the place of the first token that differs."""
    return [
        next((place for place, (a, b) in enumerate(zip(one, other, strict=True)) if a != b), None)
        for one, other in zip(some, others, strict=True)
    ]


def add(
    report: Report,
    what: str,
    some: Outputs,
    others: Outputs,
    *,
    margins: Sequence[Sequence[float]] | None = None,
    must_be_identical: bool = False,
) -> bool:
    """Whether they are as alike as they must be. `margins` are those of `others`, in float32."""
    places = divergences(some, others)
    parted = [place for place in places if place is not None]
    at_parting = None
    if margins is not None:
        at_parting = [margin[place] for margin, place in zip(margins, places, strict=True) if place is not None]
    report.add(
        what=what,
        prompts=len(places),
        tokens=OUTPUT,
        identical=len(places) - len(parted),
        first_divergence_min=min(parted, default=None),
        first_divergence_median=statistics.median(parted) if parted else None,
        largest_float32_margin=max(at_parting) if at_parting else None,
        must_be_identical=must_be_identical,
    )
    return not (must_be_identical and parted)


def measure(report: Report, device: str, *, has_invariant: bool = True) -> bool:
    """Whether everything is as alike as it must be."""
    token_ids = token_prompts(NUM_PROMPTS, PROMPT_TOKENS)
    together, alone = ours(token_ids, device, deterministic=False)
    fixed = ours(token_ids, device, deterministic=True) if has_invariant else None
    rounded, _ = transformers_outputs(token_ids, torch.bfloat16, device)
    exact, margins = transformers_outputs(token_ids, torch.float32, device)
    add(report, "ours against Transformers, both bfloat16", together, rounded)
    add(report, "ours in bfloat16 against Transformers in float32", together, exact, margins=margins)
    add(report, "Transformers in bfloat16 against float32", rounded, exact, margins=margins)
    add(report, f"ours, alone against a batch of {NUM_PROMPTS}", alone, together)
    if fixed is None:
        return True
    what = f"ours with deterministic, alone against a batch of {NUM_PROMPTS}"
    return add(report, what, fixed[1], fixed[0], must_be_identical=True)


def run() -> None:
    report = Report("agreement", "Greedy tokens of the bundled model, against Transformers and across batches")
    is_alike = measure(report, "cuda")
    report.notes = [
        f"{NUM_PROMPTS} prompts of {PROMPT_TOKENS} tokens; places count from 0. `largest_float32_margin`: at the first "
        "token that differs, how far the best logit was above the second in float32, at most."
    ]
    report.save()
    if not is_alike:
        raise SystemExit("with deterministic, tokens depend on the batch")


if __name__ == "__main__":
    run()
