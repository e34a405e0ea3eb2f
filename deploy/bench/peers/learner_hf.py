"""Training with transformers: `{"rows", "tokens", "seed"}` → reference log-probs, forward and backward, AdamW.

The loss is PPO's, as ours; rows go through in micro-batches, gradients accumulate. The reference is a copy of its own;
moments have the model's dtype.
"""

from __future__ import annotations

import argparse
import copy
import time
from itertools import pairwise

import torch
import transformers
from serve import Message, serve
from torch.nn.functional import cross_entropy

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", required=True)
parser.add_argument("--dtype", choices=["bf16", "f32"], required=True)
parser.add_argument("--threads", type=int, required=True)
parser.add_argument("--micro-rows", type=int, default=4)
options = parser.parse_args()

torch.set_num_threads(options.threads)
dtype = {"bf16": torch.bfloat16, "f32": torch.float32}[options.dtype]
model = transformers.AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype, attn_implementation="sdpa")
reference = copy.deepcopy(model).eval().requires_grad_(False)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, weight_decay=0.01, fused=True)
model.train()
parameters = sum(p.numel() for p in model.parameters())


def token_log_probs(policy: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Log-prob of each id `[rows, tokens]` given those before it: `[rows, tokens - 1]`, f32."""
    logits = policy(input_ids=ids, use_cache=False).logits[:, :-1]
    target = ids[:, 1:]
    return -cross_entropy(logits.flatten(0, 1).float(), target.flatten(), reduction="none").view(target.shape)


def forward_backward(ids: torch.Tensor, advantages: torch.Tensor) -> None:
    """Accumulates the gradient of the clipped loss."""
    for start in range(0, len(ids), options.micro_rows):
        rows = slice(start, start + options.micro_rows)
        log_probs = token_log_probs(model, ids[rows])
        ratio = torch.exp(log_probs - log_probs.detach())
        gain = torch.min(ratio * advantages[rows], ratio.clamp(0.8, 1.2) * advantages[rows])
        (-gain.sum() / (ids.numel() - len(ids))).backward()


def step(request: Message) -> Message:
    """One optimizer step, phase by phase."""
    generator = torch.Generator().manual_seed(request["seed"])
    ids = torch.randint(model.config.vocab_size, (request["rows"], request["tokens"]), generator=generator)
    advantages = torch.tensor([1.0, -1.0]).repeat(request["rows"])[: request["rows"], None]
    times = [time.perf_counter()]
    with torch.no_grad():
        for start in range(0, len(ids), options.micro_rows):
            token_log_probs(reference, ids[start : start + options.micro_rows])
    times.append(time.perf_counter())
    forward_backward(ids, advantages)
    times.append(time.perf_counter())
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    times.append(time.perf_counter())
    reference_seconds, forward_and_backward, update = (after - before for before, after in pairwise(times))
    return {"seconds": times[-1] - times[0], "tokens": ids.numel(), "parameters": parameters,
            "phases": {"reference": reference_seconds, "forward_backward": forward_and_backward, "optimizer": update},
            "versions": {"transformers": transformers.__version__, "torch": torch.__version__}}


serve(step)
