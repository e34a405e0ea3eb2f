#!/usr/bin/env python3
"""The tiny model's tokenizer and configuration: everything in deploy/models/tiny except the weights.

Trains a byte-level BPE with Qwen2's pre-tokenizer (every digit a token of its own) on what the tiny model reads and
writes: the problems of make_data.py, demonstrations, prompts, and some general English, Python and LaTeX so that
other text stays affordable. Deterministic given --seed. Runs in the environment of setup_tools.sh.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from make_data import CODE_PROMPT, Noise, demonstrations, write_atomically

QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Qwen2's pre-tokenizer; data that its models' tokenizer.json files carry."""

CONTROL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
"""Skipped by decoding without special tokens, as Qwen2.5 does."""
MARKUP_TOKENS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>")
"""One token each, but ordinary text to the decoder (Qwen2.5 has the first two, Qwen3 all of them)."""
PAD, IM_END = "<|endoftext|>", "<|im_end|>"

DEFAULT_SYSTEM = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
TOOLS_HEAD = """# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
"""
TOOLS_TAIL = """
</tools>

For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:
<tool_call>
{"name": <function-name>, "arguments": <args-json-object>}
</tool_call>"""

GENERAL_TEXT = (
    "Thought: I should work out the value of the expression first.\nAction: calculator\n"
    'Input: {"expression": "3 * (4 + 5) / 2"}\nAnswer: \\boxed{13.5}',
    '{"type": "function", "function": {"name": "code_interpreter", "description": "Runs Python code and returns '
    'what it prints.", "parameters": {"type": "object", "properties": {"code": {"type": "string"}}, '
    '"required": ["code"]}}}',
    '<tool_call>\n{"name": "code_interpreter", "arguments": {"code": "print(2 + 2)"}}\n</tool_call>',
    "def total(values):\n    result = 0\n    for value in values:\n        result = result + value\n    return result\n"
    "\nprint(total([1, 2, 3]))\n",
    "import math\nx = 12\ny = x * 7 - 5\nif y > 30:\n    print(math.sqrt(y))\nelse:\n    print(y % 4, y // 4)\n",
    'for i in range(10):\n    if i % 2 == 0 and i not in (4, 6):\n        print(f"{i} squared is {i ** 2}")\n',
    "ZeroDivisionError: division by zero\nNameError: name 'x' is not defined\nSyntaxError: invalid syntax\n"
    "Execution timed out\nMemory limit exceeded\n",
    "Find all real numbers $x$ such that $\\frac{x + 1}{2} = \\sqrt{3x}$, and let $n$ be the sum of the solutions. "
    "What is $\\left(n^2 - 1\\right) \\cdot \\pi$?",
    "We have $a \\times b = \\dfrac{1}{3}$ and $a \\leq b$, so the answer is $\\boxed{\\frac{1}{3}}$. "
    "<answer>42</answer>",
    "A train leaves the station at 9 in the morning and travels at 60 miles per hour. Two hours later another train "
    "follows at 80 miles per hour. When will the second train catch up with the first one?",
    "The price of a shirt was raised by 20 percent and then lowered by 15 dollars. If the final price is 45 dollars, "
    "how much did the shirt cost before? Each of the three children pays the same share of the total.",
    "Let us think step by step. First, we need to know how many of them there are. Then we can multiply this number by "
    "the cost of each, and subtract what has already been paid. Therefore the result is correct.",
    "State the final answer to the following arithmetic problem: 4 + 3 - 12 + 7 =",
    "The interpreter printed an error, so I will fix the code and run it again before giving the final answer.",
)

# Renders Qwen2.5's conversation format. Indexing instead of loop.previtem keeps it within every Jinja dialect.
CHAT_TEMPLATE = (
    """{%- set has_system = messages and messages[0].role == 'system' -%}
{%- set system = messages[0].content if has_system else """
    + json.dumps(DEFAULT_SYSTEM)
    + """ -%}
{{- '<|im_start|>system\\n' + system -}}
{%- if tools -%}
    {{- """
    + json.dumps("\n\n" + TOOLS_HEAD.rstrip("\n"))
    + """ -}}
    {%- for tool in tools -%}
        {{- '\\n' -}}{{- tool | tojson -}}
    {%- endfor -%}
    {{- """
    + json.dumps(TOOLS_TAIL)
    + """ -}}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- for message in messages -%}
    {%- if message.role == 'tool' -%}
        {%- if loop.first or messages[loop.index0 - 1].role != 'tool' -%}
            {{- '<|im_start|>user' -}}
        {%- endif -%}
        {{- '\\n<tool_response>\\n' + message.content + '\\n</tool_response>' -}}
        {%- if loop.last or messages[loop.index0 + 1].role != 'tool' -%}
            {{- '<|im_end|>\\n' -}}
        {%- endif -%}
    {%- elif not (has_system and loop.first) -%}
        {{- '<|im_start|>' + message.role -}}
        {%- if message.content or not message.tool_calls -%}
            {{- '\\n' + message.content -}}
        {%- endif -%}
        {%- for tool_call in message.tool_calls or [] -%}
            {%- set call = tool_call.function if tool_call.function else tool_call -%}
            {{- '\\n<tool_call>\\n{"name": "' + call.name + '", "arguments": ' -}}
            {{- call.arguments if call.arguments is string else call.arguments | tojson -}}
            {{- '}\\n</tool_call>' -}}
        {%- endfor -%}
        {{- '<|im_end|>\\n' -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""
)


def corpus(seed: int, count: int) -> Iterator[str]:
    """Texts to learn merges from; control tokens are never part of merges, so contents alone will do."""
    # Numbers and operations do not matter here, only the words: no noise but answers without code.
    noise = Noise(right_when_clear=1, right_when_unclear=1, usual_slip=0, no_code=0.1, unboxed=0.1)
    for messages in demonstrations(seed, noise, count):
        for message in messages:
            if message["role"] != "system":
                yield message["content"]
    prompts = (
        CODE_PROMPT.read_text(encoding="utf-8"),
        DEFAULT_SYSTEM,
        TOOLS_HEAD,
        TOOLS_TAIL,
        "system\nuser\nassistant\n",
    )
    # Often enough that all their words become single tokens before rare pieces of names do.
    for text in prompts:
        yield from [text] * 50
    for text in GENERAL_TEXT:
        yield from [text] * 3


def train_tokenizer(seed: int, count: int, vocabulary: int) -> Tokenizer:
    """A tokenizer of at most `vocabulary` tokens, the added ones included and last, as in Qwen2."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary - len(CONTROL_TOKENS) - len(MARKUP_TOKENS),
        min_frequency=2,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(seed, count), trainer)
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in CONTROL_TOKENS])
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in MARKUP_TOKENS])
    return tokenizer


