"""Models larger than memory: all weights but the experts are loaded, experts are read when needed.

In the encoder all experts that a layer needs are known at once, so each is read once, in the order
of the files, while the one before computes. In the decoder, which needs few, those of the next
Switch layer are predicted and prefetched: by its router, for the input of the present layer.

Shapes: R rows in the order of their experts, D d_model, E experts.
"""

from collections import Counter
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from switchlm.compression.expert_files import ExpertFiles, Recipe
from switchlm.compression.expert_memory import READERS, ExpertMemory, Tensors
from switchlm.config import check_choice
from switchlm.files import Report
from switchlm.huggingface.load import load_without_experts
from switchlm.huggingface.quantised import SCALE
from switchlm.huggingface.weights import TensorOffset
from switchlm.kernels.cpu.quantised import matrix
from switchlm.kernels.reference import Map, feed_forward
from switchlm.kernels.select import linear
from switchlm.model.config import Activation
from switchlm.model.switch import SwitchFeedForward
from switchlm.model.transformer import SwitchTransformer

if TYPE_CHECKING:
    from switchlm.data.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class ExpertPredictor:
    """Predicts the experts of the next Switch layer from the input of this one.

    layer: the name of the next layer.
    weight_ED: of its router, scaled for the norm of this layer. The residual stream changes little
        from one layer to the next.
    """

    layer: str
    weight_ED: Tensor
    experts_per_token: int

    def __call__(self, x_RD: Tensor) -> list[int]:
        """Return the experts of the rows, the most frequent first."""
        logits_RE = nn.functional.linear(x_RD.float(), self.weight_ED)
        chosen = logits_RE.topk(self.experts_per_token, -1).indices.flatten()
        return [expert for expert, _ in Counter(chosen.tolist()).most_common()]


class OffloadedExperts(nn.Module):
    """Experts of one layer (see the `Experts` protocol) in an ExpertMemory.

    Their matrices are [out, in], as in the files, or codes of such.

    width, hidden: of the outputs, and between the two matrices.
    """

    def __init__(
        self,
        layer: str,
        num_experts: int,
        width: int,
        hidden: int,
        memory: ExpertMemory,
        activation: Activation = "relu",
    ) -> None:
        super().__init__()
        self.layer = layer
        self.num_experts = num_experts
        self.width = width
        self.hidden = hidden
        self.memory = memory
        check_choice(activation, Activation, "activation")
        self.activation = activation
        self.predictor: ExpertPredictor | None = None

    def forward(self, x_RD: Tensor, counts_E: Tensor) -> Tensor:
        counts = counts_E.tolist()
        starts, total = {}, 0
        for expert, count in enumerate(counts):
            if count:
                starts[expert] = total
                total += count
        y_RW = x_RD.new_empty(x_RD.shape[0], self.width)
        y_RW[total:].zero_()
        with self.memory.acquire([(self.layer, expert) for expert in starts]) as ready:
            if self.predictor is not None and total:  # while this layer computes
                self.memory.prefetch(self.predictor.layer, self.predictor(x_RD[:total]))
            for (_, expert), tensors in ready:
                rows = slice(starts[expert], starts[expert] + counts[expert])
                y_RW[rows] = self._run(x_RD[rows], tensors)
        return y_RW

    def _run(self, x_RD: Tensor, tensors: Tensors) -> Tensor:
        if "projection" in tensors:
            return self._map("projection", tensors)(x_RD)
        up, down = self._map("up", tensors), self._map("down", tensors)
        gate = self._map("gate", tensors) if "gate" in tensors else None
        return feed_forward(x_RD, up, gate, down, self.activation, 0.0)

    def _map(self, name: str, tensors: Tensors) -> Map:
        """Return the linear map of a matrix [out, in], or of its codes."""
        weight = tensors[name]
        if f"{name}{SCALE}" in tensors:
            outputs = self.hidden if name in ("up", "gate") else self.width
            return matrix(weight, tensors[f"{name}{SCALE}"], outputs)
        return lambda x: linear(x, weight)


@dataclass(frozen=True)
class Offloaded:
    """A model whose experts stay in their files; `memory` has the statistics."""

    model: SwitchTransformer
    tokenizer: "Tokenizer | None"
    memory: ExpertMemory


def load_offloaded(
    name: str | Path,
    expert_memory: int,
    *,
    revision: str | None = None,
    local_files_only: bool = False,
    dtype: torch.dtype | None = None,
    report: Report | None = None,
    readers: int = READERS,
) -> Offloaded:
    """Load a model whose experts stay in their files, for inference on a CPU.

    The other arguments are those of `switchlm.load`.

    expert_memory: bytes for experts, see ExpertMemory.
    dtype: of experts in memory too; they are converted while they are read.

    Raises CheckpointError as `load` does and for pickled weights, ConfigError for too few bytes.
    """
    model, tokenizer, experts = load_without_experts(
        name, revision=revision, local_files_only=local_files_only, dtype=dtype, report=report
    )
    config = model.config
    parts: dict[tuple[str, int], dict[str, TensorOffset]] = {}
    for stacked, offsets in experts.items():
        before, _, part = stacked.partition(".experts.")
        layer = f"{before}.experts"
        for expert, offset in enumerate(offsets):
            parts.setdefault((layer, expert), {})[part] = offset
    coded = any(part.endswith(SCALE) for part in experts)  # scales keep their dtype
    computing = model.embedding.weight.dtype
    if any(one.dtype != computing for found in parts.values() for one in found.values()):
        dtype = computing  # of files that mix dtypes
    recipes = {key: Recipe(found, None if coded else dtype) for key, found in parts.items()}
    paths = {part.file for found in parts.values() for part in found.values()}
    memory = ExpertMemory(recipes, ExpertFiles(sorted(paths)), expert_memory, readers)
    memory.prepare()
    for layer in dict.fromkeys(layer for layer, _ in recipes):
        width = config.d_model if "down" in parts[layer, 0] else config.num_heads * config.d_kv
        model.set_submodule(
            layer,
            OffloadedExperts(
                layer, config.num_experts, width, config.d_ff, memory, config.activation
            ),
        )
    _add_predictors(model)
    return Offloaded(model.requires_grad_(False), tokenizer, memory)


def memory_of(model: nn.Module) -> ExpertMemory | None:
    """Return the memory that a model's experts share; None where they are part of the model."""
    found = (part for part in model.modules() if isinstance(part, OffloadedExperts))
    return next((part.memory for part in found), None)


def _add_predictors(model: SwitchTransformer) -> None:
    """Give each Switch feed-forward layer a predictor of the next one in its stack."""
    for stack in (model.encoder, model.decoder):
        sparse = [one for one in stack.layers if isinstance(one.feedforward, SwitchFeedForward)]
        for here, following in pairwise(sparse):
            layer, after = (cast(SwitchFeedForward, b.feedforward) for b in (here, following))
            norm_D = here.feedforward_norm.weight.float()
            ratio_D = following.feedforward_norm.weight.float() / torch.where(
                norm_D.abs() > 1e-3, norm_D, 1.0
            )
            if isinstance(layer.experts, OffloadedExperts):
                layer.experts.predictor = ExpertPredictor(
                    cast(OffloadedExperts, after.experts).layer,
                    after.router.weight.float() * ratio_D,
                    after.router.config.experts_per_token,
                )
