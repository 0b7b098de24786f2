"""Generate outputs for a batch of prompts, token by token, with a KV cache.

The output of a prompt does not depend on the other prompts of the batch, on padding or on its row:
no token is dropped, and every row has its own random generator.

In main memory this holds bit for bit: prompts are encoded one by one and without padding, since
matmul of another number of rows may sum in another order, and a step computes at most `MOST_ROWS`
rows at once, for whose kernels a row's result does not depend on the others. On a GPU prompts are
encoded together, and kernels are chosen by the number of rows: there outputs may differ where two
tokens are equally probable but for rounding.

Shapes: B batch, S source, T new tokens, D d_model, V vocabulary.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from itertools import takewhile

import torch
from torch import Tensor, nn

from switchlm.errors import CheckpointError, ConfigError, DataError
from switchlm.generation.cache import GrowingCache
from switchlm.generation.sampling import GREEDY, Draws, Sampling, next_tokens, seeds_from
from switchlm.kernels.cpu.small_batch import MOST_ROWS
from switchlm.model.attention import KeysValues
from switchlm.model.router import Router
from switchlm.model.transformer import SwitchTransformer


@contextmanager
def dropless(module: nn.Module) -> Iterator[None]:
    """Drop no token within the context, whatever capacity is configured.

    All tokens of a group, other prompts and padding included, share capacity; without it, the
    output of a token depends on its own row only. Expert choice keeps its capacity, which defines
    the number of tokens per expert. Routers compute no losses.
    """
    routers = [part for part in module.modules() if isinstance(part, Router)]
    routers = [router for router in routers if not router.experts_choose]
    configured = [(router.config, router.measures) for router in routers]
    for router in routers:
        router.config = replace(
            router.config,
            capacity_factor=None,
            evaluation_capacity_factor=None,
            expert_capacity=None,
            reroute_overflow=False,
        )
        router.measures = False
    try:
        yield
    finally:
        for router, (config, measures) in zip(routers, configured, strict=True):
            router.config, router.measures = config, measures


@contextmanager
def evaluation_mode(model: nn.Module, *, drop: bool = True) -> Iterator[None]:
    """Turn off dropout, exploration and gradients; restore the mode of every module afterwards.

    The model is changed in place: use it in one thread at a time.

    drop: drop tokens beyond the capacity; false: drop none, see `dropless`.
    """
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad(), nullcontext() if drop else dropless(model):
            yield
    finally:
        for module in training:
            module.training = True


def before_end(tokens: Sequence[int], end_ids: Collection[int]) -> list[int]:
    """Return the tokens before the first end token."""
    return list(takewhile(lambda token: token not in end_ids, tokens))


Ends = Callable[[int, int], bool]


@dataclass(frozen=True, kw_only=True)
class Generated:
    """tokens_BT: int64, the end token included where there is one, then padding.
    finished_B: bool, false where the limit of tokens ended the output.
    """

    tokens_BT: Tensor
    finished_B: Tensor

    def rows(self, end_ids: Collection[int]) -> list[list[int]]:
        """Return each row's tokens before its end token."""
        return [before_end(row, end_ids) for row in self.tokens_BT.tolist()]


@dataclass(frozen=True, kw_only=True)
class Step:
    """One decoding step.

    token_B: int64, the new token of each row, padding in rows that were over before.
    finished_B: bool, the row has its end token or was ended by the caller.
    over_B: bool, the row is finished or has reached its limit.
    """

    token_B: Tensor
    finished_B: Tensor
    over_B: Tensor


def generate(
    model: SwitchTransformer,
    inputs_BS: Tensor,
    segments_BS: Tensor | None = None,
    *,
    max_new_tokens: int | Sequence[int],
    sampling: Sampling = GREEDY,
    seeds: int | Sequence[int] | None = None,
    encoder_capacity: bool = False,
    ends: Ends | None = None,
) -> Generated:
    """Return up to `max_new_tokens` tokens for each prompt; stop when all rows are over.

    The arguments are those of `steps`, which yields them one by one.
    """
    done = list(
        steps(
            model,
            inputs_BS,
            segments_BS,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            seeds=seeds,
            encoder_capacity=encoder_capacity,
            ends=ends,
        )
    )
    tokens_BT = torch.stack([step.token_B for step in done], 1)
    return Generated(tokens_BT=tokens_BT, finished_B=done[-1].finished_B)


