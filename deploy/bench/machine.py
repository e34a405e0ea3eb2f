"""What the operating system says: the machine, a process tree's memory and CPU, and what everyone else takes."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

TICKS = os.sysconf("SC_CLK_TCK")
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
SAMPLE_SECONDS = 0.1


def describe() -> dict[str, Any]:
    """The CPU, its cores and what it multiplies in hardware; memory in MB."""
    info = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    fields = dict(line.split(":", 1) for line in info.splitlines() if ":" in line)
    fields = {key.strip(): value.strip() for key, value in fields.items()}
    flags = fields.get("flags", "").split()
    memory = Path("/proc/meminfo").read_text(encoding="utf-8").split()
    return {
        "cpu": fields.get("model name", "unknown"),
        "cores": os.cpu_count(),
        "usable_cores": len(os.sched_getaffinity(0)),
        "flags": [flag for flag in FLAGS if flag in flags],
        "memory_mb": int(memory[1]) // 1024,
        "kernel": os.uname().release,
    }


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


def resident_mb(pids: Iterable[int]) -> float:
    """Resident memory of processes by the system's count; what they share counts for each."""
    pages = 0
    for pid in pids:
        try:
            pages += int(Path(f"/proc/{pid}/statm").read_text(encoding="utf-8").split()[1])
        except (OSError, IndexError):
            continue
    return pages * PAGE_BYTES / 1e6


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
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _ticks(self) -> tuple[int, int, float]:
        known = processes()
        own = sum(known[pid][1] for pid in tree(self.roots, known))
        return busy_ticks(), own, time.monotonic()

    def _watch(self) -> None:
        while True:
            self.peak_mb = max(self.peak_mb, resident_mb(tree(self.roots)))
            if self._stop.wait(SAMPLE_SECONDS):
                return

    def __enter__(self) -> Meter:
        self._before = self._ticks()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        busy, own, now = (after - before for before, after in zip(self._before, self._ticks(), strict=True))
        self.seconds = now
        self.foreign_cores = max(0.0, (busy - own) / TICKS / max(now, 0.01))
