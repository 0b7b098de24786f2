"""Recorders of the collectives and of the peak memory of a block of code.

    with CollectiveRecorder(mesh) as sent, MemoryRecorder(model, states) as memory:
        training_step(...)
    sent.collectives, memory.peak

Collectives are recorded as operators, in real jobs and in jobs of fake processes alike. The payload
of a collective is the size of its full tensor: the input of all-reduce, reduce-scatter and
all-to-all, the output of all-gather, in the dtype that is sent. The bytes sent follow from it and
from the number of processes; what a process sends to itself is not counted.

Memory is the storages of all tensors that operators return, real or fake, without rounding and
fragmentation of an allocator and without memory other than tensors.
"""

import dataclasses
import math
import weakref
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from switchlm import _torch
from switchlm._torch import (
    FakeTensor,
    TorchDispatchMode,
    active_fake_mode,
    tree_iter,
)
from switchlm.parallel.mesh import AXES, Mesh

NAMESPACES = ("c10d", "_c10d_functional")  # of the operators below autograd
KINDS = ("all_gather", "all_reduce", "reduce_scatter", "all_to_all", "broadcast")


@dataclass(frozen=True, kw_only=True)
class Collective:
    """One collective as this process takes part in it.

    kind: all_reduce, all_gather, reduce_scatter, all_to_all or broadcast.
    axes: of the mesh, joined by `x`.
    size: processes that take part.
    payload: bytes, see above.
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


class CollectiveRecorder(TorchDispatchMode):
    """Records the collectives of a block of code, those of its backward pass too.

    mesh: gives the names of axes; without it all are called `all`.
    """

    def __init__(self, mesh: Mesh | None = None) -> None:
        super().__init__()
        self.mesh = mesh
        self.collectives: list[Collective] = []
        self._groups: dict[str, tuple[str, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if DTensor in types:
            return NotImplemented  # DTensor calls again with local tensors and collectives
        kind = collective_kind(func)
        if kind is not None:
            names = (argument.name for argument in func._schema.arguments)
            self._record(kind, {**dict(zip(names, args, strict=False)), **(kwargs or {})})
        return func(*args, **(kwargs or {}))

    def _record(self, kind: str, given: dict[str, Any]) -> None:
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
            group = _torch.group_of_name(name)
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


def collective_kind(func: Any) -> str | None:
    """Return the kind of collective that an operator is, None if it is none.

    Names differ, such as `_allgather_base_` and `all_gather_into_tensor`; operators without data
    (wait, barrier) do not count.
    """
    if func.namespace not in NAMESPACES:
        return None
    name = func._schema.name.partition("::")[2].replace("_", "")
    return next((kind for kind in KINDS if kind.replace("_", "") in name), None)


Purpose = Literal["weights", "gradients", "optimizer", "activations", "buffers"]


@dataclass(frozen=True, kw_only=True)
class Bytes:
    """Bytes of one process.

    weights, gradients, optimizer: of this process's shards.
    buffers: weights gathered from other processes, and what is gathered or reduced.
    activations: everything else, including gradients of activations, and gradients of weights until
        they are reduced.
    """

    weights: int = 0
    gradients: int = 0
    optimizer: int = 0
    activations: int = 0
    buffers: int = 0

    @property
    def total(self) -> int:
        """All of them together."""
        return sum(dataclasses.astuple(self))


class MemoryRecorder(TorchDispatchMode):
    """Records the memory of a block of code; a FakeTensorMode must be entered before it.

    model: its parameters and buffers count as weights.
    states: the optimizer's tensors, one mapping per parameter.
    """

    def __init__(self, model: nn.Module, states: Iterable[Mapping[str, Any]] = ()) -> None:
        super().__init__()
        self._known: dict[int, tuple[weakref.ref, int, Purpose]] = {}
        self._now: dict[Purpose, int] = dict.fromkeys(Bytes.__dataclass_fields__, 0)  # type: ignore[arg-type]
        self._highest = 0
        self.peak = Bytes()
        self._model = model
        self._hooks: list[Any] = []
        self._states = list(states)

    def __enter__(self) -> "MemoryRecorder":
        self._fake = active_fake_mode()
        self._depth = 0 if self._fake is None else len(self._fake.enter_stack)
        for tensor in (*self._model.parameters(), *self._model.buffers()):
            self._track(tensor, "weights")
        for state in self._states:
            for tensor in state.values():
                self._track(tensor, "optimizer")
        for parameter in self._model.parameters():
            if parameter.requires_grad:
                self._hooks.append(
                    parameter.register_post_accumulate_grad_hook(
                        lambda p: self._track(p.grad, "gradients")
                    )
                )
        self._resize = torch.UntypedStorage.resize_
        memory = self

        def resize(storage: torch.UntypedStorage, size: int) -> torch.UntypedStorage:
            # FSDP allocates and frees the memory of gathered weights by this.
            result = memory._resize(storage, size)
            memory._set_size(storage, "buffers")
            return result

        torch.UntypedStorage.resize_ = resize  # type: ignore[method-assign, assignment]
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]
        for hook in self._hooks:
            hook.remove()

    @property
    def now(self) -> Bytes:
        """The bytes in memory now."""
        return Bytes(**self._now)

    def mark(self) -> int:
        """Return the peak bytes since the last mark."""
        highest, self._highest = self._highest, sum(self._now.values())
        return highest

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if DTensor in types:
            return NotImplemented
        result = func(*args, **(kwargs or {}))
        for value in tree_iter(result):
            self._track(value, "activations")
        if func.namespace == "fsdp":  # copies into and out of communication buffers
            for value in tree_iter((args, kwargs)):
                self._track(value, "buffers", again=True)
        kind = collective_kind(func)
        if kind in ("all_gather", "reduce_scatter"):
            for value in tree_iter((args, result)):
                self._track(value, "buffers", again=True)
            if kind == "reduce_scatter":
                # The first tensor is the output: the gradient of this process's shards.
                into = result if isinstance(result, Tensor) else next(_tensors(args))
                self._track(into, "gradients", again=True)
        return result

    def _track(self, value: Any, purpose: Purpose, again: bool = False) -> None:
        """Record a tensor's storage if it is new, or with `again` its new purpose."""
        if isinstance(value, DTensor):
            value = value._local_tensor
        if not isinstance(value, Tensor) or self._has_no_memory(value):
            return
        storage = value.untyped_storage()
        if storage._cdata not in self._known or again or purpose == "gradients":
            self._set_size(storage, purpose)

    def _has_no_memory(self, tensor: Tensor) -> bool:
        """Whether a tensor has no memory in any process.

        DTensor infers shapes by running operators on fake tensors of the full shape, in a fake mode
        of its own or in the active one, entered once more.
        """
        if self._fake is None:
            return isinstance(tensor, FakeTensor)
        return len(self._fake.enter_stack) > self._depth

    def _set_size(self, storage: torch.UntypedStorage, purpose: Purpose) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            reference, old, was = self._known[key]
            if was in ("weights", "optimizer"):
                purpose = was
            self._now[was] -= old
        else:
            reference = weakref.ref(storage, lambda _: self._forget(key))
        self._known[key] = (reference, size, purpose)
        self._now[purpose] += size
        total = sum(self._now.values())
        self._highest = max(self._highest, total)
        if total > self.peak.total:
            self.peak = self.now

    def _forget(self, key: int) -> None:
        _, size, purpose = self._known.pop(key)
        self._now[purpose] -= size


def _tensors(value: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_iter(value) if isinstance(leaf, Tensor))
