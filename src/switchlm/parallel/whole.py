"""A model that is spread over processes, whole again in each of them: to generate, to be kept."""

import torch
from torch.distributed.tensor import DTensor

from switchlm.model.transformer import SwitchTransformer


@torch.no_grad()
def whole(model: SwitchTransformer) -> SwitchTransformer:
    """Return a copy of a sharded model that is whole in this process, in eval mode.

    All processes call this, and each must have room for the copy, on the model's device. A model
    that is not sharded is returned as it is.
    """
    state = model.state_dict()
    if not any(isinstance(tensor, DTensor) for tensor in state.values()):
        return model
    with torch.device("meta"):
        copy = SwitchTransformer(model.config)
    parts = {
        name: tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.clone()
        for name, tensor in state.items()
    }
    copy.load_state_dict(parts, assign=True)
    return copy.eval()
