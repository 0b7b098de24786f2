"""The tensors of a saved folder, put into a model of ours that is there already."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.module import _IncompatibleKeys

from switchlm.checkpoint.names import ALIASES, entries
from switchlm.checkpoint.write_config import family_of
from switchlm.errors import CheckpointError
from switchlm.model.transformer import SwitchTransformer


@torch.no_grad()
def load_saved(model: SwitchTransformer, tensors: Mapping[str, Tensor], strict: bool) -> Any:
    """Copy tensors by their names in a folder; return what is missing and what is unexpected.

    Raises CheckpointError for a tensor of another shape, and, where strict, for names that do not
    match.
    """
    places = model.state_dict()
    missing: list[str] = []
    known = {alias for names in ALIASES.values() for alias in names}
    for entry in entries(model.config, family_of(model.config)):
        known.add(entry.theirs)
        if entry.theirs not in tensors:
            missing.append(entry.theirs)
            continue
        tensor = tensors[entry.theirs]
        place = places[entry.ours] if entry.expert is None else places[entry.ours][entry.expert].t()
        if place.shape != tensor.shape:
            raise CheckpointError(
                f"{entry.theirs} is {list(tensor.shape)} there and {list(place.shape)} here: the "
                "weights are those of another model."
            )
        place.copy_(tensor)
    unexpected = sorted(set(tensors) - known)
    if strict and (missing or unexpected):
        raise CheckpointError(
            f"The weights are not those of this model: {len(missing)} tensors are missing and "
            f"{len(unexpected)} unknown, such as {(missing + unexpected)[0]!r}."
        )
    return _IncompatibleKeys(missing, unexpected)
