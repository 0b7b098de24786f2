"""The dense feed-forward network of T5 v1.0 (ReLU) and v1.1 (gated GELU)."""

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn

from switchlm.model.config import Activation

ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "relu": nn.functional.relu,
    "gelu": partial(nn.functional.gelu, approximate="tanh"),
}


class FeedForward(nn.Module):
    """down(act(up(x))), or down(act(gate(x)) * up(x)) when gated (Shazeer 2020). No biases."""

    def __init__(
        self,
        d_model: int,
        d_ff: int,
        activation: Activation = "relu",
        gated: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.up = nn.Linear(d_model, d_ff, bias=False)
        self.gate = nn.Linear(d_model, d_ff, bias=False) if gated else None
        self.down = nn.Linear(d_ff, d_model, bias=False)
        self.activation = activation
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        activate = ACTIVATIONS[self.activation]
        hidden = self.up(x)
        hidden = activate(hidden) if self.gate is None else activate(self.gate(x)) * hidden
        hidden = nn.functional.dropout(hidden, self.dropout, self.training)
        return self.down(hidden)
