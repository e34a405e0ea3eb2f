"""What the models are tried on: rows of tokens, with masks and advantages for the loss, prompts, and turns."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from transformers import AutoTokenizer

LENGTHS = [1, 2, 3, 7, 17, 40, 64, 129]
LONG = 700
"""Beyond 512, where kernels change their ways."""
COMMON = 100
"""Tokens that a group's rows begin with: beyond 64, a block of attention's keys."""


@dataclass
class Texts:
    """Rows for one model."""

    rows: list[list[int]]
    loss_rows: list[dict[str, Any]]
    prompts: list[list[int]]
    chains: list[list[dict[str, Any]]]


def masked(random: Random, ids: list[int], prompt: int = 1) -> dict[str, Any]:
    """A row as a rollout leaves it: a prompt, then turns with loss and observations without."""
    mask: list[bool] = [False] * prompt
    with_loss = False
    while len(mask) < len(ids):
        mask += [with_loss] * random.randint(1, max(2, len(ids) // 4))
        with_loss = not with_loss
    mask = mask[: len(ids)]
    advantages = [random.uniform(-2, 2) if has_loss else 0.0 for has_loss in mask]
    return {"ids": ids, "loss_mask": mask, "advantages": advantages}


def alike(random: Random, rows: list[list[int]]) -> list[dict[str, Any]]:
    """A group whose rows begin with one prompt, as chains of one question do: the longest row's first tokens, and after
    them some of the other rows'."""
    prompt = max(rows, key=len)[:COMMON]
    others = [row for row in rows if len(row) > 2]
    rests = [row[:40] for row in random.sample(others, 3)]
    return [{**masked(random, prompt + rest, len(prompt)), "group": 0} for rest in rests]


def turns(random: Random, text: list[int], new_tokens: int) -> list[dict[str, Any]]:
    """The text dealt out as a prompt and two observations, each followed by sampled tokens."""
    first, second = sorted(random.sample(range(1, len(text)), 2))
    parts = [text[:first], text[first:second], text[second:]]
    return [{"new_tokens": part, "max_tokens": new_tokens} for part in parts]


def from_rows(random: Random, rows: list[list[int]], prompts: list[list[int]]) -> Texts:
    loss_rows = [masked(random, row) for row in rows if len(row) > 2]
    without_loss = [{**row, "loss_mask": [False] * len(row["ids"])} for row in loss_rows[:1]]
    chains = [turns(random, row, new_tokens=8) for row in rows if len(row) > 2]
    return Texts(rows, loss_rows + without_loss + alike(random, rows), prompts, chains)


def random_texts(random: Random, vocabulary: int, prompts: int, with_long: bool) -> Texts:
    """Any tokens at all, in rows of many lengths."""

    def text(length: int) -> list[int]:
        return [random.randrange(vocabulary) for _ in range(length)]

    rows = [text(length) for length in LENGTHS + ([LONG] if with_long else [])]
    random.shuffle(rows)
    lengths = [random.choice([1, 2, 5, 12, 30, 75]) for _ in range(prompts)]
    return from_rows(random, rows, [text(length) for length in lengths])


def written_texts(model: Path, document: Path, questions: list[str], seed: int) -> Texts:
    """A document cut into rows, and questions as prompts, in the model's own tokens."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    random = Random(f"texts {seed}")
    ids = tokenizer(document.read_text()).input_ids
    start = random.randrange(0, len(ids) // 4)
    rows = []
    for length in [24, 60, 150, LONG]:
        rows.append(ids[start : start + length])
        start += length
    prompts = [tokenizer(question).input_ids for question in random.sample(questions, 100)]
    return from_rows(random, rows, prompts)
