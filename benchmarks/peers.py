"""Other implementations of a Switch layer: plain PyTorch and transformers.

All route to the most probable expert and scale by its probability; none drops a token except the
one-hot einsum, whose capacity is the paper's. Shapes: N tokens, D d_model, F d_ff, E experts, C
capacity, G groups of S tokens.
"""

import math

import torch
from torch import Tensor, nn


class _Peer(nn.Module):
    def __init__(self, d_model: int, d_ff: int, num_experts: int) -> None:
        super().__init__()
        self.router = nn.Linear(d_model, num_experts, bias=False)
        self.up = nn.Parameter(torch.randn(num_experts, d_model, d_ff) * d_model**-0.5)
        self.down = nn.Parameter(torch.randn(num_experts, d_ff, d_model) * d_ff**-0.5)
        self.num_experts = num_experts

    def route(self, x_ND: Tensor) -> tuple[Tensor, Tensor]:
        gate_N, expert_N = self.router(x_ND).softmax(-1).max(-1)
        return gate_N, expert_N


class PlainGroupedMM(_Peer):
    """argsort, two calls of torch.nn.functional.grouped_mm, and indexing back."""

    def forward(self, x_ND: Tensor) -> Tensor:
        gate_N, expert_N = self.route(x_ND)
        order_R = expert_N.argsort(stable=True)
        counts_E = torch.bincount(expert_N, minlength=self.num_experts)
        offsets = counts_E.cumsum(0).to(torch.int32)
        hidden_RF = nn.functional.grouped_mm(x_ND[order_R], self.up, offs=offsets).relu()
        y_RD = nn.functional.grouped_mm(hidden_RF, self.down, offs=offsets)
        return y_RD[order_R.argsort()] * gate_N[:, None]


class PaddedBMM(_Peer):
    """Experts padded to the largest load, and batched matmuls."""

    def forward(self, x_ND: Tensor) -> Tensor:
        gate_N, expert_N = self.route(x_ND)
        order_R = expert_N.argsort(stable=True)
        counts_E = torch.bincount(expert_N, minlength=self.num_experts)
        starts_E = counts_E.cumsum(0) - counts_E
        seat_R = torch.arange(x_ND.shape[0]) - starts_E[expert_N[order_R]]
        place_R = expert_N[order_R] * int(counts_E.max()) + seat_R
        padded = x_ND.new_zeros(self.num_experts * int(counts_E.max()), x_ND.shape[1])
        padded = padded.index_copy(0, place_R, x_ND[order_R])
        hidden_ECF = torch.bmm(padded.unflatten(0, (self.num_experts, -1)), self.up).relu()
        y_RD = torch.bmm(hidden_ECF, self.down).flatten(0, 1)[place_R]
        return y_RD[order_R.argsort()] * gate_N[:, None]


class OneHotEinsum(_Peer):
    """The form of the paper (Mesh TensorFlow): dispatch and combine tensors, in groups."""

    def forward(self, x_ND: Tensor) -> Tensor:
        tokens = math.gcd(1024, x_ND.shape[0])
        capacity = max(int(tokens * 1.25 / self.num_experts), 4)
        x_GSD = x_ND.unflatten(0, (-1, tokens))
        gate_N, expert_N = self.route(x_ND)
        chosen_GSE = nn.functional.one_hot(expert_N, self.num_experts).unflatten(0, (-1, tokens))
        place_GSE = (chosen_GSE.cumsum(1) - 1) * chosen_GSE
        kept_GSE = chosen_GSE * (place_GSE < capacity)
        seat_GSC = nn.functional.one_hot((place_GSE * kept_GSE).sum(-1), capacity)
        dispatch_GSEC = kept_GSE.to(x_ND.dtype)[..., None] * seat_GSC.to(x_ND.dtype)[..., None, :]
        combine_GSEC = dispatch_GSEC * gate_N.view(-1, tokens, 1, 1)
        rows_EGCD = torch.einsum("gsec,gsd->egcd", dispatch_GSEC, x_GSD)
        hidden = torch.bmm(rows_EGCD.flatten(1, 2), self.up).relu()
        y_EGCD = torch.bmm(hidden, self.down).view_as(rows_EGCD)
        return torch.einsum("gsec,egcd->gsd", combine_GSEC, y_EGCD).flatten(0, 1)


class HuggingFace(nn.Module):
    """transformers' SwitchTransformersSparseMLP, with capacity for every token."""

    def __init__(self, d_model: int, d_ff: int, num_experts: int) -> None:
        super().__init__()
        from transformers import SwitchTransformersConfig
        from transformers.models.switch_transformers.modeling_switch_transformers import (
            SwitchTransformersSparseMLP,
        )

        config = SwitchTransformersConfig(
            d_model=d_model,
            d_ff=d_ff,
            num_experts=num_experts,
            expert_capacity=2**30,
            router_jitter_noise=0.0,
            dropout_rate=0.0,
        )
        self.layer = SwitchTransformersSparseMLP(config)

    def forward(self, x_ND: Tensor) -> Tensor:
        y = self.layer(x_ND[None])
        return (y[0] if isinstance(y, tuple) else y)[0]


PEERS: dict[str, type[nn.Module]] = {
    "transformers SwitchTransformersSparseMLP": HuggingFace,
    "plain grouped_mm": PlainGroupedMM,
    "padded bmm": PaddedBMM,
    "one-hot einsum": OneHotEinsum,
}
