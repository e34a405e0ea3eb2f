"""Multi-turn chains against vLLM's OpenAI server with prefix caching.

Starts the server, then answers `{"chains", "turns", "new_tokens", "tool_seconds", "seed"}`. Each chain sends its
tokens so far as ids and takes the sampled ids back, so that nothing is tokenised again. The server ends with this
process.
"""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import os
import signal
import socket
import subprocess
import sys
import time

import aiohttp
from serve import Message, answer, cpus, read_json, requests

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", required=True)
parser.add_argument("--work", required=True, help="the token ids that bench_work made")
parser.add_argument("--dtype", choices=["bf16", "f32"], required=True)
parser.add_argument("--threads", type=int, required=True)
parser.add_argument("--group", type=int, default=8)
parser.add_argument("--window", type=int, default=1024)
parser.add_argument("--start-seconds", type=float, default=900, help="how long the server may take to start")
options = parser.parse_args()
work = read_json(options.work)
libc = ctypes.CDLL(None)
PR_SET_PDEATHSIG = 1


def free_port() -> int:
    """A port of the loopback that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start_server(port: int) -> subprocess.Popen[bytes]:
    """The server as a child that does not outlive this process."""
    dtype = {"bf16": "bfloat16", "f32": "float32"}[options.dtype]
    # `vllm serve` of the CPU wheel fails on its own package's name; this is the same server.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", options.model, "--host",
               "127.0.0.1", "--port", str(port), "--dtype", dtype, "--max-model-len", str(options.window),
               "--max-num-seqs", "64", "--served-model-name", "model", "--enable-prefix-caching",
               "--enable-prompt-tokens-details", "--disable-uvicorn-access-log"]
    environment = {"VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_CPU_OMP_THREADS_BIND": cpus(options.threads),
                   # A connection outlives the turns of the other side, during which this one is idle.
                   "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "3600", "VLLM_SERVER_DEV_MODE": "1", **os.environ}
    return subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL,
                            preexec_fn=lambda: libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM))


async def healthy(session: aiohttp.ClientSession, server: subprocess.Popen[bytes]) -> None:
    """Returns when the server answers."""
    deadline = time.monotonic() + options.start_seconds
    while time.monotonic() < deadline:
        if server.poll() is not None:
            raise SystemExit(f"the server ended with status {server.returncode} before it was healthy")
        try:
            async with session.get("/health") as response:
                if response.status == 200:
                    return
        except aiohttp.ClientError:
            pass
        await asyncio.sleep(0.1)
    raise SystemExit(f"the server was not healthy after {options.start_seconds:.0f} s")


class Run:
    """One measurement: the tokens its chains sampled and were prompted with."""

    def __init__(self, session: aiohttp.ClientSession, request: Message) -> None:
        self.session, self.request = session, request
        self.sampled = self.context = self.cached = 0

    async def complete(self, ids: list[int]) -> list[int]:
        """The sampled ids after `ids`."""
        # No seed: vLLM samples requests that have one one by one.
        body = {"model": "model", "prompt": ids, "max_tokens": self.request["new_tokens"], "temperature": 1.0,
                "top_p": 1.0, "ignore_eos": True, "return_token_ids": True}
        async with self.session.post("/v1/completions", json=body) as response:
            if response.status != 200:
                raise SystemExit(f"the server said {response.status}: {(await response.text())[:500]}")
            reply = await response.json()
        sampled = reply["choices"][0]["token_ids"]
        if len(sampled) != self.request["new_tokens"]:
            raise SystemExit(f"{len(sampled)} tokens came instead of {self.request['new_tokens']}")
        details = reply["usage"].get("prompt_tokens_details") or {}
        self.cached += details.get("cached_tokens") or 0
        self.context += len(ids)
        self.sampled += len(sampled)
        return sampled

    async def chain(self, chain: int) -> None:
        """All turns of one chain."""
        ids = list(work["prompts"][chain // options.group % len(work["prompts"])])
        for turn in range(self.request["turns"]):
            if turn:
                await asyncio.sleep(self.request["tool_seconds"])
                ids += work["observations"][(chain + turn) % len(work["observations"])]
            ids += await self.complete(ids)

    async def all(self) -> float:
        """Every chain; seconds."""
        started = time.perf_counter()
        await asyncio.gather(*(self.chain(chain) for chain in range(self.request["chains"])))
        return time.perf_counter() - started


async def main() -> None:
    """Serves requests until they end."""
    port = free_port()
    server = start_server(port)
    try:
        connector = aiohttp.TCPConnector(limit=0)
        timeout = aiohttp.ClientTimeout(total=600)
        async with aiohttp.ClientSession(f"http://127.0.0.1:{port}", connector=connector, timeout=timeout) as session:
            await healthy(session, server)
            async with session.get("/version") as response:
                versions = {"vllm": (await response.json())["version"]}
            for request in requests():
                async with session.post("/reset_prefix_cache") as response:
                    response.raise_for_status()
                run = Run(session, request)
                seconds = await run.all()
                answer({"seconds": seconds, "new_tokens": run.sampled, "context_tokens": run.context,
                        "cached_tokens": run.cached, "versions": versions})
    finally:
        server.send_signal(signal.SIGTERM)
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            server.kill()


asyncio.run(main())
