"""The demo with several seeds and two instruction sets: sparse against dense.

    python benchmarks/demo.py [--seeds 0 1 2 3 4] [--budget 6m] [--instructions native avx2]
        [--runs FOLDER] [--name demo] [--set SECTION.KEY=VALUE] [--write]

Each run is `switchlm compare --budget 6m` with its own seed, alone on the machine, once with all
instructions and once with none newer than AVX2, in PyTorch, its libraries and our C code. A run
that is finished is not repeated. Writes results/NAME.json and .md, with every run, and the picture
docs/NAME.png (--write: from the existing runs). It takes seeds x instruction sets x budget.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import harness
from switchlm.training.monitor import read_metrics

ROOT = Path(__file__).parents[1]
KEPT = ("dense_loss", "sparse_loss", "step_ratio", "time_ratio", "steps", "seconds", "crossing")
NOT_KEPT = ("curves", "configuration")
COLOURS = {"dense": "#1d5fd1", "sparse": "#c2570c"}
# A compiler that builds for AVX2 on any processor; its version distinguishes the two builds.
COMPILER = """#!/bin/sh
if [ "$1" = --version ]; then echo "for AVX2"; fi
exec {compiler} "$@" -march=x86-64-v3
"""


def main() -> None:
    """Run what is not finished, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--budget", default="6m")
    parser.add_argument("--instructions", nargs="+", choices=("native", "avx2"))
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "demos")
    parser.add_argument("--name", default="demo", help="of the results and of the picture")
    parser.add_argument("--set", action="append", default=[], help="override a setting")
    parser.add_argument("--write", action="store_true", help="run nothing")
    parser.add_argument("--draft", action="store_true", help="only print; write no results")
    arguments = parser.parse_args()
    runs = []
    for instructions in arguments.instructions or ("native", "avx2"):
        for seed in arguments.seeds:
            out = arguments.runs / f"{arguments.budget}-{instructions}-{seed}"
            if not (out / "compare.json").exists() and not arguments.write:
                race(out, seed, instructions, arguments)
            if (out / "compare.json").exists():
                runs.append(read(out, seed, instructions))
                print(", ".join(map(str, row(runs[-1]))), flush=True)
    if not runs:
        raise SystemExit(f"No finished runs in {arguments.runs}.")
    record = {
        "environment": harness.environment(arguments.seeds[0]),
        "budget": arguments.budget,
        "configuration": runs[0]["configuration"],  # only the seeds differ
        "runs": [{key: run[key] for key in run if key not in NOT_KEPT} for run in runs],
    }
    if not arguments.draft:
        (harness.RESULTS / f"{arguments.name}.json").write_text(json.dumps(record, indent=1) + "\n")
        (harness.RESULTS / f"{arguments.name}.md").write_text(page(record), encoding="utf-8")
        plot(runs, ROOT / "docs" / f"{arguments.name}.png")
    print(page(record))


def race(out: Path, seed: int, instructions: str, arguments: argparse.Namespace) -> None:
    """Run `switchlm compare`."""
    command = [sys.executable, "-m", "switchlm", "compare", "--out", str(out), "--overwrite"]
    command += ["--budget", arguments.budget, "--set", f"training.seed={seed}", "--json"]
    for setting in arguments.set:
        command += ["--set", setting]
    with tempfile.TemporaryDirectory() as folder:
        environment = only_avx2(Path(folder)) if instructions == "avx2" else None
        subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)


def only_avx2(folder: Path) -> dict[str, str]:
    """Return an environment in which nothing uses instructions newer than AVX2."""
    compiler = next(found for name in ("gcc", "cc", "clang") if (found := shutil.which(name)))
    program = folder / Path(compiler).name
    program.write_text(COMPILER.format(compiler=compiler))
    program.chmod(0o755)
    return {
        **os.environ,
        "PATH": f"{folder}:{os.environ['PATH']}",
        "ATEN_CPU_CAPABILITY": "avx2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
    }


def read(out: Path, seed: int, instructions: str) -> dict[str, Any]:
    """Return the results of a finished run, and both curves."""
    result = json.loads((out / "compare.json").read_text())
    curves = {
        name: [line for line in read_metrics(out / name / "metrics.jsonl") if is_evaluation(line)]
        for name in COLOURS
    }
    return {
        "seed": seed,
        "instructions": instructions,
        **{key: result[key] for key in KEPT},
        "parameters": result["parameters"],
        "flops_per_token": result["flops_per_token"],
        "configuration": result["configuration"],
        "curves": curves,
    }


