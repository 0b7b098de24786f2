"""Round weights to the nearest codes of 8 or 4 bits; the quantised state of a model.

Shapes: N outputs, K inputs, G groups of H inputs.
"""

from collections.abc import Collection, Iterator

import torch
from torch import Tensor

from switchlm.errors import CheckpointError
from switchlm.huggingface.config import family_of
from switchlm.huggingface.names import Entry
from switchlm.huggingface.quantised import (
    SCALE,
    Quantisation,
    Quantiser,
    assemble,
    first_entries,
    parts,
    weights_of_model,
)
from switchlm.kernels.cpu.quantised import BLOCK, group_size_of, matrix, pack_int4
from switchlm.model.transformer import SwitchTransformer

LARGEST_INT8 = 127
LEVELS = 15  # the largest code of 4 bits


def round_to_nearest(quantisation: Quantisation) -> Quantiser:
    """Return the function that quantises one matrix, without calibration."""

    def quantise(entry: Entry, weight_NK: Tensor) -> tuple[Tensor, Tensor]:
        weight_NK = weight_NK.float()
        if not weight_NK.isfinite().all():
            raise CheckpointError(
                f"{entry.hf_name} holds numbers that are not finite; the model is damaged."
            )
        if quantisation.bits == 8:
            scale_N = int8_scale(weight_NK)
            codes_NK = (weight_NK / scale_N[:, None]).round_()
            return codes_NK.clamp_(-LARGEST_INT8, LARGEST_INT8).to(torch.int8), scale_N
        grid_GN2 = int4_grid(weight_NK, group_size(weight_NK, quantisation))
        return pack_int4(int4_codes(weight_NK, grid_GN2)), pad_grid(grid_GN2)

    return quantise


class Rounding:
    """Rounds to nearest, and measures by how much, relative to the weights (root mean square).

    worst: the largest error of a matrix, and its name.
    """

    def __init__(self, quantisation: Quantisation) -> None:
        self._quantise = round_to_nearest(quantisation)
        self._lost = self._all = 0.0
        self.worst = (0.0, "none")

    def __call__(self, entry: Entry, weight_NK: Tensor) -> tuple[Tensor, Tensor]:
        codes, scale = self._quantise(entry, weight_NK)
        rounded_NK = matrix(codes, scale, weight_NK.shape[0]).dequantise()
        lost = float((rounded_NK - weight_NK).square().sum())
        size = float(weight_NK.float().square().sum())
        self._lost, self._all = self._lost + lost, self._all + size
        self.worst = max(self.worst, ((lost / max(size, 1e-30)) ** 0.5, entry.hf_name))
        return codes, scale

    @property
    def error(self) -> float:
        """The error of all matrices so far."""
        return float((self._lost / max(self._all, 1e-30)) ** 0.5)


def group_size(weight_NK: Tensor, quantisation: Quantisation) -> int:
    """Return how many inputs share a scale in 4 bits."""
    size = group_size_of(weight_NK.shape[1], quantisation.group_size)
    assert size is not None, "such widths are refused before"
    return size


def int8_scale(weight_NK: Tensor) -> Tensor:
    """Return the scale of each output, float32: its largest weight becomes 127."""
    scale_N = weight_NK.abs().amax(1) / LARGEST_INT8
    return torch.where(scale_N > 0, scale_N, 1.0)


def int4_grid(weight_NK: Tensor, size: int) -> Tensor:
    """Return scale and offset of each group, [G, N, 2] bfloat16.

    The codes 0 to 15 mean (code - 8) * scale + offset, from the smallest weight of a group to the
    largest. A group of equal weights has the scale 1 and that weight as its offset.
    """
    weight_NGH = weight_NK.unflatten(1, (-1, size))
    low_NG, high_NG = weight_NGH.aminmax(dim=2)
    scale_NG = (high_NG - low_NG) / LEVELS
    # bfloat16 may round down; the next number up covers the largest weight again.
    scale_NG = (scale_NG * (1 + 2**-8)).to(torch.bfloat16)
    offset_NG = (low_NG + 8 * scale_NG.float()).to(torch.bfloat16)
    scale_NG = torch.where(scale_NG > 0, scale_NG, 1.0)
    return torch.stack([scale_NG, offset_NG], 2).transpose(0, 1).contiguous()


def int4_codes(weight_NK: Tensor, grid_GN2: Tensor) -> Tensor:
    """Return the nearest codes on that grid, uint8 [N, K]."""
    scale_NG1, offset_NG1 = grid_GN2.float().permute(2, 1, 0).unsqueeze(3)
    codes_NGH = (weight_NK.unflatten(1, (grid_GN2.shape[0], -1)) - offset_NG1) / scale_NG1
    return (codes_NGH.round_() + 8).clamp_(0, LEVELS).to(torch.uint8).flatten(1)


def pad_grid(grid_GN2: Tensor) -> Tensor:
    """Return the grid padded with zeros to a multiple of the block in outputs."""
    return torch.nn.functional.pad(grid_GN2, (0, 0, 0, -grid_GN2.shape[1] % BLOCK))


class Codes:
    """The codes and scales of every quantised parameter of a model, zeros at first.

    Raises ConfigError for widths that cannot be divided into groups.
    """

    def __init__(self, model: SwitchTransformer, quantisation: Quantisation) -> None:
        self.quantisation = quantisation
        self._tensors = {
            part.key: torch.zeros(part.shape, dtype=part.dtype)
            for entry in first_entries(model.config, family_of(model.config))
            if quantisation.includes(entry)
            for part in parts(entry, model.config.num_experts, quantisation)
        }

    def put(self, entry: Entry, codes: Tensor, scale: Tensor) -> None:
        """Set codes and scale of one matrix."""
        for mine, given in zip(self.get(entry), (codes, scale), strict=True):
            mine.copy_(given)

    def get(self, entry: Entry) -> tuple[Tensor, Tensor]:
        """Return codes and scale of one matrix."""
        codes, scale = self._tensors[entry.name], self._tensors[entry.name + SCALE]
        if entry.expert is None:
            return codes, scale
        return codes[entry.expert], scale[entry.expert]

    def num_bytes(self, of: SwitchTransformer) -> int:
        """Return the bytes of the quantised model's weights as they are stored."""
        kept = (one for name, one in of.state_dict().items() if name not in self._tensors)
        return sum(one.nbytes for one in self._tensors.values()) + sum(4 * o.numel() for o in kept)

    def model(self, of: SwitchTransformer) -> SwitchTransformer:
        """Return the quantised model; other parameters are shared with `of`."""
        state = {name: tensor.detach() for name, tensor in of.state_dict().items()} | self._tensors

        def read(keys: Collection[str]) -> Iterator[tuple[str, Tensor]]:
            return ((key, state[key]) for key in keys)

        return assemble(of.config, family_of(of.config), self.quantisation, read, torch.float32)


@torch.no_grad()
def quantise_all(
    model: SwitchTransformer, quantisation: Quantisation, quantise: Quantiser
) -> Codes:
    """Return the codes of a model, quantised a matrix at a time."""
    codes = Codes(model, quantisation)
    for entry, weight_NK in weights_of_model(model):
        if quantisation.includes(entry):
            codes.put(entry, *quantise(entry, weight_NK))
    return codes
