"""The work that ours and every peer do: fixed, so that a ratio compares like with like."""

from __future__ import annotations

import json
import random
import subprocess
from pathlib import Path
from typing import Any

GROUP = 8
"""Samples a prompt."""
NEW_TOKENS = 128
"""Tokens a rollout samples for each chain."""
PROMPTS = 64

MULTI_TURN = {"chains": 64, "turns": 4, "new_tokens": 48, "tool_seconds": 0.2}
LEARNER = {"rows": 16, "tokens": 256}
GRPO = {"completions": 16, "new_tokens": NEW_TOKENS}
OPTIMIZER_PARAMETERS = 50_000_000
"""The optimizer's milliseconds are given for so many."""

NAMES = ["Ana", "Ben", "Chen", "Dara", "Eli", "Fay", "Gus", "Hana"]
THINGS = ["apples", "pens", "books", "coins", "cards", "stones", "cups", "stamps"]


def questions(count: int, seed: int = 0) -> list[str]:
    """Arithmetic word problems: 95 to 101 tokens each in SmolLM2's chat template."""
    draw = random.Random(seed)
    made = []
    for _ in range(count):
        first, second = draw.sample(NAMES, 2)
        thing = draw.choice(THINGS)
        has, boxes, each, lost = (draw.randint(*span) for span in ((12, 60), (2, 9), (2, 9), (1, 11)))
        made.append(
            f"{first} has {has} {thing}. {second} gives {first} {boxes} boxes with {each} {thing} in each box. "
            f"Then {first} loses {lost} {thing} on the way home. How many {thing} does {first} have now? Think step "
            "by step in short sentences, and then write the final answer as a number after the words 'The answer is'."
        )
    return made


def observations(count: int, seed: int = 1) -> list[str]:
    """What a code tool might print: about 30 tokens with the frame of SmolLM2's chat template."""
    draw = random.Random(seed)
    pairs = [(draw.randint(10, 99), draw.randint(10, 99)) for _ in range(count)]
    return [f"Output: the boxes hold {all_of_them} in all, and {left} are left over." for all_of_them, left in pairs]


def make(bench_work: Path, model: Path, template: str | None, out: Path) -> dict[str, Any]:
    """Writes the work file for a model: questions as text, and everything as token ids."""
    texts = {"questions": questions(PROMPTS), "observations": observations(PROMPTS)}
    command = [str(bench_work), str(model)] + ([template] if template else [])
    done = subprocess.run(command, input=json.dumps(texts), capture_output=True, text=True, timeout=60, check=False)
    if done.returncode != 0:
        raise SystemExit(f"bench-engine: {' '.join(command)} failed: {done.stderr.strip()}")
    work = {"questions": texts["questions"], **json.loads(done.stdout)}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(work), encoding="utf-8")
    return work
