"""Writes small random models and the log-probs `transformers` gives a text: the goldens of model_golden.rs.

Run with torch 2.11.0 and transformers 5.23.0: python make_goldens.py DIR (this directory). Weights are bf16 to
keep the files small; log-probs are computed from them in f32.
"""

import json
import sys
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

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
}


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
            log_probs = model(input_ids=ids).logits.log_softmax(-1)
        chosen = log_probs[0, :-1].gather(1, ids[0, 1:, None])[:, 0]
        golden = dict(ids=ids[0].tolist(), log_probs=[round(x, 6) for x in chosen.tolist()])
        (out / name / "golden.json").write_text(json.dumps(golden) + "\n")
        (out / name / "generation_config.json").unlink(missing_ok=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
