"""Diagnostics of training: locality of attention heads, and decisions of routers.

Both stacks run block by block (`StackInputs`, `Block.attend`, `Block.transform`). Attention weights
and router probabilities are computed from the input of each sublayer, without hooks.

Shapes: B batch, S source or target, N tokens (B * S), H heads, Q queries, M keys, K head width,
D d_model, E experts, A assignments, T tokens of the sample.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from switchlm.data.batch import Batch
from switchlm.generation.decode import evaluation_mode
from switchlm.model.attention import Attention, SwitchAttention, heads
from switchlm.model.precision import computing
from switchlm.model.router import Router
from switchlm.model.routing import Routing
from switchlm.model.switch import SwitchFeedForward
from switchlm.model.transformer import Stack, StackInputs, SwitchTransformer, shift_right

NEAR = 3  # positions: attention to keys within this distance is near attention
MAX_TOKENS = 8192  # of the encoder, rounded to full rows, at least one
MAX_SAMPLED = 1024  # tokens per Switch layer whose experts are recorded
MAX_SCORES = 2**22  # of attention at a time: 16 MiB


@dataclass(frozen=True, kw_only=True)
class SwitchDiagnosis:
    """Metrics of a Switch layer on held-out tokens, without padding.

    name: the module, such as `encoder.blocks.1.feedforward`.
    gate: the mean gate of the assignments that were not dropped.
    dead_experts: the number of experts that no token chose.
    router_entropy: of a token's probabilities over the experts, mean over tokens, in nats.
    load_entropy: of the share of assignments of each expert, in nats; both are at most ln E.
    expert_T: int64, on the CPU, the first choice of up to 1,024 tokens, the same ones for equal
        batches; with expert choice, each token's most probable expert.
    """

    name: str
    gate: float
    dead_experts: int
    router_entropy: float
    load_entropy: float
    expert_T: Tensor


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """Metrics of the layers of a model on held-out text.

    attention_near: for each self-attention, by its module's name, a number per head: the sum of
        the attention weights on keys at most 3 positions away, the query's own included, mean
        over tokens.
    layers: the Switch layers, in order; none in a dense model.
    """

    attention_near: dict[str, list[float]]
    layers: list[SwitchDiagnosis]

    def metrics(self, before: Mapping[str, Sequence[int]]) -> dict[str, Any]:
        """Return the fields of a metrics line (see `training.loop.train`).

        before: the result of `experts` at the previous evaluation.
        """
        found: dict[str, Any] = {"attention_near": self.attention_near}
        if self.layers:
            found["layers"] = [layer.name for layer in self.layers]
            for name in ("gate", "dead_experts", "router_entropy", "load_entropy"):
                found[name] = [getattr(layer, name) for layer in self.layers]
            found["kept_expert"] = [
                kept_share(layer.expert_T.tolist(), before.get(layer.name)) for layer in self.layers
            ]
        return found

    def experts(self) -> dict[str, list[int]]:
        """Return the experts of the sampled tokens by layer, for the next call of `metrics`."""
        return {layer.name: layer.expert_T.tolist() for layer in self.layers}


def kept_share(now: Sequence[int], before: Sequence[int] | None) -> float | None:
    """Return the share of tokens with the same expert as before; None: unknown."""
    if before is None or len(before) != len(now) or not now:
        return None
    return sum(one == other for one, other in zip(now, before, strict=True)) / len(now)


def diagnose(model: SwitchTransformer, batch: Batch) -> Diagnosis:
    """Measure the model on the first rows of a batch, in evaluation mode.

    Capacity is as configured for evaluation. The model must not be sharded: its weights are
    gathered only within its own forward pass.
    """
    device = model.embedding.weight.device
    rows = max(MAX_TOKENS // batch.inputs_BS.shape[1], 1)
    first: dict[str, Any] = {
        name: None if value is None else value[:rows] for name, value in vars(batch).items()
    }
    batch = replace(batch, **first).to(device)
    segments = batch.input_segments_BS, batch.target_segments_BT
    found = Diagnosis(attention_near={}, layers=[])
    with evaluation_mode(model), computing(model.precision, device):
        inputs = model.encoder_inputs(batch.inputs_BS, segments[0])
        encoded_BSD = _measure("encoder", model.encoder, inputs, None, found)
        decoder_inputs_BT = shift_right(batch.targets_BT, segments[1], model.config.start_id)
        inputs = model.decoder_inputs(
            decoder_inputs_BT, input_segments_BS=segments[0], target_segments_BT=segments[1]
        )
        encoded_BSD = model.encoder.final_norm(encoded_BSD)
        _measure("decoder", model.decoder, inputs, encoded_BSD, found)
    return found


def entropy(probability: Tensor) -> Tensor:
    """Return the entropy of the last dim, in nats; zeros add nothing."""
    return torch.special.entr(probability.float()).sum(-1)


def _measure(
    name: str, stack: Stack, inputs: StackInputs, memory_BSD: Tensor | None, found: Diagnosis
) -> Tensor:
    """Run a stack block by block, add the metrics of each to `found`, and return the output y_BSD.

    memory_BSD: the encoder's output, for a decoder.

    The input of a router, and of both in SwitchAttention, is the normed input of its sublayer.
    """
    x_BSD, mask_BS = inputs.x_BSD, inputs.mask_BS
    real_BS = torch.ones(x_BSD.shape[:2], dtype=torch.bool, device=x_BSD.device)
    real_BS = real_BS if mask_BS is None else mask_BS
    for index, block in enumerate(stack.layers):
        place = f"{name}.blocks.{index}"
        normed_BSD = block.attention_norm(x_BSD)
        near_H = _near(block.attention, normed_BSD, inputs.bias, mask_BS, real_BS)
        found.attention_near[f"{place}.attention"] = near_H
        x_BSD, routing = block.attend(x_BSD, inputs, memory=memory_BSD)
        if isinstance(block.attention, SwitchAttention):
            for part, one in zip(("query", "key_value"), routing, strict=True):
                router = getattr(block.attention, part).router
                at = f"{place}.attention.{part}"
                found.layers.append(_switch(at, router, normed_BSD, one, real_BS))
        normed_BSD = block.feedforward_norm(x_BSD)
        x_BSD, routing = block.transform(x_BSD, mask_BS)
        if isinstance(block.feedforward, SwitchFeedForward):
            router, at = block.feedforward.router, f"{place}.feedforward"
            found.layers.append(_switch(at, router, normed_BSD, routing[0], real_BS))
    return x_BSD


def _near(
    attention: Attention | SwitchAttention,
    x_BSD: Tensor,
    bias: Tensor,
    mask_BS: Tensor | None,
    real_BS: Tensor,
) -> list[float]:
    """Return the near attention of every head, a few rows at a time."""
    if isinstance(attention, SwitchAttention):
        query_BSW, _ = attention.query(x_BSD, mask_BS)
        key_BSW, _ = attention.key_value(x_BSD, mask_BS)
    else:
        query_BSW, key_BSW = attention.query(x_BSD), attention.key(x_BSD)
    query_BHQK, key_BHMK = heads(query_BSW, attention.d_kv), heads(key_BSW, attention.d_kv)
    num_rows, num_heads, length, _ = query_BHQK.shape
    place_S = torch.arange(length, device=x_BSD.device)
    near_QM = (place_S[:, None] - place_S).abs() <= NEAR
    total_H = torch.zeros(num_heads, dtype=torch.float64)
    rows = max(MAX_SCORES // (num_heads * length**2), 1)
    for first in range(0, num_rows, rows):
        part = slice(first, first + rows)
        bias_part = bias if bias.shape[0] == 1 else bias[part]
        # T5 does not scale its scores.
        scores_BHQM = query_BHQK[part].float() @ key_BHMK[part].float().mT + bias_part.float()
        weights_BHQM = scores_BHQM.softmax(-1)
        near_BHQ = (weights_BHQM * near_QM).sum(-1) * real_BS[part, None]
        total_H += near_BHQ.sum((0, 2)).cpu()
    return (total_H / real_BS.sum().clamp(min=1).cpu()).tolist()


def _switch(
    name: str, router: Router, x_BSD: Tensor, routing: Routing, real_BS: Tensor
) -> SwitchDiagnosis:
    """Measure a Switch layer whose router reads x_BSD."""
    real_N, num_tokens = real_BS.reshape(-1), real_BS.numel()
    logits_NE, _ = router.scores(x_BSD.reshape(num_tokens, -1))
    probability_NE = logits_NE[real_N].float().softmax(-1)
    if routing.token_A is None:
        choices = routing.expert_A.numel() // num_tokens
        first_N = routing.expert_A.view(num_tokens, choices)[:, 0][real_N]
        chosen_A = real_N.repeat_interleave(choices)
    else:
        # With expert choice, assignments that were not kept were not chosen.
        first_N = probability_NE.argmax(-1)
        chosen_A = routing.kept_A & real_N[routing.token_A]
    load_E = torch.bincount(routing.expert_A[chosen_A], minlength=router.num_experts)
    kept_A = routing.kept_A & chosen_A
    gate = routing.gate_A[kept_A].float().sum() / kept_A.sum().clamp(min=1)
    every = max(-(-first_N.numel() // MAX_SAMPLED), 1)
    return SwitchDiagnosis(
        name=name,
        gate=float(gate),
        dead_experts=int((load_E == 0).sum()),
        router_entropy=float(entropy(probability_NE).sum() / max(len(probability_NE), 1)),
        load_entropy=float(entropy(load_E / load_E.sum().clamp(min=1))),
        expert_T=first_N[::every].cpu(),
    )
