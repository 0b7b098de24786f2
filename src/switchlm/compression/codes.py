"""The codes of a whole model in memory, as they are stored, and the quantised model of them."""

from collections.abc import Collection, Iterator

import torch
from torch import Tensor

from switchlm.checkpoint.names import Entry
from switchlm.checkpoint.quantised import SCALE, Quantisation, assemble, first_entries, parts
from switchlm.checkpoint.quantised_saving import Quantiser, weights_of_model
from switchlm.checkpoint.write_config import family_of
from switchlm.model.transformer import SwitchTransformer


class Codes:
    """Room for the codes and scales of every parameter of a model that is quantised.

    Raises ConfigError for widths that cannot be cut into groups.
    """

    def __init__(self, model: SwitchTransformer, quantisation: Quantisation) -> None:
        self.config, self.family = model.config, family_of(model.config)
        self.quantisation = quantisation
        self._tensors = {
            part.key: torch.zeros(part.shape, dtype=part.dtype)
            for entry in first_entries(self.config, self.family)
            if quantisation.holds(entry)
            for part in parts(entry, self.config.num_experts, quantisation)
        }

    def put(self, entry: Entry, codes: Tensor, scale: Tensor) -> None:
        """Keep what stands for one matrix."""
        for mine, given in zip(self.get(entry), (codes, scale), strict=True):
            mine.copy_(given)

    def get(self, entry: Entry) -> tuple[Tensor, Tensor]:
        """Return codes and scale of one matrix."""
        codes, scale = self._tensors[entry.ours], self._tensors[entry.ours + SCALE]
        return (
            (codes, scale) if entry.expert is None else (codes[entry.expert], scale[entry.expert])
        )

    def num_bytes(self, of: SwitchTransformer) -> int:
        """Return the bytes of the quantised model's weights as they are stored."""
        kept = (one for name, one in of.state_dict().items() if name not in self._tensors)
        return sum(one.nbytes for one in self._tensors.values()) + sum(4 * o.numel() for o in kept)

    def model(self, of: SwitchTransformer) -> SwitchTransformer:
        """Return the quantised model; what is not quantised is that of `of`."""
        state = {name: tensor.detach() for name, tensor in of.state_dict().items()}

        def read(keys: Collection[str]) -> Iterator[tuple[str, Tensor]]:
            return (
                (key, self._tensors[key] if key in self._tensors else state[key]) for key in keys
            )

        return assemble(self.config, self.family, self.quantisation, read, torch.float32)


@torch.no_grad()
def quantise_all(
    model: SwitchTransformer, quantisation: Quantisation, quantise: Quantiser
) -> Codes:
    """Return the codes of a model, a matrix at a time."""
    codes = Codes(model, quantisation)
    for entry, weight_NK in weights_of_model(model):
        if quantisation.holds(entry):
            codes.put(entry, *quantise(entry, weight_NK))
    return codes
