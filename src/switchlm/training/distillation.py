"""Distillation: learn from the tokens that follow, and from what a teacher expects (section 4.2).

What a teacher says of a batch is part of the batch, so that the loop is the one of all training.

Shapes: B batch, T target, V vocabulary, K tokens named by the teacher.
"""

from collections.abc import Callable, Generator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from switchlm.data.batch import Batch, BatchSource
from switchlm.model.routing import ModelOutput
from switchlm.model.transformer import SwitchTransformer, forward_batch
from switchlm.parallel.tensor import gathered
from switchlm.training.config import Precision
from switchlm.training.step import computing, set_router_dtype, target_cross_entropy


@dataclass(frozen=True, kw_only=True)
class TeacherBatch(Batch):
    """A batch, and what a teacher says of each of its targets.

    expected_BTK: float32 log-probabilities. Of all tokens (K = V) where token_ids_BTK is None; else
    of
        those tokens, and behind them, in place K + 1, of all other tokens together (-inf if none
        are left).
    token_ids_BTK: int64, the tokens that the teacher finds likeliest.
    """

    expected_BTK: Tensor
    token_ids_BTK: Tensor | None = None


def soft_cross_entropy(logits_BTV: Tensor, expected_BTV: Tensor) -> Tensor:
    """Return -sum p log q of each target, losses_BT in nats.

    p are the teacher's probabilities (expected_BTV their logarithms), q = softmax(logits). The
    gradient is q - p; the least value is the entropy of p.
    """
    return -(expected_BTV.exp() * log_softmax(logits_BTV.float(), -1)).sum(-1)


def top_soft_cross_entropy(
    logits_BTV: Tensor, token_ids_BTK: Tensor, expected_BTK1: Tensor
) -> Tensor:
    """Return the same where the teacher names K tokens only, losses_BT in nats.

    All other tokens count as one: their joint probability is asked of the student, and how it
    shares it out among them is left to the hard loss. Nothing is renormalised, so that a word
    outside the K is not taught to be impossible. It is the full loss where K = V, and never more
    than that.
    """
    logits_BTV = logits_BTV.float()
    total_BT1 = logits_BTV.logsumexp(-1, keepdim=True)
    found_BTK = logits_BTV.gather(-1, token_ids_BTK) - total_BT1
    loss_BT = -(expected_BTK1[..., :-1].exp() * found_BTK).sum(-1)
    if token_ids_BTK.shape[-1] == logits_BTV.shape[-1]:
        return loss_BT
    others_BTV = logits_BTV.scatter(-1, token_ids_BTK, -torch.inf)
    others_BT = others_BTV.logsumexp(-1) - total_BT1.squeeze(-1)
    return loss_BT - expected_BTK1[..., -1].exp() * others_BT


@dataclass(frozen=True, kw_only=True)
class Distillation:
    """The objective: hard_weight x cross-entropy + soft_weight x soft cross-entropy.

    temperature: softens both distributions of the soft part, which is then multiplied by its square
        so that its gradients keep their size (Hinton et al. 2015). The batches are taught at it.
    """

    hard_weight: float = 0.75
    soft_weight: float = 0.25
    temperature: float = 1.0

    def __call__(self, output: ModelOutput, batch: Batch) -> Tensor:
        """Return the loss summed over the targets of a TaughtBatch."""
        assert isinstance(batch, TeacherBatch), "batches come from a Taught source"
        logits_BTV = gathered(output.logits_BTV).float() / self.temperature
        if batch.token_ids_BTK is None:
            losses_BT = soft_cross_entropy(logits_BTV, batch.expected_BTK)
        else:
            losses_BT = top_soft_cross_entropy(logits_BTV, batch.token_ids_BTK, batch.expected_BTK)
        soft = torch.where(batch.target_mask_BT, losses_BT, 0.0).sum() * self.temperature**2
        return self.hard_weight * target_cross_entropy(output, batch) + self.soft_weight * soft


class Teacher:
    """A model that says of batches what it expects; whole on its device, and never changed."""

    def __init__(
        self,
        model: SwitchTransformer,
        *,
        temperature: float = 1.0,
        precision: Precision = "float32",
        top_k: int | None = None,
    ) -> None:
        """top_k: so many tokens for each target; None says all."""
        self.model = model.eval()
        set_router_dtype(model, precision)
        self.temperature, self.precision, self.top_k = temperature, precision, top_k

    @torch.no_grad()
    def __call__(self, batch: Batch) -> TeacherBatch:
        """Return the batch, taught, on the teacher's device."""
        batch = batch.to(self.model.embedding.weight.device)
        with computing(self.precision, batch.inputs_BS.device):
            logits_BTV = forward_batch(self.model, batch).logits_BTV
        expected_BTV = log_softmax(logits_BTV.float() / self.temperature, -1)
        if self.top_k is None:
            return TeacherBatch(**vars(batch), expected_BTK=expected_BTV)
        found_BTK, token_ids_BTK = expected_BTV.topk(self.top_k, dim=-1)
        others_BT1 = expected_BTV.scatter(-1, token_ids_BTK, -torch.inf).logsumexp(-1, keepdim=True)
        expected_BTK = torch.cat([found_BTK, others_BT1], -1)
        return TeacherBatch(**vars(batch), expected_BTK=expected_BTK, token_ids_BTK=token_ids_BTK)


class TeacherLoader:
    """A source whose training batches are taught; those held out are as they were.

    teach: from the number of a batch and the batch to the batch taught.
    """

    def __init__(self, source: BatchSource, teach: Callable[[int, Batch], TeacherBatch]) -> None:
        self.source, self.teach = source, teach

    @property
    def sources(self) -> tuple[str, ...]:
        """The names that Batch.source_B indexes."""
        return self.source.sources

    def iterate(self, start_step: int) -> Generator[tuple[int, Batch], None, None]:
        """Yield (number, taught batch) without end."""
        batches = self.source.iterate(start_step)
        try:
            for number, batch in batches:
                yield number, self.teach(number, batch)
        finally:
            batches.close()

    def held_out(self, num_batches: int) -> list[Batch]:
        """Return a fixed set of batches for evaluation."""
        return self.source.held_out(num_batches)
