"""The pages of study.py: the figures of the paper beside ours, and a word for each claim."""

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import harness
import study_words
from study_words import MEASURED_LATER, NOT_REPRODUCED, REPRODUCED, TOO_SMALL, several, word
from switchlm.recipes.config import run_config
from switchlm.recipes.distill_result import share_kept
from switchlm.recipes.speedup import crossing

ROOT = Path(__file__).parents[1]
RECORD = harness.RESULTS / "study.json"
LANGUAGES = harness.RESULTS / "languages.json"
RESULTS = ROOT / "docs" / "results.md"
Figures = Mapping[str, Any]
Seeds = Sequence[Mapping[str, Figures]]  # a seed: the figures of its finished parts, by name

SCALES = ("laptop", "laptop-long", "gpu", "paper")
# Task: what the paper's figures are of, and they themselves: T5-Base, Switch-Base (Table 5).
PAPER_TASKS = {
    "sst2": ("mean of GLUE", 84.3, 86.7),
    "rte": ("mean of GLUE", 84.3, 86.7),
    "squad": ("SQuAD", 85.5, 87.2),
    "web_questions": ("WebQuestions", 26.6, 27.4),
    "scitldr": ("XSum", 18.7, 20.3),
}
# Part: name of the row, quality and share kept in the paper (Table 6).
PAPER_ROWS = {
    "only": ("distillation only", -1.631, "3%"),
    "weights": ("+ non-expert weights from the teacher", -1.598, "20%"),
    "mixed": ("+ 0.75 hard, 0.25 soft loss", -1.580, "29%"),
    "control": ("control: those weights, no distillation", -1.639, "-"),
}
PAPER_BASELINE, PAPER_TEACHER = -1.636, -1.444
CLAIM_HEADS = ["claim", "paper", "here", ""]


def write(name: str, scale: Figures, root: Path, *, draft: bool) -> None:
    """Put what is finished below ROOT into the record and the pages, and print it."""
    seeds = gather(root)
    record: dict[str, Any] = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    if seeds:  # the runs of what was recorded elsewhere may be gone
        record[name] = {"configuration": scale, "seeds": seeds}
    if not draft:
        RECORD.write_text(json.dumps(record, indent=1) + "\n")
        page = "\n\n".join(["# A study of one pair", *measured(record)])
        RECORD.with_suffix(".md").write_text(page + "\n", encoding="utf-8")
        RESULTS.write_text(results(record), encoding="utf-8")
    kept = record.get(name, {"seeds": {}})["seeds"]
    print(study(name, scale, list(kept.values())))


def gather(root: Path) -> dict[str, dict[str, Figures]]:
    """Return the figures of all finished parts, by seed and name; paths of folders are left out."""
    seeds: dict[str, dict[str, Figures]] = {}
    for path in sorted(root.glob("seed-*/*.json")):
        figures = json.loads(path.read_text())
        del figures["environment"]["command"]
        seeds.setdefault(path.parent.name.removeprefix("seed-"), {})[path.stem] = figures
    return seeds


def both(seeds: Seeds, *parts: str) -> list[tuple[Figures, ...]]:
    """Return the figures of those parts, of the seeds that have finished them all."""
    return [tuple(one[part] for part in parts) for one in seeds if all(p in one for p in parts)]


def study(name: str, scale: Figures, seeds: Seeds) -> str:
    """Return all that was measured at one scale."""
    sections = [about(name, scale, seeds), pretraining(seeds), tasks(scale, seeds), rows(seeds)]
    return "\n\n".join(section for section in sections if section)


def loss(figures: Figures) -> float:
    """Return the last held-out loss of a pre-training, nats a target."""
    return float(figures["evaluations"][-1]["evaluation_loss"])


