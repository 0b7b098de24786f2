"""Figures 1, 4 and 12: more experts at equal FLOPs."""

import itertools

from benchmarks.paper.base import DENSE, switch
from benchmarks.paper.pictures import by_experts
from benchmarks.paper.table import QUALITY, Claim, Column, Row, Table, better

EXPERTS = (2, 4, 8, 16, 32, 64)
NAMES = ("dense", *(f"{number} experts" for number in EXPERTS))


def sooner(least: float, name: str) -> Claim:
    """The largest model reaches the dense one's last quality so many times as early in steps."""
    return Claim(
        name,
        "7.5",
        lambda runs: runs[NAMES[-1]].speed_up(runs["dense"], "step"),
        least=least,
        form=".2f",
    )


TABLE = Table(
    name="figure1",
    title="Figures 1, 4 and 12: more experts, equal FLOPs",
    text="The paper draws these figures without numbers: quality rises at every doubling from 2 to "
    "256 experts, 2, 4 and 8 are already better than T5-Base, and 64 reach in a 7.5th of the "
    "steps what it reaches. A run that never got there counts as 0. Three seeds left most "
    "neighbours undecided, so there are five.",
    columns=(
        QUALITY,
        Column(
            "times as early as dense, in steps",
            lambda one, runs: one.speed_up(runs["dense"], "step"),
            ".2f",
        ),
    ),
    rows=[
        Row("dense", DENSE),
        *(Row(name, switch(number)) for number, name in zip(EXPERTS, NAMES[1:], strict=True)),
    ],
    seeds=(0, 1, 2, 3, 4),
    claims=[
        *(
            better(name, "dense", "better", f"{name} are better than the dense model")
            for name in NAMES[1:4]
        ),
        *(
            better(more, fewer, "better", f"{more} are better than {fewer}")
            for fewer, more in itertools.pairwise(NAMES[1:])
        ),
        sooner(1.0, "64 experts reach the dense model's quality in fewer steps"),
        sooner(7.5, "in a 7.5th of the steps"),
    ],
    picture=by_experts,
)
