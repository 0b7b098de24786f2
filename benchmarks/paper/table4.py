"""Table 4: dropout in fine-tuning; a higher rate inside experts."""

from benchmarks.paper.base import PIECES_DENSE, PIECES_SWITCH
from benchmarks.paper.plans import Finetuning, Pretraining
from benchmarks.paper.table import Column, Row, Table, scores_better

SCORE = Column("accuracy, %", lambda one, runs: one.score, ".1f")


def tuned(model: Pretraining, rate: float, expert_rate: float | None = None) -> Finetuning:
    """Return a run of SST-2 with these rates of dropout."""
    rates = f"{{dropout: {rate}, expert_dropout: {rate if expert_rate is None else expert_rate}}}"
    return Finetuning(model=model, task="sst2", overrides=(f"model={rates}",))


TABLE = Table(
    name="table4",
    title="Table 4: dropout in fine-tuning",
    text="The paper's figures are the mean over GLUE, here it is SST-2. The row without dropout "
    "is not the paper's: models of 32 dimensions may not be able to spare a tenth.",
    data=("english_novels", "sst2"),
    columns=(SCORE,),
    rows=[
        Row("dense, dropout 0.1", tuned(PIECES_DENSE, 0.1), ("82.9",)),
        Row("Switch, none", tuned(PIECES_SWITCH, 0.0)),
        Row("Switch, 0.1", tuned(PIECES_SWITCH, 0.1), ("84.7",)),
        Row("Switch, 0.2", tuned(PIECES_SWITCH, 0.2), ("84.4",)),
        Row("Switch, 0.3", tuned(PIECES_SWITCH, 0.3), ("83.9",)),
        Row("Switch, 0.1, in experts 0.4", tuned(PIECES_SWITCH, 0.1, 0.4), ("85.2",)),
    ],
    claims=[
        scores_better("Switch, 0.1, in experts 0.4", "Switch, 0.1", "+0.5"),
        scores_better("Switch, 0.1", "Switch, 0.3", "+0.8"),
        scores_better("Switch, 0.1, in experts 0.4", "dense, dropout 0.1", "+2.3"),
    ],
)
