"""GRPO steps of TRL's GRPOTrainer: each request `{"completions", "new_tokens", "seed"}` lets it do one step.

The numbers of the first request hold for all: TRL takes them at its start. Rewards are the share of digits, beta is
0, weights and autocast are bf16 (or both f32), generation is transformers'.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
import transformers
import trl
from datasets import Dataset
from serve import Message, answer, read_json, requests

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", required=True)
parser.add_argument("--work", required=True, help="questions, as text: TRL applies the chat template itself")
parser.add_argument("--dtype", choices=["bf16", "f32"], required=True)
parser.add_argument("--threads", type=int, required=True)
parser.add_argument("--group", type=int, default=8)
options = parser.parse_args()

MAX_STEPS = 1000
"""More than anyone asks for: the run ends with its requests."""

phases: dict[str, float] = {}


def timed(owner: Any, name: str, phase: str) -> None:
    """Adds the wall time of a method's calls to a phase."""
    method: Callable[..., Any] = getattr(owner, name)

    def wrapper(*positional: Any, **named: Any) -> Any:
        started = time.perf_counter()
        try:
            return method(*positional, **named)
        finally:
            phases[phase] = phases.get(phase, 0.0) + time.perf_counter() - started

    setattr(owner, name, wrapper)


def share_of_digits(completions: list[list[Message]], **_: Any) -> list[float]:
    """The toy reward."""
    texts = [completion[-1]["content"] for completion in completions]
    return [sum(c.isdigit() for c in text) / (1 + len(text)) for text in texts]


class OneStepARequest(transformers.TrainerCallback):
    """Waits for a request before each step and answers it after."""

    def __init__(self, first: Message) -> None:
        self.asked, self.first = requests(), first
        self.started = self.before_optimizer = 0.0

    def on_step_begin(self, _args: Any, _state: Any, control: Any, **_: Any) -> None:
        """The first step's request is what started it."""
        if self.first:
            self.first = {}
        elif next(self.asked, None) is None:
            raise SystemExit(0)
        phases.clear()
        self.started = time.perf_counter()

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        """Gradients are there and clipped."""
        self.before_optimizer = time.perf_counter()

    def on_optimizer_step(self, *_: Any, **__: Any) -> None:
        """Weights are updated."""
        phases["optimizer"] = time.perf_counter() - self.before_optimizer

    def on_step_end(self, _args: Any, state: Any, *_: Any, **__: Any) -> None:
        """Answers."""
        seconds = time.perf_counter() - self.started
        answer({"seconds": seconds, "phases": dict(phases), "completion_tokens": tokens, "micro_rows": completions,
                "versions": {"trl": trl.__version__, "transformers": transformers.__version__,
                             "torch": torch.__version__}})


torch.set_num_threads(options.threads)
first = next(requests())
completions, new_tokens = first["completions"], first["new_tokens"]
tokens = completions * new_tokens
bf16 = options.dtype == "bf16"
tokenizer = transformers.AutoTokenizer.from_pretrained(options.model, padding_side="left")
dtype = torch.bfloat16 if bf16 else torch.float32
model = transformers.AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype)
# Every completion is exactly as long as asked.
model.generation_config.eos_token_id = None
rows = [{"prompt": [{"role": "user", "content": question}]} for question in read_json(options.work)["questions"]]
with tempfile.TemporaryDirectory(prefix="bench-trl-") as folder:
    trainer = trl.GRPOTrainer(
        model=model,
        reward_funcs=share_of_digits,
        args=trl.GRPOConfig(
            output_dir=folder, use_cpu=True, bf16=bf16, fp16=False,
            per_device_train_batch_size=completions, gradient_accumulation_steps=1, num_generations=options.group,
            max_completion_length=new_tokens, temperature=1.0, beta=0.0, learning_rate=1e-6, max_steps=MAX_STEPS,
            save_strategy="no", logging_steps=1, report_to=[], gradient_checkpointing=False, disable_tqdm=True, seed=0,
            generation_kwargs={"min_new_tokens": new_tokens},
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    timed(trainer, "_generate", "generate")
    timed(trainer, "compute_loss", "forward")
    timed(trainer.accelerator, "backward", "backward")
    trainer.add_callback(OneStepARequest(first))
    trainer.train()
