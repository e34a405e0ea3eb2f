"""How a peer talks with bench_engine.py: requests on standard input, answers on standard output, JSON lines.

Libraries print to standard output too, so answers go to a copy of it and everything else to standard error.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

Message = dict[str, Any]

_answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
os.dup2(2, 1)


def answer(message: Message) -> None:
    """Sends one line."""
    print(json.dumps(message), file=_answers, flush=True)


def requests() -> Iterator[Message]:
    """The requests, until standard input ends."""
    while line := sys.stdin.readline():
        yield json.loads(line)


def serve(handle: Callable[[Message], Message]) -> None:
    """Answers every request with what `handle` returns."""
    for request in requests():
        answer(handle(request))


def cpus(threads: int) -> str:
    """So many of the CPUs that this process may use, as vLLM takes them: `0,2,3`."""
    return ",".join(map(str, sorted(os.sched_getaffinity(0))[:threads]))


def read_json(path: str) -> Message:
    """A JSON file."""
    with open(path, encoding="utf-8") as file:
        return json.load(file)
