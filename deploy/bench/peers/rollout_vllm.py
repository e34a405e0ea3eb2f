"""Rollout with vLLM's LLM class: `{"batch", "new_tokens", "seed"}`, groups of 8 samples a prompt."""

from __future__ import annotations

import argparse
import os
import time

from serve import Message, cpus, read_json, serve

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", required=True)
parser.add_argument("--work", required=True, help="the token ids that bench_work made")
parser.add_argument("--dtype", choices=["bf16", "f32"], required=True)
parser.add_argument("--threads", type=int, required=True)
parser.add_argument("--group", type=int, default=8)
parser.add_argument("--window", type=int, default=1024)


def main() -> None:
    """Guarded: vLLM starts its engine as a child that imports this file again."""
    options = parser.parse_args()
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", cpus(options.threads))
    import torch
    import vllm

    dtype = {"bf16": "bfloat16", "f32": "float32"}[options.dtype]
    llm = vllm.LLM(model=options.model, dtype=dtype, max_model_len=options.window, max_num_seqs=64,
                   enable_prefix_caching=True, seed=0)
    prompts: list[list[int]] = read_json(options.work)["prompts"]

    def rollout(request: Message) -> Message:
        group = min(options.group, request["batch"])
        batch = [{"prompt_token_ids": ids} for ids in prompts[: request["batch"] // group]]
        # No text: no side makes any while the clock runs.
        sampling = vllm.SamplingParams(n=group, temperature=1.0, top_p=1.0, top_k=-1, seed=None, ignore_eos=True,
                                       max_tokens=request["new_tokens"], detokenize=False)
        llm.reset_prefix_cache()
        started = time.perf_counter()
        outputs = llm.generate(batch, sampling, use_tqdm=False)
        seconds = time.perf_counter() - started
        sampled = sum(len(one.token_ids) for output in outputs for one in output.outputs)
        return {"seconds": seconds, "new_tokens": sampled,
                "versions": {"vllm": vllm.__version__, "torch": torch.__version__}}

    serve(rollout)


if __name__ == "__main__":
    main()
