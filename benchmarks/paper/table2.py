"""Table 2: selective precision has the speed of bfloat16 and the quality of float32."""

from benchmarks.paper.base import EARLY, switch
from benchmarks.paper.plans import Pretraining
from benchmarks.paper.table import QUALITY, Claim, Column, Row, Table


def precise(precision: str) -> Pretraining:
    """Return 32 experts, computed with so many bits."""
    return switch(32, f"training.precision={precision}", steps=EARLY)


TABLE = Table(
    name="table2",
    title="Table 2: precision, 32 experts",
    text="Early in training. Speeds are those of a CPU, where 16 bits pay only with instructions "
    "for them and with larger products than these.",
    columns=(
        QUALITY,
        Column("examples per second", lambda one, runs: one.examples_per_second, ",.0f"),
    ),
    rows=[
        Row("float32", precise("float32"), ("-1.718", "1160")),
        Row("bfloat16", precise("bfloat16"), ("-3.780 (diverges)", "1390")),
        Row("selective precision", precise("selective"), ("-1.716", "1390")),
    ],
    claims=[
        Claim(
            "selective precision is better than bfloat16",
            "+2.064",
            lambda runs: runs["selective precision"].quality - runs["bfloat16"].quality,
        ),
        Claim(
            "selective precision is faster than float32",
            "1.20",
            lambda runs: (
                runs["selective precision"].examples_per_second
                / runs["float32"].examples_per_second
            ),
            least=1.0,
            form=".2f",
        ),
    ],
)
