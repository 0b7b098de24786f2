"""The models that several tables share. Their settings are the demo's, recipes/compare.yaml."""

from pathlib import Path
from typing import Any

from benchmarks.paper.plans import Pretraining
from benchmarks.paper.runs import Place

STEPS = 3000  # where the quality at the end counts
EARLY = 1000  # where the paper's claim is about early training
LONG = 6000  # where the dense baseline has to be near the best that it can be
ANYWHERE = Place(Path(), Path())


def dense(*overrides: str, steps: int = STEPS, **more: Any) -> Pretraining:
    """Return the dense twin."""
    return Pretraining(steps=steps, dense=True, overrides=overrides, **more)


def switch(experts: int = 64, *overrides: str, steps: int = STEPS, **more: Any) -> Pretraining:
    """Return the Switch Transformer with so many experts per layer."""
    own = (f"model.num_experts={experts}", *overrides)
    return Pretraining(steps=steps, overrides=own, **more)


def capacity(factor: float, *overrides: str) -> tuple[str, ...]:
    """Return settings that drop tokens in training, as the paper's capacity factor does.

    The whole batch shares the capacity, as the tokens of a core do in the paper.
    """
    rows = Pretraining(steps=1).resolve(0, ANYWHERE).data.batch_size
    return (f"router.capacity_factor={factor}", f"router.group_rows={rows}", *overrides)


DENSE, SWITCH = dense(), switch()
# T5-Large has 3.5 times the FLOPs per token of T5-Base. At twice the width a third of the rate.
WIDER_DENSE = dense("model.d_model=64", "model.num_heads=8", "model.d_ff=112", rate=1 / 3)
# What tasks are learnt from: novels in pieces, which bytes are too many for.
PIECES_DENSE = dense(steps=3000, file="pieces")
PIECES_SWITCH = switch(steps=3000, file="pieces")
