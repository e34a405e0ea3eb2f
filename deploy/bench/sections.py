"""The comparisons: which sides run, what they are asked, and which figures come of it.

Within a section all sides are alive and warm, and take turns: a slow minute of the machine meets each of them.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import work
from report import Bar, Report, Row, Values, values
from side import Failed, Measurement, Side
from sides import Places
from steps_trace import add_steps

ORDER = ("gemm", "rollout", "multi-turn", "learner", "grpo")
"""Of the table."""
NOT_SET_UP = "not set up: make bench-setup"
WARM_UP_TOKENS = 8
NO_TIME_SECONDS = 1e-3
"""A phase below it did not take place."""
MB_OF_MEMORY_BAR = 1500
SECONDS_TO_FIRST_TOKEN_BAR = 2


@dataclass
class Bench:
    """One run of the benchmark."""

    places: Places
    parameters: int
    repeats: int
    batches: list[int]
    deadline: float
    peers: bool = True
    """Without them there are no bars either: those are about the comparison."""
    report: Report = field(default_factory=Report)
    alive: list[Side] = field(default_factory=list)
    peaks: dict[str, list[Measurement]] = field(default_factory=dict)
    shares: list[tuple[str, str, str, Values, int, float | None]] = field(default_factory=list)
    """(section, what, dtype, tokens/s, operations a token and parameter, bar in %), until the peak is known."""
    traces: list[dict[str, Any]] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)
    began: float = field(default_factory=time.monotonic)

    def say(self, text: str) -> None:
        """Progress, on standard error."""
        elapsed = int(time.monotonic() - self.began)
        print(f"[{elapsed // 60:02}:{elapsed % 60:02}] {text}", file=sys.stderr, flush=True)

    @contextmanager
    def running(self, sides: list[Side], first: dict[str, Any], note: str) -> Iterator[dict[str, float]]:
        """The sides, started one after the other and asked `first`; yields the seconds from start to answer.

        A side that fails is stopped, named in `failures`, and takes no further part.
        """
        ready: dict[str, float] = {}
        try:
            for side in sides:
                self.say(f"{note}: starting {side.name}")
                self.alive.append(side)
                side.start()
                if self.ask(side, first, note) is not None:
                    ready[side.name] = side.age()
            yield ready
        finally:
            for side in sides:
                side.stop()
            self.alive = [side for side in self.alive if side not in sides]

    def ask(self, side: Side, request: dict[str, Any], note: str) -> Measurement | None:
        """One measurement; None if the side has failed, now or before."""
        if not side.children:
            return None
        try:
            return side.measure(request, self.deadline)
        except Failed as failure:
            self.failures[f"{note}, {side.name}"] = str(failure)
            self.say(f"{note}: {side.name} failed: {failure}")
            side.stop()
            return None

    def choose_split(self, sides: list[Side], request: dict[str, Any], note: str,
                     rate: Callable[[Measurement], float]) -> tuple[list[Side], dict[str, list[Measurement]]]:
        """Our fastest split, and the runs of the others. One after the other: a learner takes gigabytes."""
        runs: dict[str, list[Measurement]] = {}
        if len(sides) > 1:
            for side in sides:
                with self.running([side], {**request, "seed": 0}, note):
                    runs |= self.take_turns([side], request, note, lambda run: f"{rate(run):.3g}")
        best = best_of(runs, rate)
        chosen = [side for side in sides if side.name == best] if best else sides
        return chosen, {name: taken for name, taken in runs.items() if name != best}

    def take_turns(self, sides: list[Side], request: dict[str, Any], note: str,
                   rate: Callable[[Measurement], str]) -> dict[str, list[Measurement]]:
        """Every side `repeats` times, alternating."""
        runs: dict[str, list[Measurement]] = {side.name: [] for side in sides}
        for repeat in range(self.repeats):
            for side in sides:
                run = self.ask(side, {**request, "seed": repeat + 1}, note)
                if run is not None:
                    runs[side.name].append(run)
                    self.say(f"{note}, {repeat + 1}/{self.repeats}: {side.name} {rate(run)}, "
                             f"others took {run.foreign_cores:.2f} cores")
        return runs

    def bar(self, value: float, *, at_least: bool = True) -> Bar | None:
        """A bar, where there are any."""
        return Bar(value, at_least) if self.peers else None

    def missing(self, peer: str, side: Side | None, note: str) -> str:
        """Why a peer has no figure."""
        if side is None:
            return f"{peer} {NOT_SET_UP}" if self.peers else ""
        return f"{peer} failed, see the log" if f"{note}, {peer}" in self.failures else ""

    def measure_peak(self, dtypes: list[str]) -> None:
        """libtorch's fastest matrix product; called at the start and at the end, the better counts."""
        for dtype in dtypes:
            side = self.places.gemm(dtype)
            with self.running([side], {"seconds": 0.1}, f"gemm {dtype}"):
                run = self.ask(side, {"seconds": 0.5}, f"gemm {dtype}")
                if run is not None:
                    self.peaks.setdefault(dtype, []).append(run)

    def finish(self) -> None:
        """Peaks, and the shares of them."""
        for dtype, runs in self.peaks.items():
            peak = values("libtorch", "GFLOPS", runs, lambda run: run.answers[0]["gflops"])
            assert peak is not None
            self.report.rows.append(Row("gemm", f"peak, {self.places.threads} threads", dtype, peak,
                                        ratio_is_the_bar=False))
            for section, what, share_dtype, rates, operations, bar in self.shares:
                if share_dtype == dtype:
                    percent = [100 * rate * operations * self.parameters / (peak.best() * 1e9) for rate in rates.values]
                    ours = Values(rates.side, "% of peak", percent, rates.foreign_cores)
                    self.report.rows.append(Row(section, what, dtype, ours, bar=self.bar(bar) if bar else None,
                                                ratio_is_the_bar=False))
        # Stable: within a section the rows stay as they came.
        self.report.rows.sort(key=lambda row: ORDER.index(row.section))


