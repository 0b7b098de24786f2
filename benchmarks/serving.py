"""Throughput and latency of `switchlm serve`: a server process and clients over HTTP.

    python benchmarks/serving.py [--preset switch-base-8] [--clients 1 8 32] [--repeats 4]

The model has the shape of the preset and random weights, and never generates the end token. Every
client streams one request after another: 64 tokens in, 32 new ones, greedy. The numbers of clients
are interleaved in every repeat. Then 200 clients connect at the same time, to 32 slots and a queue
of 32. /health is requested about 50 times per second throughout.
"""

import argparse
import asyncio
import http.client
import multiprocessing
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from itertools import chain
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import httpx
import torch

import harness
from switchlm.data.text.tokenizer import Tokenizer
from switchlm.huggingface import load
from switchlm.model.presets import preset
from switchlm.model.transformer import SwitchTransformer

SLOTS = QUEUE = 32
CROWD = 200
TARGET = 6.0  # times the tokens per second of one client, with 32
HEALTH = 0.1  # seconds, at most
ASCII = range(35, 129)  # the tokens of the printable characters
SECONDS = ("first", "whole", "health")
LIMITS = httpx.Limits(max_connections=None, max_keepalive_connections=None)


def build(name: str, seed: int, folder: Path) -> None:
    """Save a model that generates printable characters only, and no end token."""
    torch.manual_seed(seed)
    model, tokenizer = SwitchTransformer(preset(name)), Tokenizer.bytes()
    head = model.embedding if model.head is None else model.head
    said = torch.zeros(len(head.weight), 1)
    said[ASCII.start : ASCII.stop] = 1.0
    with torch.no_grad():
        head.weight *= said
    load.save(model, tokenizer, folder)


class Clients:
    """Streams requests to the server, and records when tokens arrived."""

    def __init__(self, address: str, *, tokens: int, new: int, seed: int) -> None:
        self._address, self._tokens, self._new = address, tokens, new
        self._draw = random.Random(seed)

    def run(self, work: Callable[[httpx.AsyncClient], Awaitable[Any]]) -> tuple[Any, list[float]]:
        """Return the result of the work, and the seconds of /health meanwhile."""

        async def run() -> Any:
            async with httpx.AsyncClient(
                base_url=self._address, limits=LIMITS, timeout=300
            ) as client:
                return await work(client)

        # A separate process, so that the work of the clients is not measured as the server's delay.
        spawn = multiprocessing.get_context("spawn")
        here, there = spawn.Pipe()
        watching = spawn.Process(target=watch, args=(self._address, there))
        watching.start()
        there.close()
        here.recv()
        try:
            result = asyncio.run(run())
        finally:
            here.send("done")
            seconds = here.recv()
            watching.join()
        return result, seconds

    async def ask(self, client: httpx.AsyncClient) -> dict[str, Any]:
        """Return the status, the seconds to the first token and to the end."""
        text = "".join(chr(self._draw.randrange(97, 123)) for _ in range(self._tokens - 1))
        body = {"prompt": text, "max_tokens": self._new, "stream": True}
        body["stream_options"] = {"include_usage": True}
        begin, first, last = time.perf_counter(), 0.0, ""
        async with client.stream("POST", "/v1/completions", json=body) as answer:
            async for line in answer.aiter_lines():
                if line.startswith("data: {"):
                    first = first or time.perf_counter() - begin
                    last = line
        if answer.status_code == 200:
            assert f'"completion_tokens": {self._new}' in last, last
        return {
            "status": answer.status_code,
            "retry_after": answer.headers.get("retry-after"),
            "first": first,
            "whole": time.perf_counter() - begin,
        }

    def busy(self, number: int, rounds: int) -> dict[str, Any]:
        """Return the results of a number of clients, each with consecutive requests."""

        async def one(client: httpx.AsyncClient) -> list[dict[str, Any]]:
            return [await self.ask(client) for _ in range(rounds)]

        async def work(client: httpx.AsyncClient) -> list[list[dict[str, Any]]]:
            return await asyncio.gather(*(one(client) for _ in range(number)))

        begin = time.perf_counter()
        found, health = self.run(work)
        seconds = time.perf_counter() - begin
        answers = [answer for answers in found for answer in answers]
        assert all(answer["status"] == 200 for answer in answers)
        return {
            "clients": number,
            "requests": len(answers),
            "seconds": seconds,
            "tokens_a_second": len(answers) * self._new / seconds,
            "first": [answer["first"] for answer in answers],
            "whole": [answer["whole"] for answer in answers],
            "health": health,
        }

    def crowd(self) -> dict[str, Any]:
        """Return the results of CROWD clients that connect at the same time."""

        async def work(client: httpx.AsyncClient) -> list[dict[str, Any]]:
            return await asyncio.gather(*(self.ask(client) for _ in range(CROWD)))

        found, health = self.run(work)
        refused = [answer for answer in found if answer["status"] == 429]
        return {
            "statuses": Counter(answer["status"] for answer in found),
            "refused_seconds": [answer["whole"] for answer in refused],
            "retry_after": sorted({int(answer["retry_after"]) for answer in refused}),
            "whole": [answer["whole"] for answer in found if answer["status"] == 200],
            "health": health,
        }


