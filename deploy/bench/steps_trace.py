"""Our GRPO steps as Chrome-trace events: where each second goes, in Perfetto."""

from __future__ import annotations

from typing import Any

from side import Measurement

PHASES = ("reference", "old_log_prob", "forward_backward", "all_reduce", "optimizer")
"""The learner reports sums; with one update a step they follow each other in this order."""


def add_steps(events: list[dict[str, Any]], name: str, runs: list[Measurement]) -> None:
    """Adds a side's steps, one after the other: a process a side, a track a rank."""
    process = len({event["pid"] for event in events}) + 1
    events.append({"name": "process_name", "ph": "M", "pid": process, "args": {"name": name}})
    start = 0.0
    for step, run in enumerate(runs, 1):
        for rank, answer in enumerate(run.answers):
            track = {"ph": "X", "pid": process, "tid": rank}
            events.append({**track, "name": f"step {step}", "ts": start * 1e6, "dur": answer["seconds"] * 1e6})
            at = start
            parts = {"generate": answer["generate"], **{phase: answer["phases"][phase] for phase in PHASES}}
            for part, seconds in parts.items():
                if seconds > 0:
                    events.append({**track, "name": part, "ts": at * 1e6, "dur": seconds * 1e6})
                    at += seconds
        start += run.inner_seconds()
