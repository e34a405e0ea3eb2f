"""What the operating system says: the machine, a process tree's memory and CPU, and what everyone else takes."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

TICKS = os.sysconf("SC_CLK_TCK")
FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
RESET_PEAK = "5"
"""What makes /proc/PID/clear_refs count a process's peak of resident memory anew."""


def describe() -> dict[str, Any]:
    """The CPU, its cores and what it multiplies in hardware; memory in MB."""
    info = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    fields = dict(line.split(":", 1) for line in info.splitlines() if ":" in line)
    fields = {key.strip(): value.strip() for key, value in fields.items()}
    flags = fields.get("flags", "").split()
    return {
        "cpu": fields.get("model name", "unknown"),
        "cores": os.cpu_count(),
        "usable_cores": len(os.sched_getaffinity(0)),
        "flags": [flag for flag in FLAGS if flag in flags],
        "memory_mb": int(memory_bytes("MemTotal") / 1e6),
        "kernel": os.uname().release,
    }


def memory_bytes(name: str) -> int:
    """A line of /proc/meminfo: MemTotal, MemAvailable."""
    return field_bytes(Path("/proc/meminfo"), name)


def field_bytes(path: Path, name: str) -> int:
    """`NAME:  123 kB` of one of the kernel's files; 0 where the process has gone."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), 0)


def processes() -> dict[int, tuple[int, int]]:
    """Every process's parent and CPU ticks."""
    found = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                text = Path(f"/proc/{entry}/stat").read_text(encoding="utf-8")
            except OSError:
                continue
            fields = text[text.rindex(")") + 2 :].split()
            found[int(entry)] = (int(fields[1]), int(fields[11]) + int(fields[12]))
    return found


def tree(roots: Iterable[int], known: dict[int, tuple[int, int]] | None = None) -> set[int]:
    """The processes and all that descend from them."""
    known = processes() if known is None else known
    found = {root for root in roots if root in known}
    grown = True
    while grown:
        more = {pid for pid, (parent, _) in known.items() if parent in found} - found
        found |= more
        grown = bool(more)
    return found


def reset_peaks(pids: Iterable[int]) -> None:
    """Lets each process's peak of resident memory begin from what it holds now."""
    for pid in pids:
        try:
            Path(f"/proc/{pid}/clear_refs").write_text(RESET_PEAK, encoding="ascii")
        except OSError:
            continue


def peak_mb(pids: Iterable[int]) -> float:
    """Peak of resident memory since `reset_peaks`, by the kernel's own count. Of several processes the sum of their
    peaks, in which pages that they share now count once."""
    pids = list(pids)
    total = sum(field_bytes(Path(f"/proc/{pid}/status"), "VmHWM") for pid in pids)
    if len(pids) > 1:
        for pid in pids:
            held, own_part = (field_bytes(Path(f"/proc/{pid}/smaps_rollup"), name) for name in ("Rss", "Pss"))
            total -= held - own_part
    return total / 1e6


def busy_ticks() -> int:
    """CPU ticks of the whole machine in which it was not idle, those the hypervisor took included."""
    fields = Path("/proc/stat").read_text(encoding="utf-8").split("\n", 1)[0].split()[1:9]
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, fields)
    return user + nice + system + irq + softirq + steal


class Meter:
    """Watches process trees while something is measured: peak memory, and cores that others used.

    Idle peers and this program count as others: they disturb like anyone else.
    """

    def __init__(self, roots: list[int]) -> None:
        self.roots = roots
        self.peak_mb = self.foreign_cores = self.seconds = 0.0

    def _ticks(self) -> tuple[int, int, float]:
        known = processes()
        own = sum(known[pid][1] for pid in tree(self.roots, known))
        return busy_ticks(), own, time.monotonic()

    def __enter__(self) -> Meter:
        reset_peaks(tree(self.roots))
        self._before = self._ticks()
        return self

    def __exit__(self, *_: object) -> None:
        busy, own, now = (after - before for before, after in zip(self._before, self._ticks(), strict=True))
        self.seconds = now
        self.foreign_cores = max(0.0, (busy - own) / TICKS / max(now, 0.01))
        self.peak_mb = peak_mb(tree(self.roots))
