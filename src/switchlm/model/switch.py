"""The Switch layer: route, dispatch, compute, combine (section 2.2).

Where all experts are in this process, `fused_switch` does the last three (kernels/select.py), on
GPUs and for small experts on CPUs in fused kernels: they gather tokens while they multiply, and
scatter the results, so that permuted rows are never stored.
"""

from typing import cast

import torch
from torch import Tensor, nn

from switchlm.kernels.permute import sort_by_expert
from switchlm.model.config import Activation, Initialisation, RouterConfig
from switchlm.model.dispatch import Assignments, Dispatcher, LocalDispatcher
from switchlm.model.experts import Experts, FeedForwardExperts, ProjectionExperts
from switchlm.model.initialise import Initialiser
from switchlm.model.router import Router
from switchlm.model.routing import Routing
from switchlm.model.selection import explore


class SwitchLayer(nn.Module):
    """Sends every token to an expert and returns the expert's output times its gate.

    router, experts: see router.py and experts.py.
    dispatcher: local, unless parallelism replaces it.
    """

    def __init__(self, router: Router, experts: Experts) -> None:
        super().__init__()
        self.router = router
        self.experts = experts
        self.dispatcher: Dispatcher = LocalDispatcher()

    def initialise(self, initialisation: Initialisation | None) -> None:
        """Draw all parameters anew (section 2.4), unless they are on the meta device."""
        if self.router.weight.device.type != "meta":
            Initialiser(initialisation or Initialisation()).fill(self)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Routing]:
        """Map x [..., S, D] to (y [..., S, width], routing).

        mask: bool [..., S], false at padding, which gives zeros where the semantics leave it out;
            None where every token is real.
        """
        x_ND = x.reshape(-1, x.shape[-1])
        valid_N = None if mask is None else mask.reshape(-1)
        config = self.router.config
        seen_ND = x_ND
        if self.training:
            seen_ND = explore(x_ND, config.exploration, config.exploration_rate)
        if config.semantics.jitter_reaches_experts and x_ND.dtype == torch.float32:
            x_ND = seen_ND
        row_tokens = x.shape[-2] if x.dim() > 1 else 1
        routing = self.router(seen_ND, valid_N, row_tokens, x_ND.dtype)
        if torch.is_autocast_enabled(x.device.type):
            x_ND = x_ND.to(torch.get_autocast_dtype(x.device.type))
        if fused_switch_misfit(self) is None:
            y_ND = fused_switch(self.experts, x_ND, routing)
        else:
            rows = self.dispatcher.dispatch(x_ND, routing)
            y_RD = self.experts(rows.x_RD, rows.counts_E)
            y_ND = self.dispatcher.combine(y_RD, rows, routing, x_ND.shape[0])
        return y_ND.view(*x.shape[:-1], y_ND.shape[-1]), routing


class SwitchFeedForward(SwitchLayer):
    """A Switch layer of feed-forward experts: replaces the FFN of any PyTorch Transformer.

    router: how tokens are routed; the default is the paper's. Parameters are initialised as in
        section 2.4 unless `initialisation` says otherwise.

    >>> y, routing = SwitchFeedForward(d_model=64, d_ff=256, num_experts=8)(x)
    >>> loss = task_loss + 0.01 * routing.balance_loss
    """

    def __init__(
        self,
        d_model: int,
        d_ff: int,
        num_experts: int,
        *,
        router: RouterConfig | None = None,
        activation: Activation = "relu",
        gated: bool = False,
        expert_dropout: float = 0.0,
        initialisation: Initialisation | None = None,
        causal: bool = False,
    ) -> None:
        super().__init__(
            Router(d_model, num_experts, router or RouterConfig(), causal),
            FeedForwardExperts(d_model, d_ff, num_experts, activation, gated, expert_dropout),
        )
        self.initialise(initialisation)


class SwitchProjection(SwitchLayer):
    """A Switch layer of linear experts, D to `width`, for attention (appendix A)."""

    def __init__(
        self,
        d_model: int,
        width: int,
        num_experts: int,
        *,
        router: RouterConfig | None = None,
        initialisation: Initialisation | None = None,
        causal: bool = False,
    ) -> None:
        super().__init__(
            Router(d_model, num_experts, router or RouterConfig(), causal),
            ProjectionExperts(d_model, width, num_experts),
        )
        self.initialise(initialisation)


def fused_switch_misfit(layer: SwitchLayer) -> str | None:
    """Return why `fused_switch` does not take a layer, None if it does."""
    if not isinstance(layer.dispatcher, LocalDispatcher):
        return "its experts are distributed over processes"
    if not isinstance(layer.experts, FeedForwardExperts):
        return "its experts are not plain feed-forward networks"
    if layer.router.experts_choose:
        return "its experts choose their tokens"
    if layer.experts.training and layer.experts.dropout:
        return "it has expert dropout"
    return None


def fused_switch(experts: Experts, x_ND: Tensor, routing: Routing) -> Tensor:
    """Return y_ND, gate times output, for a layer without `fused_switch_misfit`."""
    order = sort_by_expert(routing.expert_A, routing.kept_A, experts.num_experts)
    weight_A = torch.where(routing.kept_A, routing.gate_A, 0.0)
    # Called as a module, so that FSDP gathers its weights.
    y_ND: Tensor = cast(FeedForwardExperts, experts)(
        x_ND, order.counts_E, Assignments(order, weight_A)
    )
    return y_ND


def switch_layers(model: nn.Module) -> dict[str, SwitchLayer]:
    """Return the Switch layers by name, in the order of `ModelOutput.routing`."""
    return {name: part for name, part in model.named_modules() if isinstance(part, SwitchLayer)}