def about(name: str, scale: Figures, seeds: Seeds) -> str:
    """Return the command, the hardware and the scale."""
    parts = [part for one in seeds for part in one.values()]
    if not parts:
        return f"Scale `{name}`: {MEASURED_LATER}."
    where = parts[0]["environment"]
    commits = sorted({part["environment"]["commit"] for part in parts})
    values = {name: part for name, part in scale["pretrain"].items() if name != "sources"}
    config = run_config(values=values)
    model, data = config.model, config.data
    lines = [
        f"`python benchmarks/study.py --scale {name}`, {where['processor']}, {where['device']}, "
        f"threads a run: {where['threads']}, torch {where['torch']}, commit {', '.join(commits)}. "
        f"{len(seeds)} seeds; figures are means ± standard deviations over them.",
        "",
        f"{model.num_encoder_layers} + {model.num_decoder_layers} layers, d_model {model.d_model}, "
        f"d_ff {model.d_ff}, {model.num_experts} experts in every "
        f"{'layer' if model.sparse_step == 1 else f'{model.sparse_step}nd layer'}; batches of "
        f"{data.batch_size} rows of {data.input_length} tokens, tokenizer `{data.tokenizer}`, "
        f"{data.held_out_share:.2%} of the documents held out.",
    ]
    return "\n".join(lines)


def pretraining(seeds: Seeds) -> str:
    """Return section 3 of the paper: the pair, and how much earlier the sparse one gets there."""
    pairs = both(seeds, "pretrain-dense", "pretrain-sparse")
    if not pairs:
        return f"### Pre-training\n\n{MEASURED_LATER.capitalize()}."
    cells = []
    for place, title, paper in ((0, "dense", PAPER_BASELINE), (1, "sparse", PAPER_TEACHER)):
        runs = [pair[place] for pair in pairs]
        first = runs[0]
        cells.append(
            [
                title,
                f"{first['parameters']:,}",
                f"{first['flops_per_token']:,.0f}",
                f"{first['step']:,}",
                f"{first['tokens']:,}",
                f"{first['learning_rate']:g}",
                f"{paper:.3f}",
                several([-loss(run) for run in runs]),
            ]
        )
    heads = ["model", "parameters", "FLOPs a token", "steps", "tokens", "learning rate"]
    heads += ["quality, paper", "quality here"]
    return "\n\n".join(
        [
            "### Pre-training",
            "Quality is negative log perplexity on held-out books, nats a target. The paper's is "
            "of T5-Base and Switch-Base (Table 6), on other text with another vocabulary. A sparse "
            "run that never reached the dense loss counts as a speed-up of 0; times are wall times "
            "on a machine that other work shared.",
            harness.table(heads, cells),
            harness.table(CLAIM_HEADS, pretraining_claims(pairs)),
        ]
    )


def pretraining_claims(pairs: Sequence[tuple[Figures, ...]]) -> list[list[str]]:
    """Return the claims about the pair."""
    gains = [loss(dense) - loss(sparse) for dense, sparse in pairs]
    claims = [["sparse is better at equal FLOPs and steps", "+0.192", several(gains, "+.3f")]]
    words = [word(gains)]
    for unit, paper in (("step", 7.5), ("seconds", 7.0)):
        speeds = []
        for dense, sparse in pairs:
            reached = crossing(sparse["evaluations"], loss(dense))
            last = dense["evaluations"][-1]
            speeds.append(last[unit] / getattr(reached, unit) if reached else 0.0)
        what = "steps" if unit == "step" else "time"
        here = several(speeds, ".2f", " x")
        claims.append([f"it reaches the dense loss earlier in {what}", f"{paper} x", here])
        words.append(word([speed - 1 for speed in speeds]))
        claims.append([f"and {paper} times as early in {what}", f"{paper} x", here])
        words.append(word([speed - paper for speed in speeds]))
    return [[*claim, verdict] for claim, verdict in zip(claims, words, strict=True)]


def tasks(scale: Figures, seeds: Seeds) -> str:
    """Return Table 5, of a scale that has tasks."""
    if not scale["tasks"]:
        return ""
    cells = [task_row(task, seeds) for task in scale["tasks"]]
    heads = ["task", "metric", "paper: T5-Base", "Switch-Base", "of", "dense here", "sparse here"]
    heads += ["difference", "95% by examples", "one answer to all", "examples", "sparse is better"]
    return "\n\n".join(
        [
            "### Fine-tuning",
            "The best checkpoint by the task's metric on its validation examples, scored on other "
            "ones; in per cent. `95% by examples` is the half-width of the interval of one model "
            "on those examples, and `one answer to all` what the most frequent target of training "
            "scores: a model that is no better has not learnt the task. SST-2 and RTE stand beside "
            "the mean over GLUE, the only such figures in the paper, and SciTLDR beside XSum "
            "(CNN-DM in Table 4: 19.6 and 19.6).",
            harness.table(heads, cells),
        ]
    )