def watch(address: str, pipe: Connection) -> None:
    """Request /health over one connection until the end; send the seconds of every response."""
    connection = http.client.HTTPConnection(address.removeprefix("http://"))
    seconds: list[float] = []
    pipe.send("ready")
    while not pipe.poll():
        begin = time.perf_counter()
        connection.request("GET", "/health")
        answer = connection.getresponse()
        content = answer.read()
        assert answer.status == 200, content
        seconds.append(time.perf_counter() - begin)
        time.sleep(0.02)
    connection.close()
    pipe.send(seconds)


def counted(address: str) -> dict[str, float]:
    """Return the values of /metrics by name with labels."""
    text = httpx.get(f"{address}/metrics").text
    lines = [line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#")]
    return {name: float(value) for name, value in lines}


def resident(process: int) -> int:
    """Return the resident memory of a process, in bytes."""
    status = Path(f"/proc/{process}/status").read_text()
    return int(re.findall(r"VmRSS:\s+(\d+)", status)[0]) << 10


def place(values: list[float], part: float) -> float:
    """Return a quantile."""
    return sorted(values)[min(int(part * len(values)), len(values) - 1)]


def milliseconds(values: list[float]) -> str:
    return f"{place(values, 0.5) * 1e3:,.0f} / {place(values, 0.99) * 1e3:,.0f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="switch-base-8")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--rounds", type=int, nargs="+", default=[4, 2, 2], help="of each client")
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=64, help="of a prompt, its end included")
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="keep the model there; use it if it is there")
    parser.add_argument("--name", default="serving", help="of the files in results/")
    options = parser.parse_args()
    torch.set_num_threads(2)
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary) / options.preset
        if not folder.exists():
            build(options.preset, options.seed, folder)
        command = [sys.executable, "-m", "switchlm", "serve", "--model", str(folder), "--port", "0"]
        command += ["--slots", str(SLOTS), "--queue", str(QUEUE), "--device", "cpu"]
        command += ["--max-input-tokens", str(2 * options.tokens)]
        command += ["--max-new-tokens", str(2 * options.new)]
        server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert server.stdout is not None
        try:
            record = measured(server, server.stdout.readline(), options)
        finally:
            server.send_signal(signal.SIGTERM)
            status = server.wait(60)
        assert status == 143, status
    report(record, options)


