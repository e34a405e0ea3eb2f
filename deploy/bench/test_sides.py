"""How work is split among processes, what becomes of them, and the trace of their steps."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
import unittest
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from bench import best_of
from machine import peak_mb, processes, reset_peaks
from report import Report
from sections import learner
from side import Failed, Measurement, Side
from sides import splits
from traces import add_steps

ECHO = """
import json, sys
for line in sys.stdin:
    print("a greeting", flush=True)
    print(json.dumps({"seconds": 1.0, "versions": {"it": "1"}, "got": json.loads(line)["seed"]}), flush=True)
"""
SILENT = "import sys; sys.stdin.read()"
DIES = "import sys; sys.stdin.readline(); sys.exit('out of paper')"


BUSY = """
import json, signal, sys, threading
signal.signal(signal.SIGTERM, signal.SIG_IGN)
def look():
    while True:
        pass
threading.Thread(target=look, daemon=True).start()
for line in sys.stdin:
    print(json.dumps({"seconds": 1.0}), flush=True)
"""


class Splits(unittest.TestCase):
    """Which ways to share the threads out are tried."""

    def shown(self, *numbers: int, even: bool = False) -> list[str]:
        """As the table names them."""
        return [str(split) for split in splits(*numbers, even=even)]

    def test_on_two_cores_both_ways(self) -> None:
        self.assertEqual(self.shown(2, 16, 7), ["1×2", "2×1"])
        self.assertEqual(self.shown(1, 16, 7), ["1×1"])

    def test_many_cores_are_not_many_models(self) -> None:
        self.assertEqual(self.shown(64, 16, 40), ["1×64", "2×32", "8×8", "16×4"])
        self.assertEqual(self.shown(64, 64, 5), ["1×64", "2×32", "4×16"])
        self.assertEqual(self.shown(64, 64, 0), ["1×64"])

    def test_whole_groups_stay_with_one_process(self) -> None:
        self.assertEqual(self.shown(6, 6, 9, even=True), ["1×6", "2×3", "3×2", "6×1"])
        self.assertEqual(self.shown(6, 2, 9, even=True), ["1×6", "2×3"])
        self.assertEqual(self.shown(3, 2, 9, even=True), ["1×3"])

    def test_the_best_has_the_best_median(self) -> None:
        def taking(*seconds: float) -> list[Measurement]:
            return [Measurement(taken, [{}], 0.0, 0.0) for taken in seconds]

        runs = {"ours 1×2": taking(3, 3, 1), "ours 2×1": taking(2, 2, 9), "ours 4×1": []}
        self.assertEqual(best_of(runs, lambda run: 1 / run.seconds), "ours 2×1")
        self.assertIsNone(best_of({}, lambda run: 1 / run.seconds))

    def test_of_equally_fast_ones_the_smallest_is_best(self) -> None:
        def runs(lean: float) -> dict[str, list[Measurement]]:
            return {"ours 2×1": [Measurement(10.0, [{}], 800.0, 0.0)], "ours 1×2": [Measurement(lean, [{}], 400.0, 0.0)]}

        self.assertEqual(best_of(runs(10.2), lambda run: 1 / run.seconds), "ours 1×2")
        self.assertEqual(best_of(runs(10.5), lambda run: 1 / run.seconds), "ours 2×1")


class Learners(unittest.TestCase):
    """The learner's rows hold what several ranks cost."""

    def test_exchange_counts_with_the_work_that_needs_it(self) -> None:
        phases = {"forward_backward": 3.0, "all_reduce": 1.0, "reference": 2.0, "optimizer": 0.1, "all_gather": 0.3}
        run = Measurement(9.0, [{"seconds": 8.0, "parameters": 100_000_000, "phases": phases}] * 2, 1.0, 0.0)
        bench = FakeBench({"ours 2×1": [run]})
        learner(bench, "bf16")  # type: ignore[arg-type]
        found = {row.what.split(",")[0]: row.ours.median() for row in bench.report.rows}
        self.assertEqual(found["whole step"], 4096 / 8)
        self.assertEqual(found["forward+backward"], 4096 / 4)
        self.assertEqual(found["reference log-probs"], 4096 / 2)
        self.assertAlmostEqual(found["optimizer step"], 200)
        optimizer = next(row for row in bench.report.rows if row.what.startswith("optimizer"))
        self.assertEqual(optimizer.ours.note, "2 ranks")
        # The split is chosen by the whole step.
        self.assertEqual(bench.chosen_by(run), 4096 / 8)


class FakeBench:
    """What `learner` asks of a Bench, with given runs."""

    def __init__(self, runs: dict[str, list[Measurement]]) -> None:
        self.runs, self.report, self.shares = runs, Report(), []
        self.places, self.bar, self.running = self, lambda *_, **__: None, lambda *_: nullcontext()
        self.chosen_by: Any = None

    def peer(self, *_: str) -> None:
        """None is set up."""

    def missing(self, *_: Any) -> str:
        """Of no interest."""
        return ""

    def splits(self, _pieces: int) -> list[str]:
        """The one."""
        return ["2×1"]

    def ours(self, _what: str, _dtype: str, split: str) -> Side:
        """A side that is never started."""
        return Side(f"ours {split}", [], {}, Path(os.devnull))

    def choose_split(self, sides: list[Side], _request: Any, _note: str, rate: Any) -> Any:
        """All of them; remembers by what figure."""
        self.chosen_by = rate
        return sides, {}

    def take_turns(self, *_: Any) -> dict[str, list[Measurement]]:
        """The given runs."""
        return self.runs