def tokenizer_config(tokenizer: Tokenizer, context: int) -> dict[str, Any]:
    added = {
        str(index): {
            "content": token.content,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": token.special,
        }
        for index, token in sorted(tokenizer.get_added_tokens_decoder().items())
    }
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": context,
        "add_bos_token": False,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "bos_token": None,
        "eos_token": IM_END,
        "pad_token": PAD,
        "unk_token": None,
        "added_tokens_decoder": added,
        "chat_template": CHAT_TEMPLATE,
    }


def model_config(tokenizer: Tokenizer, hidden: int, intermediate: int, layers: int, context: int) -> dict[str, Any]:
    """A Qwen2 configuration; the vocabulary is padded to a multiple of 64."""
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "vocab_size": -(-tokenizer.get_vocab_size() // 64) * 64,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "hidden_act": "silu",
        "max_position_embeddings": context,
        "max_window_layers": layers,
        "use_sliding_window": False,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "initializer_range": 0.05,
        "attention_dropout": 0.0,
        "tie_word_embeddings": True,
        "use_cache": True,
        "torch_dtype": "float32",
        "bos_token_id": None,
        "eos_token_id": tokenizer.token_to_id(IM_END),
        "pad_token_id": tokenizer.token_to_id(PAD),
    }


def parameter_count(config: dict[str, Any]) -> int:
    """Weights of the network that `config` describes (tied embeddings counted once)."""
    hidden, inner, vocabulary = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    key_value = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    attention = hidden * hidden * 2 + hidden + 2 * key_value * (hidden + 1)
    layer = attention + 3 * hidden * inner + 2 * hidden
    return vocabulary * hidden + config["num_hidden_layers"] * layer + hidden


def check_round_trip(tokenizer: Tokenizer) -> None:
    """Stops the program if any text changes on its way through token ids, in the corpus or outside it."""
    for text in (*GENERAL_TEXT, CODE_PROMPT.read_text(encoding="utf-8"), "naïve Ω 123\t\r\n\n  4,567.89 你好 🙂"):
        decoded = tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False)
        if decoded != text:
            sys.exit(f"make_tokenizer.py: {text!r} came back as {decoded!r}; the tokenizer is not lossless")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write, e.g. deploy/models/tiny")
    parser.add_argument("--seed", type=int, default=1, help="of the demonstrations learned from (%(default)s)")
    parser.add_argument("--demonstrations", type=int, default=4000, metavar="N", help="how many (%(default)s)")
    parser.add_argument(
        "--vocabulary", type=int, default=896, metavar="N", help="most tokens, added ones included (%(default)s)"
    )
    parser.add_argument("--hidden", type=int, default=128, metavar="N", help="width of the model (%(default)s)")
    parser.add_argument("--intermediate", type=int, default=384, metavar="N", help="width of its MLP (%(default)s)")
    parser.add_argument("--layers", type=int, default=4, metavar="N", help="(%(default)s)")
    parser.add_argument(
        "--context", type=int, default=1024, metavar="N", help="longest sequence in tokens (%(default)s)"
    )
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    tokenizer = train_tokenizer(arguments.seed, arguments.demonstrations, arguments.vocabulary)
    check_round_trip(tokenizer)
    config = model_config(tokenizer, arguments.hidden, arguments.intermediate, arguments.layers, arguments.context)
    generation = {
        "eos_token_id": [config["eos_token_id"], config["pad_token_id"]],
        "pad_token_id": config["pad_token_id"],
    }
    files = {
        "tokenizer.json": tokenizer.to_str(pretty=True) + "\n",
        "tokenizer_config.json": json.dumps(
            tokenizer_config(tokenizer, arguments.context), ensure_ascii=False, indent=1
        )
        + "\n",
        "config.json": json.dumps(config, indent=1) + "\n",
        "generation_config.json": json.dumps(generation, indent=1) + "\n",
    }
    for name, text in files.items():
        write_atomically(arguments.out / name, text)
    print(f"{arguments.out}: {tokenizer.get_vocab_size()} tokens, {parameter_count(config)} parameters")


if __name__ == "__main__":
    main()