def task_row(task: str, seeds: Seeds) -> list[str]:
    """Return a row of Table 5."""
    of, paper_dense, paper_sparse = PAPER_TASKS[task]
    pairs = both(seeds, f"finetune-{task}-dense", f"finetune-{task}-sparse")
    beside = [f"{paper_dense}", f"{paper_sparse}", of]
    if not pairs:
        return [task, "", *beside, *[MEASURED_LATER] * 2, *[""] * 4, MEASURED_LATER]
    metric = pairs[0][0]["metric"]
    scores = [[one["scores"][metric] for one in pair] for pair in pairs]
    values = [[score["value"] for score in pair] for pair in scores]
    halves = [(score["high"] - score["low"]) / 2 for pair in scores for score in pair]
    guess = pairs[0][0]["always_the_same"]["value"]
    differences = [sparse - dense for dense, sparse in values]
    learnt = max(statistics.mean(column) for column in zip(*values, strict=True))
    half = statistics.mean(halves)
    # Both models answer the same examples; taking their errors as independent is on the safe side.
    verdict = word(differences, math.sqrt(2) * half / 1.96)
    if learnt - guess <= half:
        verdict = TOO_SMALL + ": not learnt"
    return [
        task,
        metric,
        *beside,
        several([dense for dense, _ in values], ".1f"),
        several([sparse for _, sparse in values], ".1f"),
        several(differences, "+.1f"),
        f"± {half:.1f}",
        f"{guess:.1f}",
        f"{pairs[0][0]['examples']}",
        verdict,
    ]


def rows(seeds: Seeds) -> str:
    """Return Table 6."""
    pairs = both(seeds, "pretrain-dense", "pretrain-sparse")
    if not pairs:
        return f"### Distillation\n\n{MEASURED_LATER.capitalize()}."
    size = [f"{one['parameters']:,}" for one in pairs[0]]
    cells = [
        ["dense (baseline)", size[0], f"{PAPER_BASELINE}", quality(seeds, "dense"), "0%", "0%"],
        [
            "sparse (teacher)",
            size[1],
            f"{PAPER_TEACHER}",
            quality(seeds, "sparse"),
            "100%",
            "100%",
        ],
    ]
    for part, (title, paper, kept) in PAPER_ROWS.items():
        ours = [one[f"distill-{part}"] for one in seeds if f"distill-{part}" in one]
        cells.append(
            [
                title,
                size[0],
                f"{paper:.3f}",
                several([-one["student_loss"] for one in ours]),
                kept,
                kept_by_seed(ours),
            ]
        )
    compression = 1 - pairs[0][0]["parameters"] / pairs[0][1]["parameters"]
    heads = ["model", "parameters", "quality, paper", "quality here", "kept, paper", "kept here"]
    return "\n\n".join(
        [
            "### Distillation",
            f"Compression {compression:.0%} (the paper's Table 6: 94%). Every student trains as "
            "many steps as the baseline did, at its learning rate. Kept is (student - baseline) / "
            "(teacher - baseline), seed by seed, where the teacher is better than the baseline.",
            harness.table(heads, cells),
            harness.table(CLAIM_HEADS, row_claims(seeds)),
        ]
    )


def quality(seeds: Seeds, model: str) -> str:
    """Return the quality of the dense or the sparse model before any distillation."""
    part = f"pretrain-{model}"
    return several([-loss(one[part]) for one in seeds if part in one])


