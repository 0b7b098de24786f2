"""Quantise a model with calibration batch: GPTQ (Frantar et al. 2023), block by block.

The input of each block is the output of the quantised blocks before it. So the activations of all
batches between two blocks are kept; of the inputs of a matrix only the Gram matrix. An expert is
calibrated with the rows that are routed to it.

Shapes: B batch, S positions, D d_model, N outputs, K inputs, R rows of one expert.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from switchlm.compression.quantise import (
    LARGEST_INT8,
    LEVELS,
    group_size,
    int4_grid,
    int8_scale,
    pad_grid,
    quantise_all,
    round_to_nearest,
)
from switchlm.data.batch import Batch
from switchlm.generation.decode import evaluation_mode
from switchlm.huggingface.config import family_of
from switchlm.huggingface.names import entries
from switchlm.huggingface.quantised import Quantisation
from switchlm.kernels.cpu.quantised import matrix, pack_int4
from switchlm.kernels.permute import sort_by_expert
from switchlm.kernels.reference import feed_forward
from switchlm.model.dispatch import per_token
from switchlm.model.experts import FeedForwardExperts, ProjectionExperts
from switchlm.model.switch import SwitchLayer
from switchlm.model.transformer import Block, Stack, StackInputs, SwitchTransformer, shift_right

LEAST_ROWS = 64  # an expert with fewer is rounded to nearest
COLUMNS = 128  # rounded before all columns after them are corrected at once
DAMPING = (0.01, 0.1, 1.0)  # times the mean diagonal, added to it; the first that suffices

Grid = tuple[Tensor, Tensor]  # scale and offset of each output


class Gram:
    """x^T x of the rows x that were added, float32 on the CPU, and their number."""

    def __init__(self, width: int) -> None:
        self.sum_KK = torch.zeros(width, width)
        self.num_rows = 0

    def add(self, x: Tensor) -> None:
        rows_RK = x.reshape(-1, x.shape[-1]).float().cpu()
        self.sum_KK.addmm_(rows_RK.t(), rows_RK)
        self.num_rows += rows_RK.shape[0]

    def hook(self, _module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        """Add the input of a module."""
        self.add(inputs[0])


@dataclass
class Activations:
    """The activations of a batch between two sublayers of a stack.

    x_BSD: the input of the next sublayer.
    inputs: returns what the blocks share; recomputed each time, as its biases are larger than x.
    memory_BSD: the encoder's output, in the decoder.
    """

    x_BSD: Tensor
    inputs: Callable[[], StackInputs]
    memory_BSD: Tensor | None = None


def _attend(block: Block, batch: Activations) -> Tensor:
    return block.attend(batch.x_BSD, batch.inputs(), memory=batch.memory_BSD)[0]


def _transform(block: Block, batch: Activations) -> Tensor:
    return block.transform(batch.x_BSD, batch.inputs().mask_BS)[0]


def calibrate(
    model: SwitchTransformer, batches: Sequence[Batch], quantisation: Quantisation
) -> "Calibrated":
    """Return the codes of the model, whose weights are replaced by the dequantised ones.

    The vocabulary is rounded to nearest, since its rows are looked up too. Raises CheckpointError
    for weights that are not finite.
    """
    found = Calibrated(model, quantisation)
    sources, targets = [], []
    with evaluation_mode(model):
        for batch in (one.to(model.embedding.weight.device) for one in batches):
            source = partial(model.encoder_inputs, batch.inputs_BS, batch.input_segments_BS)
            target = partial(
                model.decoder_inputs,
                shift_right(batch.targets_BT, batch.target_segments_BT, model.config.start_id),
                input_segments_BS=batch.input_segments_BS,
                target_segments_BT=batch.target_segments_BT,
            )
            sources.append(Activations(source().x_BSD, source))
            targets.append(Activations(target().x_BSD, target))
        found.run(model.encoder, sources)
        for decoded, encoded in zip(targets, sources, strict=True):
            decoded.memory_BSD = model.encoder.final_norm(encoded.x_BSD)
        found.run(model.decoder, targets)
    return found


class Calibrated:
    """The codes, the number of calibrated matrices, and the experts with too few rows."""

    def __init__(self, model: SwitchTransformer, quantisation: Quantisation) -> None:
        self.codes = quantise_all(model, quantisation, round_to_nearest(quantisation))
        self.num_matrices = 0
        self.too_few: list[str] = []
        self._names = {module: name for name, module in model.named_modules()}
        self._entries = {
            (entry.name, entry.expert): entry
            for entry in entries(model.config, family_of(model.config))
            if quantisation.includes(entry)
        }

    def run(self, stack: Stack, batches: Sequence[Activations]) -> None:
        """Quantise the weights of a stack, block by block, and run the batches through it."""
        for block in stack.layers:
            attentions = [block.attention]
            if block.cross_attention is not None:
                attentions.append(block.cross_attention)
            self._sublayer(attentions, block.attention_norm, partial(_attend, block), batches)
            feedforward = [block.feedforward]
            self._sublayer(feedforward, block.feedforward_norm, partial(_transform, block), batches)

    def _sublayer(
        self,
        parts: Sequence[nn.Module],
        norm: nn.Module,
        apply: Callable[[Activations], Tensor],
        batches: Sequence[Activations],
    ) -> None:
        """Quantise parts of a block, and update the activations with `apply`, which runs them."""
        modules = [module for part in parts for module in part.modules()]
        grams = {
            module: Gram(module.in_features)
            for module in modules
            if isinstance(module, nn.Linear)
            and (f"{self._names[module]}.weight", None) in self._entries
        }
        if grams:
            hooks = [linear.register_forward_pre_hook(gram.hook) for linear, gram in grams.items()]
            for batch in batches:
                apply(batch)
            for hook in hooks:
                hook.remove()
        for linear, gram in grams.items():
            self._put(f"{self._names[linear]}.weight", None, linear.weight, gram)
        for module in modules:
            if isinstance(module, SwitchLayer):
                self._experts(module, norm, batches)
        for batch in batches:
            batch.x_BSD = apply(batch)

    def _experts(self, layer: SwitchLayer, norm: nn.Module, batches: Sequence[Activations]) -> None:
        experts, name = layer.experts, f"{self._names[layer]}.experts"
        assert isinstance(experts, FeedForwardExperts | ProjectionExperts)
        tokens = [_tokens_of_experts(layer, norm(t.x_BSD), t.inputs().mask_BS) for t in batches]

        def rows(expert: int) -> Iterator[Tensor]:
            for batch, chosen in zip(batches, tokens, strict=True):
                yield norm(batch.x_BSD.flatten(0, 1)[chosen[expert]])

        for expert in range(experts.num_experts):
            gram = Gram(layer.router.weight.shape[1])
            for rows_RD in rows(expert):
                gram.add(rows_RD)
            if gram.num_rows < LEAST_ROWS:
                self.too_few.append(f"{name}.{expert}")
            for part, weight_EDF in experts.named_parameters():
                if part == "down":  # the last matrix: those before are quantised by now
                    gram = Gram(weight_EDF.shape[1])
                    for rows_RD in rows(expert):
                        gram.add(_hidden(experts, expert, rows_RD))
                self._put(f"{name}.{part}", expert, weight_EDF[expert].t(), gram)

    def _put(self, name: str, expert: int | None, weight_NK: Tensor, gram: Gram) -> None:
        """Quantise one matrix, and replace it by the dequantised one."""
        codes, entry = self.codes, self._entries[name, expert]
        if gram.num_rows >= LEAST_ROWS:
            better = gptq(weight_NK.detach().cpu(), gram.sum_KK, codes.quantisation)
            if better is not None:
                codes.put(entry, *better)
                self.num_matrices += 1
        weight_NK.copy_(matrix(*codes.get(entry), entry.shape[0]).dequantise())


def _tokens_of_experts(
    layer: SwitchLayer, x_BSD: Tensor, mask_BS: Tensor | None
) -> tuple[Tensor, ...]:
    """Return for each expert the indices of its tokens, of B * S, int64."""
    _, routing = layer(x_BSD, mask_BS)
    order = sort_by_expert(routing.expert_A, routing.kept_A, layer.experts.num_experts)
    if routing.token_A is None:
        token_R = order.assignment_R // per_token(routing, x_BSD.shape[:2].numel())
    else:
        token_R = routing.token_A[order.assignment_R]
    counts = order.counts_E.tolist()
    return token_R[: sum(counts)].split(counts)


def _hidden(experts: nn.Module, expert: int, rows_RD: Tensor) -> Tensor:
    """Return the input of the expert's last matrix, [R, F]."""
    assert isinstance(experts, FeedForwardExperts)
    up, gate = experts.up[expert], None if experts.gate is None else experts.gate[expert]
    return feed_forward(
        rows_RD,
        lambda x: x @ up,
        None if gate is None else lambda x: x @ gate,
        lambda hidden: hidden,
        experts.activation,
        0.0,
    )


