"""Rollout with transformers' generate: `{"batch", "new_tokens", "seed"}`, groups of 8 samples a prompt."""

from __future__ import annotations

import argparse
import time

import torch
import transformers
from serve import Message, read_json, serve

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", required=True)
parser.add_argument("--work", required=True, help="the token ids that bench_work made")
parser.add_argument("--dtype", choices=["bf16", "f32"], required=True)
parser.add_argument("--threads", type=int, required=True)
parser.add_argument("--group", type=int, default=8)
options = parser.parse_args()

torch.set_num_threads(options.threads)
dtype = {"bf16": torch.bfloat16, "f32": torch.float32}[options.dtype]
model = transformers.AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype).eval()
model.generation_config.eos_token_id = None
model.generation_config.pad_token_id = 0
prompts: list[list[int]] = read_json(options.work)["prompts"]


def left_padded(rows: list[list[int]]) -> dict[str, torch.Tensor]:
    """Ids and mask `[rows, longest]`."""
    longest = max(map(len, rows))
    ids = [[0] * (longest - len(row)) + row for row in rows]
    mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


def rollout(request: Message) -> Message:
    """One batch, timed."""
    group = min(options.group, request["batch"])
    inputs = left_padded(prompts[: request["batch"] // group])
    new = request["new_tokens"]
    torch.manual_seed(request["seed"])
    started = time.perf_counter()
    with torch.inference_mode():
        output = model.generate(**inputs, do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
                                num_return_sequences=group, max_new_tokens=new, min_new_tokens=new)
    seconds = time.perf_counter() - started
    sampled = output.shape[0] * (output.shape[1] - inputs["input_ids"].shape[1])
    return {"seconds": seconds, "new_tokens": sampled,
            "versions": {"transformers": transformers.__version__, "torch": torch.__version__}}


serve(rollout)
