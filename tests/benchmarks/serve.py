"""A server under load: requests lost, latencies, tokens per second, CPU time by process; beside an autoregressive one.

    python -m tests.benchmarks.serve runs/demo/student --beside models/chain-teacher
    python -m tests.benchmarks.serve runs/demo/student --kill --replicas 2

Each server is started as a user starts it, `opdlm serve` on loopback, and gets the same requests: so many clients at a
time, each of which sends its next request when it has its answer. A request has 1 to `--prompts` held-out problems of
the demo's task and a limit of its own, so that responses have mixed lengths; one in four is streamed. Every response is
compared with the task's solution, or with its beginning where the limit cuts it. A client repeats a request up to five
times that is refused for now (429, 503) or whose connection breaks, and counts it as lost after that.

Server and clients share the machine. The CPU seconds of their processes do not depend on what else runs, tokens per
second do. With --kill an engine is killed (SIGKILL) when a third of the requests are answered.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import psutil
from rich.console import Console
from rich.table import Table

from opdlm.common.data.tasks import Problem, get_task, problems
from tests import REPOSITORY
from tests.benchmarks.measure import write_json
from tests.ports import free_ports

ATTEMPTS = 6
START_SECONDS = 600.0
LONGEST = 28
ROLES = {":engine": "engines", ":api": "front", "Proxy": "proxy", "Controller": "controller"}
"""By a part of the titles that Ray gives its processes: whose they are. All others of the server are `Ray`."""


@dataclass(frozen=True, slots=True)
class Asked:
    """One request: its problems, and the longest response."""

    problems: list[Problem]
    limit: int
    streamed: bool

    def body(self, model: str) -> dict[str, Any]:
        """The JSON body."""
        prompts = [problem.prompt for problem in self.problems]
        how = {"max_tokens": self.limit, "stream": self.streamed, "temperature": 0}
        return {"model": model, "prompt": prompts} | how

    def right(self, texts: list[str]) -> int:
        """Number of responses that are the solution, or the part of it that fits: a character is a token."""
        pairs = zip(texts, self.problems, strict=True)
        return sum(text == problem.solution[: self.limit] for text, problem in pairs)


@dataclass
class Load:
    """What came of all requests."""

    seconds: float = 0.0
    cpu: dict[str, float] = field(default_factory=dict)
    """CPU seconds by role."""
    latencies: list[float] = field(default_factory=list)
    """Seconds of each request, with its repetitions."""
    first: list[float] = field(default_factory=list)
    """Seconds to the first text of each streamed request."""
    responses: int = 0
    right: int = 0
    tokens: int = 0
    repeated: int = 0
    lost: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    killed: int = 0


def mixed(count: int, most_prompts: int, seed: int) -> list[Asked]:
    """Requests of 1 to `most_prompts` problems, with limits of a long tail: median 7, from 1 to 28 tokens."""
    rng, source = random.Random(seed), problems(get_task("chain"), "test", seed)
    limits = [min(max(round(rng.lognormvariate(np.log(7), 0.8)), 1), LONGEST) for _ in range(count)]
    return [Asked(list(islice(source, rng.randint(1, most_prompts))), limit, rng.random() < 0.25) for limit in limits]


async def answer(session: aiohttp.ClientSession, url: str, body: dict[str, Any], load: Load) -> list[str]:
    """The texts of one request's responses.

    Raises:
        aiohttp.ClientError, OSError, ValueError: it was refused, or the connection or the stream ended early.
    """
    started, texts, ends = time.perf_counter(), [""] * len(body["prompt"]), 0
    async with session.post(url, json=body) as response:
        response.raise_for_status()
        if not body["stream"]:
            found = await response.json()
            load.tokens += found["usage"]["completion_tokens"]
            return [choice["text"] for choice in found["choices"]]
        async for line in response.content:
            event = line.decode().strip().removeprefix("data: ")
            if not event or event == "[DONE]":
                continue
            for choice in json.loads(event)["choices"]:  # an error that comes in a stream has none
                if choice["text"] and not any(texts):
                    load.first.append(time.perf_counter() - started)
                texts[choice["index"]] += choice["text"]
                ends += choice["finish_reason"] is not None
    if ends < len(texts):
        raise ValueError("the stream ended early")
    load.tokens += sum(map(len, texts))
    return texts


async def ask(session: aiohttp.ClientSession, url: str, model: str, asked: Asked, load: Load) -> None:
    """Sends one request until it is answered, and notes what came of it."""
    started = time.perf_counter()
    for attempt in range(ATTEMPTS):
        try:
            texts = await answer(session, url, asked.body(model), load)
        except (aiohttp.ClientError, OSError, ValueError, KeyError) as error:
            load.faults[f"{type(error).__name__}: {error}"[:100]] += 1
            load.repeated += attempt + 1 < ATTEMPTS
            await asyncio.sleep(0.5 * (attempt + 1))
            continue
        load.latencies.append(time.perf_counter() - started)
        load.responses += len(texts)
        load.right += asked.right(texts)
        return
    load.lost += 1


async def send(url: str, model: str, requests: list[Asked], clients: int, kill: psutil.Process | None) -> Load:
    """All requests, from so many clients at a time. `kill`: the engine that is killed meanwhile."""
    load, left = Load(), iter(requests)
    limits = aiohttp.ClientTimeout(total=600)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=clients), timeout=limits) as session:

        async def client() -> None:
            for asked in left:
                await ask(session, url, model, asked, load)
                if kill is not None and not load.killed and 3 * len(load.latencies) > len(requests):
                    load.killed = kill.pid
                    kill.kill()

        started = time.perf_counter()
        await asyncio.gather(*(client() for _ in range(clients)))
        load.seconds = time.perf_counter() - started
    return load


@contextmanager
def served(folder: Path, args: argparse.Namespace) -> Iterator[tuple[str, psutil.Process]]:
    """A server of this folder, as `opdlm serve` starts it: its address and its process."""
    (port,) = free_ports(1)
    how = ["--slots", args.slots, "--replicas", args.replicas, "--port", port, "--name", "served"]
    command = [sys.executable, "-m", "opdlm", "serve", str(folder), *map(str, how)]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}  # a Ray of its own
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, env=environment, cwd=REPOSITORY, stdout=log, stderr=subprocess.STDOUT)
        try:
            until = time.monotonic() + START_SECONDS
            while not _said(log, "serving "):
                if process.poll() is not None or time.monotonic() > until:
                    raise SystemExit(f"the server did not start: {' '.join(command)}\n{_all(log)[-2000:]}")
                time.sleep(0.2)
            yield f"http://127.0.0.1:{port}", psutil.Process(process.pid)
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(120)
            finally:
                process.kill()


def _all(log: Any) -> str:
    log.seek(0)
    return str(log.read())


def _said(log: Any, text: str) -> bool:
    return text in _all(log)


def processes(server: psutil.Process) -> dict[psutil.Process, str]:
    """The server's processes and their roles."""
    found = {}
    for process in server.children(recursive=True):
        try:
            title = " ".join(process.cmdline())
        except psutil.Error:  # it has ended meanwhile
            continue
        found[process] = next((role for part, role in ROLES.items() if part in title), "Ray")
    return found