def steps(
    model: SwitchTransformer,
    inputs_BS: Tensor,
    segments_BS: Tensor | None = None,
    *,
    max_new_tokens: int | Sequence[int],
    sampling: Sampling = GREEDY,
    seeds: int | Sequence[int] | None = None,
    encoder_capacity: bool = False,
    ends: Ends | None = None,
) -> Iterator[Step]:
    """Yield the next token of every prompt, until all rows are over.

    inputs_BS: int64, one prompt per row.
    segments_BS: int, 0 at padding and 1 elsewhere; None: no padding.
    max_new_tokens: for all rows, or one per row.
    seeds: of samples, one per row; a number is that of the first row, the next has the next one.
        None: random ones.
    encoder_capacity: enforce the encoder's capacity as configured, for each prompt separately (as
        transformers' `generate` does); the decoder drops no token.
    ends: called with the row and the value of every new token; true ends the row after it.

    The model is in evaluation mode until the last step, or until the iterator is closed.

    Raises ConfigError for invalid limits or seeds, DataError for an empty prompt or a token that
    the vocabulary lacks, CheckpointError for logits that are not finite.
    """
    batch, device, config = inputs_BS.shape[0], inputs_BS.device, model.config
    limits = limits_of(max_new_tokens, batch)
    if seeds is None or isinstance(seeds, int):
        seeds = seeds_from(seeds, batch)
    if len(seeds) != batch:
        raise ConfigError(f"There are {len(seeds)} seeds for {batch} prompts; give one per prompt.")
    check_prompts(model, inputs_BS, segments_BS)

    longest = max(limits)
    limit_B = torch.tensor(limits, device=device)
    draws = Draws(seeds) if sampling.temperature else None
    token_B1 = torch.full((batch, 1), config.first_id, device=device)
    end_E = torch.tensor(config.end_ids, device=device)
    finished_B = over_B = torch.zeros(batch, dtype=torch.bool, device=device)
    gradients = torch.is_grad_enabled()
    with evaluation_mode(model):
        encoded_BSD = encode_prompts(model, inputs_BS, segments_BS, encoder_capacity)
        cache = GrowingCache(memories(model, encoded_BSD, segments_BS), longest)
        with dropless(model.decoder):
            for step in range(longest):
                logits_BV = decode_step(model, token_B1, segments_BS, cache)
                check_finite(logits_BV, over_B)
                drawn_B = None if draws is None else draws.next().to(device)
                token_B = next_tokens(logits_BV, sampling, drawn_B)
                token_B = token_B.masked_fill(over_B, config.pad_id)
                finished_B = finished_B | (torch.isin(token_B, end_E) & ~over_B)
                if ends is not None:
                    finished_B = finished_B | _ended(ends, token_B, over_B)
                over_B = finished_B | (limit_B <= step + 1)
                with torch.set_grad_enabled(gradients):
                    yield Step(token_B=token_B, finished_B=finished_B, over_B=over_B)
                if over_B.all():
                    break
                token_B1 = token_B[:, None]


