#!/usr/bin/env python3
"""Measures the sandbox beside a plain interpreter, bubblewrap, and AgentFly's way, taking turns.

`make bench-sandbox` builds what it needs and calls it. For each program: the latency of one caller, and how many a second four
callers get. Ours is measured over HTTP, as AgentFly's is, and in the caller's process, as a rank calls it. A side that is not
installed is named as missing. Writes JSON to runs/bench/sandbox-DATE.json. Only the standard library is used.
"""

from __future__ import annotations

import argparse
import datetime
import http.client
import json
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import machine

REPOSITORY = Path(__file__).resolve().parents[2]
PROGRAMS = {
    "print(1 + 1)": ("print(1 + 1)", "2\n"),
    "numpy solve": ("import numpy as np\nprint(np.linalg.solve(np.eye(50), np.ones(50)).sum())", "50.0\n"),
    "sympy factor": (
        "from sympy import *\nx = symbols('x')\nprint(factor(x**6 - 1))",
        "(x - 1)*(x + 1)*(x**2 - x + 1)*(x**2 + x + 1)\n",
    ),
}
CALLERS = 4
# The bars of the project: milliseconds of one caller by program, and snippets a second of four callers.
BARS_MS = {"print(1 + 1)": 5.0, "sympy factor": 30.0}
BAR_PER_SECOND = 350.0


class Side:
    """One way to run a snippet: `connect` gives a caller's function from code to output."""

    def __init__(self, name: str, connect: Callable[[], Callable[[str], str]]) -> None:
        self.name, self.connect = name, connect


def command_side(name: str, command: list[str]) -> Side:
    """A process for each snippet."""

    def run(code: str) -> str:
        return subprocess.run([*command, code], capture_output=True, text=True, check=True).stdout

    return Side(name, lambda: run)


def http_side(name: str, port: int) -> Side:
    """A server with AgentFly's contract; each caller keeps its connection."""

    def connect() -> Callable[[str], str]:
        connection = http.client.HTTPConnection("127.0.0.1", port)
        headers = {"content-type": "application/json"}

        def run(code: str) -> str:
            connection.request("POST", "/exec", json.dumps({"code": code}), headers)
            answer = json.load(connection.getresponse())
            if "output" not in answer or "detail" in answer:
                raise RuntimeError(f"{name} answered {answer}")
            return answer["output"]

        return run

    return Side(name, connect)


def bubblewrap(python: Path) -> list[str]:
    """The interpreter in namespaces, with what it needs to be seen; no limits, no seccomp."""
    base = Path(python).resolve()
    seen = {"/usr", "/lib", "/lib64", "/bin", str(python.parents[1]), str(base.parents[1])}
    binds = [word for path in sorted(seen) if Path(path).exists() for word in ("--ro-bind", path, path)]
    rest = ["--proc", "/proc", "--dev", "/dev", "--unshare-all", "--die-with-parent", "--clearenv"]
    return ["bwrap", *binds, *rest, "--tmpfs", "/tmp", str(python), "-I", "-c"]


def latency(side: Side, program: str, seconds: float) -> list[float]:
    """Milliseconds of one caller's snippets, for a while; the first two are not counted."""
    code, expected = PROGRAMS[program]
    run, times = side.connect(), []
    until = time.monotonic() + seconds
    while len(times) < 7 or time.monotonic() < until:
        began = time.perf_counter()
        said = run(code)
        times.append((time.perf_counter() - began) * 1e3)
        if said != expected:
            raise RuntimeError(f"{side.name} said {said!r} to {program}")
    return times[2:]


def throughput(side: Side, program: str, seconds: float) -> float:
    """Snippets a second of four callers."""
    done, began = [0] * CALLERS, time.monotonic()

    def call(at: int) -> None:
        run = side.connect()
        while time.monotonic() < began + seconds:
            run(PROGRAMS[program][0])
            done[at] += 1

    callers = [threading.Thread(target=call, args=(at,)) for at in range(CALLERS)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    return sum(done) / (time.monotonic() - began)


def in_process(example: Path, python: Path) -> list[dict[str, Any]]:
    """What the sandbox's own example measures, in the process that calls it."""
    ran = subprocess.run([example, "--json", python], capture_output=True, text=True, check=True)
    return [json.loads(line) for line in ran.stdout.splitlines()]


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=2.0, help="of each measurement [2]")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each side [3]")
    parser.add_argument("--out", type=Path, help="JSON file [runs/bench/sandbox-DATE.json]")
    parser.add_argument("--python", type=Path, default=REPOSITORY / "third_party/sandbox-venv/bin/python")
    return parser.parse_args()


