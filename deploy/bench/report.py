"""The result: one row a comparison, held against its bar, as a table and as JSON."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from side import Measurement

NOISY_CORES = 0.15
"""Others' CPU beyond which a measurement says little."""


@dataclass
class Values:
    """One quantity of one side over the repeats."""

    side: str
    unit: str
    values: list[float]
    foreign_cores: list[float]
    larger_is_better: bool = True
    note: str = ""
    caveat: str = ""
    """What the side lacked to be at its best."""

    def best(self) -> float:
        """Of the repeats."""
        return max(self.values) if self.larger_is_better else min(self.values)

    def median(self) -> float:
        """Of the repeats."""
        return statistics.median(self.values)

    def gain_over(self, other: Values, of: Callable[[Values], float]) -> float:
        """How many times better, by medians or by bests."""
        ours, theirs = of(self), of(other)
        return ours / theirs if self.larger_is_better else theirs / ours

    def noise(self) -> float:
        """Cores that others took, at worst."""
        return max(self.foreign_cores, default=0.0)


@dataclass
class Bar:
    """What must hold: a gain over the peer, or a limit of ours alone; medians count."""

    value: float
    at_least: bool = True

    def holds(self, value: float) -> bool:
        """Whether it does."""
        return value >= self.value if self.at_least else value <= self.value

    def __str__(self) -> str:
        return f"{'≥' if self.at_least else '≤'} {self.value:g}"


@dataclass
class Row:
    """One line of the table. Without `peer`, ours is held against the bar itself."""

    section: str
    what: str
    dtype: str
    ours: Values | None
    peer: Values | None = None
    bar: Bar | None = None
    ratio_is_the_bar: bool = True
    missing: str = ""

    def figure(self) -> float | None:
        """The number that the bar is about."""
        if self.ours is None or (self.ratio_is_the_bar and self.peer is None):
            return None
        if self.ratio_is_the_bar and self.peer is not None:
            return self.ours.gain_over(self.peer, Values.median)
        return self.ours.median()

    def verdict(self) -> str:
        """pass, FAIL, or why there is none."""
        figure = self.figure()
        if figure is None:
            return self.missing or ("" if self.ours and not self.bar else "not measured")
        if self.bar is None:
            return ""
        sides = [side for side in (self.ours, self.peer) if side is not None]
        noise = max((side.noise() for side in sides), default=0.0)
        doubts = [f"others took {noise:.1f} cores"] if noise > NOISY_CORES else []
        doubts += [side.caveat for side in sides if side.caveat]
        word = "pass" if self.bar.holds(figure) else "FAIL"
        return f"{word} ({', '.join(doubts)})" if doubts else word

    def failed(self) -> bool:
        """Whether a bar does not hold."""
        figure = self.figure()
        return figure is not None and self.bar is not None and not self.bar.holds(figure)

    def json(self) -> dict[str, Any]:
        """All of it."""
        ratios = None
        if self.ours is not None and self.peer is not None:
            ratios = {name: self.ours.gain_over(self.peer, of)
                      for name, of in (("best", Values.best), ("median", Values.median))}
        return {
            "section": self.section, "what": self.what, "dtype": self.dtype,
            "ours": asdict(self.ours) if self.ours else None, "peer": asdict(self.peer) if self.peer else None,
            "ratio": ratios, "bar": str(self.bar) if self.bar else None, "verdict": self.verdict(),
        }


def values(side: str, unit: str, runs: list[Measurement], of: Callable[[Measurement], float], *,
           larger_is_better: bool = True, note: str = "") -> Values | None:
    """A quantity of each run, if there are runs."""
    if not runs:
        return None
    numbers = [of(run) for run in runs]
    return Values(side, unit, numbers, [run.foreign_cores for run in runs], larger_is_better, note, runs[0].caveat)


def number(value: float) -> str:
    """Three figures, more where they stand before the point."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def cell(side: Values | None) -> str:
    """`best / median unit (who)`."""
    if side is None:
        return "–"
    shown = number(side.best())
    if len(side.values) > 1:
        shown += f" / {number(side.median())}"
    return f"{shown} {side.unit} ({side.side}{'; ' + side.note if side.note else ''})"


@dataclass
class Report:
    """Rows as they come, and what else the JSON file holds."""

    rows: list[Row] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    def table(self) -> str:
        """For the terminal: ours and peer as best / median, the ratio of the medians (of the bests)."""
        head = ["work", "ours", "peer", "ratio (best)", "bar", ""]
        lines = []
        for row in self.rows:
            ratio = ""
            if row.ours is not None and row.peer is not None:
                median, best = (row.ours.gain_over(row.peer, of) for of in (Values.median, Values.best))
                ratio = f"{median:.2f} ({best:.2f})"
            what = f"{row.section}: {row.what}, {row.dtype}"
            lines.append([what, cell(row.ours), cell(row.peer), ratio, str(row.bar or ""), row.verdict()])
        widths = [max(len(line[column]) for line in [head, *lines]) for column in range(len(head))]
        rule = ["-" * width for width in widths]
        return "\n".join("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip()
                         for line in [head, rule, *lines])

    def json(self) -> dict[str, Any]:
        """All of it."""
        return {**self.facts, "rows": [row.json() for row in self.rows]}
