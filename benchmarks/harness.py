"""Time several cases fairly, and write the results as JSON and Markdown.

Cases are interleaved in every repeat, so that other load on the machine affects all of them. Ratios
are computed within one run only. A record holds the command, the hardware, the versions, the
commit, the seed, and every time.
"""

import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
# `cpu` is the CPU time of all threads of this process: for one thread on a busy machine.
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def measure(
    cases: Mapping[str, Callable[[], object]], repeats: int, warmup: int = 2, clock: str = "wall"
) -> dict[str, list[float]]:
    """Return the seconds of every repeat of every case."""
    for run in cases.values():
        for _ in range(warmup):
            run()
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    names = list(cases)
    for repeat in range(repeats):
        first = repeat % len(names)
        for name in names[first:] + names[:first]:
            start = CLOCKS[clock]()
            cases[name]()
            seconds[name].append(CLOCKS[clock]() - start)
    return seconds


def summary(seconds: list[float]) -> dict[str, float]:
    """Return the median, the minimum and the quartiles, in seconds."""
    lower, median, upper = statistics.quantiles(seconds, n=4, method="inclusive")
    return {"median": median, "minimum": min(seconds), "lower": lower, "upper": upper}


def ratio(seconds: list[float], baseline: list[float]) -> dict[str, float]:
    """Return the ratio to the baseline: by repeat (median, quartiles), and of the minima."""
    pairs = [ours / theirs for ours, theirs in zip(seconds, baseline, strict=True)]
    found = summary(pairs)
    return {
        "median": found["median"],
        "lower": found["lower"],
        "upper": found["upper"],
        "of_minima": min(seconds) / min(baseline),
    }


def copy_bandwidth(megabytes: int = 256, repeats: int = 5) -> float:
    """Return the bytes per second that a copy reads and writes, the best of `repeats`."""
    source = torch.ones(megabytes << 18)
    target = torch.empty_like(source)
    best = min(measure({"copy": lambda: target.copy_(source)}, repeats)["copy"])
    return 2 * source.numel() * source.element_size() / best


def matrix_peak(dtype: torch.dtype = torch.float32, size: int = 2048, repeats: int = 9) -> float:
    """Return the FLOPs per second of a large matmul, the best of `repeats`."""
    a, b = torch.randn(2, size, size).to(dtype)
    best = min(measure({"product": lambda: torch.mm(a, b)}, repeats)["product"])
    return 2 * size**3 / best


def environment(seed: int) -> dict[str, Any]:
    """Return command, hardware, versions, commit and seed."""
    return {
        "command": " ".join(["python", *sys.argv]),
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": _git("rev-parse", "--short", "HEAD"),
        "uncommitted_changes": bool(_git("status", "--porcelain", "--", "src", "benchmarks/*.py")),
        "seed": seed,
    }


def write(name: str, title: str, record: dict[str, Any], tables: list[str]) -> None:
    """Write results/NAME.json and results/NAME.md, and print the latter."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
    about = record["environment"]
    lines = [
        f"# {title}",
        "",
        f"`{about['command']}`, {about['processor']}, {about['threads']} threads, "
        f"{about['device']}, Python {about['python']}, torch {about['torch']}, "
        f"commit {about['commit']}{' with changes' * about['uncommitted_changes']}, "
        f"seed {about['seed']}, {record['repeats']} interleaved repeats, "
        f"{record['clock']} clock.",
        "",
    ]
    text = "\n".join(lines) + "\n" + "\n\n".join(tables) + "\n"
    (RESULTS / f"{name}.md").write_text(text)
    print(text)


def table(headers: list[str], rows: list[list[str]]) -> str:
    """Return a Markdown table."""
    lines = [headers, ["---"] + ["---:"] * (len(headers) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _git(*arguments: str) -> str:
    done = subprocess.run(
        ["git", *arguments], cwd=Path(__file__).parents[1], capture_output=True, text=True
    )
    return done.stdout.strip()
