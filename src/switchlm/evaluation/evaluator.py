"""Held-out loss per target token, in total and by source.

Shapes: B batch, T target, V vocabulary.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from switchlm.data.batch import Batch
from switchlm.data.text.tokenizer import Tokenizer
from switchlm.errors import DataError
from switchlm.evaluation.metrics import Floats, bootstrap, ratio
from switchlm.generation.decode import evaluation_mode
from switchlm.model.losses import token_losses
from switchlm.model.transformer import SwitchTransformer, forward_batch
from switchlm.parallel.apply import loss_parallel_context
from switchlm.parallel.mesh import ALONE, Mesh


def held_out_loss(
    model: SwitchTransformer,
    batches: Iterable[Batch],
    sources: Sequence[str],
    mesh: Mesh = ALONE,
    *,
    resamples: int = 0,
    tokenizer: Tokenizer | None = None,
) -> dict[str, Any]:
    """Return the mean negative log likelihood, in nats per target token.

    batches: of this process; on several processes, each has its share.
    sources: the names that `Batch.source_B` indexes.
    mesh: over which the model is sharded; every process returns the result of all.
    resamples: of the bootstrap over rows; above 0, a single process adds to every loss its 95%
        `interval` (low, high).
    tokenizer: if given, every loss has its `bits_per_byte` of target text beside it, which models
        with different tokenizers share; None if there is no text.

    The result has `loss`, `tokens`, and `sources`: `loss` and `tokens` of each source with target
    tokens. Capacity is as configured for evaluation (`router.evaluation_capacity_factor`). Raises
    DataError if there is no target token.
    """
    device = model.embedding.weight.device
    loss_S = torch.zeros(len(sources), dtype=torch.float64)
    tokens_S = torch.zeros(len(sources), dtype=torch.int64)
    bytes_S = torch.zeros(len(sources), dtype=torch.int64)
    rows: list[tuple[Tensor, Tensor, Tensor]] = []
    with evaluation_mode(model), loss_parallel_context(mesh):
        for batch in batches:
            source_B = batch.source_B.long().cpu()
            if tokenizer is not None:
                bytes_S.index_add_(0, source_B, target_bytes(batch, tokenizer))
            batch = batch.to(device)
            loss_BT = token_losses(forward_batch(model, batch).logits_BTV, batch.targets_BT)
            mask_BT = batch.target_mask_BT
            loss_B = torch.where(mask_BT, loss_BT, 0.0).sum(1).cpu().double()
            tokens_B = mask_BT.sum(1).cpu()
            loss_S.index_add_(0, source_B, loss_B)
            tokens_S.index_add_(0, source_B, tokens_B)
            rows.append((source_B, loss_B, tokens_B))
    loss_S, tokens_S = mesh.all_reduce_sum(loss_S), mesh.all_reduce_sum(tokens_S)
    if not tokens_S.sum():
        raise DataError("There is no held-out text to evaluate on: no target token.")
    result: dict[str, Any] = {
        "loss": float(loss_S.sum() / tokens_S.sum()),
        "tokens": int(tokens_S.sum()),
        "sources": {
            name: {"loss": float(loss / tokens), "tokens": int(tokens)}
            for name, loss, tokens in zip(sources, loss_S, tokens_S, strict=True)
            if tokens
        },
    }
    if tokenizer is not None:
        bytes_S = mesh.all_reduce_sum(bytes_S)
        result["bits_per_byte"] = _bits_per_byte(loss_S.sum(), bytes_S.sum())
        for name, part in result["sources"].items():
            place = sources.index(name)
            part["bits_per_byte"] = _bits_per_byte(loss_S[place], bytes_S[place])
    if resamples:
        source_N, loss_N, tokens_N = (torch.cat(parts).numpy() for parts in zip(*rows, strict=True))
        statistics_N2 = np.stack([loss_N, tokens_N], axis=1)
        result["interval"] = _interval(statistics_N2, resamples)
        for name, part in result["sources"].items():
            here_N = source_N == sources.index(name)
            part["interval"] = _interval(statistics_N2[here_N], resamples)
    return result


def perplexity(loss: float) -> float:
    """Return exp of a loss in nats, bounded so that it is a number."""
    return math.exp(min(loss, 700.0))


def target_bytes(batch: Batch, tokenizer: Tokenizer) -> Tensor:
    """Return bytes_B, int64: the length in UTF-8 of each row's target text without sentinels."""
    sentinels = torch.tensor(tokenizer.sentinel_ids, device=batch.targets_BT.device)
    kept_BT = batch.target_mask_BT & ~torch.isin(batch.targets_BT, sentinels)
    rows = [ids[kept].tolist() for ids, kept in zip(batch.targets_BT, kept_BT, strict=True)]
    return torch.tensor([len(text.encode()) for text in tokenizer.decode_all(rows)])


def _bits_per_byte(nats: Tensor, num_bytes: Tensor) -> float | None:
    return float(nats) / math.log(2) / int(num_bytes) if num_bytes else None


def _interval(statistics_N2: Floats, resamples: int) -> list[float]:
    found = bootstrap(statistics_N2, ratio, resamples=resamples)
    return [found.low, found.high]
