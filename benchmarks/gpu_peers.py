"""Other implementations of a Switch layer for GPUs: plain PyTorch, and installed libraries.

Building one raises ImportError or AssertionError if its library is missing. Shapes: N tokens, D
d_model.
"""

from torch import Tensor, nn

import peers


class MegaBlocks(nn.Module):
    """MegaBlocks' dropless layer (Gale et al. 2022), one expert per token, ReLU, no biases."""

    def __init__(self, d_model: int, d_ff: int, num_experts: int) -> None:
        super().__init__()
        import torch
        from megablocks.layers.arguments import Arguments
        from megablocks.layers.dmoe import dMoE

        arguments = Arguments(
            hidden_size=d_model,
            ffn_hidden_size=d_ff,
            moe_num_experts=num_experts,
            moe_top_k=1,
            mlp_type="mlp",
            mlp_impl="grouped",
            activation_fn=torch.nn.functional.relu,
            bias=False,
            bf16=True,
            fp16=False,
        )
        self.layer = dMoE(arguments)

    def forward(self, x_ND: Tensor) -> Tensor:
        y = self.layer(x_ND[:, None])
        return (y[0] if isinstance(y, tuple) else y)[:, 0]


class ScatterMoE(nn.Module):
    """ScatterMoE's layer (Tan et al. 2024), with a top-1 router."""

    def __init__(self, d_model: int, d_ff: int, num_experts: int) -> None:
        super().__init__()
        from scattermoe.mlp import MLP

        self.router = nn.Linear(d_model, num_experts, bias=False)
        self.experts = MLP(
            input_size=d_model,
            hidden_size=d_ff,
            num_experts=num_experts,
            top_k=1,
            activation=nn.ReLU(),
        )

    def forward(self, x_ND: Tensor) -> Tensor:
        gate_N1, expert_N1 = self.router(x_ND).softmax(-1).max(-1, keepdim=True)
        return self.experts(x_ND, gate_N1, expert_N1)


PEERS: dict[str, type[nn.Module]] = {
    "transformers SwitchTransformersSparseMLP": peers.HuggingFace,
    "plain grouped_mm": peers.PlainGroupedMM,
    "MegaBlocks dMoE": MegaBlocks,
    "ScatterMoE": ScatterMoE,
}
