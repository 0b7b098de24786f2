"""Many languages, sparse against dense (section 4.3 of the paper): gain and speed-up by language.

    python benchmarks/languages.py [--data FOLDER] [--scale laptop|gpu] [--seeds 0 1 2]
        [--budget 4m] [--runs FOLDER]
    python benchmarks/languages.py --scale paper [--finished SPARSE DENSE]

FOLDER holds parallel text: LANGUAGES.tsv (code and name), files NAME.CODE.txt with the same lines
in each language, and DOCUMENT_IDS.tsv with the document of each line, as NTREX-128 has them. Whole
documents are held out, the same ones in all languages. Writes results/languages.json and .md, and
docs/languages.png; every seed's run folder has its own report, with the experts by language.

The paper's scale needs a cluster: `--scale paper` prints the two jobs, and `--finished` reads the
folders of both runs. Neither it nor `gpu` was measured.
"""

import argparse
import json
import math
import shutil
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import harness
from switchlm.cli.compare import parse_duration
from switchlm.config import read_yaml
from switchlm.recipes import compare as recipe
from switchlm.recipes.speedup import crossing, speed_by_source
from switchlm.training.monitor import read_metrics

ROOT = Path(__file__).parents[1]
DATA = ROOT.parent / "shared" / "data" / "ntrex128"
CONFIGS = Path(__file__).parent / "languages"
LANGUAGE_NAMES, DOCUMENTS = "LANGUAGES.tsv", "DOCUMENT_IDS.tsv"
SCALES = ["laptop", "gpu", "paper"]
# Section 4.3, mSwitch-Base against mT5-Base.
PAPER_JOBS = """\
# One file or folder of text a language below mc4/; the fastest mesh: switchlm plan with this file.
torchrun --nnodes 16 --nproc-per-node 8 -m switchlm pretrain benchmarks/languages/paper.yaml \\
    --data 'each:mc4' --out runs/mswitch --set mesh.expert=128
torchrun --nnodes 16 --nproc-per-node 8 -m switchlm pretrain benchmarks/languages/paper.yaml \\
    --data 'each:mc4' --out runs/mt5 --set model.num_experts=0
python benchmarks/languages.py --scale paper --finished runs/mswitch runs/mt5"""
PAPER = ["paper", "1,000,000", "", "101 of 101", "5", "", "", "91%"]


def main() -> None:
    """Prepare the text, race both models for every seed, and write record, page and figure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--scale", choices=SCALES, default="laptop")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument(
        "--budget", help="wall time a seed, such as 4m; else the steps of the config"
    )
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "languages")
    parser.add_argument("--finished", type=Path, nargs=2, help="run folders, sparse and dense")
    parser.add_argument("--set", action="append", default=[], help="override a setting")
    parser.add_argument("--set-dense", action="append", default=[])
    parser.add_argument("--draft", action="store_true", help="only print; write no results")
    arguments = parser.parse_args()
    if arguments.finished:
        results = [finished(*arguments.finished)]
    elif arguments.scale == "paper":
        print(PAPER_JOBS)
        return
    elif (arguments.data / DOCUMENTS).is_file():
        texts = prepare(arguments.data, arguments.runs / "texts")
        results = [race(texts, arguments, seed) for seed in arguments.seeds]
    else:
        print(f"No parallel text in {arguments.data}: nothing is measured. Give some with --data.")
        return
    record = {"environment": harness.environment(arguments.seeds[0]), **summarise(results)}
    record |= {"scale": arguments.scale, "budget": arguments.budget, "seeds": arguments.seeds}
    if not arguments.draft:
        (harness.RESULTS / "languages.json").write_text(json.dumps(record, indent=1) + "\n")
        (harness.RESULTS / "languages.md").write_text(page(record), encoding="utf-8")
        plot(record, ROOT / "docs" / "languages.png")
    print(page(record))


def prepare(data: Path, folder: Path) -> Path:
    """Write one JSONL a language, a record a document; return the folder."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    names = dict(language_names(data))
    documents = (data / DOCUMENTS).read_text(encoding="utf-8").split()
    for code, path in languages(data):
        # Not splitlines: some scripts' texts hold other signs that it takes for line ends.
        lines = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
        if len(lines) != len(documents):
            raise SystemExit(f"{path} has {len(lines)} lines, {DOCUMENTS} {len(documents)}.")
        texts: dict[str, list[str]] = {}
        for document, line in zip(documents, lines, strict=True):
            texts.setdefault(document, []).append(line)
        records = [
            json.dumps({"document": document, "text": "\n".join(part)}, ensure_ascii=False) + "\n"
            for document, part in texts.items()
        ]
        (folder / f"{names.get(code, code)}.jsonl").write_text("".join(records), encoding="utf-8")
    return folder