class Processes(unittest.TestCase):
    """Sides of real processes."""

    def setUp(self) -> None:
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.log = Path(folder.name) / "side.log"

    def side(self, *programs: str) -> Side:
        """Started, and stopped when the test ends."""
        side = Side("ours", [[sys.executable, "-c", program] for program in programs], os.environ, self.log)
        self.addCleanup(side.stop)
        side.start()
        return side

    def test_every_process_answers_and_what_ran_is_known(self) -> None:
        side = self.side(ECHO, ECHO)
        run = side.measure({"seed": 7}, 60)
        self.assertEqual([answer["got"] for answer in run.answers], [7, 7])
        self.assertEqual((run.inner_seconds(), side.facts()["versions"]), (1.0, {"it": "1"}))
        self.assertGreater(run.peak_mb, 1)

    def test_a_rank_that_dies_is_blamed_at_once_not_the_one_that_waits_for_it(self) -> None:
        side, started = self.side(SILENT, DIES), time.monotonic()
        with self.assertRaisesRegex(Failed, "rank 1 of 2: it ended with status 1: out of paper"):
            side.measure({"seed": 1}, 60)
        self.assertLess(time.monotonic() - started, 30)

    def test_silence_ends_at_the_deadline(self) -> None:
        with self.assertRaisesRegex(Failed, "no answer before its deadline"):
            self.side(SILENT).measure({"seed": 1}, 0.2)

    def test_who_is_suspended_takes_no_time_and_goes_on_when_asked(self) -> None:
        side = self.side(BUSY)
        side.measure({"seed": 1}, 60)
        side.suspend()
        # The kernel stops a running thread soon, not within the call; that would wait for ever for one that runs on.
        pid, deadline = side.children[0].process.pid, time.monotonic() + 10
        while os.waitid(os.P_PID, pid, os.WSTOPPED | os.WNOHANG) is None and time.monotonic() < deadline:
            time.sleep(0.001)
        before = self.ticks(side)
        self.assertEqual(self.state(side), "T")
        side.resume()
        side.measure({"seed": 2}, 60)
        self.assertGreater(self.ticks(side), before)
        side.suspend()
        child = side.children[0]
        side.stop()
        # It ended by itself, as one does whose input ends: it was let go on first, and not killed.
        self.assertEqual(child.process.returncode, 0)

    def state(self, side: Side) -> str:
        """The kernel's letter for what its first process does."""
        return Path(f"/proc/{side.children[0].process.pid}/stat").read_text(encoding="utf-8").rsplit(")", 1)[1].split()[0]

    def ticks(self, side: Side) -> int:
        """CPU time of its processes."""
        return sum(processes()[pid][1] for child in side.children for pid in child.members())

    def test_the_kernel_counts_a_peak_from_when_it_was_reset(self) -> None:
        program = ("big = bytearray(b'x') * (64 << 20); del big; print(flush=True); input(); "
                   "half = bytearray(b'x') * (32 << 20); print(flush=True); input()")
        process = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdout.readline()
            self.assertGreater(peak_mb([process.pid]), 64)
            reset_peaks([process.pid])
            self.assertLess(peak_mb([process.pid]), 50)
            process.stdin.write(b"\n")
            process.stdin.flush()
            process.stdout.readline()
            self.assertGreater(peak_mb([process.pid]), 32)
        finally:
            process.kill()
            process.communicate()


class Traces(unittest.TestCase):
    """Spans of several ranks and steps in one file."""

    def test_ranks_lie_beside_each_other_from_zero_on(self) -> None:
        def answer(rank: int, at: int) -> dict[str, Any]:
            named = {"ph": "M", "name": "process_name", "pid": rank + 1, "tid": 0, "args": {"name": f"rank {rank}"}}
            span = {"ph": "X", "name": "rollout", "pid": rank + 1, "tid": 1, "ts": at, "dur": 5, "args": {}}
            return {"seconds": 1.0, "trace_events": [named, span]}

        steps = [Measurement(1.0, [answer(0, at), answer(1, at + 2)], 0.0, 0.0) for at in (1_000_000, 1_000_100)]
        events: list[dict[str, Any]] = []
        add_steps(events, "ours 2×1 bf16", steps)
        spans = [(event["pid"], event["ts"]) for event in events if event["ph"] == "X"]
        self.assertEqual(spans, [(1, 0), (2, 2), (1, 100), (2, 102)])
        names = [event["args"]["name"] for event in events if event["ph"] == "M"]
        self.assertEqual(names, ["ours 2×1 bf16, rank 0", "ours 2×1 bf16, rank 1"])
        add_steps(events, "ours 1×2 bf16", [Measurement(1.0, [answer(0, 77)], 0.0, 0.0)])
        self.assertEqual((events[-1]["pid"], events[-1]["ts"]), (3, 0))


if __name__ == "__main__":
    unittest.main()
