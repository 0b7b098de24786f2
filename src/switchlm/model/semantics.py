"""The three named router semantics, as data: what `paper`, `t5x` and `hf` mean.

`paper` is Mesh TensorFlow's `transformer/moe.py` (the code of Fedus et al. 2021), `t5x` is T5X with
Flaxformer (the code of the released checkpoints), `hf` is transformers' `switch_transformers`
(the format and the logits of most users). The router reads these fields, never the name.

In one point training is the same in all of them: padding is not routed. Its amount depends on the
lengths of rows and not on the text, so what it adds to loads, losses and gradients is noise. In
evaluation, where logits are compared with those implementations, it is treated as theirs treat it;
in `hf`, padding at the end of a row changes no other token.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Mode = Literal["paper", "t5x", "hf"]


@dataclass(frozen=True, kw_only=True)
class Semantics:
    """The behaviour of one implementation where they differ.

    group_tokens: tokens share capacity in groups of at most this many; None: a row is a group.
    capacity_rounding: applied to tokens * factor / experts.
    min_capacity: the least capacity of an expert in a group.
    padding_takes_capacity: whether padding is routed at all, and counted in loads and losses; in
        evaluation alone (see above).
    jitter_reaches_experts: whether float32 experts see the jittered input too.
    gate_in_activation_dtype: whether the argmax is taken after casting to the activations' dtype.
    balance_over_layers: `sum` and `mean` reduce the losses of the layers; `joined` averages the
        fractions and probabilities over the layers first and multiplies then.
    losses_where_all_sparse: whether a stack of nothing but Switch layers has router losses.
    first_sparse_layer: the first Switch layer, from the sparse step; every step-th follows.
    """

    group_tokens: int | None
    capacity_rounding: Callable[[float], int]
    min_capacity: int
    padding_takes_capacity: bool
    jitter_reaches_experts: bool
    gate_in_activation_dtype: bool
    balance_over_layers: Literal["sum", "mean", "joined"]
    losses_where_all_sparse: bool
    first_sparse_layer: Callable[[int], int]


SEMANTICS: dict[str, Semantics] = {
    "paper": Semantics(
        group_tokens=1024,
        capacity_rounding=math.trunc,
        min_capacity=4,
        padding_takes_capacity=False,
        jitter_reaches_experts=False,
        gate_in_activation_dtype=False,
        balance_over_layers="sum",
        losses_where_all_sparse=True,
        first_sparse_layer=lambda step: step - 1,
    ),
    "t5x": Semantics(
        group_tokens=4096,
        capacity_rounding=round,  # Python rounds half to even, as jax.numpy does
        min_capacity=4,
        padding_takes_capacity=True,
        jitter_reaches_experts=False,
        gate_in_activation_dtype=False,
        balance_over_layers="mean",
        losses_where_all_sparse=True,
        first_sparse_layer=lambda step: step - 1,
    ),
    "hf": Semantics(
        group_tokens=None,
        capacity_rounding=math.trunc,
        min_capacity=1,
        padding_takes_capacity=True,
        jitter_reaches_experts=True,
        gate_in_activation_dtype=True,
        balance_over_layers="joined",
        losses_where_all_sparse=False,
        first_sparse_layer=lambda step: 1 % step,
    ),
}
