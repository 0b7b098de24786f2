"""The one trace that sharding leaves in the model: a module computes with the part that is here."""

from typing import cast

from torch import Tensor


def local(tensor: Tensor) -> Tensor:
    """Return the part of a sharded tensor that this process holds; any other tensor as it is.

    Sharded tensors (DTensor) know how; gradients go back to where they belong.
    """
    to_local = getattr(tensor, "to_local", None)
    return tensor if to_local is None else cast(Tensor, to_local())