def language_names(data: Path) -> Iterator[tuple[str, str]]:
    """Yield (code, name) of every language listed."""
    for line in (data / LANGUAGE_NAMES).read_text(encoding="utf-8").splitlines():
        code, _, name = line.strip().replace("\t", " ").partition(" ")
        if name:
            yield code, name.strip()
    yield "eng", "English (original)"


def languages(data: Path) -> Iterator[tuple[str, Path]]:
    """Yield (code, file) of every language, of two versions of one the first."""
    found: dict[str, Path] = {}
    for path in sorted(data.glob("*.*.txt"), key=lambda path: len(path.name)):
        found.setdefault(path.name.split(".")[-2], path)
    yield from sorted(found.items())


def race(texts: Path, arguments: argparse.Namespace, seed: int) -> dict[str, Any]:
    """Train both models on all languages and return compare.json."""
    pair = recipe.configure(
        path=CONFIGS / f"{arguments.scale}.yaml",
        sources=[f"each:{texts}"],
        overrides=[f"training.seed={seed}", *arguments.set],
        dense_overrides=arguments.set_dense,
        by_time=arguments.budget is not None,
    )
    seconds = None if arguments.budget is None else parse_duration(arguments.budget)
    result: dict[str, Any] = {}
    out = arguments.runs / f"{arguments.scale}-{seed}"
    out.mkdir(parents=True, exist_ok=True)
    clear(out)
    for event in recipe.compare(pair, out, seconds=seconds):
        if "evaluation_loss" in event:
            print(event["run"], event["step"], round(event["evaluation_loss"], 4), flush=True)
        result = event.get("result", result)
    print(f"Report: {out / 'report.html'}")
    return result


def finished(sparse: Path, dense: Path) -> dict[str, Any]:
    """Return what `race` returns of two runs that were trained one by one."""
    lines = {
        name: [line for line in read_metrics(path / "metrics.jsonl") if "evaluation_loss" in line]
        for name, path in (("sparse", sparse), ("dense", dense))
    }
    last = {name: ones[-1] for name, ones in lines.items()}
    reached = crossing(lines["sparse"], last["dense"]["evaluation_loss"])
    configuration = {
        name: read_yaml(path / "config.yaml")
        for name, path in (("sparse", sparse), ("dense", dense))
    }
    return {
        "seeds": [configuration["sparse"]["training"]["seed"]],
        "steps": last["dense"]["step"],
        "seconds": {name: line["seconds"] for name, line in last.items()},
        "dense_loss": last["dense"]["evaluation_loss"],
        "sparse_loss": last["sparse"]["evaluation_loss"],
        "step_ratio": reached and reached.step / last["dense"]["step"],
        "time_ratio": reached and reached.seconds / last["dense"]["seconds"],
        "sources": speed_by_source(lines["dense"], lines["sparse"]),
        "configuration": configuration,
    }


def clear(out: Path) -> None:
    """Remove an earlier race of this script."""
    for name in ("dense", "sparse"):
        shutil.rmtree(out / name, ignore_errors=True)