def is_evaluation(line: Mapping[str, Any]) -> bool:
    """Return whether a line of metrics has a held-out loss."""
    return "evaluation_loss" in line


def row(run: Mapping[str, Any]) -> list[str]:
    """Return a run as a row of the table."""
    cost = run["seconds"]["sparse"] / run["seconds"]["dense"]
    reached = run["crossing"]
    return [
        run["instructions"],
        str(run["seed"]),
        f"{run['steps']:,}",
        f"{run['dense_loss']:.3f}",
        f"{run['sparse_loss']:.3f}",
        "never" if reached is None else f"{reached['step']:,.0f}",
        "never" if reached is None else f"{run['step_ratio']:.3f}",
        "never" if reached is None else f"{run['time_ratio']:.3f}",
        f"{cost:.2f}",
    ]


def page(record: Mapping[str, Any]) -> str:
    """Return the page: every run, and mean, smallest and largest of both ratios."""
    about, runs = record["environment"], record["runs"]
    heads = ["instructions", "seed", "steps of each", "dense loss", "sparse loss"]
    heads += ["dense loss reached at step", "of the steps", "of the time"]
    heads += ["time of a sparse step / dense"]
    first = runs[0]
    lines = [
        "# The demo: sparse against dense at equal FLOPs, every run",
        "",
        f"`{about['command']}`, {about['processor']}, torch {about['torch']}, commit "
        f"{about['commit']}{' with changes' * about['uncommitted_changes']}; budget "
        f"{record['budget']} of wall time for both models, one core each. FLOPs per token "
        f"{first['flops_per_token']['dense']:,.0f} dense, "
        f"{first['flops_per_token']['sparse']:,.0f} sparse (the router is the difference); "
        f"parameters {first['parameters']['dense']:,} and {first['parameters']['sparse']:,}.",
        "",
        harness.table(heads, [row(run) for run in runs]),
        "",
        *(f"- {line}" for line in spread(runs)),
        "",
    ]
    return "\n".join(lines)


def spread(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a sentence per metric: mean, smallest and largest over the runs."""
    sentences = []
    for key, name in (("step_ratio", "steps"), ("time_ratio", "time")):
        ratios = [run[key] for run in runs]
        if None in ratios:
            never = ratios.count(None)
            sentences.append(f"{name}: {never} of {len(runs)} runs never reached the dense loss")
            continue
        sentences.append(
            f"share of the {name}: mean {statistics.mean(ratios):.3f}, smallest "
            f"{min(ratios):.3f}, largest {max(ratios):.3f}, of {len(ratios)} runs"
        )
    return sentences


def plot(runs: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw the held-out loss of every run by step and by time."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.4), layout="constrained", dpi=110)
    by_step, by_time = figure.subplots(1, 2, sharey=True)
    for axis, key, unit in ((by_step, "step", "step"), (by_time, "seconds", "seconds of training")):
        for number, run in enumerate(runs):
            for name, colour in COLOURS.items():
                lines = run["curves"][name]
                axis.plot(
                    [line[key] for line in lines],
                    [line["evaluation_loss"] for line in lines],
                    color=colour, linewidth=1, alpha=0.7,
                    label={"dense": "dense twin", "sparse": "Switch Transformer"}[name]
                    if number == 0 else None,
                )  # fmt: skip
        axis.set_xlabel(unit)
        axis.grid(alpha=0.3)
        axis.set_xlim(left=0)
    last = [run["dense_loss"] for run in runs]
    for axis in (by_step, by_time):
        axis.axhspan(min(last), max(last), color=COLOURS["dense"], alpha=0.12, linewidth=0)
    lowest = min(run["sparse_loss"] for run in runs)
    by_step.set_ylim(lowest - 0.03, max(last) + 0.35)
    by_step.set_ylabel("held-out loss, nats per target token")
    by_step.legend(frameon=False)
    ratios = [run["step_ratio"] for run in runs if run["step_ratio"] is not None]
    times = [run["time_ratio"] for run in runs if run["time_ratio"] is not None]
    if len(ratios) == len(runs):
        for axis, values, what in ((by_step, ratios, "steps"), (by_time, times, "time")):
            axis.set_title(
                f"dense loss after {statistics.mean(values):.2f} of the {what} "
                f"({min(values):.2f} to {max(values):.2f} in {len(runs)} runs)",
                loc="left", fontsize=10, fontweight="bold",
            )  # fmt: skip
    figure.savefig(path)


if __name__ == "__main__":
    main()
