"""Our GRPO steps as one Chrome trace: the spans that the ranks gathered, each side after the other in Perfetto."""

from __future__ import annotations

from typing import Any

from side import Measurement

Event = dict[str, Any]


def add_steps(events: list[Event], side: str, runs: list[Measurement]) -> None:
    """Adds a side's steps, a process a rank; times become microseconds since the side's first span. The answers give
    up their events: they are in the trace, not in the figures."""
    taken = [(rank, event) for run in runs for rank, answer in enumerate(run.answers)
             for event in answer.pop("trace_events", [])]
    starts = [event["ts"] for _, event in taken if "ts" in event]
    if not starts:
        return
    began = min(starts)
    first = max((event["pid"] for event in events), default=0) + 1
    named = set()
    for rank, event in taken:
        event = {**event, "pid": first + rank}
        if event["ph"] == "M":
            if event["name"] == "process_name":
                event["args"] = {"name": f"{side}, rank {rank}"}
            # Each step names process and lanes again; the same steps have the same lanes.
            key = (event["name"], event["pid"], event["tid"])
            if key in named:
                continue
            named.add(key)
        else:
            event["ts"] -= began
        events.append(event)
