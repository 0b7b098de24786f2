"""Why a small model learns or does not: where its heads look, and what its routers decide.

Both stacks run block by block (`StackInputs`, `Block.attend`, `Block.transform`), so that what
every sublayer reads is at hand: attention weights and the router's probabilities are computed from
it with the modules' own parameters, and nothing is hooked into the model.

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
from switchlm.model.router import Router
from switchlm.model.routing import Routing
from switchlm.model.switch import SwitchFeedForward
from switchlm.model.transformer import Stack, StackInputs, SwitchTransformer, shift_right

NEAR = 3  # positions: the attention of a head to keys no farther away is its near attention
MOST_TOKENS = 8192  # of the encoder that are measured: whole rows, at least one
MOST_SAMPLED = 1024  # tokens a Switch layer whose experts are remembered
MOST_SCORES = 2**22  # of attention at once: 16 MiB


@dataclass(frozen=True, kw_only=True)
class SwitchDiagnosis:
    """What a Switch layer did with the held-out tokens; padding is left out everywhere.

    name: the module, such as `encoder.blocks.1.feedforward`.
    gate: the mean gate of the assignments that were kept.
    dead_experts: how many experts no token chose.
    router_entropy: of a token's probabilities over the experts, mean over tokens; load_entropy: of
        the share of assignments that wanted each expert; both in nats, at most ln E.
    expert_T: int64, on the CPU, the first choice of up to 1,024 tokens, always the same for a
        batch; where experts choose, each token's most probable expert.
    """

    name: str
    gate: float
    dead_experts: int
    router_entropy: float
    load_entropy: float
    expert_T: Tensor


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """What the layers of a model did with held-out text.

    attention_near: for each self-attention, by its module's name, a number a head: the sum of the
        attention weights on keys at most 3 positions away, the query's own included, mean over
        tokens.
    layers: the Switch layers, in layer order; none in a dense model.
    """

    attention_near: dict[str, list[float]]
    layers: list[SwitchDiagnosis]

    def figures(self, before: Mapping[str, Sequence[int]]) -> dict[str, Any]:
        """Return the figures for a metrics line (see `training.loop.train`).

        before: the experts of the evaluation before, as `experts` gave them.
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
        """Return the experts of the sampled tokens by layer, to be remembered."""
        return {layer.name: layer.expert_T.tolist() for layer in self.layers}


def kept_share(now: Sequence[int], before: Sequence[int] | None) -> float | None:
    """Return the share of tokens with the same expert as before; None if that is not known."""
    if before is None or len(before) != len(now) or not now:
        return None
    return sum(one == other for one, other in zip(now, before, strict=True)) / len(now)


def diagnose(model: SwitchTransformer, batch: Batch) -> Diagnosis:
    """Measure the model on the first rows of a batch, as it is in evaluation.

    Capacity is as configured for evaluation. The model is whole on this process: a sharded one has
    its weights together only while its own forward pass runs.
    """
    rows = max(MOST_TOKENS // batch.inputs_BS.shape[1], 1)
    first: dict[str, Any] = {
        name: None if value is None else value[:rows] for name, value in vars(batch).items()
    }
    batch = replace(batch, **first).to(model.embedding.weight.device)
    segments = batch.input_segments_BS, batch.target_segments_BT
    found = Diagnosis(attention_near={}, layers=[])
    with evaluation_mode(model):
        inputs = model.encoder_inputs(batch.inputs_BS, segments[0])
        encoded_BSD = _measure("encoder", model.encoder, inputs, None, found)
        decoder_inputs_BT = shift_right(batch.targets_BT, segments[1], model.config.pad_id)
        inputs = model.decoder_inputs(
            decoder_inputs_BT, input_segments_BS=segments[0], target_segments_BT=segments[1]
        )
        encoded_BSD = model.encoder.final_norm(encoded_BSD)
        _measure("decoder", model.decoder, inputs, encoded_BSD, found)
    return found


def entropy(probability: Tensor) -> Tensor:
    """Return the entropy of the last dim, in nats; what is not there adds nothing."""
    return torch.special.entr(probability.double()).sum(-1)


def _measure(
    name: str, stack: Stack, inputs: StackInputs, memory_BSD: Tensor | None, found: Diagnosis
) -> Tensor:
    """Run a stack block by block, add what each did to `found`, and return y_BSD of the last.

    memory_BSD: the encoder's output, in a decoder.

    A router reads the normed input of its sublayer, and in SwitchAttention both routers do.
    """
    x_BSD, mask_BS = inputs.x_BSD, inputs.mask_BS
    real_BS = torch.ones(x_BSD.shape[:2], dtype=torch.bool, device=x_BSD.device)
    real_BS = real_BS if mask_BS is None else mask_BS
    for index, block in enumerate(stack.layers):
        place = f"{name}.blocks.{index}"
        seen_BSD = block.attention_norm(x_BSD)
        near_H = _near(block.attention, seen_BSD, inputs.bias, mask_BS, real_BS)
        found.attention_near[f"{place}.attention"] = near_H
        x_BSD, routing = block.attend(x_BSD, inputs, memory=memory_BSD)
        if isinstance(block.attention, SwitchAttention):
            for part, one in zip(("query", "key_value"), routing, strict=True):
                router = getattr(block.attention, part).router
                at = f"{place}.attention.{part}"
                found.layers.append(_switch(at, router, seen_BSD, one, real_BS))
        seen_BSD = block.feedforward_norm(x_BSD)
        x_BSD, routing = block.transform(x_BSD, mask_BS)
        if isinstance(block.feedforward, SwitchFeedForward):
            router, at = block.feedforward.router, f"{place}.feedforward"
            found.layers.append(_switch(at, router, seen_BSD, routing[0], real_BS))
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
    total_H = torch.zeros(num_heads, dtype=torch.float64, device=x_BSD.device)
    rows = max(MOST_SCORES // (num_heads * length**2), 1)
    for first in range(0, num_rows, rows):
        part = slice(first, first + rows)
        bias_part = bias if bias.shape[0] == 1 else bias[part]
        # T5 does not scale its scores.
        scores_BHQM = query_BHQK[part].float() @ key_BHMK[part].float().mT + bias_part.float()
        weights_BHQM = scores_BHQM.softmax(-1)
        mass_BHQ = (weights_BHQM * near_QM).sum(-1) * real_BS[part, None]
        total_H += mass_BHQ.sum((0, 2), dtype=torch.float64)
    return (total_H / real_BS.sum().clamp(min=1)).tolist()


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
        wanted_A = real_N.repeat_interleave(choices)
    else:
        # Experts chose: what they did not keep, they did not want.
        first_N = probability_NE.argmax(-1)
        wanted_A = routing.kept_A & real_N[routing.token_A]
    load_E = torch.bincount(routing.expert_A[wanted_A], minlength=router.num_experts)
    kept_A = routing.kept_A & wanted_A
    gate = routing.gate_A[kept_A].double().sum() / kept_A.sum().clamp(min=1)
    every = max(-(-first_N.numel() // MOST_SAMPLED), 1)
    return SwitchDiagnosis(
        name=name,
        gate=float(gate),
        dead_experts=int((load_E == 0).sum()),
        router_entropy=float(entropy(probability_NE).sum() / max(len(probability_NE), 1)),
        load_entropy=float(entropy(load_E / load_E.sum().clamp(min=1))),
        expert_T=first_N[::every].cpu(),
    )