def new_tokens_per_second(run: Measurement) -> float:
    """Sampled tokens by the wall clock."""
    return run.total("new_tokens") / run.seconds


def best_of(runs: dict[str, list[Measurement]], rate: Callable[[Measurement], float]) -> str | None:
    """Our split with the best median."""
    ours = {name: statistics.median(map(rate, taken)) for name, taken in runs.items()
            if name.startswith("ours") and taken}
    return max(ours, key=lambda name: ours[name]) if ours else None


def others(runs: dict[str, Any], best: str | None) -> list[str]:
    """Our other splits."""
    return [name for name in runs if name.startswith("ours") and name != best]


def best_first(runs: dict[str, list[Measurement]], best: str | None) -> list[str]:
    """Our splits, the chosen one first."""
    return ([best] if best else []) + others(runs, best)


def rollout(bench: Bench, dtype: str) -> None:
    """Generation: tokens a second, seconds to the first token, memory."""
    places, note, slots = bench.places, f"rollout {dtype}", max(bench.batches)
    ours = [places.ours("rollout", dtype, split, slots) for split in places.splits()]
    vllm = places.peer("vllm", "rollout_vllm.py", dtype)
    hf = places.peer("transformers", "rollout_hf.py", dtype)
    sides = ours + [peer for peer in (vllm, hf) if peer]
    with bench.running(sides, {"batch": 1, "new_tokens": 1, "seed": 0}, note) as ready:
        memory: dict[str, list[Measurement]] = {}
        best: str | None = None
        for batch in bench.batches:
            here = f"{note} batch {batch}"
            request = {"batch": batch, "new_tokens": work.NEW_TOKENS}
            for side in sides:
                bench.ask(side, {**request, "new_tokens": WARM_UP_TOKENS, "seed": 0}, here)
            memory = bench.take_turns(sides, request, here, lambda run: f"{new_tokens_per_second(run):.0f} tokens/s")
            best = best_of(memory, new_tokens_per_second)
            rates = {name: values(name, "tokens/s", runs, new_tokens_per_second) for name, runs in memory.items()}
            for name, peer, bar in (("vllm", vllm, 1.5), ("transformers", hf, 3.0))[: 2 if bench.peers else 1]:
                bench.report.rows.append(Row("rollout", f"batch {batch}", dtype, rates.get(best or ""), rates.get(name),
                                             bench.bar(bar), missing=bench.missing(name, peer, here)))
            for name in others(rates, best):
                bench.report.rows.append(Row("rollout", f"batch {batch}, other split", dtype, rates[name],
                                             ratio_is_the_bar=False))
            if best and (chosen := rates[best]):
                bench.shares.append(("rollout", f"batch {batch}", dtype, chosen, 2, 50.0 if batch >= 64 else None))
        once = {name: Values(name, "s", [seconds], [], False) for name, seconds in ready.items()}
        peak = {name: values(name, "MB", runs, lambda run: run.peak_mb, larger_is_better=False)
                for name, runs in memory.items()}
        for what, limit, table in (("start to first token", SECONDS_TO_FIRST_TOKEN_BAR, once),
                                   (f"peak memory, batch {bench.batches[-1]}", MB_OF_MEMORY_BAR, peak)):
            for name in ("vllm", "transformers"):
                if name == "vllm" or name in table:
                    bench.report.rows.append(Row("rollout", what, dtype, table.get(best or ""), table.get(name),
                                                 bench.bar(limit, at_least=False), ratio_is_the_bar=False))