def decode_step(
    model: SwitchTransformer, token_B1: Tensor, segments_BS: Tensor | None, cache: GrowingCache
) -> Tensor:
    """Return logits_BV of the next token of each row, and advance the cache."""
    batch = len(token_B1)
    most = rows_at_once(model) or batch
    cache.advance(1)
    parts = []
    for first in range(0, batch, most):
        rows = slice(first, first + most)
        part = cache.rows(rows)
        output = model.decode(
            token_B1[rows],
            part.cross_attention[0][0],
            input_segments_BS=None if segments_BS is None else segments_BS[rows],
            cache=part,
        )
        parts.append(output.logits_BTV[:, -1])
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def rows_at_once(model: SwitchTransformer) -> int | None:
    """Return the most rows per matmul of a step that keep outputs bitwise equal; None: any."""
    if not model.embedding.weight.is_cpu:
        return None
    return max(MOST_ROWS // model.config.router.experts_per_token, 1)


def _ended(ends: Ends, token_B: Tensor, over_B: Tensor) -> Tensor:
    """Return which rows, of those not over, `ends` ends with their new token."""
    rows = zip(token_B.tolist(), over_B.tolist(), strict=True)
    ended = [not over and ends(row, token) for row, (token, over) in enumerate(rows)]
    return torch.tensor(ended, device=token_B.device)


def limits_of(max_new_tokens: int | Sequence[int], batch: int) -> list[int]:
    """Return the limit of every prompt. Raises ConfigError for invalid limits."""
    limits = [max_new_tokens] * batch if isinstance(max_new_tokens, int) else list(max_new_tokens)
    if min(limits, default=1) < 1:
        raise ConfigError(f"At least 1 new token must be allowed, got {min(limits)}.")
    if len(limits) != batch:
        raise ConfigError(
            f"There are {len(limits)} limits for {batch} prompts; give one per prompt."
        )
    return limits


def check_prompts(model: SwitchTransformer, inputs_BS: Tensor, segments_BS: Tensor | None) -> None:
    """Raise DataError for an empty prompt, or a token that the vocabulary lacks."""
    if inputs_BS.shape[1] == 0 or (segments_BS is not None and not (segments_BS != 0).any(1).all()):
        raise DataError("A prompt is empty: there is nothing to generate from.")
    check_vocabulary(int(inputs_BS.max()), model.config.vocabulary_size)


NOT_FINITE = (
    "The model's output is not finite: its weights are damaged, or its numbers are too large for "
    "the format that it computes in. float16 ends at 65,504: load the model in bfloat16 (--dtype "
    "bfloat16), which has the range of float32."
)


def finite_rows(logits_BV: Tensor) -> Tensor:
    """Return a bool per row: whether the model computed it without overflow or NaN."""
    return logits_BV.amax(-1).isfinite()  # `amax` returns NaN if there is one


def check_finite(logits_BV: Tensor, over_B: Tensor | None = None) -> None:
    """Raise CheckpointError for logits that are not finite, in rows that are not over."""
    good_B = finite_rows(logits_BV)
    if not (good_B if over_B is None else good_B | over_B).all():
        raise CheckpointError(NOT_FINITE)


def check_vocabulary(highest: int, vocabulary_size: int) -> None:
    """Raise DataError if the highest token id of a text is not in the vocabulary."""
    if highest >= vocabulary_size:
        raise DataError(
            f"A prompt has the token id {highest}, but the model's vocabulary ends at "
            f"{vocabulary_size - 1}: the tokenizer is that of another model."
        )


def encode_prompts(
    model: SwitchTransformer,
    inputs_BS: Tensor,
    segments_BS: Tensor | None,
    enforce_capacity: bool = False,
) -> Tensor:
    """Return encoded_BSD, zeros at padding; no prompt depends on another one or on padding.

    Prompts are encoded one by one in main memory, see above, and everywhere with enforced capacity
    or expert choice, since the tokens of a batch would share the capacity.
    """
    router = model.config.router
    shares_capacity = enforce_capacity or router.selection == "expert_choice"
    alone = inputs_BS.is_cpu or (shares_capacity and model.config.num_experts > 0)
    with nullcontext() if enforce_capacity else dropless(model.encoder):
        if not alone or (len(inputs_BS) == 1 and segments_BS is None):
            return model.encode(inputs_BS, segments_BS)[0]
        spans = _spans(inputs_BS, segments_BS)
        rows = [model.encode(inputs_BS[row, span][None], mask)[0] for row, span, mask in spans]
    encoded_BSD = rows[0].new_zeros(*inputs_BS.shape, rows[0].shape[2])
    for (row, span, _), encoded_1SD in zip(spans, rows, strict=True):
        encoded_BSD[row, span] = encoded_1SD[0]
    return encoded_BSD


def _spans(inputs_BS: Tensor, segments_BS: Tensor | None) -> list[tuple[int, slice, Tensor | None]]:
    """Return each row, its places without the padding at both ends, and its segments if needed."""
    if segments_BS is None:
        return [(row, slice(None), None) for row in range(len(inputs_BS))]
    found: list[tuple[int, slice, Tensor | None]] = []
    for row, segments_S in enumerate(segments_BS):
        places = segments_S.nonzero()
        span = slice(int(places[0]), int(places[-1]) + 1)
        full = len(places) == span.stop - span.start
        found.append((row, span, None if full else segments_S[None, span]))
    return found


def memories(
    model: SwitchTransformer, encoded_BSD: Tensor, segments_BS: Tensor | None
) -> list[KeysValues]:
    """Return the keys and values of cross-attention, [B, H, S, K], for each layer of the decoder.

    As in `encode_prompts`, those of a prompt do not depend on the others; zeros at padding.
    """
    if not encoded_BSD.is_cpu or (len(encoded_BSD) == 1 and segments_BS is None):
        return model.decoder.memories(encoded_BSD)
    found: list[KeysValues] = []
    for row, span, _ in _spans(encoded_BSD, segments_BS):
        for layer, pair in enumerate(model.decoder.memories(encoded_BSD[row, span][None])):
            if row == 0:
                _, heads, _, width = pair[0].shape
                shape = (len(encoded_BSD), heads, encoded_BSD.shape[1], width)
                found.append((pair[0].new_zeros(shape), pair[0].new_zeros(shape)))
            for all_BHSK, new_1HSK in zip(found[layer], pair, strict=True):
                all_BHSK[row, :, span] = new_1HSK[0]
    return found


def pad_prompts(prompts: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Return (inputs_BS, segments_BS) of prompts of unequal length, padded on the right."""
    longest = max((len(prompt) for prompt in prompts), default=0)
    inputs_BS = torch.full((len(prompts), longest), pad_id)
    segments_BS = torch.zeros(len(prompts), longest, dtype=torch.int32)
    for row, prompt in enumerate(prompts):
        inputs_BS[row, : len(prompt)] = torch.tensor(prompt, dtype=torch.int64)
        segments_BS[row, : len(prompt)] = 1
    return inputs_BS, segments_BS


def prompt_batches(
    model: SwitchTransformer, prompts: Sequence[Sequence[int]], batch_size: int
) -> Iterator[tuple[list[int], Tensor, Tensor | None]]:
    """Yield prompts in batches of similar length, the longest first, so that it fails early.

    Each batch is (indices in `prompts`, inputs_BS, segments_BS); segments_BS is None without
    padding. Tensors are on the model's device.
    """
    device = model.embedding.weight.device
    order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
    for first in range(0, len(order), batch_size):
        indices = order[first : first + batch_size]
        inputs_BS, segments_BS = pad_prompts([prompts[i] for i in indices], model.config.pad_id)
        yield indices, inputs_BS.to(device), None if segments_BS.all() else segments_BS.to(device)
