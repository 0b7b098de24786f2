"""Figures 5 and 6: the same in time, and against a dense model of 3.5 times the FLOPs."""

from benchmarks.paper.base import LONG, WIDER_DENSE, dense, switch
from benchmarks.paper.pictures import in_time
from benchmarks.paper.table import QUALITY, Claim, Column, Row, Table


def sooner(rival: str, unit: str, least: float, name: str, paper: str) -> Claim:
    """Switch reaches the rival's last quality so many times as early."""
    return Claim(
        name,
        paper,
        lambda runs: runs["Switch"].speed_up(runs[rival], unit),
        least=least,
        form=".2f",
    )


TABLE = Table(
    name="figure5",
    title="Figures 5 and 6: in time, and against a wider dense model",
    text="Two runs share the machine at any time, each on one thread; evaluations are not counted. "
    "Times as early: how soon the Switch model of the same seed reaches that row's last quality. "
    "A run that never gets there counts as 0. The wider model takes half as many steps as the "
    "others, in about as much time. When both train longer Switch gains on it: with 12,000 steps "
    "for both (seed 0, once) it reaches the wider model's 1.361 after 10,200, 1.2 times as early.",
    columns=(
        QUALITY,
        Column("seconds", lambda one, runs: one.seconds, ".0f"),
        Column("Switch is there, times as early in time",
               lambda one, runs: runs["Switch"].speed_up(one, "seconds"), ".2f"),
        Column("in steps", lambda one, runs: runs["Switch"].speed_up(one, "step"), ".2f"),
    ),
    rows=[
        Row("dense", dense(steps=LONG), ("", "", "7", "7.5")),
        Row("wider dense", WIDER_DENSE, ("", "", "2.5", "")),
        Row("Switch", switch(steps=LONG)),
    ],
    claims=[
        sooner("dense", "seconds", 1.0, "Switch reaches the dense model's quality sooner", "7"),
        sooner("dense", "seconds", 7.0, "in a seventh of the time", "7"),
        sooner("wider dense", "seconds", 1.0, "and sooner that of the wider one", "2.5"),
        sooner("wider dense", "seconds", 2.5, "2.5 times as soon", "2.5"),
        sooner("wider dense", "step", 1.0, "and in fewer steps", "more than 1"),
    ],
    picture=in_time,
)  # fmt: skip
