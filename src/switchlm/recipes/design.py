"""Given hardware and a shape: how many experts to take, and the layout to train them in.

Quality rises at every doubling of the experts at equal FLOPs a token (section 3.1), so the best
model is the one with the most experts whose step is not much longer than the shortest.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from switchlm.model import count
from switchlm.parallel.hardware import Cluster
from switchlm.recipes.config import RunConfig
from switchlm.recipes.plan import Layout, plan

DOUBLINGS = tuple(2**power for power in range(3, 12))


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A number of experts. best: its fastest layout, None if nothing fits; then `reason` says why.

    chosen: whether it is the one to take.
    """

    num_experts: int
    parameters: int
    best: Layout | None
    reason: str
    chosen: bool = False


def design(
    config: RunConfig,
    cluster: Cluster,
    *,
    experts: Sequence[int] = DOUBLINGS,
    tolerance: float = 0.1,
) -> list[Choice]:
    """Plan the shape of `config.model` with each number of experts, and choose one.

    tolerance: how much longer than the shortest step of all the chosen one's may be.
    """
    choices = list(_choices(config, cluster, experts))
    steps = [choice.best.times.step for choice in choices if choice.best is not None]
    if not steps:
        return choices
    fast = [
        choice
        for choice in choices
        if choice.best is not None and choice.best.times.step <= min(steps) * (1 + tolerance)
    ]
    most = max(fast, key=lambda choice: choice.num_experts)
    return [dataclasses.replace(choice, chosen=choice is most) for choice in choices]


def _choices(config: RunConfig, cluster: Cluster, experts: Sequence[int]) -> Iterator[Choice]:
    for number in experts:
        model = dataclasses.replace(config.model, num_experts=number)
        found = plan(dataclasses.replace(config, model=model), cluster)
        yield Choice(
            num_experts=number,
            parameters=count.parameters(model),
            best=found.layouts[0] if found.layouts else None,
            reason=found.reason,
        )
