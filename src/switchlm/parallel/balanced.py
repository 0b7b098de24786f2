"""A dispatcher whose loads are known beforehand, for steps that are traced but not computed.

Fake tensors carry no values, so what the routers choose is not known. Here every expert takes the
same number of tokens of the whole batch, which is what the balance loss trains for (section 2.2);
what no expert has seats for is dropped. Real loads differ from step to step: the fullest process
then holds more rows, up to the capacity, and the others fewer.

Shapes: P processes of the expert axis, E experts in all, L experts here.
"""

import functools
import math

import numpy
from numpy.typing import NDArray
from torch import Tensor, nn

from switchlm.model.dispatch import Rows
from switchlm.model.router import Router
from switchlm.model.routing import Routing
from switchlm.model.switch import SwitchLayer
from switchlm.parallel.expert import AllToAllDispatcher


def balanced_loads(
    assignments: int, num_experts: int, process: int, seats: int
) -> NDArray[numpy.int64]:
    """Return load_E: how many of its assignments a process sends to each expert.

    The remainder of the division goes to the experts in turn, from process to process, so that all
    have the same load in the end. seats: what an expert takes of one process at most.
    """
    base, rest = divmod(assignments, num_experts)
    load_E = numpy.full(num_experts, base, dtype=numpy.int64)
    load_E[(process * rest + numpy.arange(rest)) % num_experts] += 1
    return numpy.minimum(load_E, seats)


@functools.cache
def exchanged(
    assignments: int, num_experts: int, processes: int, here: int, seats: int
) -> tuple[list[int], list[int]]:
    """Return the rows that process `here` sends to each process, and those that it receives."""
    loads_PE = numpy.stack(
        [balanced_loads(assignments, num_experts, p, seats) for p in range(processes)]
    )
    loads_PPL = loads_PE.reshape(processes, processes, -1).sum(-1)
    return loads_PPL[here].tolist(), loads_PPL[:, here].tolist()


def balance(model: nn.Module) -> None:
    """Let all experts of a sharded model have the same load, whatever the routers say."""
    for layer in [module for module in model.modules() if isinstance(module, SwitchLayer)]:
        if isinstance(layer.dispatcher, AllToAllDispatcher):
            layer.dispatcher = BalancedDispatcher(layer.dispatcher, layer.router)


class BalancedDispatcher(AllToAllDispatcher):
    """Carries rows as AllToAllDispatcher does, as many as `balanced_loads` says."""

    def __init__(self, like: AllToAllDispatcher, router: Router) -> None:
        super().__init__(like.experts, like.tensor)
        self._router = router
        self._assignments, self._seats = 0, 0

    def dispatch(self, x_ND: Tensor, routing: Routing) -> Rows:
        """Return the rows of the experts here, sorted by expert; how many depends on shapes only.

        Which rows they are is not what the routers say.
        """
        groups = routing.fraction_GE.shape[0]
        capacity = self._router.capacity(math.ceil(x_ND.shape[0] / groups))
        self._assignments = routing.expert_A.numel()
        self._seats = self._assignments if capacity is None else capacity * groups
        return super().dispatch(x_ND, routing)

    def exchange_counts(self, counts_E: Tensor) -> tuple[Tensor, list[int], list[int]]:
        """Return counts as they travel, whose values are not used, and the balanced loads."""
        counts_PL = self._swap(counts_E)
        processes, here = 1, 0
        if self.experts is not None:
            processes, here = self.experts.size(), self.experts.get_local_rank()
        rows = exchanged(self._assignments, counts_E.numel(), processes, here, self._seats)
        return counts_PL, *rows
