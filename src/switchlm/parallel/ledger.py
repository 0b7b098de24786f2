"""What travels: every collective of a block of code, by kind, axes and payload.

    with Ledger(mesh) as ledger:
        training_step(...)
    ledger.collectives, ledger.by_kind()

It reads the calls themselves, so it counts a real job and one of fake processes alike. The payload
of a collective is the size of its whole tensor here: the input of all-reduce, reduce-scatter and
all-to-all, the output of all-gather, in the dtype that is sent. How many bytes pass the wire
follows from it and from the number of processes. What a process sends to itself alone is left out.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from switchlm.parallel.mesh import AXES, Mesh

# The operators below autograd, by the name of what they do; others (wait, barrier) carry nothing.
KINDS = {
    "c10d": {
        "_allgather_base_": "all_gather",
        "allgather_": "all_gather",
        "allgather_into_tensor_coalesced_": "all_gather",
        "allreduce_": "all_reduce",
        "allreduce_coalesced_": "all_reduce",
        "_reduce_scatter_base_": "reduce_scatter",
        "reduce_scatter_": "reduce_scatter",
        "reduce_scatter_tensor_coalesced_": "reduce_scatter",
        "alltoall_base_": "all_to_all",
        "alltoall_": "all_to_all",
        "broadcast_": "broadcast",
    },
    "_c10d_functional": {
        "all_gather_into_tensor": "all_gather",
        "all_gather_into_tensor_out": "all_gather",
        "all_gather_into_tensor_coalesced": "all_gather",
        "all_reduce": "all_reduce",
        "all_reduce_": "all_reduce",
        "all_reduce_coalesced": "all_reduce",
        "all_reduce_coalesced_": "all_reduce",
        "reduce_scatter_tensor": "reduce_scatter",
        "reduce_scatter_tensor_out": "reduce_scatter",
        "reduce_scatter_tensor_coalesced": "reduce_scatter",
        "all_to_all_single": "all_to_all",
        "broadcast": "broadcast",
        "broadcast_": "broadcast",
    },
}


@dataclass(frozen=True, kw_only=True)
class Collective:
    """One collective as this process takes part in it.

    kind: all_reduce, all_gather, reduce_scatter, all_to_all or broadcast. axes: of the mesh, joined
    by `x`. size: processes that take part. payload: bytes, see above.
    """

    kind: str
    axes: str
    size: int
    dtype: torch.dtype
    payload: int

    @property
    def sent(self) -> float:
        """Bytes that leave this process: of a ring, and of an all-to-all with equal loads."""
        rounds = 2 if self.kind == "all_reduce" else 1
        return self.payload * rounds * (self.size - 1) / self.size


class Ledger(TorchDispatchMode):
    """Writes down the collectives of a block of code, those of its backward pass too.

    mesh: names the axes; without one they are called `all`.
    """

    def __init__(self, mesh: Mesh | None = None) -> None:
        super().__init__()
        self.mesh = mesh
        self.collectives: list[Collective] = []
        self._groups: dict[str, tuple[str, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if DTensor in types:
            return NotImplemented  # it calls again with its parts, and the collectives it needs
        kind = kind_of(func)
        if kind is not None:
            names = (argument.name for argument in func._schema.arguments)
            self._note(kind, {**dict(zip(names, args, strict=False)), **(kwargs or {})})
        return func(*args, **(kwargs or {}))

    def by_kind(self) -> dict[tuple[str, str, torch.dtype], tuple[int, int]]:
        """Return (how many, payload in bytes) of each (kind, axes, dtype)."""
        return by_kind(self.collectives)

    def _note(self, kind: str, given: dict[str, Any]) -> None:
        tensors = [
            tensor
            for name, value in given.items()
            if name.startswith(("input", "tensor"))
            for tensor in _tensors(value)
        ]
        axes, size = self._group(given)
        if size == 1:
            return
        payload = sum(math.prod(tensor.shape) * tensor.element_size() for tensor in tensors)
        self.collectives.append(
            Collective(
                kind=kind,
                axes=axes,
                size=size,
                dtype=tensors[0].dtype,
                payload=payload * size if kind == "all_gather" else payload,
            )
        )

    def _group(self, given: dict[str, Any]) -> tuple[str, int]:
        name = given.get("group_name")
        if name is None:
            name = dist.ProcessGroup.unbox(given["process_group"]).group_name
        if name not in self._groups:
            group = dist.distributed_c10d._resolve_process_group(name)
            ranks = dist.get_process_group_ranks(group)
            self._groups[name] = (self._axes(ranks), len(ranks))
        return self._groups[name]

    def _axes(self, ranks: list[int]) -> str:
        """Return the axes along which these processes differ."""
        if self.mesh is None:
            return "all"
        shape = [self.mesh.size(axis) for axis in AXES]
        places = numpy.unravel_index(numpy.array(ranks), shape)
        return "x".join(
            axis for axis, place in zip(AXES, places, strict=True) if (place != place[0]).any()
        )


def kind_of(func: Any) -> str | None:
    """Return the kind of collective that an operator is, None if it is none."""
    return KINDS.get(func.namespace, {}).get(func._schema.name.partition("::")[2])


def by_kind(
    collectives: Iterable[Collective],
) -> dict[tuple[str, str, torch.dtype], tuple[int, int]]:
    """Return (how many, payload in bytes) of each (kind, axes, dtype)."""
    totals: dict[tuple[str, str, torch.dtype], tuple[int, int]] = {}
    for one in collectives:
        key = (one.kind, one.axes, one.dtype)
        number, payload = totals.get(key, (0, 0))
        totals[key] = (number + 1, payload + one.payload)
    return totals


def _tensors(value: Any) -> Iterable[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
