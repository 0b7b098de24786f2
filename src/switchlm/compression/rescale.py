"""Rescale features that are out of proportion before weights are quantised; the model is the same.

A norm's weight may be multiplied per feature, and the inputs of the matrices after it divided; a
hidden unit likewise, between `up` and `down` where the path between them is linear or a ReLU, and a
feature of values, before the output projection. In floating point such models are equal. In few
bits they are not: numbers that share a scale are rounded by the largest of them. So a feature that
is large on one side and small on the other, against the median of all, is moved back (Nagel et al.
2019, Meller et al. 2019). Factors are powers of two, so that nothing is rounded. What is large or
small on both sides is the model's own and stays.

Shapes: N outputs, K inputs, D d_model, F hidden units.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from switchlm.huggingface.config import family_of
from switchlm.huggingface.names import Entry, entries
from switchlm.huggingface.quantised import Source, weights_of_model
from switchlm.model.config import ModelConfig
from switchlm.model.transformer import SwitchTransformer

LEAST = 4.0  # the smallest factor that is worth it

Key = tuple[str, int | None]  # of an entry: name and expert


@dataclass
class Rescaling:
    """The factors of every weight, of its outputs and of its inputs; none where it stays.

    num_features: rescaled features, hidden units and values.
    """

    outputs: dict[Key, Tensor] = field(default_factory=dict)
    inputs: dict[Key, Tensor] = field(default_factory=dict)
    num_features: int = 0

    def apply(self, entry: Entry, weight: Tensor) -> Tensor:
        """Return the rescaled weight: [N, K], or [D] of a norm."""
        key = entry.name, entry.expert
        if key in self.outputs:
            factor_N = self.outputs[key]
            weight = weight * (factor_N if weight.dim() == 1 else factor_N[:, None])
        return weight * self.inputs[key] if key in self.inputs else weight

    def source(self, source: Source) -> Source:
        """Yield the rescaled weights."""
        return ((entry, self.apply(entry, weight)) for entry, weight in source)


def find_rescaling(config: ModelConfig, read: Callable[[], Source]) -> Rescaling:
    """Return the factors of a model, read one weight at a time.

    read: returns all weights, [outputs, inputs], in any order; called twice.
    """
    found = Rescaling()
    norm_of = {
        (entry.name, entry.expert): norm
        for entry in entries(config, family_of(config))
        if (norm := _norm_before(entry)) is not None
    }
    before: dict[str, Tensor] = {}
    after: dict[str, Tensor] = {}
    for entry, weight in read():
        if entry.name.endswith("norm.weight"):
            before[entry.name] = weight.float().abs()
        name = norm_of.get((entry.name, entry.expert))
        if name is not None and ".router." not in entry.name:
            largest_D = weight.float().abs().amax(0)
            after[name] = torch.maximum(after.get(name, largest_D), largest_D)
    factor_of = {norm: _factors(before[norm], after[norm]) for norm in after}
    for norm, factor_D in factor_of.items():
        found.outputs[norm, None] = 1 / factor_D
        found.num_features += int((factor_D != 1).sum())
    found.inputs |= {key: factor_of[norm] for key, norm in norm_of.items() if norm in factor_of}

    source_of = {
        (following, entry.expert): (entry.name, entry.expert)
        for entry in entries(config, family_of(config))
        if (following := _matrix_after(entry, config)) is not None
    }
    sources = set(source_of.values())
    rows: dict[Key, Tensor] = {}
    columns: dict[Key, Tensor] = {}
    for entry, weight in read():
        key = entry.name, entry.expert
        if key in sources:
            rows[key] = found.apply(entry, weight.float()).abs().amax(1)
        elif key in source_of:
            columns[key] = weight.float().abs().amax(0)
    for target, before_it in source_of.items():
        factor_F = _factors(rows[before_it], columns[target])
        if (factor_F != 1).any():
            found.outputs[before_it], found.inputs[target] = 1 / factor_F, factor_F
            found.num_features += int((factor_F != 1).sum())
    return found


@torch.no_grad()
def rescale(model: SwitchTransformer) -> int:
    """Rescale a model in main memory, in place; return how many features were rescaled."""
    found = find_rescaling(model.config, lambda: weights_of_model(model))
    if found.num_features:
        for entry, weight in weights_of_model(model):
            weight.copy_(found.apply(entry, weight))
    return found.num_features


def _factors(before_K: Tensor, after_K: Tensor) -> Tensor:
    """Return by what to divide before, and multiply after; 1 where it stays.

    before_K, after_K: the size of each feature on both sides.
    """
    usable_K = (before_K > 0) & (after_K > 0) & before_K.isfinite() & after_K.isfinite()
    if not usable_K.any():
        return torch.ones_like(before_K)
    before_K, after_K = (
        (size_K / size_K[usable_K].median()).log2() for size_K in (before_K, after_K)
    )
    shared_K = torch.minimum(before_K.abs(), after_K.abs())
    opposite_K = usable_K & (before_K * after_K < 0)
    factor_K = (shared_K * before_K.sign()).round().clamp(-60, 60).exp2()
    far_K = opposite_K & (torch.maximum(factor_K, 1 / factor_K) >= LEAST)
    return torch.where(far_K, factor_K, 1.0)


def _norm_before(entry: Entry) -> str | None:
    """Return the name of the norm whose output a matrix multiplies, if it has no other input."""
    name = entry.name
    if len(entry.shape) != 2 or name.endswith((".output.weight", ".down.weight", ".down")):
        return None
    if name == "head.weight":
        return "decoder.final_norm.weight"
    block, _, part = name.partition(".attention.")
    if part:
        return f"{block}.attention_norm.weight"
    block, _, part = name.partition(".cross_attention.")
    if part:
        if part == "query.weight":
            return f"{block}.cross_attention_norm.weight"
        return "encoder.final_norm.weight"
    block, _, part = name.partition(".feedforward.")
    return f"{block}.feedforward_norm.weight" if part else None


def _matrix_after(entry: Entry, config: ModelConfig) -> str | None:
    """Return the name of the matrix that multiplies this one's outputs, scaled as they are."""
    name = entry.name
    if name.endswith("attention.value.weight"):
        return name.replace("value.weight", "output.weight")
    linear = config.gated or config.activation == "relu"
    if linear and name.endswith(("feedforward.up.weight", "feedforward.experts.up")):
        return name.replace(".up", ".down")
    return None
