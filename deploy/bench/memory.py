#!/usr/bin/env python3
"""Holds the memory plan of a rank against the kernel's count: the largest VmHWM of a job's ranks, by one step each.

`make bench-memory` builds what it needs and calls it. Each case is a whole job (rollouts, log-probs, one update) of
enough chains to fill a micro-batch; what was planned and measured is read from its metrics.jsonl. Ends with a code other
than 0 where a plan is more than 15 % off. Only the standard library is used.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import machine

REPOSITORY = Path(__file__).resolve().parents[2]
ALLOWED = 0.15
DTYPES = {"bf16": "bfloat16", "f32": "float32"}
# Chains of a step, per rank and 1024 tokens of a micro-batch: more than fill it.
CHAINS = 8


def numbers(text: str) -> list[int]:
    """`1,2` as numbers."""
    return [int(part) for part in text.split(",")]


def arguments() -> argparse.Namespace:
    """The command line; defaults may come from the environment, as make passes them."""

    def given(name: str, default: str) -> str:
        return os.environ.get(name) or default

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=given("MODEL", "deploy/models/smollm2"), help="a Hugging Face directory (MODEL)")
    parser.add_argument("--template", default=given("TEMPLATE", "chatml"), help="its chat template (TEMPLATE)")
    parser.add_argument("--dtype", default=given("DTYPE", "bf16,f32"), help="of bf16, f32 (DTYPE)")
    parser.add_argument("--ranks", type=numbers, default=given("RANKS", "1,2"), help="CPU ranks (RANKS)")
    parser.add_argument("--tokens", type=numbers, default=given("TOKENS", "1024,4096"), help="of a micro-batch (TOKENS)")
    parser.add_argument("--bin", default=given("BIN", "target/release"), help="folder of the programs (BIN)")
    parser.add_argument("--deadline", type=float, default=1200, help="seconds a case may take")
    parser.add_argument("--out", default=given("OUT", ""), help="JSON file (OUT)")
    return parser.parse_args()


def settings(args: argparse.Namespace, dtype: str, ranks: int, tokens: int) -> list[str]:
    """The job of a case: one step, without validation or checkpoint."""
    model, chains = str((REPOSITORY / args.model).resolve()), CHAINS * ranks * max(1, tokens // 1024)
    return [
        f"data.train_files={REPOSITORY / 'deploy/data/train.json'}", "data.val_files=[]", "trainer.val_before_train=False",
        f"data.train_batch_size={chains // 4}", "agent.num_chains=4", "agent.agent_type=code", "agent.max_steps=3",
        "agent.tools=[code_interpreter]", f"agent.template={args.template}", "agent.reward_name=math_reward_format",
        f"actor_rollout_ref.model.path={model}", f"actor_rollout_ref.rollout.dtype={DTYPES[dtype]}",
        "actor_rollout_ref.rollout.max_tokens=160", "actor_rollout_ref.rollout.max_model_len=1024",
        "actor_rollout_ref.actor.use_kl_loss=True", f"actor_rollout_ref.actor.ppo_max_token_len_per_gpu={tokens}",
        f"actor_rollout_ref.actor.ppo_mini_batch_size={chains}", f"trainer.n_gpus_per_node={ranks}",
        "trainer.total_training_steps=1", "trainer.save_freq=-1", "trainer.resume_mode=disable",
        "trainer.project_name=memory", "trainer.experiment_name=case",
    ]


def measure(args: argparse.Namespace, dtype: str, ranks: int, tokens: int) -> dict[str, Any]:
    """Runs one case in a folder of its own."""
    program = (REPOSITORY / args.bin / "coordinator").resolve()
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"AGENTFLY_RUNTIME_DIR": f"{folder}/runtime"}
        python = REPOSITORY / "third_party/sandbox-venv/bin/python"
        environment.setdefault("AGENTFLY_SANDBOX_PYTHON", str(python))
        command = [str(program), "train", *settings(args, dtype, ranks, tokens)]
        ended = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False,
                               timeout=args.deadline)
        if ended.returncode != 0:
            raise SystemExit(f"bench-memory: the job of {dtype}, {ranks} ranks, {tokens} tokens failed:\n{ended.stderr}")
        lines = (Path(folder) / "runs/memory/case/metrics.jsonl").read_text(encoding="utf-8").splitlines()
    metrics: dict[str, float] = {}
    for line in lines:
        metrics |= {key: value for key, value in json.loads(line).items() if isinstance(value, int | float)}
    return {
        "dtype": dtype, "ranks": ranks, "micro_batch_tokens": tokens,
        "tokens_a_rank": metrics["perf/total_num_tokens"] / ranks,
        "planned_mib": metrics["perf/max_memory_planned_gb"] * 1024,
        "measured_mib": metrics["perf/max_memory_allocated_gb"] * 1024,
    }


def row(case: dict[str, Any]) -> str:
    """A line of the table."""
    ratio = case["planned_mib"] / case["measured_mib"]
    return (f"| {case['dtype']} | {case['ranks']} | {case['micro_batch_tokens']} | {case['tokens_a_rank']:.0f} "
            f"| {case['planned_mib']:.0f} | {case['measured_mib']:.0f} | {ratio:.2f} |")


def main() -> None:
    """Measures every case and prints the table."""
    args, cases = arguments(), []
    print(json.dumps(machine.describe()), file=sys.stderr)
    print("| numbers | ranks | micro-batch, tokens | tokens a rank | predicted, MiB | measured, MiB | ratio |")
    print("|---|---|---|---|---|---|---|")
    for dtype, ranks, tokens in itertools.product(args.dtype.split(","), args.ranks, args.tokens):
        cases.append(measure(args, dtype, ranks, tokens))
        print(row(cases[-1]), flush=True)
    if args.out:
        Path(args.out).write_text(json.dumps({"machine": machine.describe(), "cases": cases}, indent=1), encoding="utf-8")
    off = [case for case in cases if abs(case["planned_mib"] / case["measured_mib"] - 1) > ALLOWED]
    if off:
        raise SystemExit(f"bench-memory: {len(off)} of {len(cases)} plans are more than {ALLOWED:.0%} off")


if __name__ == "__main__":
    main()
