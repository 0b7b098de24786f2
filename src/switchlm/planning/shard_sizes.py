"""Which part of every parameter a process holds: the rules of `apply`, as numbers.

A test holds them against `apply` itself. Sizes are those of the fullest process, the first.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from math import prod

import torch

from switchlm.errors import ConfigError
from switchlm.model.config import ModelConfig
from switchlm.model.transformer import SwitchTransformer
from switchlm.parallel.mesh import MeshConfig

# The dim of a parameter that the tensor axis splits, by the end of its name; others are whole.
TENSOR_DIMS = {
    "query.weight": 0,
    "key.weight": 0,
    "value.weight": 0,
    "output.weight": 1,
    "feedforward.up.weight": 0,
    "feedforward.gate.weight": 0,
    "feedforward.down.weight": 1,
    "relative_bias.weight": 1,
    "embedding.weight": 0,
    "head.weight": 0,
    "experts.up": 2,
    "experts.gate": 2,
    "experts.down": 1,
}


@dataclass(frozen=True, kw_only=True)
class Share:
    """A parameter as a process holds it.

    group: what is gathered together: `root`, `encoder.blocks.3`, `... exact` (routers and norms of
        a block), `... experts` (of each Switch layer).
    shape: without the tensor and expert axes' other parts, before the rest is spread.
    processes: over how many the rest is spread (1: it is whole here).
    copies: how many replicas sum its gradient.
    held: elements here, as many as in any process; the last ones hold less and are filled up when
        they send.
    """

    name: str
    group: str
    whole: tuple[int, ...]
    shape: tuple[int, ...]
    processes: int
    copies: int
    held: int

    @property
    def is_expert(self) -> bool:
        """Whether it belongs to experts."""
        return self.group.endswith("experts")

    @property
    def is_exact(self) -> bool:
        """Whether it is gathered in float32 whatever the others are."""
        return self.group == "root" or self.group.endswith("exact")


@cache
def shapes_of(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return the shapes of all parameters by name."""
    with torch.device("meta"):
        model = SwitchTransformer(config)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def shares(config: ModelConfig, mesh: MeshConfig, *, exact_apart: bool) -> Iterator[Share]:
    """Yield what the first process of a mesh holds of each parameter.

    mesh: with its `data` given.
    exact_apart: whether routers and norms are gathered by themselves, because the others are
        gathered in another dtype.

    Raises ConfigError where an axis does not divide what it splits.
    """
    assert mesh.data is not None
    _part("model.num_heads", config.num_heads, mesh.tensor, "tensor")
    for name, whole in shapes_of(config).items():
        group = _group(name, exact_apart)
        expert = group.endswith("experts")
        shape = list(whole)
        if expert:
            shape[0] = _part(name, whole[0], mesh.expert, "expert")
        for end, dim in TENSOR_DIMS.items():
            if name.endswith(end):
                shape[dim] = _part(name, whole[dim], mesh.tensor, "tensor")
        processes = mesh.data if expert else mesh.data * mesh.expert
        dim = 0
        if expert and shape[0] % processes and shape[1] % processes == 0:
            dim = 1
        rows = -(-shape[dim] // processes)
        yield Share(
            name=name,
            group=group,
            whole=whole,
            shape=tuple(shape),
            processes=processes,
            copies=mesh.replicas,
            held=rows * (prod(shape) // shape[dim]),
        )


def _part(name: str, size: int, parts: int, axis: str) -> int:
    if size % parts:
        raise ConfigError(f"{name}: {size} cannot be split evenly over mesh.{axis} {parts}.")
    return size // parts


def _group(name: str, exact_apart: bool) -> str:
    if ".blocks." not in name:
        return "root"
    parts = name.split(".")
    block = ".".join(parts[:3])
    if ".experts." in name:
        return f"{block} {parts[3]} {parts[-3]} experts"
    is_exact = ".router." in name or parts[-2].endswith("norm")
    return f"{block} exact" if is_exact and exact_apart else block
