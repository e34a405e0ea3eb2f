"""This project's side of the comparison: the example `parity_probe`, one process that answers JSON lines."""

from __future__ import annotations

import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file


class ProbeError(RuntimeError):
    """The probe refused a request, or is gone."""


class Probe:
    """Asks the probe; tensors come back in files that are read and removed."""

    def __init__(self, program: Path, threads: int) -> None:
        self._process = subprocess.Popen(
            [program, str(threads)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._folder = tempfile.TemporaryDirectory(prefix="parity-")

    def __enter__(self) -> Probe:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.stdin is not None:
            self._process.stdin.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
        self._folder.cleanup()

    def ask(self, op: str, **request: Any) -> Any:
        """The answer's value.

        Raises:
            ProbeError: with the probe's reason, or its exit status when it is gone.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({"op": op, **request}, default=str) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise ProbeError(f"{op}: the probe ended with status {self._process.wait()}")
        answer = json.loads(line)
        if "error" in answer:
            raise ProbeError(f"{op}: {answer['error']}")
        return answer["ok"]

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
