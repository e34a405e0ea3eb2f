"""The other side: the same figures from `transformers`, in the plainest way there is.

Rows go through the model one at a time and whole, without padding or cache, except in `gradients` (a padded batch, as
a trainer makes it) and in `greedy` (its own `generate`).
"""

from __future__ import annotations

from pathlib import Path
from types import MethodType
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

DTYPES = {"f64": torch.float64, "f32": torch.float32, "bf16": torch.bfloat16}


def norm_as_it_is(self: Any, x: torch.Tensor) -> torch.Tensor:
    """RMSNorm in the model's own numbers: theirs rounds to float32 within."""
    return self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon))


def load(folder: Path, dtype: str) -> PreTrainedModel:
    """Their model; in f64 with RMSNorm in f64, too. Rotary angles are float32 by the model's definition."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[dtype]).eval()
    if dtype == "f64":
        norms = [module for module in model.modules() if type(module).__name__.endswith("RMSNorm")]
        if not norms:
            raise ValueError(f"{type(model).__name__} has no RMSNorm that float64 could be computed with")
        for module in norms:
            module.forward = MethodType(norm_as_it_is, module)
    # With a padding id the embedding gives that id's row no gradient, though the id may occur in a text (where a model
    # is padded with its end-of-turn token it always does). Rows here have no padding: this is the loss's gradient.
    model.get_input_embeddings().padding_idx = None
    return model


@torch.no_grad()
def logits(model: PreTrainedModel, row: list[int]) -> torch.Tensor:
    """What follows each token, `[T, vocabulary]` float32, or float64 of such a model."""
    return wide(model(input_ids=torch.tensor([row])).logits[0])


def wide(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


@torch.no_grad()
def scores(model: PreTrainedModel, rows: list[list[int]]) -> dict[str, torch.Tensor]:
    """Log-probs of the rows' tokens and entropies of what they are drawn from, each row without its first."""
    log_probs, entropies = [], []
    for row in rows:
        if len(row) < 2:
            continue
        log_softmax = logits(model, row)[:-1].log_softmax(-1)
        log_probs.append(log_softmax.gather(1, torch.tensor(row[1:])[:, None])[:, 0])
        entropies.append(-(log_softmax.exp() * log_softmax).sum(-1))
    return {"log_probs": torch.cat(log_probs), "entropies": torch.cat(entropies)}


def gradients(
    model: PreTrainedModel, rows: list[dict[str, Any]], temperature: float, entropy_coeff: float
) -> dict[str, torch.Tensor]:
    """Gradient of GRPO's loss where the old policy is the current one, averaged over the tokens with loss:
    -(advantage × log-prob) - entropy_coeff × entropy, of softmax(logits / temperature)."""
    longest = max(len(row["ids"]) for row in rows)

    def padded(key: str, fill: Any) -> torch.Tensor:
        return torch.tensor([row[key] + [fill] * (longest - len(row[key])) for row in rows])

    ids, mask, advantages = padded("ids", 0), padded("loss_mask", False), padded("advantages", 0.0)
    attended = torch.tensor([[1] * len(row["ids"]) + [0] * (longest - len(row["ids"])) for row in rows])
    model.zero_grad(set_to_none=True)
    # In float64 a row at a time: the logits of all take 20 GB of a vocabulary of 49152. Their sums hardly round there.
    at_once = 1 if model.dtype == torch.float64 else len(rows)
    for first in range(0, len(rows), at_once):
        part = slice(first, first + at_once)
        raw = wide(model(input_ids=ids[part], attention_mask=attended[part]).logits)[:, :-1] / temperature
        log_softmax = raw.log_softmax(-1)
        log_probs = log_softmax.gather(2, ids[part, 1:, None])[..., 0]
        entropies = -(log_softmax.exp() * log_softmax).sum(-1)
        terms = -advantages[part, 1:] * log_probs - entropy_coeff * entropies
        (terms * mask[part, 1:]).sum().div(mask.sum()).backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return {name: wide(gradient) for name, gradient in found.items() if gradient is not None}


@torch.no_grad()
def greedy(model: PreTrainedModel, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
    """What `generate` continues each prompt with; prompts of equal length go together."""
    # No stop token: every continuation is as long as asked for.
    config = GenerationConfig(do_sample=False, max_new_tokens=new_tokens, pad_token_id=0)
    model.generation_config = config
    continuations: list[list[int]] = [[] for _ in prompts]
    by_length: dict[int, list[int]] = {}
    for index, prompt in enumerate(prompts):
        by_length.setdefault(len(prompt), []).append(index)
    for length, indices in by_length.items():
        ids = torch.tensor([prompts[index] for index in indices])
        found = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config)
        for index, row in zip(indices, found.tolist(), strict=True):
            continuations[index] = row[length:]
    return continuations