def gptq(
    weight_NK: Tensor, gram_KK: Tensor, quantisation: Quantisation
) -> tuple[Tensor, Tensor] | None:
    """Return codes and scale of a matrix as they are stored; None if the Gram matrix is singular.

    Rounds an input at a time, and corrects the remaining inputs for the error, so that the outputs
    on these rows change least.

    gram_KK: x^T x of the rows, float32.
    """
    factor_KK = _inverse_factor(gram_KK)
    if factor_KK is None:
        return None
    weight_NK = weight_NK.float().clone()
    if quantisation.bits == 8:
        scale_N = int8_scale(weight_NK)
        grid = scale_N, torch.zeros_like(scale_N)
        bounds = -LARGEST_INT8, LARGEST_INT8
        codes_NK = _round(weight_NK, factor_KK, lambda _: grid, bounds, COLUMNS)
        return codes_NK.to(torch.int8), scale_N
    size = group_size(weight_NK, quantisation)
    grids: list[Tensor] = []

    def next_grid(column: int) -> Grid:
        if column % size == 0:
            grids.append(int4_grid(weight_NK[:, column : column + size], size)[0])
        scale_N, offset_N = grids[-1].float().unbind(1)
        return scale_N, offset_N

    columns = max(COLUMNS, size)
    codes_NK = _round(weight_NK, factor_KK, next_grid, (-8, LEVELS - 8), columns) + 8
    return pack_int4(codes_NK), pad_grid(torch.stack(grids))