def multi_turn(bench: Bench, dtype: str) -> None:
    """Chains with tools between their turns, against vLLM's server with its prefix cache."""
    places, note = bench.places, f"multi-turn {dtype}"
    ours = [places.ours("multi-turn", dtype, split, int(work.MULTI_TURN["chains"])) for split in places.splits()]
    server = places.peer("vllm server", "multi_turn_vllm.py", dtype)
    sides = ours + ([server] if server else [])
    warm_up = {**work.MULTI_TURN, "new_tokens": WARM_UP_TOKENS, "seed": 0}
    with bench.running(sides, warm_up, note):
        runs = bench.take_turns(sides, work.MULTI_TURN, note, lambda run: f"{new_tokens_per_second(run):.0f} tokens/s")
    best, missing = best_of(runs, new_tokens_per_second), bench.missing("vllm server", server, note)
    what = "{chains} chains, {turns} turns".format(**work.MULTI_TURN)
    server_rate = values("vllm server", "tokens/s", runs.get("vllm server", []), new_tokens_per_second)
    for name in best_first(runs, best):
        chosen = name == best
        bench.report.rows.append(Row(
            "multi-turn", what + ("" if chosen else ", other split"), dtype,
            values(name, "tokens/s", runs[name], new_tokens_per_second), server_rate if chosen else None,
            bench.bar(2.0) if chosen else None, ratio_is_the_bar=chosen, missing=missing))
    counted = {name: values(name, "% of context", taken, prefilled_percent, larger_is_better=False)
               for name, taken in runs.items()}
    bench.report.rows.append(Row("multi-turn", "tokens prefilled", dtype, counted.get(best or ""),
                                 counted.get("vllm server"), ratio_is_the_bar=False))


def prefilled_percent(run: Measurement) -> float:
    """Tokens computed by prefill, of those in the contexts of all turns."""
    if "cached_tokens" in run.answers[0]:
        computed = run.total("context_tokens") - run.total("cached_tokens")
    else:
        computed = run.total("prefill_tokens")
    return 100 * computed / run.total("context_tokens")


def learner(bench: Bench, dtype: str) -> None:
    """A training step: forward and backward, the reference's log-probs, the optimizer, memory."""
    places, note = bench.places, f"learner {dtype}"
    hf = places.peer("transformers", "learner_hf.py", dtype)
    tokens = work.LEARNER["rows"] * work.LEARNER["tokens"]

    def rate(phase: str) -> Callable[[Measurement], float]:
        return lambda run: tokens / run.phase(phase)

    def milliseconds(run: Measurement) -> float:
        return 1e3 * run.phase("optimizer") * work.OPTIMIZER_PARAMETERS / float(run.answers[0]["parameters"])

    splits = [places.ours("learner", dtype, split) for split in places.splits()]
    ours, slower = bench.choose_split(splits, work.LEARNER, note, rate("forward_backward"))
    sides = ours + ([hf] if hf else [])
    with bench.running(sides, {**work.LEARNER, "seed": 0}, note):
        runs = bench.take_turns(sides, work.LEARNER, note, lambda run: f"{rate('forward_backward')(run):.0f} tokens/s")
    runs |= slower
    best = ours[0].name if runs.get(ours[0].name) else None
    peer, missing = runs.get("transformers", []), bench.missing("transformers", hf, note)
    what = "{rows} × {tokens} tokens".format(**work.LEARNER)
    for name in best_first(runs, best):
        chosen = name == best
        for title, phase in (("forward+backward", "forward_backward"), ("reference log-probs", "reference")):
            title = f"{title}, {what}" + ("" if chosen else ", other split")
            mine = values(name, "tokens/s", runs[name], rate(phase))
            theirs = values("transformers", "tokens/s", peer, rate(phase)) if chosen else None
            bench.report.rows.append(Row("learner", title, dtype, mine, theirs, bench.bar(1.5) if chosen else None,
                                         ratio_is_the_bar=chosen, missing=missing))
            if chosen and mine and phase == "forward_backward":
                bench.shares.append(("learner", title, dtype, mine, 6, 55.0))
    own = runs.get(best or "", [])
    smaller: dict[str, Any] = {"larger_is_better": False}
    bench.report.rows.append(Row(
        "learner", "optimizer step, of 50M parameters", dtype, values(best or "", "ms", own, milliseconds, **smaller),
        values("transformers", "ms", peer, milliseconds, **smaller), bench.bar(40, at_least=False),
        ratio_is_the_bar=False))
    bench.report.rows.append(Row(
        "learner", "peak memory", dtype, values(best or "", "MB", own, lambda run: run.peak_mb, **smaller),
        values("transformers", "MB", peer, lambda run: run.peak_mb, **smaller), ratio_is_the_bar=False))


