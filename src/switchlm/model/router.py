"""The router: which expert takes each token, in float32 (sections 2.1, 2.2 and 2.4).

Shapes: N tokens, D d_model, E experts, K experts a token, A assignments, G groups of S tokens.
"""

import torch
from torch import Tensor, nn

from switchlm.errors import ConfigError
from switchlm.model import selection
from switchlm.model.capacity import expert_capacity, group_size, position_in_expert
from switchlm.model.config import RouterConfig
from switchlm.model.routing import Routing


class Router(nn.Module):
    """A linear map to expert logits, a softmax, a choice, and a capacity.

    `dtype` is float32 (selective precision); the experiment of Table 2 sets it to bfloat16.
    `causal` says that a token may not look at later ones, so that experts may not choose.
    """

    def __init__(
        self, d_model: int, num_experts: int, config: RouterConfig, causal: bool = False
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, d_model))
        self.num_experts = num_experts
        self.config = config
        self.experts_choose = config.selection == "expert_choice" and not causal
        self.dtype = torch.float32
        if config.balance == "bias":
            self.register_buffer("bias_E", torch.zeros(num_experts))
        else:
            self.bias_E = None

    def forward(self, x_ND: Tensor, valid_N: Tensor | None, row_tokens: int) -> Routing:
        """Route tokens.

        x_ND: any floating dtype, as the exploration left it. valid_N: bool, false at padding; None
        says all tokens are real. row_tokens: tokens a row, for semantics that group by row.
        """
        semantics = self.config.semantics
        if semantics.padding_takes_capacity:
            valid_N = None
        with torch.autocast(x_ND.device.type, enabled=False):
            logits_NE = nn.functional.linear(x_ND.to(self.dtype), self.weight.to(self.dtype))
            probability_NE = logits_NE.softmax(-1)
            tokens_a_group = group_size(x_ND.shape[0], row_tokens, semantics)
            if self.experts_choose:
                return self._experts_choose(logits_NE, probability_NE, valid_N, tokens_a_group)
            if semantics.gate_in_activation_dtype:
                probability_NE = probability_NE.to(x_ND.dtype)
            return self._tokens_choose(logits_NE, probability_NE, valid_N, tokens_a_group)

    @torch.no_grad()
    def nudge_bias(self, load_E: Tensor) -> None:
        """Move each expert's selection bias one step against its load (balance: bias)."""
        load_E = load_E.float()
        self.bias_E += self.config.bias_rate * (load_E.mean() - load_E).sign()

    def capacity(self, tokens_a_group: int) -> int | None:
        """Seats an expert has in a group, or None when dropless."""
        config = self.config
        if config.expert_capacity is not None:
            return config.expert_capacity
        factor = config.capacity_factor if self.training else config.evaluation_capacity_factor
        if factor is None:
            return None
        return expert_capacity(tokens_a_group, factor, self.num_experts, config.semantics)

    def _tokens_choose(
        self,
        logits_NE: Tensor,
        probability_NE: Tensor,
        valid_N: Tensor | None,
        tokens_a_group: int,
    ) -> Routing:
        num_tokens, choices = logits_NE.shape[0], self.config.experts_per_token
        capacity = self.capacity(tokens_a_group)
        if self.training and self.config.exploration == "sample":
            expert_NK = selection.sample(probability_NE)
        else:
            expert_NK = selection.choose(probability_NE, choices, self.bias_E)
        wanted_NK = expert_NK
        kept_NK = torch.ones_like(expert_NK, dtype=torch.bool)
        if valid_N is not None:
            kept_NK = kept_NK & valid_N[:, None]
        if capacity is not None:
            group_N = torch.arange(num_tokens, device=expert_NK.device) // tokens_a_group
            if self.config.reroute_overflow:
                expert_N, kept_N = selection.reroute_overflow(
                    probability_NE, group_N, kept_NK[:, 0], capacity
                )
                expert_NK, kept_NK = expert_N[:, None], kept_N[:, None]
            else:
                queued_NK = torch.where(kept_NK, expert_NK, self.num_experts)
                place_NK = position_in_expert(queued_NK, group_N, self.num_experts)
                kept_NK = kept_NK & (place_NK < capacity)
        gate_NK = probability_NE.gather(1, expert_NK)
        if choices > 1:
            gate_NK = gate_NK / gate_NK.sum(-1, keepdim=True)
        with torch.no_grad():
            wanted_GSE = self._grouped(self._one_hot(wanted_NK, valid_N), tokens_a_group)
        return self._record(
            logits_NE,
            probability_NE,
            valid_N,
            tokens_a_group,
            expert_A=expert_NK.reshape(-1),
            gate_A=gate_NK.reshape(-1),
            kept_A=kept_NK.reshape(-1),
            token_A=None,
            wanted_GE=wanted_GSE.sum(1),
        )

    def _experts_choose(
        self,
        logits_NE: Tensor,
        probability_NE: Tensor,
        valid_N: Tensor | None,
        tokens_a_group: int,
    ) -> Routing:
        capacity = self.capacity(tokens_a_group)
        if capacity is None:
            raise ConfigError(
                "router.selection=expert_choice needs a capacity: set router.capacity_factor and "
                "router.evaluation_capacity_factor."
            )
        num_tokens = probability_NE.shape[0]
        real_N = valid_N
        if real_N is None:
            real_N = torch.ones(num_tokens, dtype=torch.bool, device=probability_NE.device)
        probability_GSE = self._grouped(probability_NE, tokens_a_group)
        valid_GS = self._grouped(real_N[:, None], tokens_a_group)[..., 0]
        place_GEC, kept_GEC = selection.expert_choice(probability_GSE, valid_GS, capacity)
        num_groups, num_experts, seats = place_GEC.shape
        first_G = torch.arange(num_groups, device=place_GEC.device) * tokens_a_group
        token_A = (place_GEC + first_G[:, None, None]).clamp(max=num_tokens - 1).reshape(-1)
        expert_A = torch.arange(num_experts, device=place_GEC.device)
        expert_A = expert_A[None, :, None].expand(num_groups, -1, seats).reshape(-1)
        return self._record(
            logits_NE,
            probability_NE,
            valid_N,
            tokens_a_group,
            expert_A=expert_A,
            gate_A=probability_NE[token_A, expert_A],
            kept_A=kept_GEC.reshape(-1),
            token_A=token_A,
            wanted_GE=kept_GEC.sum(-1).float(),
        )

    def _record(
        self,
        logits_NE: Tensor,
        probability_NE: Tensor,
        valid_N: Tensor | None,
        tokens_a_group: int,
        *,
        wanted_GE: Tensor,
        **decision: Tensor | None,
    ) -> Routing:
        """Add loads and losses to a decision; padding stays out of every mean."""
        logits_NE, probability_NE = logits_NE.float(), probability_NE.float()
        log_partition_N = logits_NE.logsumexp(-1)
        if valid_N is None:
            z_loss = log_partition_N.square().mean()
            tokens_G1 = self._grouped(logits_NE.new_ones(logits_NE.shape[0], 1), tokens_a_group)
        else:
            real_N = valid_N.float()
            z_loss = (log_partition_N.square() * real_N).sum() / real_N.sum().clamp(min=1)
            probability_NE = probability_NE * real_N[:, None]
            tokens_G1 = self._grouped(real_N[:, None], tokens_a_group)
        tokens_G1 = tokens_G1.sum(1).clamp(min=1)
        probability_GE = self._grouped(probability_NE, tokens_a_group).sum(1) / tokens_G1
        fraction_GE = wanted_GE / wanted_GE.sum(-1, keepdim=True).clamp(min=1)
        balance = (fraction_GE * probability_GE).sum(-1).mean() * self.num_experts
        return Routing(
            load_E=wanted_GE.sum(0).long(),
            fraction_GE=fraction_GE,
            probability_GE=probability_GE,
            balance_loss=balance,
            z_loss=z_loss,
            **decision,  # type: ignore[arg-type]
        )

    def _one_hot(self, expert_NK: Tensor, valid_N: Tensor | None) -> Tensor:
        chosen_NE = torch.zeros(
            expert_NK.shape[0], self.num_experts, device=expert_NK.device
        ).scatter_(1, expert_NK, 1.0)
        return chosen_NE if valid_N is None else chosen_NE * valid_N[:, None]

    @staticmethod
    def _grouped(values_NX: Tensor, tokens_a_group: int) -> Tensor:
        """Return values_GSX, a short last group filled up with zeros."""
        missing = -values_NX.shape[0] % tokens_a_group
        if missing:
            values_NX = nn.functional.pad(values_NX, (0, 0, 0, missing))
        return values_NX.unflatten(0, (-1, tokens_a_group))
