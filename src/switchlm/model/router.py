"""The router: which expert takes each token, in float32 (sections 2.1, 2.2 and 2.4).

Shapes: N tokens, D d_model, E experts, K experts per token, A assignments, G groups of S tokens.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from switchlm.errors import ConfigError
from switchlm.kernels.registry import ROUTE, Kernel, fitting
from switchlm.model import selection
from switchlm.model.config import RouterConfig
from switchlm.model.routing import Routing
from switchlm.model.selection import (
    count_by_group,
    expert_capacity,
    group_size,
    grouped,
    position_in_expert,
)


@dataclass(frozen=True)
class Scores:
    """What the router thinks of a batch, before any token or expert chooses.

    logits_NE, probability_NE: in the router's dtype.
    valid_N: bool, false at padding; None where all tokens are real.
    tokens_a_group: S, how many consecutive tokens share capacity.
    """

    logits_NE: Tensor
    probability_NE: Tensor
    valid_N: Tensor | None
    tokens_a_group: int

    @property
    def group_N(self) -> Tensor:
        """The group of each token, int64."""
        num_tokens = self.logits_NE.shape[0]
        return torch.arange(num_tokens, device=self.logits_NE.device) // self.tokens_a_group

    def by_group(self, values_NX: Tensor) -> Tensor:
        """Return values_GSX, a short last group filled up with zeros."""
        return grouped(values_NX, self.tokens_a_group)


class Router(nn.Module):
    """A linear map to expert logits, a softmax, a choice, and a capacity.

    `dtype` is float32 (selective precision); the experiment of Table 2 sets it to bfloat16.
    `causal` says that a token may not look at later ones, so that experts may not choose.
    `measures` is false where nobody asks for losses and means, as in decoding: they are zeros then.
    """

    bias_E: Tensor | None

    def __init__(
        self, d_model: int, num_experts: int, config: RouterConfig, causal: bool = False
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, d_model))
        self.num_experts = num_experts
        self.config = config
        self.experts_choose = config.selection == "expert_choice" and not causal
        self.dtype = torch.float32
        self.measures = True
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

        x_ND: any floating dtype, as the exploration left it.
        valid_N: bool, false at padding; None says all tokens are real.
        row_tokens: tokens per row, for semantics that group by row.
        activation_dtype: what the experts compute in, for semantics that choose in that dtype.
        """
        semantics = self.config.semantics
        if semantics.padding_takes_capacity and not self.experts_choose:
            valid_N = None
        tokens_a_group = group_size(x_ND.shape[0], row_tokens, semantics, self.config.group_rows)
        x_ND = x_ND.to(self.dtype)
        if self._may_fuse(activation_dtype):
            kernel = fitting(ROUTE, x_ND, self.weight, self.bias_E, valid_N)
            if kernel is not None:
                return self._fused(kernel, x_ND, valid_N, tokens_a_group)
        with torch.autocast(x_ND.device.type, enabled=False):
            logits_NE = nn.functional.linear(x_ND, self.weight.to(self.dtype))
            scores = Scores(logits_NE, logits_NE.softmax(-1), valid_N, tokens_a_group)
            if self.experts_choose:
                return self._experts_choose(scores)
            probability_NE = scores.probability_NE
            if semantics.gate_in_activation_dtype:
                probability_NE = probability_NE.to(activation_dtype)
            return self._tokens_choose(scores, probability_NE)

    @torch.no_grad()
    def nudge_bias(self, load_E: Tensor) -> None:
        """Move each expert's selection bias one step against its load (balance: bias)."""
        assert self.bias_E is not None, "only routers balanced by `bias` have one"
        load_E = load_E.float()
        self.bias_E += self.config.bias_rate * (load_E.mean() - load_E).sign()

    def capacity(self, tokens_a_group: int) -> int | None:
        """Return how many tokens an expert takes from a group, None when dropless."""
        config = self.config
        if config.expert_capacity is not None:
            return config.expert_capacity
        factor = config.capacity_factor if self.training else config.evaluation_capacity_factor
        if factor is None:
            return None
        return expert_capacity(tokens_a_group, factor, self.num_experts, config.semantics)

    def _may_fuse(self, activation_dtype: torch.dtype) -> bool:
        """Whether tokens take the one expert they find most probable, all in float32."""
        config = self.config
        return (
            config.experts_per_token == 1
            and not self.experts_choose
            and not config.reroute_overflow
            and not (self.training and config.exploration == "sample")
            and self.dtype == torch.float32
            and not (config.semantics.gate_in_activation_dtype and activation_dtype != self.dtype)
        )

    def _fused(
        self, kernel: Kernel, x_ND: Tensor, valid_N: Tensor | None, tokens_a_group: int
    ) -> Routing:
        """The same as `_tokens_choose`, in one kernel."""
        capacity = self.capacity(tokens_a_group)
        found = kernel.run(x_ND, self.weight, self.bias_E, valid_N, tokens_a_group, capacity)
        if not self.measures and capacity is None:
            return self._unmeasured(found.expert_N, found.gate_N, found.kept_N)
        return Routing(
            expert_A=found.expert_N,
            gate_A=found.gate_N,
            kept_A=found.kept_N,
            token_A=None,
            load_E=found.load_E,
            fraction_GE=found.fraction_GE,
            probability_GE=found.probability_GE,
            balance_loss=found.balance_loss,
            z_loss=found.z_loss,
        )

    def _tokens_choose(self, scores: Scores, probability_NE: Tensor) -> Routing:
        """Every token asks for its experts; those with capacity left take it."""
        choices = self.config.experts_per_token
        capacity = self.capacity(scores.tokens_a_group)
        if self.training and self.config.exploration == "sample":
            expert_NK = selection.sample(probability_NE)
        else:
            expert_NK = selection.choose(probability_NE, choices, self.bias_E)
        # Before overflow asks elsewhere: loads and losses are of what was wanted.
        wanted_GE = None
        if self.measures or capacity is not None:
            wanted_GE = count_by_group(
                expert_NK, scores.valid_N, scores.tokens_a_group, self.num_experts
            )
        kept_NK = torch.ones_like(expert_NK, dtype=torch.bool)
        if scores.valid_N is not None:
            kept_NK = kept_NK & scores.valid_N[:, None]
        if capacity is not None and self.config.reroute_overflow:
            expert_NK, kept_NK = selection.reroute_overflow(
                probability_NE, expert_NK, kept_NK, scores.group_N, capacity
            )
        elif capacity is not None:
            queued_NK = torch.where(kept_NK, expert_NK, self.num_experts)
            place_NK = position_in_expert(queued_NK, scores.group_N, self.num_experts)
            kept_NK = kept_NK & (place_NK < capacity)
        gate_NK = probability_NE.gather(1, expert_NK).float()
        if choices > 1:
            gate_NK = gate_NK / gate_NK.sum(-1, keepdim=True)
        expert_A, gate_A, kept_A = expert_NK.flatten(), gate_NK.flatten(), kept_NK.flatten()
        if wanted_GE is None:
            return self._unmeasured(expert_A, gate_A, kept_A)
        return self._record(
            scores, wanted_GE, expert_A=expert_A, gate_A=gate_A, kept_A=kept_A, token_A=None
        )

    def _unmeasured(self, expert_A: Tensor, gate_A: Tensor, kept_A: Tensor) -> Routing:
        """Return a decision that drops nothing; losses and means are zeros."""
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

    def _experts_choose(self, scores: Scores) -> Routing:
        """Every expert takes as many of its most probable tokens as it has capacity for."""
        capacity = self.capacity(scores.tokens_a_group)
        assert capacity is not None, "experts that choose have a capacity"
        num_tokens = scores.probability_NE.shape[0]
        real_N = scores.valid_N
        if real_N is None:
            real_N = torch.ones(num_tokens, dtype=torch.bool, device=scores.logits_NE.device)
        place_GEC, kept_GEC = selection.expert_choice(
            scores.by_group(scores.probability_NE),
            scores.by_group(real_N[:, None])[..., 0],
            capacity,
        )
        num_groups, num_experts, capacity = place_GEC.shape
        first_G = torch.arange(num_groups, device=place_GEC.device) * scores.tokens_a_group
        token_A = (place_GEC + first_G[:, None, None]).clamp(max=num_tokens - 1).reshape(-1)
        expert_A = torch.arange(num_experts, device=place_GEC.device)
        expert_A = expert_A[None, :, None].expand(num_groups, -1, capacity).reshape(-1)
        return self._record(
            scores,
            kept_GEC.sum(-1).float(),
            expert_A=expert_A,
            gate_A=scores.probability_NE[token_A, expert_A].float(),
            kept_A=kept_GEC.reshape(-1),
            token_A=token_A,
        )

    def _record(
        self,
        scores: Scores,
        wanted_GE: Tensor,
        *,
        expert_A: Tensor,
        gate_A: Tensor,
        kept_A: Tensor,
        token_A: Tensor | None,
    ) -> Routing:
        """Add loads and losses to a decision; padding stays out of every mean."""
        logits_NE, probability_NE = scores.logits_NE.float(), scores.probability_NE.float()
        real_N = torch.ones_like(logits_NE[:, 0])
        if scores.valid_N is not None:
            real_N = scores.valid_N.float()
            probability_NE = probability_NE * real_N[:, None]
        tokens_G1 = scores.by_group(real_N[:, None]).sum(1)
        probability_GE = scores.by_group(probability_NE).sum(1) / tokens_G1.clamp(min=1)
        fraction_GE = wanted_GE / wanted_GE.sum(-1, keepdim=True).clamp(min=1)
        balance_G = (fraction_GE * probability_GE).sum(-1) * self.num_experts
        groups = (tokens_G1 > 0).sum().clamp(min=1)
        z_N1 = (logits_NE.logsumexp(-1).square() * real_N)[:, None]
        z_G1 = scores.by_group(z_N1).sum(1) / tokens_G1.clamp(min=1)
        return Routing(
            expert_A=expert_A,
            gate_A=gate_A,
            kept_A=kept_A,
            token_A=token_A,
            load_E=wanted_GE.sum(0).long(),
            fraction_GE=fraction_GE,
            probability_GE=probability_GE,
            balance_loss=balance_G.sum() / groups,
            z_loss=z_G1.sum() / groups,
        )
