"""The fused router, native/router.c, where every token takes its most probable expert.

The plain twin is `Router` in model/router.py: some forty operators each way. In small models
starting an operator takes longer than its work.

Shapes: N tokens, D d_model, E experts, G groups of consecutive tokens.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from switchlm.kernels.cpu import native

MOST_WORK = 2**25  # multiply-adds of the logits above which PyTorch's threads pay
_BLOCK = 64  # as in router.c


class Routed(NamedTuple):
    """See `Routing`; gate_A, probability_GE and the two losses carry gradients."""

    gate_A: Tensor
    probability_GE: Tensor
    balance_loss: Tensor
    z_loss: Tensor
    expert_A: Tensor
    kept_A: Tensor
    load_E: Tensor
    fraction_GE: Tensor


def misfit(
    x_ND: Tensor,
    weight_ED: Tensor,
    bias_E: Tensor | None = None,
    valid_N: Tensor | None = None,
) -> str | None:
    """Return why the kernel does not take these, None if it does.

    Float32, in main memory, little work, not traced. The number of threads plays no part, so it
    changes no result.
    """
    reason = native.misfit(x_ND, weight_ED)
    if reason is None and valid_N is not None:
        reason = native.misfit(valid_N, dtype=torch.bool)
    if reason is not None:
        return reason
    if x_ND.shape[0] * weight_ED.numel() > MOST_WORK:
        return "enough work for several threads"
    if x_ND.shape[1:] != weight_ED.shape[1:] or weight_ED.shape[1] % native.WIDTH:
        return "other widths, or no whole vectors"
    if bias_E is not None and not (bias_E.is_cpu and bias_E.shape == weight_ED.shape[:1]):
        return "a bias on another device, or of another shape"
    if valid_N is not None and valid_N.shape != x_ND.shape[:1]:
        return "a mask of another shape"
    return None


def route(
    x_ND: Tensor,
    weight_ED: Tensor,
    bias_E: Tensor | None,
    valid_N: Tensor | None,
    tokens_per_group: int,
    capacity: int | None,
) -> Routed:
    """Route tokens that have no `misfit` to one expert each.

    bias_E: added to the probabilities for the choice alone.
    valid_N: bool, false at padding; None where all tokens are real.
    capacity: of an expert in a group of `tokens_per_group`; None is dropless.
    """
    tensors = (x_ND.contiguous(), weight_ED.contiguous())
    bias_E = None if bias_E is None else bias_E.float().contiguous()
    valid_N = None if valid_N is None else valid_N.contiguous()
    most = -1 if capacity is None else capacity
    return Routed(*_Route.apply(*tensors, bias_E, valid_N, tokens_per_group, most))


def _padded(num_tokens: int, tokens_per_group: int) -> int:
    """Return the number of tokens with each group padded to whole vectors."""
    full, rest = divmod(num_tokens, tokens_per_group)
    vectors = full * -(-tokens_per_group // native.WIDTH) + -(-rest // native.WIDTH)
    return vectors * native.WIDTH


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


class _Route(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_ND: Tensor,
        weight_ED: Tensor,
        bias_E: Tensor | None,
        valid_N: Tensor | None,
        tokens_per_group: int,
        capacity: int,
    ) -> tuple[Tensor, ...]:
        (num_tokens, width), num_experts = x_ND.shape, weight_ED.shape[0]
        num_groups = max(-(-num_tokens // tokens_per_group), 1)
        expert_N = x_ND.new_empty(num_tokens, dtype=torch.int64)
        load_E = x_ND.new_empty(num_experts, dtype=torch.int64)
        kept_N = x_ND.new_empty(num_tokens, dtype=torch.bool)
        gate_N, lse_N = x_ND.new_empty(num_tokens), x_ND.new_empty(num_tokens)
        fraction_GE = x_ND.new_empty(num_groups, num_experts)
        probability_GE = x_ND.new_empty(num_groups, num_experts)
        balance_loss, z_loss = x_ND.new_empty(()), x_ND.new_empty(())
        probability = x_ND.new_empty(num_experts * _padded(num_tokens, tokens_per_group))
        workspace = x_ND.new_empty(width * _BLOCK + num_experts * native.WIDTH)
        native.library().route(
            x_ND.data_ptr(), weight_ED.data_ptr(), _pointer(bias_E), _pointer(valid_N),
            num_tokens, width, num_experts, tokens_per_group, capacity, workspace.data_ptr(),
            expert_N.data_ptr(), gate_N.data_ptr(), kept_N.data_ptr(), load_E.data_ptr(),
            fraction_GE.data_ptr(), probability_GE.data_ptr(), balance_loss.data_ptr(),
            z_loss.data_ptr(), probability.data_ptr(), lse_N.data_ptr(),
        )  # fmt: skip
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(expert_N, kept_N, load_E, fraction_GE)
        ctx.save_for_backward(x_ND, weight_ED, valid_N, expert_N, fraction_GE, probability, lse_N)
        ctx.tokens_per_group = tokens_per_group
        return (
            gate_N, probability_GE, balance_loss, z_loss, expert_N, kept_N, load_E, fraction_GE
        )  # fmt: skip

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        """Return the gradients of x and weight from those of gates, means and losses."""
        x_ND, weight_ED, valid_N, expert_N, fraction_GE, probability, lse_N = ctx.saved_tensors
        incoming = [None if one is None else one.contiguous() for one in gradients[:4]]
        if all(one is None for one in incoming):
            return (None,) * 6
        dx_ND = torch.empty_like(x_ND) if ctx.needs_input_grad[0] else None
        dweight_ED = torch.empty_like(weight_ED) if ctx.needs_input_grad[1] else None
        num_experts, width = weight_ED.shape
        workspace = x_ND.new_empty(num_experts * (_BLOCK + 1))
        native.library().route_backward(
            x_ND.data_ptr(), weight_ED.data_ptr(), _pointer(valid_N),
            x_ND.shape[0], width, num_experts, ctx.tokens_per_group,
            expert_N.data_ptr(), fraction_GE.data_ptr(), probability.data_ptr(), lse_N.data_ptr(),
            *map(_pointer, incoming), workspace.data_ptr(), _pointer(dx_ND), _pointer(dweight_ED),
        )  # fmt: skip
        return dx_ND, dweight_ED, None, None, None, None
