"""Table 5: fine-tuning on tasks, sparse against dense models of equal FLOPs."""

from collections.abc import Sequence

from benchmarks.paper.base import PIECES_DENSE, PIECES_SWITCH
from benchmarks.paper.plans import Finetuning
from benchmarks.paper.table import Claim, Column, Row, Runs, Table, scores_better

# Task: what the paper's figures are of, T5-Base and Switch-Base.
PAPER = {
    "sst2": ("mean of GLUE", "84.3", "86.7"),
    "scitldr": ("XSum", "18.7", "20.3"),
}


def claim(task: str) -> Claim:
    """The sparse model scores higher; void where neither has learnt the task."""
    dense, switch = f"{task}, dense", f"{task}, Switch"
    of, paper_dense, paper_switch = PAPER[task]

    def not_learnt(seeds: Sequence[Runs]) -> str:
        found = [runs[name] for runs in seeds for name in (dense, switch) if name in runs]
        learnt = any(one.score - one.figures["one_answer"] > one.half_width for one in found)
        return "" if learnt else "not learnt"

    gain = f"{float(paper_switch) - float(paper_dense):+.1f} ({of})"
    return scores_better(switch, dense, gain, f"Switch is better on {task}", void=not_learnt)


TABLE = Table(
    name="table5",
    title="Table 5: fine-tuning",
    text="The best checkpoint by the task's metric on its validation examples, scored on others, "
    "in per cent. One answer: what the most frequent target of training scores; a model that is no "
    "better has not learnt the task. CoLA, RTE, SQuAD and WebQuestions are left out: models "
    "of this size do not learn them.",
    data=("english_novels", "sst2", "scitldr"),
    columns=(
        Column("score, %", lambda one, runs: one.score, ".1f"),
        Column("one answer, %", lambda one, runs: one.figures["one_answer"], ".1f"),
        Column("± by examples", lambda one, runs: one.half_width, ".1f"),
    ),
    rows=[
        Row(f"{task}, {name}", Finetuning(model=model, task=task), (PAPER[task][place],))
        for task in PAPER
        for place, name, model in ((1, "dense", PIECES_DENSE), (2, "Switch", PIECES_SWITCH))
    ],
    claims=[claim(task) for task in PAPER],
)
