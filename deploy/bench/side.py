"""One side of a comparison: a process, or several that share the work, that answer requests one after another.

What must stay true: no answer is waited for without a deadline, and no process outlives this program, however it
ends.
"""

from __future__ import annotations

import ctypes
import json
import os
import queue
import signal
import subprocess
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from machine import Meter, processes, resident_mb, tree

PR_SET_PDEATHSIG = 1
STOP_SECONDS = 8
LAST_WORDS = 3

_libc = ctypes.CDLL(None)


class Failed(Exception):
    """A side that ended, or did not answer in time; the text says why."""


@dataclass
class Measurement:
    """One answered request."""

    seconds: float
    """From the request to the last answer, as seen from outside."""
    answers: list[dict[str, Any]]
    peak_mb: float
    foreign_cores: float

    def inner_seconds(self) -> float:
        """The slowest process's own clock."""
        return max(float(answer["seconds"]) for answer in self.answers)

    def total(self, key: str) -> float:
        """A value summed over the processes."""
        return sum(float(answer[key]) for answer in self.answers)

    def phase(self, name: str) -> float:
        """A phase's seconds: the slowest process's."""
        return max(float(answer["phases"].get(name, 0.0)) for answer in self.answers)


class Child:
    """A process with a line protocol; its standard error goes to a file."""

    def __init__(self, command: list[str], environment: Mapping[str, str], log: Path) -> None:
        self.log = log
        self.started = time.monotonic()
        with log.open("ab") as errors:
            self.process = subprocess.Popen(
                command, env=dict(environment), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors,
                text=True, bufsize=1, process_group=0,
                preexec_fn=lambda: _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL),
            )
        self._lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._lines.put(line)
        self._lines.put(None)

    def send(self, request: dict[str, Any]) -> None:
        """Hands a request over."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        except (BrokenPipeError, ValueError) as error:
            raise Failed(self.ending()) from error

    def receive(self, deadline: float) -> dict[str, Any]:
        """The next answer, until `deadline` on the monotonic clock."""
        line: str | None = ""
        while line is not None and not line.startswith("{"):  # a library's greeting
            try:
                line = self._lines.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                raise Failed(f"no answer before its deadline; its output is in {self.log}") from None
        if line is None:
            raise Failed(self.ending())
        answer: dict[str, Any] = json.loads(line)
        return answer

    def ending(self) -> str:
        """How it ended, and why by its log."""
        status = self.process.wait(STOP_SECONDS)
        how = f"status {status}" if status >= 0 else f"signal {-status}"
        hint = " (was memory short? the kernel's log says whom it killed)" if status == -signal.SIGKILL else ""
        lines = [line for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        return f"it ended with {how}{hint}: " + " | ".join(lines[-LAST_WORDS:])[-700:]

    def members(self) -> set[int]:
        """It, what descends from it, and what was orphaned in its process group."""
        pids = tree([self.process.pid])
        for pid in processes():
            try:
                if os.getpgid(pid) == self.process.pid:
                    pids.add(pid)
            except OSError:
                continue
        return pids

    def stop(self) -> None:
        """Ends it and all it started: kindly, then not."""
        if self.process.stdin is not None:
            try:
                self.process.stdin.close()
            except OSError:
                pass
        members = self.members()
        deadline = time.monotonic() + STOP_SECONDS
        for number in (signal.SIGTERM, signal.SIGKILL):
            for pid in members | self.members():
                try:
                    os.kill(pid, number)
                except OSError:
                    continue
            while time.monotonic() < deadline and (self.process.poll() is None or self.members() - {self.process.pid}):
                time.sleep(0.05)
            deadline += 2
        self.process.wait(STOP_SECONDS)


@dataclass
class Side:
    """A name, and the commands of the processes that share its work."""

    name: str
    commands: list[list[str]]
    environment: Mapping[str, str]
    log: Path
    children: list[Child] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)

    def start(self) -> None:
        """Starts the processes; their first answer says that they are ready."""
        self.log.unlink(missing_ok=True)
        for command in self.commands:
            self.children.append(Child(command, self.environment, self.log))

    def measure(self, request: dict[str, Any], deadline_seconds: float) -> Measurement:
        """Sends the request to every process and waits for all answers."""
        deadline = time.monotonic() + deadline_seconds
        with Meter([child.process.pid for child in self.children]) as meter:
            started = time.monotonic()
            for child in self.children:
                child.send(request)
            answers = [child.receive(deadline) for child in self.children]
            seconds = time.monotonic() - started
        self.versions.update(answers[0].get("versions", {}))
        return Measurement(seconds, answers, meter.peak_mb, meter.foreign_cores)

    def age(self) -> float:
        """Seconds since its first process was started."""
        return time.monotonic() - self.children[0].started

    def resident_mb(self) -> float:
        """Memory of all its processes now."""
        return resident_mb(tree(child.process.pid for child in self.children))

    def stop(self) -> None:
        """Ends all its processes."""
        for child in self.children:
            child.stop()
        self.children.clear()
