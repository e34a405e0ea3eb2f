"""One side of a comparison: a process, or several that share the work, that answer requests one after another.

What must stay true: no answer is waited for without a deadline, and no process outlives this program, however it
ends.
"""

from __future__ import annotations

import contextlib
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

from machine import Meter, processes, tree

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
    caveat: str = ""
    """What the side lacks to be at its best here."""

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
    """A process with a line protocol; its standard error goes to a file, its answers into a queue: (`number`, line),
    and (`number`, None) when there will be no more."""

    def __init__(self, number: int, command: list[str], environment: Mapping[str, str], log: Path,
                 arrived: queue.Queue[tuple[int, str | None]]) -> None:
        self.number, self.log, self._arrived = number, log, arrived
        self.started = time.monotonic()
        with log.open("ab") as errors:
            self.process = subprocess.Popen(
                command, env=dict(environment), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors,
                text=True, bufsize=1, process_group=0,
                preexec_fn=lambda: _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL),
            )
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as lines:
            for line in lines:
                self._arrived.put((self.number, line))
        self._arrived.put((self.number, None))

    def send(self, request: dict[str, Any]) -> None:
        """Hands a request over; one that has ended shows by its answers' end."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError, ValueError):
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()

    def ending(self) -> str:
        """How it ended, and why by its log."""
        try:
            status = self.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            how, hint = "its output closed, though it still runs", ""
        else:
            how = f"it ended with status {status}" if status >= 0 else f"it ended with signal {-status}"
            hint = " (was memory short? the kernel's log says whom it killed)" if status == -signal.SIGKILL else ""
        lines = [line for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        return f"{how}{hint}: " + " | ".join(lines[-LAST_WORDS:])[-700:]

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

    def send_signal(self, number: signal.Signals) -> None:
        """Sends a signal to it and all it started; one that has ended meanwhile needs none."""
        for pid in self.members():
            with contextlib.suppress(OSError):
                os.kill(pid, number)

    def stop(self) -> None:
        """Ends it and all it started: kindly, then not."""
        if self.process.stdin is not None:
            try:
                self.process.stdin.close()
            except OSError:
                pass
        members = self.members()
        deadline = time.monotonic() + STOP_SECONDS
        self.send_signal(signal.SIGCONT)  # one that is suspended would not see that it shall end
        for number in (signal.SIGTERM, signal.SIGKILL):
            for pid in members | self.members():
                try:
                    os.kill(pid, number)
                except OSError:
                    continue
            while time.monotonic() < deadline and (self.process.poll() is None or self.members() - {self.process.pid}):
                time.sleep(0.05)
            deadline += 2
        # One that the kernel does not let go yet ends when it does: its signal waits.
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(STOP_SECONDS)


@dataclass
class Side:
    """A name, and the commands of the processes that share its work."""

    name: str
    commands: list[list[str]]
    environment: Mapping[str, str]
    log: Path
    caveat: str = ""
    """What it lacks to be at its best here."""
    children: list[Child] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    _arrived: queue.Queue[tuple[int, str | None]] = field(default_factory=queue.Queue)

    def start(self) -> None:
        """Starts the processes; their first answer says that they are ready."""
        self._arrived = queue.Queue()
        for number, command in enumerate(self.commands):
            log = self.log if len(self.commands) == 1 else self.log.with_suffix(f".{number}.log")
            log.unlink(missing_ok=True)
            self.children.append(Child(number, command, self.environment, log, self._arrived))

    def measure(self, request: dict[str, Any], deadline_seconds: float) -> Measurement:
        """Sends the request to every process and waits for all answers; the first that ends fails it."""
        deadline = time.monotonic() + deadline_seconds
        with Meter([child.process.pid for child in self.children]) as meter:
            started = time.monotonic()
            for child in self.children:
                child.send(request)
            answers = self._receive(deadline)
            seconds = time.monotonic() - started
        self.versions.update(answers[0].get("versions", {}))
        return Measurement(seconds, answers, meter.peak_mb, meter.foreign_cores, self.caveat)

    def suspend(self) -> None:
        """Holds all its processes until `resume`: what it does while it waits for a request (timers, threads that look
        for work) would cost whoever is measured then."""
        for child in self.children:
            child.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Lets them go on."""
        for child in self.children:
            child.send_signal(signal.SIGCONT)

    def _receive(self, deadline: float) -> list[dict[str, Any]]:
        """An answer of each process, in their order, until `deadline` on the monotonic clock."""
        answers: dict[int, dict[str, Any]] = {}
        while len(answers) < len(self.children):
            try:
                number, line = self._arrived.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                silent = next(child for child in self.children if child.number not in answers)
                raise Failed(f"{self._who(silent.number)}no answer before its deadline; "
                             f"its output is in {silent.log}") from None
            if line is None:
                raise Failed(self._who(number) + self.children[number].ending())
            if line.startswith("{"):  # else a library's greeting
                answers[number] = json.loads(line)
        return [answers[child.number] for child in self.children]

    def _who(self, number: int) -> str:
        """Which of several processes."""
        return f"rank {number} of {len(self.children)}: " if len(self.children) > 1 else ""

    def facts(self) -> dict[str, Any]:
        """What ran, for the JSON file."""
        preload = self.environment.get("LD_PRELOAD", "")
        return {"versions": self.versions, "preload": preload, "commands": self.commands, "caveat": self.caveat}

    def age(self) -> float:
        """Seconds since its first process was started."""
        return time.monotonic() - self.children[0].started

    def stop(self) -> None:
        """Ends all its processes."""
        for child in self.children:
            child.stop()
        self.children.clear()
