"""Random small models of every supported family, as `transformers` makes and saves them.

A variant is a kind of model (family, head tied or not, rotary scaling); from a seed it draws any number of models.
Edges are models chosen by hand: extreme shapes, and configurations written in every layout there is.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

FAMILIES = {
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "llama": (LlamaConfig, LlamaForCausalLM),
}
MOST_SPREAD = 1.6
"""Standard deviation of what a drawn matrix makes of a normed row."""
POSITIONS = 1024
"""max_position_embeddings of the drawn models."""
STORED = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}

Edit = Callable[[dict[str, Any]], None]
"""A change of config.json after the model was saved: another way to write the same model down."""


@dataclass
class Model:
    """One model to compare on: what it is made from, and then where it lies."""

    name: str
    family: str
    config: dict[str, Any]
    seed: int
    stored: str = "f32"
    shards: bool = False
    edit: Edit | None = None
    dir: Path = field(default_factory=Path)

    @property
    def vocabulary(self) -> int:
        return self.config["vocab_size"]

    def make(self, folder: Path) -> None:
        """Draws the weights and saves them under `folder`."""
        self.dir = folder / self.name.replace(" ", "_")
        config_class, model_class = FAMILIES[self.family]
        torch.manual_seed(self.seed)
        model: PreTrainedModel = model_class(config_class(**self.config))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:  # biases and norms too, so that forgetting one shows
                    parameter.add_(torch.randn_like(parameter) * 0.2)
        model.to(STORED[self.stored])
        size = sum(p.numel() * p.element_size() for p in model.parameters())
        model.save_pretrained(self.dir, max_shard_size=max(size // 3, 1) if self.shards else "5GB")
        if self.edit is not None:
            path = self.dir / "config.json"
            config = json.loads(path.read_text())
            self.edit(config)
            path.write_text(json.dumps(config, indent=1))


def llama3(random: Random) -> dict[str, Any]:
    low = random.choice([1.0, 2.0])
    return {
        "rope_type": "llama3",
        "rope_theta": random.choice([10_000.0, 500_000.0]),
        "factor": random.choice([4.0, 8.0, 32.0]),
        "low_freq_factor": low,
        "high_freq_factor": low * random.choice([2.0, 4.0]),
        "original_max_position_embeddings": random.choice([64, 128, 512]),
    }


def draw(random: Random, family: str, tied: bool, scaled: bool) -> dict[str, Any]:
    """A configuration of a few ten to some hundred thousand weights."""
    head_dim = random.choice([8, 16, 24, 32, 64])
    kv_heads = random.choice([1, 2, 3])
    heads = kv_heads * random.choice([1, 2, 3, 4])
    # Qwen3 has its head_dim for itself; in the others it follows from the width.
    hidden = random.randrange(20, 200) if family == "qwen3" else heads * head_dim
    config: dict[str, Any] = {
        "hidden_size": hidden,
        "num_hidden_layers": random.randint(1, 3),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": random.randrange(16, 300),
        "vocab_size": random.randrange(50, 1200),
        "max_position_embeddings": POSITIONS,
        # Up to where float32 can be held to the bound: with scores and logits that spread further, transformers' own
        # float32 is more than the bound from its float64.
        "initializer_range": min(random.choice([0.02, 0.1, 0.2]), MOST_SPREAD / math.sqrt(hidden)),
        "rms_norm_eps": random.choice([1e-5, 1e-6]),
        "tie_word_embeddings": tied,
        "eos_token_id": 1,
        "bos_token_id": None,
        "pad_token_id": 0,
    }
    if family == "qwen3":
        config["head_dim"] = head_dim
    theta = random.choice([1_000.0, 10_000.0, 500_000.0, 1_000_000.0])
    config["rope_parameters"] = llama3(random) if scaled else {"rope_type": "default", "rope_theta": theta}
    return config


VARIANTS = {
    "qwen2-tied": ("qwen2", True, False),
    "qwen2-untied": ("qwen2", False, False),
    "qwen3-tied": ("qwen3", True, False),
    "qwen3-untied": ("qwen3", False, False),
    "llama-tied": ("llama", True, False),
    "llama-untied": ("llama", False, False),
    "llama3-rope": ("llama", False, True),
}


def drawn(variant: str, seed: int, count: int) -> list[Model]:
    """`count` models of a variant; the same seed gives the same ones."""
    family, tied, scaled = VARIANTS[variant]
    models = []
    for index in range(count):
        random = Random(f"{variant} {seed} {index}")
        config = draw(random, family, tied, scaled)
        stored = random.choice(list(STORED))
        name = f"{variant} {index}"
        models.append(Model(name, family, config, random.randrange(2**31), stored, random.random() < 0.3))
    return models


def older_layout(config: dict[str, Any]) -> None:
    """`rope_theta` and `rope_scaling`, as before transformers 5."""
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    config["torch_dtype"] = config.pop("dtype")


def without(*keys: str) -> Edit:
    return lambda config: [config.pop(key, None) for key in keys] and None


def with_rope(**keys: Any) -> Edit:
    """Rotary keys as given, and none besides."""

    def edit(config: dict[str, Any]) -> None:
        config.pop("rope_parameters")
        config.update(keys)

    return edit


def null_head_dim(config: dict[str, Any]) -> None:
    config["head_dim"] = None


def edges(seed: int) -> list[Model]:
    """Models chosen by hand. The shapes are fixed; weights, and what is not said, come from the seed."""
    rope3 = {"type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    chosen: list[tuple[str, str, dict[str, Any], Edit | None]] = [
        ("one layer", "llama", {"num_hidden_layers": 1}, None),
        ("eight layers", "qwen2", {"num_hidden_layers": 8}, None),
        ("one head", "qwen2", {"num_attention_heads": 1, "num_key_value_heads": 1, "hidden_size": 34}, None),
        ("one key head", "llama", {"num_attention_heads": 8, "num_key_value_heads": 1, "hidden_size": 64}, None),
        ("all key heads", "qwen3", {"num_attention_heads": 5, "num_key_value_heads": 5, "head_dim": 8}, None),
        ("head dim 2", "qwen3", {"head_dim": 2}, None),
        ("head dim 128", "qwen3", {"head_dim": 128, "hidden_size": 72}, None),
        ("head dim 80", "llama", {"num_attention_heads": 2, "num_key_value_heads": 2, "hidden_size": 160}, None),
        (
            "explicit head dim",
            "qwen2",
            {"hidden_size": 60, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32},
            None,
        ),
        ("uneven width", "qwen2", {"hidden_size": 50, "num_attention_heads": 3, "num_key_value_heads": 1}, None),
        ("tiny vocabulary", "qwen3", {"vocab_size": 3}, None),
        ("odd vocabulary", "qwen2", {"vocab_size": 4099}, None),
        ("wide mlp", "llama", {"intermediate_size": 1021}, None),
        ("small base", "llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 10.0}}, None),
        ("huge base", "qwen3", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e7}}, None),
        ("large eps", "qwen2", {"rms_norm_eps": 1e-2}, None),
        ("llama3 rope on qwen2", "qwen2", {"rope_parameters": llama3(Random(seed))}, None),
        ("older layout", "qwen2", {}, older_layout),
        ("older layout llama3", "llama", {"rope_parameters": llama3(Random(seed))}, older_layout),
        ("no base named", "llama", {}, with_rope()),
        ("base inside wins", "qwen2", {}, with_rope(rope_theta=5e5, rope_parameters={"rope_theta": 777.0})),
        ("base outside", "qwen3", {}, with_rope(rope_theta=5e5, rope_parameters={"rope_type": "default"})),
        (
            "both rope objects",
            "llama",
            {},
            with_rope(
                rope_theta=5e5,
                rope_scaling={**rope3, "original_max_position_embeddings": 64},
                rope_parameters={"rope_theta": 9.0},
            ),
        ),
        ("first context absent", "llama", {}, with_rope(rope_theta=1e4, rope_scaling=rope3)),
        (
            "first context outside",
            "llama",
            {},
            with_rope(
                rope_theta=1e4,
                rope_scaling={**rope3, "original_max_position_embeddings": 64},
                original_max_position_embeddings=32,
            ),
        ),
        (
            "defaults of llama",
            "llama",
            {"num_key_value_heads": 6, "num_attention_heads": 6, "hidden_size": 48, "rms_norm_eps": 1e-6},
            without(
                "num_key_value_heads",
                "head_dim",
                "rms_norm_eps",
                "tie_word_embeddings",
                "initializer_range",
                "hidden_act",
                "attention_bias",
                "mlp_bias",
            ),
        ),
        (
            "defaults of qwen2",
            "qwen2",
            {
                "num_key_value_heads": 32,
                "num_attention_heads": 32,
                "hidden_size": 64,
                "rms_norm_eps": 1e-6,
                "tie_word_embeddings": False,
            },
            without("num_key_value_heads", "rms_norm_eps", "tie_word_embeddings", "use_sliding_window", "layer_types"),
        ),
        (
            "defaults of qwen3",
            "qwen3",
            {
                "head_dim": 128,
                "num_attention_heads": 2,
                "num_key_value_heads": 2,
                "rms_norm_eps": 1e-6,
                "tie_word_embeddings": False,
            },
            without("head_dim", "rms_norm_eps", "tie_word_embeddings", "architectures"),
        ),
        ("null head dim", "llama", {}, null_head_dim),
    ]
    models = []
    for index, (name, family, changes, edit) in enumerate(chosen):
        random = Random(f"edges {seed} {index}")
        config = draw(random, family, random.random() < 0.5, False)
        if family != "qwen3" and "num_attention_heads" in changes:
            config.pop("head_dim", None)
        if name.startswith("defaults of llama"):
            config["tie_word_embeddings"] = False
        config.update(changes)
        stored = random.choice(list(STORED))
        models.append(Model(name, family, config, random.randrange(2**31), stored, False, edit))
    return models
