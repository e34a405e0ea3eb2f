#!/usr/bin/env python3
"""Compares this project's models with PyPI's `transformers`: `make parity`.

Logits, log-probs, entropies, gradients of every parameter, greedy continuations, multi-turn generation through the
cache, and exported checkpoints, for random small models of every supported family, for shapes and configurations
chosen by hand, and for SmolLM2-135M-Instruct where it is there. float32 must agree to rounding; bfloat16 must be no
further from float64, to a tenth, than `transformers` in bfloat16 is. Prints a table, writes JSON, and exits with status 1 when a
figure exceeds its bound.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from contextlib import suppress
from pathlib import Path
from random import Random

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch  # noqa: E402
import transformers  # noqa: E402
from checks import Bf16Errors, compare  # noqa: E402
from probe import Probe, ProbeError, ProbeGoneError  # noqa: E402
from report import Findings  # noqa: E402
from texts import Texts, random_texts, written_texts  # noqa: E402
from variants import VARIANTS, Model, drawn, edges  # noqa: E402

REPOSITORY = Path(__file__).resolve().parents[3]
KINDS = [*VARIANTS, "edges", "smollm2"]
CONTINUATIONS = 100
"""Greedy continuations of each kind of model."""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="parity", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seed", type=int, default=1, help="draws other models and texts (default 1)")
    parser.add_argument("--count", type=int, default=3, metavar="N", help="random models of each kind (default 3)")
    parser.add_argument("--only", metavar="KIND[,KIND...]", help=f"some of {', '.join(KINDS)}")
    parser.add_argument(
        "--smollm2",
        type=Path,
        default=REPOSITORY / "deploy/models/smollm2",
        metavar="DIR",
        help="the model of `make smollm2`; skipped, and said so, when it is not there",
    )
    parser.add_argument(
        "--json",
        type=Path,
        default=REPOSITORY / "target/parity.json",
        metavar="FILE",
        help="where the figures go (default target/parity.json)",
    )
    parser.add_argument(
        "--probe", type=Path, default=REPOSITORY / "target/release/examples/parity_probe", help="the built example"
    )
    parser.add_argument(
        "--threads", type=int, default=os.cpu_count() or 1, metavar="N", help="CPU threads of each side (default all)"
    )
    parser.add_argument(
        "--deadline", type=float, default=1800, metavar="SECONDS", help="for each answer of the probe (default 1800)"
    )
    options = parser.parse_args()
    if options.count < 1 or options.threads < 1 or options.deadline <= 0:
        parser.error("--count, --threads and --deadline must be at least 1")
    options.kinds = options.only.split(",") if options.only else KINDS
    if unknown := [kind for kind in options.kinds if kind not in KINDS]:
        parser.error(f"--only: no kind {unknown[0]!r}; there are {', '.join(KINDS)}")
    return options


def commit() -> str:
    """What is compared; with `+changes` where the tree differs from it."""

    def git(*args: str) -> str:
        done = subprocess.run(["git", *args], cwd=REPOSITORY, capture_output=True, text=True, timeout=20, check=False)
        return done.stdout.strip() if done.returncode == 0 else ""

    head = git("rev-parse", "--short=12", "HEAD") or "unknown"
    return head + ("+changes" if git("status", "--porcelain", "--untracked-files=no") else "")


def cpu() -> str:
    """The processor's name, as the kernel gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.machine())


def questions() -> list[str]:
    return [row["question"] for row in json.loads((REPOSITORY / "deploy/data/val.json").read_text())]


class Run:
    """Goes through the models, one after another."""

    def __init__(self, options: argparse.Namespace, probe: Probe) -> None:
        self.options, self.probe, self.findings = options, probe, Findings()
        self.done = 0

    def group(self, group: str, models: list[tuple[str, Path, Texts]]) -> None:
        errors = Bf16Errors()
        for name, folder, texts in models:
            started = time.monotonic()
            try:
                compare(self.findings, errors, self.probe, group, name, folder, texts, self.options.seed)
            except ProbeGoneError as error:
                self.findings.failures.append(f"{name}: {error}; what comes after it was not compared")
                raise
            except (ProbeError, ValueError) as error:
                self.findings.failures.append(f"{name}: {error}")
            self.done += 1
            print(f"{self.done:>4} models  {name:<28} {time.monotonic() - started:6.1f} s", file=sys.stderr, flush=True)
        errors.report(self.findings, group)

    def small(self, group: str, models: list[Model]) -> None:
        prompts = -(-CONTINUATIONS // len(models))
        with tempfile.TemporaryDirectory(prefix="parity-") as folder:
            ready = []
            for index, model in enumerate(models):
                model.make(Path(folder))
                random = Random(f"texts {self.options.seed} {model.name}")
                ready.append((model.name, model.dir, random_texts(random, model.vocabulary, prompts, index % 4 == 0)))
            self.group(group, ready)

    def smollm2(self) -> None:
        folder = self.options.smollm2
        if not (folder / "config.json").exists():
            if self.options.only:
                sys.exit(f"parity: no {folder}; make smollm2 gets it")
            print(f"no {folder}: SmolLM2 is left out (make smollm2 gets it)", file=sys.stderr)
            self.findings.notes["left_out"] = "smollm2"
            return
        texts = written_texts(folder, REPOSITORY / "README.md", questions(), self.options.seed)
        # Checkpoints are exported beside the model, which may lie where nothing can be written.
        with tempfile.TemporaryDirectory(prefix="parity-") as copy:
            shutil.copytree(folder, Path(copy) / "smollm2")
            self.group("smollm2", [("smollm2", Path(copy) / "smollm2", texts)])


def main() -> int:
    options = arguments()
    if not options.probe.exists():
        sys.exit(
            f"parity: no {options.probe}; build it: cargo build --release -p agentfly-policy --example parity_probe"
        )
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(options.threads)
    started = time.monotonic()
    with Probe(options.probe, options.threads, options.deadline) as probe, suppress(ProbeGoneError):
        run = Run(options, probe)
        for variant in VARIANTS:
            if variant in options.kinds:
                run.small(variant, drawn(variant, options.seed, options.count))
        if "edges" in options.kinds:
            run.small("edges", edges(options.seed))
        if "smollm2" in options.kinds:
            run.smollm2()
    findings = run.findings
    findings.notes |= {
        "commit": commit(),
        "seed": options.seed,
        "models": run.done,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "machine": cpu(),
        "threads": options.threads,
        "seconds": round(time.monotonic() - started, 1),
    }
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(findings.json(), indent=1) + "\n")
    print(findings.table())
    verdict = "every figure is within its bound" if findings.all_passed() else "NOT EQUAL: see the lines with FAIL"
    drawn_on, tied = (findings.notes.get(key, 0) for key in ("continuations", "tied_continuations"))
    print(
        f"\n{run.done} models, {drawn_on} greedy continuations ({tied} part at a tie), seed {options.seed}, "
        f"{findings.notes['seconds']:.0f} s: {verdict}. Figures: {options.json}\n"
        f"commit {findings.notes['commit']}, {findings.notes['machine']}, {options.threads} threads, "
        f"torch {torch.__version__}, transformers {transformers.__version__}"
    )
    return 0 if findings.all_passed() else 1


if __name__ == "__main__":
    sys.exit(main())
