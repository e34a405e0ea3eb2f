"""This project's side of the comparison: the example `parity_probe`, one process that answers JSON lines."""

from __future__ import annotations

import contextlib
import json
import queue
import subprocess
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file


class ProbeError(RuntimeError):
    """The probe refused a request."""


class ProbeGoneError(ProbeError):
    """The probe ended, or did not answer in time: nothing further can be compared."""


class Probe:
    """Asks the probe; tensors come back in files that are read and removed. No answer is waited for longer than
    `deadline_seconds`; a probe that took longer is ended."""

    def __init__(self, program: Path, threads: int, deadline_seconds: float) -> None:
        self._deadline_seconds = deadline_seconds
        self._process = subprocess.Popen(
            [program, str(threads)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()
        self._folder = tempfile.TemporaryDirectory(prefix="parity-")

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put("")

    def __enter__(self) -> Probe:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):  # it is gone, and a request to it was not read
                self._process.stdin.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(timeout=10)
        self._folder.cleanup()

    def ask(self, op: str, **request: Any) -> Any:
        """The answer's value.

        Raises:
            ProbeError: with the probe's reason.
            ProbeGoneError: with its exit status, or the time in which it did not answer.
        """
        assert self._process.stdin is not None
        deadline = time.monotonic() + self._deadline_seconds
        try:
            self._process.stdin.write(json.dumps({"op": op, **request}, default=str) + "\n")
            self._process.stdin.flush()
            line = self._lines.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            self._process.kill()
            raise ProbeGoneError(
                f"{op}: no answer in {self._deadline_seconds:.0f} s; --deadline allows the probe more"
            ) from None
        except BrokenPipeError:
            line = ""
        if not line:
            raise ProbeGoneError(f"{op}: the probe ended with {self._ending()}")
        answer = json.loads(line)
        if "error" in answer:
            raise ProbeError(f"{op}: {answer['error']}")
        return answer["ok"]

    def _ending(self) -> str:
        try:
            return f"status {self._process.wait(timeout=10)}"
        except subprocess.TimeoutExpired:
            self._process.kill()
            return "its output closed, though it still ran"

    def open(self, model: Path, dtype: str) -> None:
        self.ask("open", model=model, dtype=dtype)

    def scores(self, rows: list[list[int]]) -> dict[str, torch.Tensor]:
        """`log_probs` and `entropies` of all rows' tokens but each row's first, in one pass."""
        return self._tensors("scores", rows=rows)

    def logits(self, rows: list[list[int]]) -> torch.Tensor:
        """What follows each token of the rows, `[N, vocabulary]`."""
        return self._tensors("logits", rows=rows)["logits"]

    def gradients(self, rows: list[dict[str, Any]], **settings: Any) -> dict[str, torch.Tensor]:
        return self._tensors("gradients", rows=rows, **settings)

    def greedy(self, chains: list[dict[str, Any]], **limits: int) -> list[list[dict[str, Any]]]:
        """`ids` and `log_probs` of each turn of each chain."""
        return self.ask("greedy", chains=chains, **limits)

    def _tensors(self, op: str, **request: Any) -> dict[str, torch.Tensor]:
        path = Path(self._folder.name) / "answer.safetensors"
        self.ask(op, out=path, **request)
        tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
        path.unlink()
        return tensors
