#!/usr/bin/env python3
"""AgentFly's way of running snippets: an HTTP server that starts an interpreter for each (`POST /exec {"code"}`).

Written after the contract of AgentFly's container (python-http-env): 200 {"output"}, 400 or 408 {"detail"}; CPU and address space
limited, nothing isolated. Measured by bench_sandbox.py; never to be shown a stranger's code.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

WALL_SECONDS, CPU_SECONDS, ADDRESS_BYTES = 10, 8, 1 << 30


def limit() -> None:
    """The container's limits, in the child."""
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_BYTES, ADDRESS_BYTES))


class Exec(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else a client that keeps its connection waits 40 ms for the second part of an answer

    def do_POST(self) -> None:  # noqa: N802 (the base class's name)
        """Runs the code of a request."""
        code = json.loads(self.rfile.read(int(self.headers["content-length"])))["code"]
        command = [sys.executable, "-I", "-c", code]
        try:
            ran = subprocess.run(command, capture_output=True, text=True, timeout=WALL_SECONDS, preexec_fn=limit)
        except subprocess.TimeoutExpired:
            return self.answer(408, {"detail": "Execution timed out"})
        if ran.returncode != 0:
            return self.answer(400, {"detail": ran.stderr.strip().rpartition("\n")[2]})
        return self.answer(200, {"output": ran.stdout})

    def answer(self, status: int, body: dict[str, str]) -> None:
        """Sends a JSON answer."""
        text = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: object) -> None:
        """Says nothing of each request."""


if __name__ == "__main__":
    server = ThreadingHTTPServer(("127.0.0.1", 0), Exec)
    print(server.server_address[1], flush=True)
    server.serve_forever()
