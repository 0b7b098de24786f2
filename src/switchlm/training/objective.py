"""What training minimises besides routing losses: cross-entropy, unless a recipe says otherwise.

Shapes: B batch, T target, V vocabulary.
"""

from typing import Protocol

from torch import Tensor

from switchlm.data.batch import Batch
from switchlm.model.losses import cross_entropy
from switchlm.model.routing import ModelOutput


class Objective(Protocol):
    """The loss of a model's answer to a batch.

    What it needs beyond targets travels in the batch, as fields of a subclass of `Batch`.
    """

    def __call__(self, output: ModelOutput, batch: Batch) -> Tensor:
        """Return the loss summed over the batch's targets: nats, a float32 scalar."""
        ...


def target_cross_entropy(output: ModelOutput, batch: Batch) -> Tensor:
    """Return the summed negative log likelihood of the batch's targets, in nats."""
    mask_BT = None if batch.target_segments_BT is None else batch.target_mask_BT
    return cross_entropy(output.logits_BTV, batch.targets_BT, mask_BT)[0]