def grpo(bench: Bench, dtype: str) -> None:
    """A whole GRPO step, against TRL's; with where its seconds go."""
    places, note = bench.places, f"GRPO {dtype}"
    groups = work.GRPO["completions"] // work.GROUP
    splits = [split for split in places.splits() if groups % split.processes == 0]
    ours, slower = bench.choose_split([places.ours("grpo", dtype, split) for split in splits], work.GRPO, note,
                                      lambda run: 1 / run.inner_seconds())
    trl = places.peer("TRL", "grpo_trl.py", dtype)
    sides = ours + ([trl] if trl else [])
    with bench.running(sides, {**work.GRPO, "seed": 0}, note):
        runs = bench.take_turns(sides, work.GRPO, note, lambda run: f"{run.inner_seconds():.2f} s")
    runs |= slower
    best = ours[0].name if runs.get(ours[0].name) else None
    peer, missing = runs.get("TRL", []), bench.missing("TRL", trl, note)
    smaller: dict[str, Any] = {"larger_is_better": False}
    what = "step, {completions} completions × {new_tokens} tokens".format(**work.GRPO)
    for name in best_first(runs, best):
        chosen = name == best
        bench.report.rows.append(Row(
            "grpo", what + ("" if chosen else ", other split"), dtype,
            values(name, "s", runs[name], Measurement.inner_seconds, **smaller),
            values("TRL", "s", peer, Measurement.inner_seconds, **smaller) if chosen else None,
            bench.bar(2.0) if chosen else None, ratio_is_the_bar=chosen, missing=missing))
        add_steps(bench.traces, f"{name} {dtype}", runs[name])
    own = runs.get(best or "", [])

    def generated(run: Measurement) -> float:
        return max(float(answer.get("generate", 0.0)) for answer in run.answers) or run.phase("generate")

    def trained(run: Measurement) -> float:
        return run.phase("forward_backward") or run.phase("forward") + run.phase("backward")

    parts: list[tuple[str, Callable[[Measurement], float]]] = [
        ("generation", generated), ("forward+backward", trained),
        ("old log-probs", lambda run: run.phase("old_log_prob")), ("all-reduce", lambda run: run.phase("all_reduce")),
        ("optimizer", lambda run: run.phase("optimizer"))]
    for part, seconds in parts:
        theirs = values("TRL", "s", peer, seconds, **smaller)
        if theirs and not theirs.best():
            theirs = None
        mine = values(best or "", "s", own, seconds, **smaller)
        if theirs is None and mine and mine.median() < NO_TIME_SECONDS:
            continue
        bench.report.rows.append(Row("grpo", f"of which {part}", dtype, mine, theirs, ratio_is_the_bar=False))
    bench.report.rows.append(Row(
        "grpo", "peak memory (ratio: TRL's over ours)", dtype,
        values(best or "", "MB", own, lambda run: run.peak_mb, **smaller),
        values("TRL", "MB", peer, lambda run: run.peak_mb, **smaller), bench.bar(2.0), missing=missing))


SECTIONS: dict[str, Callable[[Bench, str], None]] = {
    "rollout": rollout, "multi_turn": multi_turn, "learner": learner, "grpo": grpo,
}