def measured(server: "subprocess.Popen[str]", line: str, options: Any) -> dict[str, Any]:
    address = re.findall(r"http://[\d.:]+\d", line)[0]
    clients = Clients(address, tokens=options.tokens, new=options.new, seed=options.seed)
    clients.busy(1, 1)
    at_first = resident(server.pid)
    busy: list[list[dict[str, Any]]] = [[] for _ in options.clients]
    for _ in range(options.repeats):
        for runs, number, rounds in zip(busy, options.clients, options.rounds, strict=True):
            runs.append(clients.busy(number, rounds))
    after_load = resident(server.pid)
    crowd = clients.crowd()
    counts = counted(address)
    steps = counts["switchlm_steps_total"]
    return {
        "environment": harness.environment(options.seed),
        "repeats": options.repeats,
        "clock": "wall",
        "preset": options.preset,
        "prompt_tokens": options.tokens,
        "new_tokens": options.new,
        "slots": SLOTS,
        "queue": QUEUE,
        "busy": busy,
        "crowd": crowd,
        "resident_bytes": {
            "after_the_first_request": at_first,
            "after_the_clients": after_load,
            "after_the_crowd": resident(server.pid),
        },
        "metrics": counts,
        "rows_a_step": counts["switchlm_rows_total"] / steps,
        "step_seconds": counts["switchlm_step_seconds_sum"] / steps,
    }


def report(record: dict[str, Any], options: Any) -> None:
    alone = [run["tokens_a_second"] for run in record["busy"][0]]
    rows = []
    for runs in record["busy"]:
        speed = [run["tokens_a_second"] for run in runs]
        first, whole, health = ([*chain(*(run[name] for run in runs))] for name in SECONDS)
        times = harness.ratio(speed, alone)
        rows.append(
            [
                str(runs[0]["clients"]),
                str(sum(run["requests"] for run in runs)),
                f"{statistics.median(speed):.1f} ({min(speed):.1f} to {max(speed):.1f})",
                f"{times['median']:.2f} ({times['lower']:.2f} to {times['upper']:.2f})",
                milliseconds(first),
                milliseconds(whole),
                f"{milliseconds(health)} / {max(health) * 1e3:,.0f}",
            ]
        )
    headers = ["clients", "requests", "tokens/s, median (from, to)",
               f"times {options.clients[0]} client, median (quartiles)",
               "first token ms, p50 / p99", "request ms, p50 / p99",
               "/health ms, p50 / p99 / most"]  # fmt: skip
    crowd, memory = record["crowd"], record["resident_bytes"]
    statuses = ", ".join(f"{number} x {status}" for status, number in crowd["statuses"].items())
    first, after, last = (size / 1e9 for size in memory.values())
    metrics = record["metrics"]
    outcomes = ", ".join(
        f"{int(metrics[name])} {name.split(chr(34))[1]}"
        for name in metrics
        if name.startswith("switchlm_requests_total") and metrics[name]
    )
    text = (
        f"The shape of {options.preset}, float32, random weights; {options.tokens} tokens in, "
        f"{options.new} new, {SLOTS} slots; clients and server share the processor. "
        f"Target at 32 clients: {TARGET:g} times one. Target of /health: {HEALTH * 1e3:.0f} ms.\n\n"
        f"{CROWD} clients at once against a queue of {QUEUE}: {statuses}; refused after "
        f"{milliseconds(crowd['refused_seconds'])} ms (p50 / p99) with Retry-After "
        f"{', '.join(map(str, crowd['retry_after']))} s; accepted ones took "
        f"{milliseconds(crowd['whole'])} ms; /health {milliseconds(crowd['health'])}, at most "
        f"{max(crowd['health']) * 1e3:.0f} ms.\n\n"
        f"Resident: {first:.2f} GB after the first request, {after:.2f} GB after the clients, "
        f"{last:.2f} GB after the crowd. /metrics: {outcomes}; {record['rows_a_step']:.1f} rows a "
        f"step, {record['step_seconds'] * 1e3:.0f} ms per step."
    )
    title = "What a server gives its clients"
    harness.write(options.name, title, record, [harness.table(headers, rows), text])


if __name__ == "__main__":
    main()
