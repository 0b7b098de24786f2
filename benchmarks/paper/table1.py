"""Table 1: Switch against top-2 mixtures of experts and dense models, by capacity factor."""

from benchmarks.paper.base import DENSE, WIDER_DENSE, capacity, switch
from benchmarks.paper.table import QUALITY, Claim, Column, Row, Table, better

TOP_2 = "router.experts_per_token=2"
COLUMNS = (
    QUALITY,
    Column("seconds to the dense model's quality", lambda one, runs: to_dense(one, runs), ".0f"),
    Column("examples per second", lambda one, runs: one.examples_per_second, ",.0f"),
    Column("dropped", lambda one, runs: one.figures.get("dropped", 0.0), ".1%"),
)


def to_dense(one, runs):
    """Seconds until the quality at which the dense model of the seed ends."""
    return one.seconds_to(runs["dense"].quality)


def faster(first: str, second: str, paper: str) -> Claim:
    """The first row reads more examples in a second; the value is how many times as many."""
    return Claim(
        f"{first} is faster than {second}",
        paper,
        lambda runs: runs[first].examples_per_second / runs[second].examples_per_second,
        least=1.0,
        form=".2f",
    )


TABLE = Table(
    name="table1",
    title="Table 1: Switch, top-2 and dense models",
    text="Capacity factors are those of training; in evaluation no token is dropped. The paper's "
    "threshold is a quality of -1.50 and its unit the hour; here it is where the dense model of "
    "the same seed ends. The wider models are T5-Large and Switch-Base+ there.",
    columns=COLUMNS,
    rows=[
        Row("dense", DENSE, ("-1.731", "not reached", "1600")),
        Row("wider dense", WIDER_DENSE, ("-1.550", "131.1 h", "470")),
        Row("top-2, capacity 2.0", switch(64, *capacity(2.0, TOP_2)), ("-1.547", "68.7 h", "840")),
        Row("Switch, capacity 2.0", switch(64, *capacity(2.0)), ("-1.554", "72.8 h", "860")),
        Row(
            "top-2, capacity 1.25", switch(64, *capacity(1.25, TOP_2)), ("-1.559", "80.7 h", "790")
        ),
        Row("Switch, capacity 1.25", switch(64, *capacity(1.25)), ("-1.553", "65.0 h", "910")),
        Row("top-2, capacity 1.0", switch(64, *capacity(1.0, TOP_2)), ("-1.572", "80.1 h", "860")),
        Row("Switch, capacity 1.0", switch(64, *capacity(1.0)), ("-1.561", "62.8 h", "1000")),
        Row(
            "wider Switch, capacity 1.0",
            switch(64, *capacity(1.0, "model.d_model=40", "model.num_heads=5"), rate=0.8),
            ("-1.534", "67.6 h", "780"),
        ),
    ],
    claims=[
        better("Switch, capacity 1.0", "dense", "+0.170"),
        better("top-2, capacity 2.0", "Switch, capacity 2.0", "+0.007"),
        better("Switch, capacity 1.25", "top-2, capacity 1.25", "+0.006"),
        better("Switch, capacity 1.0", "top-2, capacity 1.0", "+0.011"),
        better("wider Switch, capacity 1.0", "top-2, capacity 2.0", "+0.013"),
        faster("Switch, capacity 2.0", "top-2, capacity 2.0", "1.02"),
        faster("Switch, capacity 1.25", "top-2, capacity 1.25", "1.15"),
        faster("Switch, capacity 1.0", "top-2, capacity 1.0", "1.16"),
        faster("Switch, capacity 1.0", "Switch, capacity 2.0", "1.16"),
    ],
)