def cpu_seconds(server: psutil.Process) -> Counter[str]:
    """CPU seconds so far, by role; the clients are this process."""
    seconds: Counter[str] = Counter({"clients": time.process_time()})
    for process, role in processes(server).items():
        try:
            seconds[role] += sum(process.cpu_times()[:2])
        except psutil.Error:
            continue
    return seconds


def measure(folder: Path, args: argparse.Namespace) -> Load:
    """Starts a server, warms it up, and sends all requests."""
    with served(folder, args) as (address, server):
        url = f"{address}/v1/completions"
        engines = [process for process, role in processes(server).items() if role == "engines"]
        asyncio.run(send(url, "served", mixed(args.clients, args.prompts, 1), args.clients, None))  # warms up
        before = cpu_seconds(server)
        requests = mixed(args.requests, args.prompts, 0)
        load = asyncio.run(send(url, "served", requests, args.clients, engines[0] if args.kill else None))
        after = cpu_seconds(server)
        load.cpu = {role: max(after[role] - before[role], 0.0) for role in after}
    return load


def show(arms: dict[str, Load], args: argparse.Namespace) -> None:
    """Prints what came of each server's requests."""
    table = Table("", *arms)

    def row(name: str, *values: str) -> None:
        table.add_row(name, *values)

    loads = list(arms.values())
    row("requests answered, lost", *(f"{len(load.latencies)}, {load.lost}" for load in loads))
    row("repeated by the client", *(str(load.repeated) for load in loads))
    row("responses", *(str(load.responses) for load in loads))
    row("right", *(f"{100 * load.right / max(load.responses, 1):.1f}%" for load in loads))
    row("tokens", *(f"{load.tokens:,}" for load in loads))
    row("tokens/s", *(f"{load.tokens / load.seconds:,.0f}" for load in loads))
    row("requests/s", *(f"{len(load.latencies) / load.seconds:,.0f}" for load in loads))
    for name, part in (("p50", 50), ("p99", 99)):
        row(f"latency, s, {name}", *(f"{np.percentile(load.latencies, part):.2f}" for load in loads))
        row(f"first block, s, {name}", *(f"{np.percentile(load.first, part):.2f}" for load in loads))
    for role in sorted({role for load in loads for role in load.cpu}):
        row(f"CPU ms a request: {role}", *(f"{1e3 * load.cpu.get(role, 0) / args.requests:.2f}" for load in loads))
    console = Console()
    console.print(table)
    for name, load in arms.items():
        if load.killed:
            console.print(f"{name}: engine {load.killed} was killed")
        for fault, count in load.faults.most_common(5):
            console.print(f"{name}: {count} times {fault}", highlight=False, markup=False)


def main() -> None:
    """Prints the table, writes `serve.json`; exit status 1 if a request was lost."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("student", type=Path)
    made.add_argument("--beside", type=Path, help="an autoregressive model, served in turn")
    made.add_argument("--requests", type=int, default=2000)
    made.add_argument("--clients", type=int, default=200)
    made.add_argument("--prompts", type=int, default=1, help="most prompts of a request")
    made.add_argument("--slots", type=int, default=32)
    made.add_argument("--replicas", type=int, default=1)
    made.add_argument("--kill", action="store_true")
    args = made.parse_args()
    if args.kill and args.replicas < 2:
        made.error("--kill needs --replicas 2 or more")
    folders = {"student": args.student} | ({"autoregressive": args.beside} if args.beside else {})
    arms = {name: measure(folder, args) for name, folder in folders.items()}
    show(arms, args)
    if args.beside:
        speeds = [load.tokens / load.seconds for load in arms.values()]
        print(f"tokens/s, times the autoregressive model's: {speeds[0] / speeds[1]:.2f}")
    write_json("serve", {name: vars(load) for name, load in arms.items()})
    sys.exit(any(load.lost for load in arms.values()))


if __name__ == "__main__":
    main()
