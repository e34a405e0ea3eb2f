"""How each side is started: our processes in some splits of the threads, and the peers in their environments."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from pathlib import Path

import machine
from side import Side

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
PRELOADS = ("lib/libiomp5.so",)
"""What vLLM's own warnings ask to preload, in its environment; and beside it, where the system has it:"""
TCMALLOC = Path("/usr/lib/x86_64-linux-gnu/libtcmalloc_minimal.so.4")
BYTES_PER_PARAMETER = 24
"""Of one of our processes: its weights and the reference's, gradients, master weights, two moments, and room to work."""
MOST_SPLITS = 4
"""Each is measured as often as a peer."""


@dataclass(frozen=True)
class Split:
    """Processes that share the work, and the threads of each."""

    processes: int
    threads: int

    def __str__(self) -> str:
        return f"{self.processes}×{self.threads}"


def splits(threads: int, pieces: int, whole_models: int, *, even: bool = False) -> list[Split]:
    """Ways to share the threads out among processes, from one process to the most: as there are pieces of work and as
    memory holds whole models; with `even`, such that each process gets equally many pieces."""
    most = max(1, min(threads, pieces, whole_models))
    counts = [count for count in range(1, most + 1)
              if threads % count == 0 and not (even and pieces % count)]
    if len(counts) > MOST_SPLITS:
        last = len(counts) - 1
        counts = [counts[round(step * last / (MOST_SPLITS - 1))] for step in range(MOST_SPLITS)]
    return [Split(count, threads // count) for count in counts]


@dataclass(frozen=True)
class Places:
    """Where everything is."""

    model: Path
    work: Path
    logs: Path
    engine_bench: Path
    hf_python: Path | None
    vllm_python: Path | None
    threads: int
    window: int
    parameters: int

    def splits(self, pieces: int, *, even: bool = False) -> list[Split]:
        """Those of the threads that memory has room for now."""
        room = machine.memory_bytes("MemAvailable") // (self.parameters * BYTES_PER_PARAMETER)
        return splits(self.threads, pieces, room, even=even)

    def log(self, name: str) -> Path:
        """The file for a side's standard error."""
        return self.logs / f"{name.replace(' ', '-')}.log"

    def gemm(self, dtype: str) -> Side:
        """Our process that multiplies matrices on all threads."""
        command = [str(self.engine_bench), "gemm", "--dtype", dtype, "--threads", str(self.threads)]
        return Side("libtorch", [command], os.environ, self.log(f"gemm-{dtype}"))

    def ours(self, what: str, dtype: str, split: Split, slots: int = 0) -> Side:
        """Our processes for `what`, a subcommand of engine_bench; `slots` over all of them."""
        common = [str(self.engine_bench), what, "--model", str(self.model), "--dtype", dtype,
                  "--threads", str(split.threads), "--ranks", str(split.processes)]
        if what != "learner":
            common += ["--work", str(self.work), "--window", str(self.window)]
        if slots:
            common += ["--slots", str(-(-slots // split.processes))]
        if what in ("learner", "grpo") and split.processes > 1:
            common += ["--store-port", str(free_port())]
        commands = [[*common, "--rank", str(rank)] for rank in range(split.processes)]
        return Side(f"ours {split}", commands, os.environ, self.log(f"ours-{what}-{dtype}-{split}"))

    def peer(self, name: str, script: str, dtype: str) -> Side | None:
        """A script of peers/ in its environment, if that is set up."""
        vllm = "vllm" in script
        python = self.vllm_python if vllm else self.hf_python
        if python is None:
            return None
        command = [str(python), str(HERE / "peers" / script), "--model", str(self.model), "--dtype", dtype,
                   "--threads", str(self.threads)]
        if script != "learner_hf.py":
            command += ["--work", str(self.work)]
        if vllm:
            command += ["--window", str(self.window)]
        environment, caveat = {**os.environ, **OFFLINE}, ""
        if not vllm:
            environment["OMP_NUM_THREADS"] = str(self.threads)
        else:  # binds its threads itself, and warns where they are set
            environment.pop("OMP_NUM_THREADS", None)
            preloads = [python.parent.parent / name for name in PRELOADS] + [TCMALLOC]
            found = ":".join(str(path) for path in preloads if path.exists())
            if found:
                environment["LD_PRELOAD"] = found
            caveat = "" if TCMALLOC.exists() else f"{name} without tcmalloc"
        return Side(name, [command], environment, self.log(f"{name}-{dtype}"), caveat)


OFFLINE = {
    "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
}
"""Nothing is looked up in a network, nothing is reported to anyone."""


def free_port() -> int:
    """A port of the loopback that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
