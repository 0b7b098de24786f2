"""Figures 7 and 8: 128 languages, sparse against dense."""

import json
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks.paper.base import LONG, dense, switch
from benchmarks.paper.pictures import by_language
from benchmarks.paper.runs import Place
from benchmarks.paper.table import Claim, Row, Runs, Table

from switchlm.recipes.speedup import speed_by_source

FOLDER = "ntrex128"
STEPS = 4 * LONG  # twice the text: 128 languages share it
ROWS = "training.evaluate_batches=128"  # 64 held-out rows of each language


def prepare(place: Place) -> None:
    """Write a JSONL file per language below OUT/languages, with a record per document.

    The text: LANGUAGES.tsv (code and name), NAME.CODE.txt with the same lines in each language, and
    DOCUMENT_IDS.tsv with the document of each line, as NTREX-128 has them.
    """
    data, folder = place.data / FOLDER, place.out / "languages"
    if folder.exists():
        return
    names = dict(language_names(data))
    documents = (data / "DOCUMENT_IDS.tsv").read_text(encoding="utf-8").split()
    partial = folder.with_name(".languages")
    partial.mkdir(parents=True, exist_ok=True)
    for code, path in languages(data):
        # Not splitlines: some scripts' texts hold other signs that it takes for line ends.
        lines = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
        if len(lines) != len(documents):
            raise SystemExit(f"{path} has {len(lines)} lines, the documents {len(documents)}.")
        texts: dict[str, list[str]] = {}
        for document, line in zip(documents, lines, strict=True):
            texts.setdefault(document, []).append(line)
        records = [
            json.dumps({"document": document, "text": "\n".join(part)}, ensure_ascii=False) + "\n"
            for document, part in texts.items()
        ]
        (partial / f"{names.get(code, code)}.jsonl").write_text("".join(records), encoding="utf-8")
    partial.rename(folder)


def language_names(data: Path) -> Iterator[tuple[str, str]]:
    """Yield (code, name) of every language listed."""
    for line in (data / "LANGUAGES.tsv").read_text(encoding="utf-8").splitlines():
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


def speeds(runs: Runs) -> list[float]:
    """How many times fewer steps Switch takes, by language; 0 where it never gets there."""
    found = speed_by_source(runs["dense"].evaluations, runs["Switch"].evaluations)
    return [1 / one["step_ratio"] if one["step_ratio"] else 0.0 for one in found.values()]


def better(runs: Runs) -> float:
    """The per cent of the languages in which Switch ends with the lower loss."""
    last = [runs[name].evaluations[-1]["evaluation_loss_by_source"] for name in ("dense", "Switch")]
    return 100 * statistics.mean(last[1][name] < loss for name, loss in last[0].items())


def claim(name: str, paper: str, measure: Callable[[Runs], float], least: float) -> Claim:
    """Return a claim about all languages of a seed."""
    return Claim(name, paper, measure, least=least, form=".2f")


TABLE = Table(
    name="figure7",
    title="Figures 7 and 8: 128 languages",
    text="NTREX-128, the same 98 documents in every language, whole documents held out; the paper "
    "has mC4, mSwitch-Base and mT5-Base. Languages in which Switch never reaches the dense "
    "model's last loss count as a speed-up of 0. Both models take 64 rows per batch, which "
    "favours Switch: with 128 the dense model is better and Switch worse from equal text, see the "
    "log.",
    data=(FOLDER,),
    prepare=prepare,
    rows=[
        Row("dense", dense(ROWS, steps=STEPS, file="languages")),
        Row("Switch", switch(64, ROWS, steps=STEPS, file="languages")),
    ],
    claims=[
        claim("Switch is better in every language, %", "100", better, least=99.6),
        claim("it takes fewer steps, mean", "5", lambda runs: statistics.mean(speeds(runs)), 1),
        claim("a fifth of the steps", "5", lambda runs: statistics.mean(speeds(runs)), 5),
        claim(
            "at least 4 times as fast in 91% of them",
            "91",
            lambda runs: 100 * statistics.mean(one >= 4 for one in speeds(runs)),
            91,
        ),
    ],
    picture=by_language,
)
