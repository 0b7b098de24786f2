"""What the weights themselves say about a model, read off the names and shapes of their tensors.

A configuration can be wrong (that of the released Switch-C is); the names in the weight index
cannot. Reading them costs time and memory in proportion to the index, whatever the names claim.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from switchlm.errors import CheckpointError
from switchlm.huggingface.names import ALIASES, STACKS, Family, locate
from switchlm.huggingface.weights import Description

_OUR_BLOCK = re.compile(r"(encoder|decoder)\.blocks\.([0-9]{1,9})\.(.+)", re.ASCII)


@dataclass(frozen=True, kw_only=True)
class StackArchitecture:
    """One stack: how many layers there are, which are sparse, and which are dense, for certain.

    A layer in neither set has no feed-forward tensor at all: one is missing.
    """

    num_layers: int
    sparse: frozenset[int]
    dense: frozenset[int]


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """All stacks, and what they share. gated is None where no first matrix of an FFN was found."""

    stacks: Mapping[str, StackArchitecture]
    num_experts: int
    gated: bool | None
    family: Family | None
    head_key: str | None
    attention_experts: bool


def infer_architecture(keys: Mapping[str, object]) -> Architecture:
    """Read the names; raises CheckpointError where whole layers are missing in between."""
    layers: dict[str, set[int]] = {stack: set() for stack in STACKS}
    sparse: dict[str, set[int]] = {stack: set() for stack in STACKS}
    dense: dict[str, set[int]] = {stack: set() for stack in STACKS}
    experts: set[int] = set()
    families: set[Family] = set()
    needs: set[str] = set()
    for key in keys:
        place = locate(key)
        if place is None or place.stack is None or place.layer is None:
            continue
        layers[place.stack].add(place.layer)
        if place.family is not None:
            families.add(place.family)
        if place.expert is not None:
            experts.add(place.expert)
        needs |= place.row.needs
        if "sparse" in place.row.needs:
            sparse[place.stack].add(place.layer)
        if "dense" in place.row.needs:
            dense[place.stack].add(place.layer)
    for stack, found in layers.items():
        _check_complete(f"{stack}.block", found)
    _check_complete("expert_", experts)
    if len(families) > 1:
        raise CheckpointError(
            "The weights mix the names of T5 (DenseReluDense) and of Switch Transformers (mlp); "
            "they do not belong to one model."
        )
    if {"plain", "gated"} <= needs:
        raise CheckpointError(
            "Some feed-forward layers have wi and others wi_0 and wi_1; a model is either gated or "
            "not. The files do not belong to one model."
        )
    heads = ("lm_head.weight", *ALIASES["lm_head.weight"])
    return Architecture(
        stacks={
            stack: StackArchitecture(
                num_layers=len(layers[stack]),
                sparse=frozenset(sparse[stack]),
                dense=frozenset(dense[stack]),
            )
            for stack in STACKS
        },
        num_experts=len(experts),
        gated=("gated" in needs) if {"plain", "gated"} & needs else None,
        family=families.pop() if families else None,
        head_key=next((key for key in heads if key in keys), None),
        attention_experts="switch_attention" in needs,
    )


def infer_quantised(tensors: Mapping[str, Description]) -> Architecture:
    """Read the names of a quantised folder, which are our own."""
    layers: dict[str, set[int]] = {stack: set() for stack in STACKS}
    sparse: dict[str, set[int]] = {stack: set() for stack in STACKS}
    num_experts = 0
    gated, switched = None, False
    for key, description in tensors.items():
        place = _OUR_BLOCK.fullmatch(key)
        if place is None:
            continue
        stack, layer, rest = place[1], int(place[2]), place[3]
        layers[stack].add(layer)
        if rest.startswith("feedforward."):
            gated = bool(gated) or ".gate" in rest
        if ".experts." in rest:
            num_experts = max(num_experts, description.shape[0] if description.shape else 0)
            switched = switched or rest.startswith("attention.")
            if rest.startswith("feedforward."):
                sparse[stack].add(layer)
    stacks: dict[str, StackArchitecture] = {}
    for stack in STACKS:
        if layers[stack] and max(layers[stack]) + 1 != len(layers[stack]):
            raise CheckpointError(f"The weights lack layers of the {stack}: they are incomplete.")
        dense = frozenset(layers[stack] - sparse[stack])
        stacks[stack] = StackArchitecture(
            num_layers=len(layers[stack]), sparse=frozenset(sparse[stack]), dense=dense
        )
    return Architecture(
        stacks=stacks,
        num_experts=num_experts,
        gated=gated,
        family=None,
        head_key="head.weight" if "head.weight" in tensors else None,
        attention_experts=switched,
    )


def _check_complete(name: str, found: set[int]) -> None:
    if found and max(found) + 1 != len(found):
        first = next(number for number in range(len(found)) if number not in found)
        raise CheckpointError(
            f"The weights have {name}{'.' * (not name.endswith('_'))}{max(found)}, but nothing of "
            f"number {first}: the files are incomplete."
        )
