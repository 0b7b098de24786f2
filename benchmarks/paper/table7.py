"""Table 7: teachers of different sizes, students of one size."""

import math

from benchmarks.paper.base import DENSE, switch
from benchmarks.paper.plans import Distillation
from benchmarks.paper.table import QUALITY, Claim, Column, Result, Row, Runs, Table, better

from switchlm.recipes.distill import share_kept

# Experts here: quality of teacher and student, share kept, and compression in the paper, whose
# teachers have 1.1, 2.0, 3.8 and 7.4 billion parameters.
PAPER = {
    8: ("-1.505", "-1.587", "37", "82"),
    16: ("-1.474", "-1.585", "32", "90"),
    32: ("-1.444", "-1.579", "30", "95"),
    64: ("-1.432", "-1.582", "27", "97"),
}
MIXED = {"start": "teacher", "hard_weight": 0.75, "soft_weight": 0.25}


def student(experts: int) -> str:
    """The name of a row."""
    return f"student of {experts} experts"


def teacher_of(one: Result, runs: Runs) -> Result | None:
    """The teacher of a student."""
    name = next(name for name, other in runs.items() if other is one)
    return runs[name.removeprefix("student of ")] if name.startswith("student") else None


def kept(one: Result, runs: Runs) -> float | None:
    """The share of the teacher's gain that a student keeps, in per cent."""
    teacher = teacher_of(one, runs)
    if teacher is None:
        return None
    share = share_kept(one.quality, teacher.quality, runs["dense"].quality)
    return math.nan if share is None else 100 * share


def compression(one: Result, runs: Runs) -> float | None:
    """How much smaller than its teacher a student is, in per cent."""
    teacher = teacher_of(one, runs)
    if teacher is None:
        return None
    return 100 * (1 - one.figures["parameters"] / teacher.figures["parameters"])


def rows(experts: int) -> list[Row]:
    """Return a teacher and its student."""
    teacher, (quality, taught, *shares) = switch(experts), PAPER[experts]
    learner = Distillation(teacher=teacher, student=DENSE, settings=MIXED)
    return [
        Row(f"{experts} experts", teacher, (quality,)),
        Row(student(experts), learner, (taught, *shares)),
    ]


TABLE = Table(
    name="table7",
    title="Table 7: teachers of different sizes",
    text="Students start from their teacher's weights and learn by 0.75 hard and 0.25 soft loss.",
    columns=(
        QUALITY,
        Column("kept, %", kept, ".0f", otherwise=""),
        Column("compression, %", compression, ".0f", otherwise=""),
    ),
    rows=[
        Row("dense", DENSE, ("-1.636",)),
        *(row for experts in PAPER for row in rows(experts)),
    ],
    claims=[
        *(
            better(
                student(experts),
                "dense",
                f"{float(PAPER[experts][1]) + 1.636:+.3f}",
                f"the {student(experts)} beats the dense model",
            )
            for experts in PAPER
        ),
        Claim(
            "the smallest teacher's gain is kept best, against the largest, %",
            "+10",
            lambda runs: (kept(runs[student(8)], runs) or 0) - (kept(runs[student(64)], runs) or 0),
            form="+.0f",
        ),
    ],
)
