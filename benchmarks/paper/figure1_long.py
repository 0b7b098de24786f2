"""Figure 1 again with twice the steps: do the last doublings of experts pay with more text?"""

import itertools

from benchmarks.paper.base import LONG, switch
from benchmarks.paper.table import Row, Table, better

EXPERTS = (16, 32, 64)
NAMES = tuple(f"{number} experts" for number in EXPERTS)

TABLE = Table(
    name="figure1_long",
    title="Figure 1, the last doublings with twice the steps",
    text="An expert of 64 sees a fourth of the text that one of 16 sees. Where the figure above "
    "leaves the last doublings undecided, is it for want of text?",
    rows=[
        Row(name, switch(number, steps=LONG)) for number, name in zip(EXPERTS, NAMES, strict=True)
    ],
    seeds=(0, 1, 2, 3, 4),
    claims=[
        better(more, fewer, "better", f"{more} are better than {fewer}")
        for fewer, more in itertools.pairwise(NAMES)
    ],
)
