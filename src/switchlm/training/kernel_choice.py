"""Choose the kernel of the Switch layers of a run, once, the same in all processes."""

from typing import cast

import torch

from switchlm.errors import ConfigError
from switchlm.kernels import select
from switchlm.kernels.select import Choice, Implementation
from switchlm.model.experts import FeedForwardExperts
from switchlm.model.precision import computing
from switchlm.model.switch import SwitchFeedForward, fused_switch_misfit
from switchlm.model.transformer import SwitchTransformer
from switchlm.parallel.mesh import ALONE, Mesh
from switchlm.training.config import TrainingConfig


def choose_switch(
    model: SwitchTransformer,
    config: TrainingConfig,
    num_tokens: int,
    implementation: Implementation = "auto",
    mesh: Mesh = ALONE,
) -> Choice | None:
    """Set how the Switch feed-forward layers of a model run, and return the choice.

    Every process of a job calls this once, before its first step. The main process chooses for all,
    after a timing run if the shape is new; if another process cannot run that kernel, all take
    separate matmuls. A single process with `auto` goes on to time every new shape.

    num_tokens: tokens that the encoder reads in a batch of this process.

    Returns None for a model without such layers. Raises ConfigError, in all processes, if
    `implementation` is `fused` and no fused kernel supports these layers.
    """
    layers = [part for part in model.modules() if isinstance(part, SwitchFeedForward)]
    if not layers:
        return None
    fitting = [layer for layer in layers if fused_switch_misfit(layer) is None]
    if config.compile:
        choice = Choice("separate", "the model is compiled (training.compile)")
    elif fitting:
        choice = _choose_for(fitting[0], config, num_tokens, implementation, mesh)
    else:
        choice = Choice("separate", str(fused_switch_misfit(layers[0])))
    found = mesh.gather(choice)
    choice = next((one for one in found if one.name == "separate"), found[0])
    if implementation == "fused" and choice.name == "separate":
        raise ConfigError(
            f"kernels.switch is 'fused', but no fused kernel supports a Switch layer of this run: "
            f"{choice.reason}. Take kernels.switch=auto, or separate."
        )
    if mesh.is_distributed:
        implementation = "separate" if choice.name == "separate" else "fused"
    for layer in fitting:
        cast(FeedForwardExperts, layer.experts).implementation = implementation
    return choice


def _choose_for(
    layer: SwitchFeedForward,
    config: TrainingConfig,
    num_tokens: int,
    implementation: Implementation,
    mesh: Mesh,
) -> Choice:
    """Return the choice for a layer; `autotune` in a process that has not timed it."""
    experts, router = cast(FeedForwardExperts, layer.experts), layer.router
    num_experts, d_model, d_ff = experts.up.shape
    about = (num_experts, d_ff, experts.activation, experts.gate is not None, implementation)
    dtype = torch.float32 if config.precision == "float32" else torch.bfloat16
    x_ND = torch.randn(num_tokens, d_model, dtype=dtype, device=router.weight.device)
    per_token = router.config.experts_per_token
    with computing(config.precision, x_ND.device):
        if mesh.is_main:
            return select.choose_switch(x_ND.requires_grad_(), per_token, *about)
        return select.explain_switch(x_ND, num_tokens * per_token, *about)
