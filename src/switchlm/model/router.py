"""The router: which expert takes each token, in float32 (sections 2.1, 2.2 and 2.4).

Shapes: N tokens, D d_model, E experts, K experts per token, A assignments, G groups of S tokens.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn

from switchlm.config import check_sizes
from switchlm.errors import ConfigError
from switchlm.kernels.registry import ROUTE, Kernel, fitting
from switchlm.kernels.select import linear
from switchlm.model import selection
from switchlm.model.config import RouterConfig
from switchlm.model.routing import Routing
from switchlm.model.selection import (
    count_by_group,
    expert_capacity,
    group_size,
    grouped,
    position_in_expert,
    sum_by_group,
)


class Router(nn.Module):
    """A linear map to expert logits, a softmax, a choice, and a capacity.

    dtype: float32 (selective precision); bfloat16 in the experiment of Table 2.
    causal: a token may not depend on later ones, so experts may not choose.
    trains_on_padding: whether padding is routed in training too, in semantics that route it.
    measures: false where losses and means are not needed, as in decoding: they are zeros then.
    keeps_logits: true where routings are to have the logits.
    """

    bias_E: Tensor | None

    def __init__(
        self, d_model: int, num_experts: int, config: RouterConfig, causal: bool = False
    ) -> None:
        super().__init__()
        check_sizes(d_model=d_model, num_experts=num_experts)
        self.weight = nn.Parameter(torch.empty(num_experts, d_model))
        self.num_experts = num_experts
        self.config = config
        self.experts_choose = config.selection == "expert_choice" and not causal
        self.dtype = torch.float32
        self.trains_on_padding = False
        self.measures = True
        self.keeps_logits = False
        bias_E = torch.zeros(num_experts) if config.balance == "bias" else None
        self.register_buffer("bias_E", bias_E)
        factors = (config.capacity_factor, config.evaluation_capacity_factor)
        if self.experts_choose and config.expert_capacity is None and None in factors:
            raise ConfigError(
                "router.selection=expert_choice needs a capacity, but router.capacity_factor is "
                f"{config.capacity_factor} and router.evaluation_capacity_factor is "
                f"{config.evaluation_capacity_factor}: set both."
            )

    def forward(
        self,
        x_ND: Tensor,
        valid_N: Tensor | None,
        row_tokens: int,
        activation_dtype: torch.dtype = torch.float32,
    ) -> Routing:
        """Route tokens.

        x_ND: any floating dtype, after exploration.
        valid_N: bool, false at padding; None where all tokens are real.
        row_tokens: tokens per row, for semantics that group by row.
        activation_dtype: what the experts compute in, for semantics that choose in that dtype.
        """
        semantics = self.config.semantics
        if self.routes_padding:
            valid_N = None
        tokens_per_group = group_size(x_ND.shape[0], row_tokens, semantics, self.config.group_rows)
        x_ND = x_ND.to(self.dtype)
        if self._may_fuse(activation_dtype):
            kernel = fitting(ROUTE, x_ND, self.weight, self.bias_E, valid_N)
            if kernel is not None:
                return self._fused(kernel, x_ND, valid_N, tokens_per_group)
        # Only what autocast would change: programs of torch.export with a size from within this
        # context cannot be saved.
        with torch.autocast(x_ND.device.type, enabled=False):
            scores = self.scores(x_ND)
        if self.experts_choose:
            routing = self._experts_choose(*scores, valid_N, tokens_per_group)
        else:
            dtype = activation_dtype if semantics.gate_in_activation_dtype else self.dtype
            routing = self._tokens_choose(*scores, valid_N, tokens_per_group, dtype)
        return replace(routing, logits_NE=scores[0]) if self.keeps_logits else routing

    @property
    def routes_padding(self) -> bool:
        """Whether padding is routed like any token, counted in loads, losses and capacity."""
        if self.experts_choose or (self.training and not self.trains_on_padding):
            return False
        return self.config.semantics.padding_takes_capacity

    def scores(self, x_ND: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits_NE and probability_NE, in the router's dtype."""
        logits_NE = linear(x_ND.to(self.dtype), self.weight.to(self.dtype))
        return logits_NE, logits_NE.softmax(-1)

    def choose(self, probability_NE: Tensor) -> Tensor:
        """Return expert_NK, the experts that each token chooses, int64."""
        if self.training and self.config.exploration == "sample":
            return selection.sample(probability_NE)
        return selection.choose(probability_NE, self.config.experts_per_token, self.bias_E)

    def gates(self, probability_NE: Tensor, expert_NK: Tensor) -> Tensor:
        """Return gate_NK, float32: the experts' probabilities; those of several add up to one."""
        gate_NK = probability_NE.gather(1, expert_NK).float()
        if self.config.experts_per_token > 1:
            gate_NK = gate_NK / gate_NK.sum(-1, keepdim=True)
        return gate_NK

    @torch.no_grad()
    def update_expert_bias(self, load_E: Tensor) -> None:
        """Update each expert's selection bias by one step against its load (balance: bias)."""
        assert self.bias_E is not None, "only routers balanced by `bias` have one"
        load_E = load_E.float()
        self.bias_E += self.config.bias_rate * (load_E.mean() - load_E).sign()

    def capacity(self, tokens_per_group: int) -> int | None:
        """Return how many tokens of a group an expert takes, None if dropless."""
        config = self.config
        if config.expert_capacity is not None:
            return config.expert_capacity
        factor = config.capacity_factor if self.training else config.evaluation_capacity_factor
        if factor is None:
            return None
        return expert_capacity(tokens_per_group, factor, self.num_experts, config.semantics)

    def _may_fuse(self, activation_dtype: torch.dtype) -> bool:
        """Whether each token takes its most probable expert, all in float32."""
        config = self.config
        return (
            config.experts_per_token == 1
            and not self.keeps_logits
            and not self.experts_choose
            and not config.reroute_overflow
            and not (self.training and config.exploration == "sample")
            and self.dtype == torch.float32
            and not (config.semantics.gate_in_activation_dtype and activation_dtype != self.dtype)
        )

    def _fused(
        self, kernel: Kernel, x_ND: Tensor, valid_N: Tensor | None, tokens_per_group: int
    ) -> Routing:
        """The same as `_tokens_choose`, in one kernel."""
        capacity = self.capacity(tokens_per_group)
        found = kernel.run(x_ND, self.weight, self.bias_E, valid_N, tokens_per_group, capacity)
        if not self.measures and capacity is None:
            return self._unmeasured(found.expert_A, found.gate_A, found.kept_A)
        return Routing(token_A=None, **found._asdict())

    def _tokens_choose(
        self,
        logits_NE: Tensor,
        probability_NE: Tensor,
        valid_N: Tensor | None,
        tokens_per_group: int,
        dtype: torch.dtype,
    ) -> Routing:
        """Every token chooses its experts, in that dtype; past their capacity it is dropped."""
        capacity = self.capacity(tokens_per_group)
        choice_NE = probability_NE.to(dtype)
        expert_NK = self.choose(choice_NE)
        # Before rerouting and dropping: loads and losses are of the choices.
        chosen_GE = None
        if self.measures or capacity is not None:
            chosen_GE = count_by_group(expert_NK, valid_N, tokens_per_group, self.num_experts)
        kept_NK = torch.ones_like(expert_NK, dtype=torch.bool)
        if valid_N is not None:
            kept_NK = kept_NK & valid_N[:, None]
        if capacity is not None and chosen_GE is not None:
            group_N = torch.arange(logits_NE.shape[0], device=logits_NE.device) // tokens_per_group
            if self.config.reroute_overflow:
                expert_NK, kept_NK = selection.reroute_overflow(
                    choice_NE, expert_NK, kept_NK, group_N, chosen_GE.shape[0], capacity
                )
            else:
                queued_NK = torch.where(kept_NK, expert_NK, self.num_experts)
                place_NK = position_in_expert(queued_NK, group_N, self.num_experts)
                kept_NK = kept_NK & (place_NK < capacity)
        gate_NK = self.gates(choice_NE, expert_NK)
        choice = expert_NK.flatten(), gate_NK.flatten(), kept_NK.flatten()
        if chosen_GE is None:
            return self._unmeasured(*choice)
        return self._record(
            logits_NE, probability_NE, valid_N, tokens_per_group, chosen_GE, *choice
        )

    def _unmeasured(self, expert_A: Tensor, gate_A: Tensor, kept_A: Tensor) -> Routing:
        """Return a routing that drops nothing; losses and means are zeros."""
        load_E = torch.zeros(self.num_experts, dtype=torch.int64, device=expert_A.device)
        zeros_GE = gate_A.new_zeros(1, self.num_experts)
        return Routing(
            expert_A=expert_A,
            gate_A=gate_A,
            kept_A=kept_A,
            token_A=None,
            load_E=load_E.scatter_add_(0, expert_A, kept_A.long()),
            fraction_GE=zeros_GE,
            probability_GE=zeros_GE,
            balance_loss=zeros_GE[0, 0],
            z_loss=zeros_GE[0, 0],
        )

    def _experts_choose(
        self,
        logits_NE: Tensor,
        probability_NE: Tensor,
        valid_N: Tensor | None,
        tokens_per_group: int,
    ) -> Routing:
        """Every expert takes its most probable tokens, up to its capacity."""
        capacity = self.capacity(tokens_per_group)
        assert capacity is not None, "experts that choose have a capacity"
        num_tokens = probability_NE.shape[0]
        real_N = valid_N
        if real_N is None:
            real_N = torch.ones(num_tokens, dtype=torch.bool, device=logits_NE.device)
        place_GEC, kept_GEC = selection.expert_choice(
            grouped(probability_NE, tokens_per_group),
            grouped(real_N[:, None], tokens_per_group)[..., 0],
            capacity,
        )
        num_groups, num_experts, capacity = place_GEC.shape
        first_G = torch.arange(num_groups, device=place_GEC.device) * tokens_per_group
        token_A = (place_GEC + first_G[:, None, None]).clamp(max=num_tokens - 1).reshape(-1)
        expert_A = torch.arange(num_experts, device=place_GEC.device)
        expert_A = expert_A[None, :, None].expand(num_groups, -1, capacity).reshape(-1)
        return self._record(
            logits_NE,
            probability_NE,
            valid_N,
            tokens_per_group,
            kept_GEC.sum(-1).float(),
            expert_A,
            probability_NE[token_A, expert_A].float(),
            kept_GEC.reshape(-1),
            token_A,
        )

    def _record(
        self,
        logits_NE: Tensor,
        probability_NE: Tensor,
        valid_N: Tensor | None,
        tokens_per_group: int,
        chosen_GE: Tensor,
        expert_A: Tensor,
        gate_A: Tensor,
        kept_A: Tensor,
        token_A: Tensor | None = None,
    ) -> Routing:
        """Return the routing with loads and losses; padding is left out of every mean."""
        logits_NE, probability_NE = logits_NE.float(), probability_NE.float()
        real_N = torch.ones_like(logits_NE[:, 0])
        if valid_N is not None:
            real_N = valid_N.float()
            probability_NE = probability_NE * real_N[:, None]
        groups = tokens_per_group, chosen_GE.shape[0]
        tokens_G1 = sum_by_group(real_N[:, None], *groups)
        probability_GE = sum_by_group(probability_NE, *groups) / tokens_G1.clamp(min=1)
        fraction_GE = chosen_GE / chosen_GE.sum(-1, keepdim=True).clamp(min=1)
        balance_G = (fraction_GE * probability_GE).sum(-1) * self.num_experts
        filled = (tokens_G1 > 0).sum().clamp(min=1)
        z_N1 = (logits_NE.logsumexp(-1).square() * real_N)[:, None]
        z_G1 = sum_by_group(z_N1, *groups) / tokens_G1.clamp(min=1)
        return Routing(
            expert_A=expert_A,
            gate_A=gate_A,
            kept_A=kept_A,
            token_A=token_A,
            load_E=chosen_GE.sum(0).long(),
            fraction_GE=fraction_GE,
            probability_GE=probability_GE,
            balance_loss=balance_G.sum() / filled,
            z_loss=z_G1.sum() / filled,
        )