def _round(
    weight_NK: Tensor,
    factor_KK: Tensor,
    grid_of: Callable[[int], Grid],
    bounds: tuple[int, int],
    columns: int,
) -> Tensor:
    """Return integers, [N, K]; the weight is corrected in place.

    grid_of: called with each column in turn, after all corrections of its group.
    """
    codes_NK = torch.empty_like(weight_NK)
    inputs = weight_NK.shape[1]
    for start in range(0, inputs, columns):
        stop = min(start + columns, inputs)
        errors_NC = torch.zeros_like(weight_NK[:, start:stop])
        for column in range(start, stop):
            scale_N, offset_N = grid_of(column)
            value_N = weight_NK[:, column]
            code_N = ((value_N - offset_N) / scale_N).round_().clamp_(*bounds)
            codes_NK[:, column] = code_N
            error_N = (value_N - (code_N * scale_N + offset_N)) / factor_KK[column, column]
            errors_NC[:, column - start] = error_N
            weight_NK[:, column + 1 : stop].addr_(
                error_N, factor_KK[column, column + 1 : stop], alpha=-1
            )
        weight_NK[:, stop:].addmm_(errors_NC, factor_KK[start:stop, stop:], alpha=-1)
    return codes_NK


def _inverse_factor(gram_KK: Tensor) -> Tensor | None:
    """Return the upper Cholesky factor of the inverse of the damped Gram matrix."""
    mean = gram_KK.diagonal().mean()
    if not mean.isfinite() or mean <= 0:
        return None
    for damping in DAMPING:
        damped_KK = gram_KK.clone()
        damped_KK.diagonal().add_(damping * mean)
        lower_KK, failed = torch.linalg.cholesky_ex(damped_KK)
        if not failed:
            inverse_KK = torch.cholesky_inverse(lower_KK)
            upper_KK, failed = torch.linalg.cholesky_ex(inverse_KK, upper=True)
            if not failed and upper_KK.isfinite().all():
                return upper_KK
    return None
