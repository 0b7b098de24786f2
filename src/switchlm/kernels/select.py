"""The operations of a model, each by the fastest kernel for its tensors, and why that one.

Shapes: N tokens, A assignments (of a token to an expert), R = A rows in the order of their experts,
D in (d_model), F out (d_ff), E experts.
"""

from collections.abc import Callable, Hashable
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import Tensor

from switchlm.kernels import autotune
from switchlm.kernels.autotune import Choice
from switchlm.kernels.cpu import feedforward as cpu_feedforward
from switchlm.kernels.cpu import native, small_batch, switch
from switchlm.kernels.cpu.small_matmul import matmul_dtype
from switchlm.kernels.gpu import allows_tf32
from switchlm.kernels.permute import ExpertOrder, combine_rows, gather_rows, sort_by_expert
from switchlm.kernels.reference import Activation, Map, feed_forward
from switchlm.kernels.registry import (
    ATTENTION,
    CROSS_ENTROPY,
    GROUPED_MATMUL,
    LINEAR,
    RMS_NORM,
    fitting,
    run,
)

Implementation = Literal["auto", "separate", "fused"]
LEAST_ROWS = 1024  # below which launching dominates, as in decoding; not worth autotuning


def explain(x_RD: Tensor, weight_EDF: Tensor) -> Choice:
    """Return the kernel that `grouped_matmul` takes for such tensors here."""
    kernel = fitting(GROUPED_MATMUL, x_RD, weight_EDF)
    assert kernel is not None
    return Choice(kernel.name, kernel.good_for)


def linear(x: Tensor, weight_NK: Tensor) -> Tensor:
    """Return x w^T over the last dim, as nn.functional.linear, by the fastest kernel."""
    return run(LINEAR, x, weight_NK)


def rms_norm(x: Tensor, weight_D: Tensor, epsilon: float) -> Tensor:
    """Return x / sqrt(mean(x^2) + epsilon) * weight, the mean over the last dim; all float32."""
    return run(RMS_NORM, x, weight_D, epsilon=epsilon)


def attention(
    query_BHQK: Tensor,
    key_BHMK: Tensor,
    value_BHMK: Tensor,
    bias: Tensor | None,
    dropout: float = 0.0,
) -> Tensor:
    """Return softmax(q k^T + bias) v, [B, Q, H * K], by the fastest kernel.

    bias: [1 or B, 1 or H, Q, M]; None is a bias of zero.
    dropout: of attention weights; only PyTorch's own kernels have it.
    """
    if dropout:
        dropped: Tensor = ATTENTION[-1].run(query_BHQK, key_BHMK, value_BHMK, bias, dropout)
        return dropped
    return run(ATTENTION, query_BHQK, key_BHMK, value_BHMK, bias)


def token_losses(logits_NV: Tensor, targets_N: Tensor) -> Tensor:
    """Return loss_N, float32: the negative log likelihood of each target, in nats.

    logits_NV: float32.
    targets_N: int64; where it is -100, the loss is zero.
    """
    return run(CROSS_ENTROPY, logits_NV, targets_N)


def grouped_matmul(x_RD: Tensor, weight_EDF: Tensor, counts_E: Tensor) -> Tensor:
    """Multiply consecutive runs of rows with their expert's matrix, by the fastest kernel.

    The first counts_E[0] rows belong to expert 0, the next counts_E[1] to expert 1, and so on. Rows
    past the sum of the counts give zeros, and have zero gradients. Under autocast, inputs are cast
    as nn.Linear casts them.

    x_RD, weight_EDF: one floating dtype.
    counts_E: int64.

    Returns y_RF.
    """
    return run(GROUPED_MATMUL, *_autocast(x_RD, weight_EDF), counts_E=counts_E)


