"""The one record that leaves this room: padded or packed rows of token ids."""

from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Rows of inputs and targets for an encoder-decoder.

    inputs_BS, targets_BT: int64 token ids. Targets end with the end token; the model shifts them.
    input_segments_BS, target_segments_BT: int32; 0 is padding, packed examples count from 1 and
        never attend to one another. None says that every row is one full example without padding,
        which spares the model its masks.
    source_B: int32, the index of the source in the mixture that each row came from.
    """

    inputs_BS: Tensor
    targets_BT: Tensor
    input_segments_BS: Tensor | None
    target_segments_BT: Tensor | None
    source_B: Tensor

    def to(self, device: torch.device | str) -> Self:
        """Return the batch on `device`; copies only what is elsewhere."""
        move: dict[str, Any] = {
            name: None if value is None else value.to(device, non_blocking=True)
            for name, value in vars(self).items()
        }
        return replace(self, **move)

    @property
    def target_mask_BT(self) -> Tensor:
        """Bool, true where a target counts in the loss."""
        if self.target_segments_BT is None:
            return torch.ones_like(self.targets_BT, dtype=torch.bool)
        return self.target_segments_BT != 0

    @property
    def num_tokens(self) -> int:
        """Real input and target tokens, padding left out."""
        inputs = self.inputs_BS.numel()
        if self.input_segments_BS is not None:
            inputs = int((self.input_segments_BS != 0).sum())
        return inputs + int(self.target_mask_BT.sum())