def main() -> int:
    """Measures, prints a table, writes the figures."""
    args = arguments()
    release = REPOSITORY / "target/release"
    worker = subprocess.Popen(
        [release / "worker", "sandbox", "serve", "--listen", "127.0.0.1:0", "--slots", "4", "--python", args.python],
        stdout=subprocess.PIPE,
        text=True,
    )
    agentfly = subprocess.Popen(
        [args.python, REPOSITORY / "deploy/bench/peers/exec_server.py"], stdout=subprocess.PIPE, text=True
    )
    try:
        told = worker.stdout.readline()
        sides = [
            http_side("worker sandbox serve", int(told.split("/exec")[0].rpartition(":")[2])),
            http_side("AgentFly's way", int(agentfly.stdout.readline())),
            command_side("python3 -I", [str(args.python), "-I", "-c"]),
        ]
        missing = []
        if shutil.which("bwrap"):
            sides.append(command_side("bubblewrap", bubblewrap(args.python)))
        else:
            missing.append("bubblewrap is not installed (apt-get install bubblewrap)")
        figures = measure(sides, args.rounds, args.seconds)
    finally:
        for server in (worker, agentfly):
            server.terminate()
            server.wait(30)
    inner = in_process(release / "examples/bench", args.python)
    show(figures, inner, missing)
    out = args.out or REPOSITORY / f"runs/bench/sandbox-{datetime.datetime.now():%Y%m%d-%H%M%S}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    report = {"machine": machine.describe(), "http": figures, "in_process": inner, "missing": missing}
    out.write_text(json.dumps(report, indent=1) + "\n")
    print(f"written: {out}")
    return 0


def measure(sides: list[Side], rounds: int, seconds: float) -> dict[str, dict[str, dict[str, float]]]:
    """program → side → p50 and p99 in milliseconds, and snippets a second: the sides in turn, round by round."""
    figures: dict[str, dict[str, dict[str, float]]] = {}
    for program in PROGRAMS:
        times: dict[str, list[float]] = {side.name: [] for side in sides}
        rates: dict[str, list[float]] = {side.name: [] for side in sides}
        for _ in range(rounds):
            for side in sides:
                times[side.name] += latency(side, program, seconds)
                rates[side.name].append(throughput(side, program, seconds))
        figures[program] = {
            name: {
                "p50_ms": statistics.median(all_times),
                "p99_ms": sorted(all_times)[int(len(all_times) * 0.99)],
                "per_second": statistics.median(rates[name]),
            }
            for name, all_times in times.items()
        }
    return figures


def show(figures: dict[str, Any], inner: list[dict[str, Any]], missing: list[str]) -> None:
    """Prints a table; of the project's own figures, what their bars are."""
    print(f"{'':34} {'p50 ms':>8} {'p99 ms':>8} {'4 at once, 1/s':>15}")
    for program, by_side in figures.items():
        for name, figure in by_side.items():
            print(
                f"{program:13} {name:20} {figure['p50_ms']:8.1f} {figure['p99_ms']:8.1f} {figure['per_second']:15.0f}"
            )
    for line in inner:
        bar = BARS_MS.get(line["program"])
        told = f"   (bar {bar:.0f} ms)" if bar else ""
        if line["program"] == "print(1 + 1)":
            told += f" (bar {BAR_PER_SECOND:.0f}/s)"
        warm = ", ".join(line["preload"]) or "nothing"
        print(
            f"{line['program']:13} {'in process':20} {line['p50_ms']:8.1f} {line['p99_ms']:8.1f} "
            f"{line['per_second']:15.0f}   warm with {warm}{told}"
        )
    for reason in missing:
        print(f"not measured: {reason}")


if __name__ == "__main__":
    sys.exit(main())
