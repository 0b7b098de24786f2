"""The time of `import switchlm` and `switchlm --help`, each in a separate process.

    python benchmarks/start.py [--repeats 5]

Wall seconds, and the CPU seconds of the process (user and system), which other load affects less;
compared with `python -c pass` and `import torch`.
"""

import argparse
import resource
import statistics
import subprocess
import sys
import time

import torch

import harness

CASES = {
    "python -c pass": (["-c", "pass"], None),
    "import switchlm": (["-c", "import switchlm"], 2.0),
    "from switchlm import SwitchFeedForward": (["-c", "from switchlm import SwitchFeedForward"], 2),
    "switchlm --help": (["-m", "switchlm", "--help"], 0.5),
    "import torch": (["-c", "import torch"], None),
}


def seconds_of(arguments: list[str]) -> tuple[float, float]:
    """Return the wall and the CPU seconds of a Python process."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--name", default="start", help="of the files in results/")
    options = parser.parse_args()
    torch.set_num_threads(2)
    for arguments, _ in CASES.values():
        seconds_of(arguments)
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in CASES}
    for _ in range(options.repeats):
        for name, (arguments, _) in CASES.items():
            found[name].append(seconds_of(arguments))
    record = {
        "environment": harness.environment(seed=0),
        "repeats": options.repeats,
        "clock": "wall and CPU",
        "seconds": {
            name: {"wall": [wall for wall, _ in times], "cpu": [cpu for _, cpu in times]}
            for name, times in found.items()
        },
    }
    rows = []
    for name, times in found.items():
        target = CASES[name][1]
        cells = [name]
        for clock in zip(*times, strict=True):
            cells.append(f"{statistics.median(clock):.2f} ({min(clock):.2f} to {max(clock):.2f})")
        rows.append([*cells, "" if target is None else f"{target:.1f}"])
    headers = ["process", "wall s, median (from, to)", "CPU s, median (from, to)", "target s"]
    title = "How long the package takes to start"
    harness.write(options.name, title, record, [harness.table(headers, rows)])


if __name__ == "__main__":
    main()