def summarise(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the figures of every language, as means over the seeds, and those of every seed."""
    names = list(results[0]["sources"])
    by_language = {}
    for name in names:
        ones = [result["sources"][name] for result in results]
        ratios = [one["step_ratio"] for one in ones]
        by_language[name] = {
            "dense_loss": statistics.mean(one["dense_loss"] for one in ones),
            "sparse_loss": statistics.mean(one["sparse_loss"] for one in ones),
            "speed_ups": [None if ratio is None else round(1 / ratio, 4) for ratio in ratios],
        }
    return {
        "languages": by_language,
        "runs": [figures(result) for result in results],
        "configuration": results[0]["configuration"],
    }


def figures(result: Mapping[str, Any]) -> dict[str, Any]:
    """Return what section 4.3 tells of a run; a language that never got there counts as below 1."""
    ones = result["sources"].values()
    speed = [1 / one["step_ratio"] if one["step_ratio"] else 0.0 for one in ones]
    return {
        "seed": result["seeds"][0],
        "steps": result["steps"],
        "seconds": result["seconds"],
        "dense_loss": result["dense_loss"],
        "sparse_loss": result["sparse_loss"],
        "step_ratio": result["step_ratio"],
        "time_ratio": result["time_ratio"],
        "languages": len(speed),
        "better": sum(one["sparse_loss"] < one["dense_loss"] for one in ones),
        "mean_speed_up": statistics.mean(speed),
        "median_speed_up": statistics.median(speed),
        "at_least_2": sum(one >= 2 for one in speed) / len(speed),
        "at_least_4": sum(one >= 4 for one in speed) / len(speed),
    }


def page(record: Mapping[str, Any]) -> str:
    """Return the page: the figures of every seed beside the paper's, and every language."""
    about, runs = record["environment"], record["runs"]
    heads = ["run", "steps", "held-out loss, sparse (dense)", "languages with a lower loss"]
    heads += ["mean speed-up in steps", "median", "at least 2 x", "at least 4 x"]
    rows = [
        [
            f"seed {run['seed']}",
            f"{run['steps']:,}",
            f"{run['sparse_loss']:.3f} ({run['dense_loss']:.3f})",
            f"{run['better']} of {run['languages']}",
            f"{run['mean_speed_up']:.2f}",
            f"{run['median_speed_up']:.2f}",
            f"{run['at_least_2']:.0%}",
            f"{run['at_least_4']:.0%}",
        ]
        for run in runs
    ]
    model, data = (record["configuration"]["sparse"][part] for part in ("model", "data"))
    lines = [
        "# Many languages, sparse against dense",
        "",
        f"`{about['command']}`, {about['processor']}, {about['threads']} threads, "
        f"{about['device']}, torch {about['torch']}, commit {about['commit']}"
        f"{' with changes' * about['uncommitted_changes']}.",
        "",
        f"Scale `{record['scale']}`: {model['num_experts']} experts a Switch layer against a dense "
        f"twin of equal FLOPs a token, d_model {model['d_model']}, tokenizer {data['tokenizer']}, "
        f"languages drawn by size^{data['mixing_exponent']}, the same whole documents held out in "
        "all. The speed-up is how many times fewer steps the sparse model took to the dense twin's "
        "last held-out loss in a language; one that never got there counts as 0. The paper's row "
        "is of another scale: mC4, mSwitch-Base against mT5-Base.",
        "",
        harness.table(heads, [PAPER, *rows]),
        "",
        "![Both figures of section 4.3](../../docs/languages.png)",
        "",
        harness.table(
            ["language", "dense loss", "sparse loss", "gain", "speed-up in steps, by seed"],
            [
                [
                    name,
                    f"{one['dense_loss']:.3f}",
                    f"{one['sparse_loss']:.3f}",
                    f"{one['dense_loss'] - one['sparse_loss']:.3f}",
                    ", ".join("never" if s is None else f"{s:.2f}" for s in one["speed_ups"]),
                ]
                for name, one in by_gain(record)
            ],
        ),
        "",
    ]
    return "\n".join(lines)


def by_gain(record: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Return (language, figures), the largest gain first."""
    return sorted(
        record["languages"].items(),
        key=lambda item: item[1]["sparse_loss"] - item[1]["dense_loss"],
    )


def plot(record: Mapping[str, Any], path: Path) -> None:
    """Draw the paper's figures 7 and 8: quality and speed-up by language."""
    from matplotlib.figure import Figure

    ordered = by_gain(record)
    names, ones = zip(*ordered, strict=True)
    figure = Figure(figsize=(17, 10.5), layout="constrained", dpi=110)
    upper, lower = figure.subplots(2, 1, height_ratios=[1.5, 1])
    places = range(len(names))
    dense, sparse = [-one["dense_loss"] for one in ones], [-one["sparse_loss"] for one in ones]
    upper.vlines(places, dense, sparse, color="#b8c0cc", linewidth=1.6, zorder=1)
    upper.scatter(places, sparse, s=20, color="#c2570c", label="sparse", zorder=2)
    upper.scatter(places, dense, s=20, color="#1d5fd1", label="dense twin", zorder=2)
    upper.set_xticks(places, names, rotation=90, fontsize=7.5)
    upper.set_xlim(-1, len(names))
    upper.set_ylabel("held-out negative log perplexity")
    upper.set_title("Quality by language, largest gain first", loc="left", fontweight="bold")
    upper.grid(axis="y", alpha=0.3)
    upper.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, frameon=False)
    speeds = [
        statistics.mean(0.0 if speed is None else speed for speed in one["speed_ups"])
        for one in ones
    ]
    width = next((w for w in (0.1, 0.25, 0.5, 1.0) if max(speeds) / w <= 40), max(speeds) / 40)
    edges = [width * edge for edge in range(math.ceil(max(speeds) / width) + 1)]
    lower.hist(speeds, bins=edges, color="#c2570c", rwidth=0.92)
    lower.axvline(1, color="#667085", linewidth=1, linestyle="--")
    middle = statistics.mean(speeds)
    lower.axvline(middle, color="#1c2330", linewidth=1.2)
    lower.annotate(
        f"mean {middle:.2f}", (middle, 0.96), xytext=(5, 0), textcoords="offset points",
        xycoords=("data", "axes fraction"), va="top",
    )  # fmt: skip
    lower.set_xlim(left=min(0.8, min(speeds)))
    lower.set_xlabel("speed-up in steps to the dense twin's quality (1: as fast; 0: never reached)")
    lower.set_ylabel("languages")
    lower.set_title("Speed-up by language", loc="left", fontweight="bold")
    lower.grid(axis="y", alpha=0.3)
    figure.savefig(path)


if __name__ == "__main__":
    main()