def expert_feedforward(
    x_RD: Tensor,
    counts_E: Tensor,
    up_EDF: Tensor,
    down_EFD: Tensor,
    activation: Activation = "relu",
    gate_EDF: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Apply to every row its expert: down(act(up(x))), gated: down(act(gate(x)) * up(x)).

    The same as `grouped_matmul` with the activation between, but one kernel on a CPU. Rows past the
    counts give zeros.

    activation: `relu`, or `gelu` (the tanh form, as T5 v1.1).
    dropout: on the intermediate activation.
    """
    x_RD, up_EDF, down_EFD, gate_EDF = _autocast(x_RD, up_EDF, down_EFD, gate_EDF)
    kernel = explain(x_RD, up_EDF).name
    if kernel == "cpu" and not dropout:
        return cpu_feedforward.expert_feedforward(
            x_RD, counts_E, up_EDF, down_EFD, activation, gate_EDF
        )
    # `small_batch` takes `down` wherever it takes `up`; other kernels are chosen for each.
    multiply = small_batch.grouped_matmul if kernel == "small_batch" else grouped_matmul

    def by(weight_EDF: Tensor) -> Map:
        return lambda rows: multiply(rows, weight_EDF, counts_E)

    gate = None if gate_EDF is None else by(gate_EDF)
    return feed_forward(x_RD, by(up_EDF), gate, by(down_EFD), activation, dropout)


def explain_switch(
    x_ND: Tensor,
    num_assignments: int,
    num_experts: int,
    d_ff: int,
    activation: Activation = "relu",
    gated: bool = False,
    implementation: Implementation = "auto",
) -> Choice:
    """Return how `switch_feedforward` computes such a layer here.

    `separate`: rows are gathered, multiplied by `explain`'s kernel, and combined. `native`: fused,
    in C, on a CPU. `triton`: fused kernels in Triton (the extra `triton`, or PyTorch's own on a
    GPU). `autotune`: not known yet, the next call times both (see autotune.py).

    implementation: `separate` always; `fused` wherever a fused kernel takes the layer, untimed.
    """
    if implementation == "separate":
        return Choice("separate", "kernels.switch is `separate`")
    if x_ND.is_cpu:
        misfit = switch.misfit(x_ND, num_assignments, d_ff, activation, gated)
    else:
        misfit = _triton_misfit(x_ND, num_assignments)
    if misfit is not None:
        return Choice("separate", f"no fused kernel on {x_ND.device}: {misfit}")
    if x_ND.is_cpu:
        return Choice("native", "small experts on a CPU: one kernel for the whole layer")
    if implementation == "fused":
        return Choice("triton", "kernels.switch is `fused`")
    key = _shape_class(x_ND, num_assignments, (num_experts, d_ff, activation, gated))
    known = autotune.cached_choice(key)
    if known is None and torch.cuda.is_current_stream_capturing():
        return Choice("separate", "a graph is being captured, during which nothing can be timed")
    return known or Choice("autotune", "such shapes were not timed yet: the next call times both")


def _triton_misfit(x_ND: Tensor, num_assignments: int) -> str | None:
    """Return why Triton's kernels do not take such a layer, None if they do."""
    if x_ND.device.type != "cuda":
        return "there are none for this device"
    if torch.compiler.is_compiling() or type(x_ND) is not Tensor:
        return "traced: fused kernels need autotuning"
    dtype = matmul_dtype(x_ND)
    if dtype not in (torch.bfloat16, torch.float32):
        return f"they take bfloat16 and float32, not {dtype}"
    if dtype == torch.float32 and not allows_tf32():
        return "float32 without TF32 does not use tensor cores"
    if num_assignments < LEAST_ROWS:
        return f"{num_assignments} rows are too few for them to pay"
    if find_spec("triton") is None:
        return "Triton is not installed (the extra `triton`)"
    return None


def switch_feedforward(
    x_ND: Tensor,
    weight_A: Tensor,
    order: ExpertOrder,
    up_EDF: Tensor,
    down_EFD: Tensor,
    activation: Activation = "relu",
    gate_EDF: Tensor | None = None,
    implementation: Implementation = "auto",
) -> Tensor:
    """Return y_ND: the sum over a token's assignments of weight times expert.

    The same as gathering rows, `expert_feedforward` and combining them.

    weight_A: float32, zero where dropped; in token order, the same number for each token.
    implementation: see `explain_switch`.
    """
    x_ND, up_EDF, down_EFD, gate_EDF = _autocast(x_ND, up_EDF, down_EFD, gate_EDF)
    num_experts, _, d_ff = up_EDF.shape
    shape = (num_experts, d_ff, activation, gate_EDF is not None)
    choice = explain_switch(x_ND, weight_A.shape[0], *shape, implementation)

    def bound(name: str) -> Callable[..., Tensor]:
        return lambda x, weight, up, down, gate=None: SWITCHES[name](
            x, weight, order, up, down, activation, gate
        )

    tensors = [x_ND, weight_A, up_EDF, down_EFD] + ([] if gate_EDF is None else [gate_EDF])
    if choice.name == "autotune":
        key = _shape_class(x_ND, weight_A.shape[0], shape)
        both = (("triton", bound("triton")), ("separate", bound("separate")))
        choice = autotune.autotune(key, *both, tensors)
    return bound(choice.name)(*tensors)


def choose_switch(
    x_ND: Tensor,
    experts_per_token: int,
    num_experts: int,
    d_ff: int,
    activation: Activation = "relu",
    gated: bool = False,
    implementation: Implementation = "auto",
) -> Choice:
    """Return how a layer is computed, as `explain_switch` does, but autotune if that is due.

    Timed with random weights and even loads, so no model is needed.

    x_ND: the input to time with; its values do not matter.
    """
    num_tokens, d_model = x_ND.shape
    about = (num_tokens * experts_per_token, num_experts, d_ff, activation, gated, implementation)
    choice = explain_switch(x_ND, *about)
    if choice.name != "autotune":
        return choice

    def random(*shape: int) -> Tensor:
        matrix = torch.randn(shape, dtype=x_ND.dtype, device=x_ND.device)
        return matrix.div_(shape[-2] ** 0.5).requires_grad_()

    expert_A = torch.arange(about[0], device=x_ND.device) % num_experts
    order = sort_by_expert(expert_A, torch.ones_like(expert_A, dtype=torch.bool), num_experts)
    weight_A = torch.rand(about[0], device=x_ND.device).requires_grad_()
    up_EDF, down_EFD = random(num_experts, d_model, d_ff), random(num_experts, d_ff, d_model)
    gate_EDF = random(num_experts, d_model, d_ff) if gated else None
    switch_feedforward(x_ND, weight_A, order, up_EDF, down_EFD, activation, gate_EDF)
    return explain_switch(x_ND, *about)


def _separate(
    x_ND: Tensor,
    weight_A: Tensor,
    order: ExpertOrder,
    up_EDF: Tensor,
    down_EFD: Tensor,
    activation: Activation,
    gate_EDF: Tensor | None,
) -> Tensor:
    per_token = max(weight_A.shape[0] // max(x_ND.shape[0], 1), 1)
    x_RD = gather_rows(x_ND, order, per_token)
    y_RD = expert_feedforward(x_RD, order.counts_E, up_EDF, down_EFD, activation, gate_EDF)
    return combine_rows(y_RD, weight_A, order, per_token)


def _native(
    x_ND: Tensor,
    weight_A: Tensor,
    order: ExpertOrder,
    up_EDF: Tensor,
    down_EFD: Tensor,
    activation: Activation,
    gate_EDF: Tensor | None,
) -> Tensor:
    readable = native.misfit(weight_A, up_EDF, down_EFD) is None
    compute = switch.switch_feedforward if readable else _separate
    return compute(x_ND, weight_A, order, up_EDF, down_EFD, activation, gate_EDF)


def _triton(*arguments: object) -> Tensor:
    from switchlm.kernels.gpu import feedforward

    return feedforward.switch_feedforward(*arguments)  # type: ignore[arg-type]


SWITCHES: dict[str, Callable[..., Tensor]] = {
    "separate": _separate,
    "native": _native,
    "triton": _triton,
}


def _shape_class(x_ND: Tensor, num_assignments: int, shape: tuple[Hashable, ...]) -> Hashable:
    """Return the key of a timed choice: sizes as they are, the number of rows to a factor of 2."""
    num_tokens, d_model = x_ND.shape
    rows = num_assignments.bit_length(), num_assignments // num_tokens
    return x_ND.device, matmul_dtype(x_ND), d_model, *shape, rows, torch.is_grad_enabled()


def _autocast(x: Tensor, *weights: Tensor | None) -> tuple[Any, ...]:
    """Cast as autocast casts the inputs of nn.Linear: floating tensors, but not float64."""
    tensors = (x, *weights)
    if not torch.is_autocast_enabled(x.device.type):
        return tensors
    return tuple(None if t is None else t.to(matmul_dtype(t)) for t in tensors)