def kept_by_seed(ours: Sequence[Figures]) -> str:
    """Return the share kept, mean and spread, and of how many seeds the teacher has a gain."""
    shares = [
        share_kept(-one["student_loss"], -one["teacher_loss"], -one["baseline_loss"])
        for one in ours
    ]
    known = [100 * share for share in shares if share is not None]
    if ours and not known:
        return "no gain to keep"
    here = several(known, ".0f", "%")
    return here if len(known) == len(ours) else f"{here} ({len(known)} of {len(ours)} seeds)"


def row_claims(seeds: Seeds) -> list[list[str]]:
    """Return what the rows of Table 6 say, each as a difference of qualities."""
    claims = [
        ("distillation alone beats the baseline", "baseline", "only", "+0.005"),
        ("the teacher's weights help", "only", "weights", "+0.033"),
        ("the mixed loss helps", "weights", "mixed", "+0.018"),
        ("so taught, it beats the baseline", "baseline", "mixed", "+0.056"),
        ("and it is distillation that does it", "control", "mixed", "+0.059"),
        ("the weights alone do not help", "control", "baseline", "+0.003"),
    ]
    found = []
    for claim, worse, better, paper in claims:
        named = [f"distill-{one}" for one in (worse, better) if one != "baseline"]
        gains = []
        for parts in both(seeds, *named):
            losses = iter([one["student_loss"] for one in parts])
            base = parts[0]["baseline_loss"]
            before = base if worse == "baseline" else next(losses)
            gains.append(before - (base if better == "baseline" else next(losses)))
        found.append([claim, paper, several(gains, "+.3f"), word(gains) if gains else ""])
    return found


def languages() -> str:
    """Return section 4.3, from what benchmarks/languages.py measured."""
    if not LANGUAGES.exists():
        return f"{MEASURED_LATER.capitalize()}: `python benchmarks/languages.py`."
    record = json.loads(LANGUAGES.read_text())
    runs = record["runs"]
    better = [run["better"] for run in runs]
    speeds = [run["mean_speed_up"] for run in runs]
    many = [100 * run["at_least_4"] for run in runs]
    total = runs[0]["languages"]
    here = f"{several(better, '.0f')} of {total}"
    return "\n\n".join(
        [
            f"Scale `{record['scale']}`, {runs[0]['steps']:,} steps, {len(runs)} seeds; more in "
            "[the page of the run](../benchmarks/results/languages.md). A language in which the "
            "sparse model never reached the dense loss counts as a speed-up of 0.",
            harness.table(
                CLAIM_HEADS,
                [
                    [
                        "sparse is better in every language",
                        "101 of 101",
                        here,
                        REPRODUCED if min(better) == total and len(runs) >= 3 else NOT_REPRODUCED,
                    ],
                    [
                        "it takes fewer steps in the mean",
                        "5 x",
                        several(speeds, ".2f", " x"),
                        word([speed - 1 for speed in speeds]),
                    ],
                    [
                        "a fifth of the steps in the mean",
                        "5 x",
                        several(speeds, ".2f", " x"),
                        word([speed - 5 for speed in speeds]),
                    ],
                    [
                        "at least 4 times as fast in 91% of languages",
                        "91%",
                        several(many, ".0f", "%"),
                        word([share - 91 for share in many]),
                    ],
                ],
            ),
            "![Gain and speed-up by language](languages.png)",
        ]
    )


def results(record: Mapping[str, Any]) -> str:
    """Return docs/results.md."""
    missing = [f"`{name}`" for name in SCALES if name not in record]
    lines = [
        "# Results",
        "What the paper says beside what this code does on real text, small. Written by "
        "`benchmarks/study.py`; the languages come from `benchmarks/languages.py`. What was tried "
        "on the way, and why the scales are what they are: [the log](log.md).",
        *(study_words.__doc__ or "").strip().split("\n\n")[1:],
        *measured(record),
        f"Scales that were {MEASURED_LATER}: {', '.join(missing)}." if missing else "",
        "## 128 languages",
        languages(),
    ]
    return "\n\n".join(line for line in lines if line) + "\n"


def measured(record: Mapping[str, Any]) -> list[str]:
    """Return a section a scale."""
    return [
        f"## Scale `{name}`\n\n" + study(name, one["configuration"], list(one["seeds"].values()))
        for name, one in record.items()
    ]
