"""Table 3: a smaller initialisation is better early in training, and steadier over seeds."""

import statistics
from collections.abc import Sequence

from benchmarks.paper.base import EARLY, switch
from benchmarks.paper.table import Claim, Column, Row, Runs, Table

SMALL, LARGE = "s = 0.1", "s = 1.0"
DEPTH = ("model.num_encoder_layers=4", "model.num_decoder_layers=4")


def less_spread(seeds: Sequence[Runs]) -> list[float]:
    """How much further from their mean the runs of the large scale are, seed by seed."""
    both = [runs for runs in seeds if SMALL in runs and LARGE in runs]
    if not both:
        return []
    distances = []
    for name in (LARGE, SMALL):
        found = [runs[name].quality for runs in both]
        distances.append([abs(one - statistics.mean(found)) for one in found])
    return [large - small for large, small in zip(*distances, strict=True)]


TABLE = Table(
    name="table3",
    title="Table 3: scale of initialisation, 32 experts",
    text="Early in training, of a model with four layers per stack: with the demo's one layer the "
    "scale makes no difference. The scale is that of attention and experts; embeddings, routers "
    "and position biases start as the demo's do. The paper's deviations are 0.01 and 0.68.",
    columns=(
        Column("quality", lambda one, runs: one.quality),
        Column("quality after half of the steps", lambda one, runs: one.quality_halfway),
    ),
    rows=[
        Row(
            f"s = {s}", switch(32, f"model.initialisation.scale={s}", *DEPTH, steps=EARLY), (paper,)
        )
        for s, paper in (("0.1", "-2.72"), ("1.0", "-3.60"))
    ],
    claims=[
        Claim(
            "the small scale is better",
            "+0.88",
            lambda runs: runs[SMALL].quality - runs[LARGE].quality,
        ),
        Claim("its seeds are closer to their mean", "0.01 to 0.68", across=less_spread),
    ],
)
