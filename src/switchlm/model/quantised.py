"""Modules whose weights are codes of 8 or 4 bits: experts, projections and vocabulary.

For inference only: codes have no gradients. Parameters that are not quantised stay as they are.

Shapes: R rows in the order of their experts, D d_model, E experts.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from switchlm.config import check_choice
from switchlm.kernels.cpu.quantised import Int4Matrix, Int8Matrix, Matrix
from switchlm.kernels.reference import feed_forward
from switchlm.model.config import Activation
from switchlm.model.experts import FeedForwardExperts, ProjectionExperts
from switchlm.model.transformer import SwitchTransformer

Matrices = Mapping[str, Sequence[Matrix]]
ExpertMap = Callable[[int, Tensor], Tensor]  # expert and its rows to its outputs


class QuantisedExperts(nn.Module):
    """Feed-forward experts (see the `Experts` protocol); each list has a matrix per expert."""

    def __init__(
        self,
        up: Sequence[Matrix],
        gate: Sequence[Matrix] | None,
        down: Sequence[Matrix],
        activation: Activation,
    ) -> None:
        super().__init__()
        self.up, self.gate, self.down = up, gate, down
        self.num_experts = len(up)
        check_choice(activation, Activation, "activation")
        self.activation = activation

    def forward(self, x_RD: Tensor, counts_E: Tensor) -> Tensor:
        def run(expert: int, rows: Tensor) -> Tensor:
            gate = None if self.gate is None else self.gate[expert]
            up, down = self.up[expert], self.down[expert]
            return feed_forward(rows, up, gate, down, self.activation, 0.0)

        return map_experts(run, x_RD, counts_E, self.down[0].num_outputs)


class QuantisedProjectionExperts(nn.Module):
    """One matrix per expert, for Switch layers inside attention."""

    def __init__(self, projection: Sequence[Matrix]) -> None:
        super().__init__()
        self.projection = projection
        self.num_experts = len(projection)

    def forward(self, x_RD: Tensor, counts_E: Tensor) -> Tensor:
        width = self.projection[0].num_outputs
        return map_experts(lambda e, rows: self.projection[e](rows), x_RD, counts_E, width)


class _Quantised(nn.Module):
    """A module with one matrix. `weight`, the codes, is read for its device."""

    def __init__(self, matrix: Matrix) -> None:
        super().__init__()
        self.matrix = matrix

    @property
    def weight(self) -> Tensor:
        return self.matrix.codes


class QuantisedLinear(_Quantised):
    """A projection without bias."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.matrix(x.reshape(-1, x.shape[-1]))
        return y.view(*x.shape[:-1], y.shape[-1])


class QuantisedEmbedding(_Quantised):
    """The vocabulary as codes, dequantised row by row to float32."""

    def forward(self, tokens: Tensor) -> Tensor:
        matrix, index_I = cast(Int8Matrix | Int4Matrix, self.matrix), tokens.reshape(-1)
        if isinstance(matrix, Int8Matrix):
            rows_ID = matrix.codes[index_I].float() * matrix.scale_N[index_I, None]
        else:
            rows_ID = matrix.rows(index_I)
        return rows_ID.view(*tokens.shape, -1)


def map_experts(run: ExpertMap, x_RD: Tensor, counts_E: Tensor, width: int) -> Tensor:
    """Return y_RW: every expert's run of rows mapped by `run`; rows past the counts give zeros."""
    parts = []
    start = 0
    for expert, count in enumerate(counts_E.tolist()):
        if count:
            parts.append(run(expert, x_RD[start : start + count]))
            start += count
    if start < x_RD.shape[0] or not parts:
        parts.append(x_RD.new_zeros(x_RD.shape[0] - start, width))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def put_in(model: SwitchTransformer, matrices: Matrices) -> None:
    """Replace experts, and quantised linear maps and vocabulary, in place.

    matrices: by the name of the parameter; one per expert where it is stacked.
    """
    for name, module in list(model.named_modules()):
        replacement = _replacement(name, module, matrices)
        if replacement is not None:
            model.set_submodule(name, replacement)
    vocabulary = "embedding.weight" if model.head is None else "head.weight"
    if vocabulary in matrices:
        matrix = matrices[vocabulary][0]
        model.project = lambda x, _weight: QuantisedLinear(matrix)(x)


def quantised_modules(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the modules that hold codes."""
    kinds = QuantisedExperts | QuantisedProjectionExperts | QuantisedLinear | QuantisedEmbedding
    return (module for module in model.modules() if isinstance(module, kinds))


def _replacement(name: str, module: nn.Module, matrices: Matrices) -> nn.Module | None:
    """Return the quantised module that replaces `module`, None to keep it."""
    if isinstance(module, FeedForwardExperts):
        up, gate, down = (matrices.get(f"{name}.{part}") for part in ("up", "gate", "down"))
        if up is None or down is None:
            return None
        return QuantisedExperts(up, gate, down, module.activation)
    if isinstance(module, ProjectionExperts) and f"{name}.projection" in matrices:
        return QuantisedProjectionExperts(matrices[f"{name}.projection"])
    if f"{name}.weight" not in matrices:
        return None
    matrix = matrices[f"{name}.weight"][0]
    if isinstance(module, nn.Embedding):
        return QuantisedEmbedding(matrix)
    return QuantisedLinear(matrix) if isinstance(module, nn.Linear) else None
