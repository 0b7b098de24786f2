"""Table 10 (appendix A): experts in attention too, which bfloat16 does not bear."""

from benchmarks.paper.base import EARLY, switch
from benchmarks.paper.table import Claim, Column, Row, Table

ATTENTION = "model.attention_experts=true"
BFLOAT16 = "training.precision=selective"
FFN, BOTH, BOTH_16 = "experts in the FFN", "in attention too", "in attention too, bfloat16"

TABLE = Table(
    name="table10",
    title="Table 10: experts in attention, 32 experts",
    text="Experts make queries, and the shared keys and values. With experts in attention alone, "
    "which are not among the settings, the paper has -1.524. bfloat16 is with routers in "
    "float32; it is measured early, and compared with float32 at the same step.",
    columns=(
        Column("quality", lambda one, runs: one.quality),
        Column("quality early", lambda one, runs: one.quality_after(EARLY)),
    ),
    rows=[
        Row(FFN, switch(32), ("-1.548",)),
        Row("experts in the FFN, bfloat16", switch(32, BFLOAT16, steps=EARLY)),
        Row(BOTH, switch(32, ATTENTION), ("-1.513",)),
        Row(BOTH_16, switch(32, ATTENTION, BFLOAT16, steps=EARLY), ("diverges",)),
    ],
    claims=[
        Claim(
            "experts in attention too are better",
            "+0.035",
            lambda runs: runs[BOTH].quality - runs[FFN].quality,
        ),
        Claim(
            "with them bfloat16 is worse than float32, early",
            "diverges",
            lambda runs: runs[BOTH].quality_after(EARLY) - runs[BOTH_16].quality,
        ),
    ],
)
