"""Table 6: distilling a sparse model into its dense twin."""

from benchmarks.paper.base import LONG, dense, switch
from benchmarks.paper.plans import Distillation
from benchmarks.paper.table import QUALITY, Column, Result, Row, Runs, Table, better

from switchlm.recipes.distill import share_kept

DENSE, TEACHER = dense(steps=LONG), switch(steps=LONG)
ONLY, WEIGHTS, MIXED, CONTROL = (
    "distillation only",
    "+ non-expert weights from the teacher",
    "+ 0.75 hard, 0.25 soft loss",
    "control: those weights, no distillation",
)


def student(hard: float, soft: float, start: str = "teacher") -> Distillation:
    """Return a student that learns by these weights of the losses."""
    settings = {"start": start, "hard_weight": hard, "soft_weight": soft}
    return Distillation(teacher=TEACHER, student=DENSE, settings=settings)


def kept(one: Result, runs: Runs) -> float | None:
    """The share of the teacher's gain that is kept."""
    share = share_kept(one.quality, runs["Switch (teacher)"].quality, runs["dense"].quality)
    return None if share is None else 100 * share


TABLE = Table(
    name="table6",
    title="Table 6: distillation",
    text="Students train as long as the dense model, at its learning rate. Teacher and student "
    "together take twice the steps of the dense model, and so does its second row, which the "
    "paper has not. Gain of the last half: how much nearer to saturation a model could be.",
    columns=(
        QUALITY,
        Column("kept, %", kept, ".0f", otherwise="no gain to keep"),
        Column("gain of the last half", lambda one, runs: one.quality - one.quality_halfway),
    ),
    rows=[
        Row("dense", DENSE, ("-1.636", "0")),
        Row("dense, twice the steps", dense(steps=2 * LONG)),
        Row("Switch (teacher)", TEACHER, ("-1.444", "100")),
        Row(ONLY, student(0.0, 1.0, start="random"), ("-1.631", "3")),
        Row(WEIGHTS, student(0.0, 1.0), ("-1.598", "20")),
        Row(MIXED, student(0.75, 0.25), ("-1.580", "29")),
        Row(CONTROL, student(1.0, 0.0), ("-1.639", "")),
    ],
    claims=[
        better("Switch (teacher)", "dense", "+0.192", "the teacher is better than the dense model"),
        better(ONLY, "dense", "+0.005", "distillation alone beats the dense model"),
        better(WEIGHTS, ONLY, "+0.033", "the teacher's weights help"),
        better(MIXED, WEIGHTS, "+0.018", "the mixed loss helps"),
        better(MIXED, "dense", "+0.056", "so taught, it beats the dense model"),
        better(MIXED, CONTROL, "+0.059", "and it is distillation that does it"),
        better("dense", CONTROL, "+0.003", "the weights alone do not help"),
        better(MIXED, "dense, twice the steps", "-", "it beats the dense model of twice the steps"),
    ],
)
