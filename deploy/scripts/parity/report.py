"""What was found, against its bound: gathered per check and group of models, printed as a table, written as JSON."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Check:
    """A figure that must not exceed its bound."""

    label: str
    bound: float


F32 = 1e-4
"""Nats by which float32 log-probs and entropies may be off."""
TIE = 2 * F32
"""Two tokens whose logits in `transformers` float32 are closer than this are tied: either may be the greedy one."""
BF16_MARGIN = 1.10
"""Root-mean-square errors over some thousand tokens vary by a few per cent from draw to draw."""

CHECKS = {
    "logits": Check("f32 logits: largest difference / largest logit", F32),
    "log_probs": Check("f32 log-probs: largest difference, nats", F32),
    "entropies": Check("f32 entropies: largest difference, nats", F32),
    "exact_log_probs": Check("f32 log-probs: from float64, nats", F32),
    "exact_entropies": Check("f32 entropies: from float64, nats", F32),
    "gradients": Check("f32 gradients: from float64 / |gradient|, worst parameter", F32),
    "greedy": Check("f32 greedy: continuations that part, ties aside", 0),
    "ties": Check("f32 greedy: share of continuations that part at a tie", 0.02),
    "turn_tokens": Check("f32 turns through the cache: tokens that are not greedy", 0),
    "turn_log_probs": Check("f32 turns through the cache: log-probs, nats", F32),
    "bf16_log_probs": Check("bf16 log-probs: our rms error / theirs", BF16_MARGIN),
    "bf16_entropies": Check("bf16 entropies: our rms error / theirs", BF16_MARGIN),
    "bf16_gradients": Check("bf16 gradients: our error / theirs", BF16_MARGIN),
    "export_weights": Check("exported: weights that differ when loaded there", 0),
    "export_log_probs": Check("exported: log-probs there against ours, nats", F32),
}


@dataclass
class Worst:
    """The largest value of a check in a group, and the model it came from."""

    value: float
    where: str
    count: int = 1

    def add(self, value: float, where: str) -> None:
        self.count += 1
        if not value <= self.value and not math.isnan(self.value):  # a NaN is the worst there is, and stays it
            self.value, self.where = value, where


@dataclass
class Findings:
    """Everything found so far."""

    figures: dict[tuple[str, str], Worst] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    notes: dict[str, Any] = field(default_factory=dict)

    def add(self, check: str, group: str, value: float, where: str) -> None:
        found = self.figures.get((check, group))
        if found is None:
            self.figures[check, group] = Worst(value, where)
        else:
            found.add(value, where)

    def passed(self, check: str, group: str) -> bool:
        return self.figures[check, group].value <= CHECKS[check].bound

    def all_passed(self) -> bool:
        return bool(self.figures) and not self.failures and all(self.passed(*key) for key in self.figures)

    def groups(self) -> list[str]:
        return list(dict.fromkeys(group for _, group in self.figures))

    def table(self) -> str:
        groups = self.groups()
        width = max(len(check.label) for check in CHECKS.values())
        columns = [max(len(group), 9) for group in groups]
        head = [f"{'worst of each kind of model':<{width}}", f"{'bound':>7}"]
        head += [f"{group:>{column}}" for group, column in zip(groups, columns, strict=True)]
        lines = ["  ".join(head)]
        for key, check in CHECKS.items():
            cells = [f"{check.label:<{width}}", f"{check.bound:>7.4g}"]
            for group, column in zip(groups, columns, strict=True):
                found = self.figures.get((key, group))
                text = "-" if found is None else f"{found.value:.2g}"
                if found is not None and not self.passed(key, group):
                    text += " FAIL"
                cells.append(f"{text:>{column}}")
            lines.append("  ".join(cells).rstrip())
        for (key, group), found in self.figures.items():
            if not self.passed(key, group):
                lines.append(
                    f"FAIL  {CHECKS[key].label}: {found.value:.4g} exceeds {CHECKS[key].bound:.4g} in {found.where}"
                )
        lines += [f"FAIL  {failure}" for failure in self.failures]
        return "\n".join(lines)

    def json(self) -> dict[str, Any]:
        figures = [
            {
                "check": key,
                "label": CHECKS[key].label,
                "models": group,
                "worst": found.value,
                "bound": CHECKS[key].bound,
                "passed": self.passed(key, group),
                "where": found.where,
                "of": found.count,
            }
            for (key, group), found in self.figures.items()
        ]
        return {"passed": self.all_passed(), "figures": figures, "failures": self.failures, **self.notes}
