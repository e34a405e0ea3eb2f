"""Writes small random models and what `transformers` computes with them: the goldens of model_golden.rs.

Run with torch 2.11.0 and transformers 5.23.0: python make_goldens.py DIR (this directory). Weights are bf16 to
keep the files small; everything is computed from them in f32. `make parity` compares far more, with both programs
at hand; these hold every build to it.
"""

import json
import sys
from pathlib import Path

import torch
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

SIZES = dict(
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=64,
    vocab_size=96,
    max_position_embeddings=256,
    initializer_range=0.3,
    eos_token_id=1,
    bos_token_id=None,
    pad_token_id=0,
    attn_implementation="eager",
)
LLAMA3 = dict(
    rope_type="llama3",
    rope_theta=500000.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=64,
)
MODELS = {
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, dict(tie_word_embeddings=True)),
    "llama": (LlamaConfig, LlamaForCausalLM, dict(tie_word_embeddings=False, rope_parameters=LLAMA3)),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, dict(tie_word_embeddings=True, head_dim=16)),
    "qwen2_untied": (Qwen2Config, Qwen2ForCausalLM, dict(tie_word_embeddings=False)),
}
TEMPERATURE, ENTROPY_COEFF = 0.8, 0.05
PROMPTS = [1, 5, 20, 60]
NEW_TOKENS = 24


def rounded(values: torch.Tensor, digits: int = 6) -> list[float]:
    return [round(x, digits) for x in values.tolist()]


def loss_rows(ids: list[int]) -> list[dict]:
    """Rows of several lengths whose masks have gaps, as turns and observations leave them."""
    rows = []
    for start, length, advantage in [(0, 40, 1.25), (40, 17, -0.75), (57, 63, 0.5)]:
        mask = [j > 3 and j % 7 not in (0, 1) for j in range(length)]
        advantages = [advantage if has_loss else 0.0 for has_loss in mask]
        rows.append(dict(ids=ids[start : start + length], loss_mask=mask, advantages=advantages))
    return rows


def sketch(gradient: torch.Tensor) -> list[float]:
    """A gradient in four numbers: its norm, its sum, and its products with two waves."""
    flat = gradient.double().flatten()
    at = torch.arange(len(flat), dtype=torch.float64)
    return [x.item() for x in (flat.norm(), flat.sum(), (flat * at.cos()).sum(), (flat * (0.7 * at).sin()).sum())]


def gradients(model, rows: list[dict]) -> dict[str, list[float]]:
    """Of GRPO's loss where the old policy is the current one, averaged over the tokens with loss."""
    loss, tokens = torch.tensor(0.0), 0
    for row in rows:
        ids, mask = torch.tensor(row["ids"]), torch.tensor(row["loss_mask"])
        log_softmax = (model(input_ids=ids[None]).logits[0, :-1] / TEMPERATURE).log_softmax(-1)
        log_probs = log_softmax.gather(1, ids[1:, None])[:, 0]
        entropies = -(log_softmax.exp() * log_softmax).sum(-1)
        terms = -torch.tensor(row["advantages"])[1:] * log_probs - ENTROPY_COEFF * entropies
        loss = loss + (terms * mask[1:]).sum()
        tokens += int(mask.sum())
    (loss / tokens).backward()
    return {name: sketch(parameter.grad) for name, parameter in model.named_parameters()}


@torch.no_grad()
def continuation(model, prompt: list[int]) -> list[int]:
    config = GenerationConfig(do_sample=False, max_new_tokens=NEW_TOKENS, pad_token_id=0)
    model.generation_config = config
    ids = torch.tensor([prompt])
    return model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config)[
        0, len(prompt) :
    ].tolist()


def main(out: Path) -> None:
    for name, (config_class, model_class, more) in MODELS.items():
        torch.manual_seed(0)
        model = model_class(config_class(**SIZES, **more))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:  # biases and norms too, so that forgetting one shows
                    parameter.add_(torch.randn_like(parameter) * 0.2)
        model.to(torch.bfloat16).save_pretrained(out / name)
        # Read anew: the cast rounded the rotary frequencies too.
        model = model_class.from_pretrained(out / name, dtype=torch.float32, attn_implementation="eager").eval()
        ids = torch.randint(2, SIZES["vocab_size"], (1, 120))
        with torch.no_grad():
            log_softmax = model(input_ids=ids).logits.log_softmax(-1)[0, :-1]
        text = ids[0].tolist()
        golden = dict(
            ids=text,
            log_probs=rounded(log_softmax.gather(1, ids[0, 1:, None])[:, 0]),
            entropies=rounded(-(log_softmax.exp() * log_softmax).sum(-1)),
            temperature=TEMPERATURE,
            entropy_coeff=ENTROPY_COEFF,
            rows=loss_rows(text),
            gradients=gradients(model, loss_rows(text)),
            greedy=[dict(prompt=text[:length], ids=continuation(model, text[:length])) for length in PROMPTS],
        )
        (out / name / "golden.json").write_text(json.dumps(golden) + "\n")
        (out / name / "generation_config.json").unlink(missing_ok=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
