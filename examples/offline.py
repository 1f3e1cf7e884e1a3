"""Prompts in, completions out: services of its own, on this machine, for as long as the program runs.

    $ .venv/bin/python examples/offline.py                             # the bundled model
    $ .venv/bin/python examples/offline.py ~/models/Qwen3-0.6B         # a Hugging Face folder

With two GPUs one computes prompts, the other decodes, and the attention/FFN pipeline runs there; without a GPU both
services run on the CPU, and the statistics say why the pipeline does not.
"""

from __future__ import annotations

import sys

from pdserve import LLM, SamplingParams

PROMPTS = ["Hello!", "What is AI?", "Return a list of"]


def main(model: list[str]) -> None:
    with LLM(
        *model,
        enable_two_gpu_pd=True,
        prefill_device_id=0,
        decode_device_id=1,
        enable_decode_pipeline=True,
        decode_attention_sm=16,
        decode_ffn_sm=16,
        decode_pipeline_profiling=True,
        enforce_eager=True,
    ) as llm:
        outputs = llm.generate(PROMPTS, SamplingParams(temperature=0.7, max_tokens=64))
        for prompt, output in zip(PROMPTS, outputs, strict=True):
            print(f"{prompt!r} → {output['text']!r}")
            path = output.path
            print(f"  {path.prefill_worker} → {path.decode_worker}: {path.kv_bytes:,} bytes over {path.kv_transport}")
        llm.decode_runner.print_pipeline_statistics()


if __name__ == "__main__":
    main(sys.argv[1:2])
