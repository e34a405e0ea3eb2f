"""One run of the benchmark: which sides are alive, who is asked what, and what became of it.

Our fastest split is chosen first; then it and the peers are alive together and warm, and take turns: a slow minute of
the machine meets each of them. Who is not asked is suspended.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from report import Bar, Report, Row, Values, values
from side import Failed, Measurement, Side
from sides import Places

ORDER = ("gemm", "rollout", "multi-turn", "learner", "grpo")
"""Of the table."""
NOT_SET_UP = "not set up: make bench-setup"
TIE = 0.03
"""Rates that differ by less are not told apart: repeats of one split differ by as much."""


@dataclass
class Started:
    """What a side's start and its first answer took."""

    seconds: float
    first: Measurement


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
    def running(self, sides: list[Side], first: dict[str, Any], note: str) -> Iterator[dict[str, Started]]:
        """The sides, started one after the other and asked `first`; yields what that took.

        A side that fails is stopped, named in `failures`, and takes no further part.
        """
        ready: dict[str, Started] = {}
        try:
            for side in sides:
                self.say(f"{note}: starting {side.name}")
                self.alive.append(side)
                side.start()
                if (run := self.ask(side, first, note)) is not None:
                    ready[side.name] = Started(side.age(), run)
            yield ready
        finally:
            for side in sides:
                side.stop()
                self.report.facts.setdefault("sides", {})[f"{note}, {side.name}"] = side.facts()
            self.alive = [side for side in self.alive if side not in sides]

    def ask(self, side: Side, request: dict[str, Any], note: str) -> Measurement | None:
        """One measurement, while the other sides are suspended; None if the side has failed, now or before."""
        if not side.children:
            return None
        try:
            side.resume()
            run = side.measure(request, self.deadline)
            side.suspend()
            return run
        except Failed as failure:
            self.failures[f"{note}, {side.name}"] = str(failure)
            self.say(f"{note}: {side.name} failed: {failure}")
            side.stop()
            return None

    def choose_split(self, sides: list[Side], request: dict[str, Any], note: str,
                     rate: Callable[[Measurement], float]) -> tuple[list[Side], dict[str, list[Measurement]]]:
        """Our best split, and the runs of the others. One after the other: each takes the memory."""
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

    def measure_peak(self, dtypes: Iterable[str]) -> None:
        """libtorch's fastest matrix product; called at the start and at the end, the better counts."""
        for dtype in dtypes:
            side = self.places.gemm(dtype)
            with self.running([side], {"seconds": 0.1}, f"gemm {dtype}"):
                run = self.ask(side, {"seconds": 0.5}, f"gemm {dtype}")
                if run is not None:
                    self.peaks.setdefault(dtype, []).append(run)

    def finish(self) -> None:
        """Peaks, and the shares of them."""
        peaks = {dtype: values("libtorch", "GFLOPS", runs, lambda run: run.answers[0]["gflops"])
                 for dtype, runs in self.peaks.items()}
        for dtype, peak in peaks.items():
            self.report.rows.append(Row("gemm", f"peak, {self.places.threads} threads", dtype, peak,
                                        ratio_is_the_bar=False))
        for section, what, dtype, rates, operations, bar in self.shares:
            # bf16 may be multiplied in f32, where the machine does that faster.
            usable = [peak.best() for of, peak in peaks.items() if peak and (of == dtype or dtype == "bf16")]
            if not usable:
                continue
            percent = [100 * rate * operations * self.parameters / (max(usable) * 1e9) for rate in rates.values]
            ours = Values(rates.side, "% of peak", percent, rates.foreign_cores)
            self.report.rows.append(Row(section, what, dtype, ours, bar=self.bar(bar) if bar else None,
                                        ratio_is_the_bar=False))
        # Stable: within a section the rows stay as they came.
        self.report.rows.sort(key=lambda row: ORDER.index(row.section))


def best_of(runs: dict[str, list[Measurement]], rate: Callable[[Measurement], float]) -> str | None:
    """The side with the best median; of those that are as fast but for `TIE`, the one that takes the least memory."""
    medians = {name: statistics.median(map(rate, taken)) for name, taken in runs.items() if taken}
    fast = [name for name, median in medians.items() if median >= (1 - TIE) * max(medians.values())]
    return min(fast, key=lambda name: max(run.peak_mb for run in runs[name])) if fast else None
