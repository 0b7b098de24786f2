"""Generate outputs for a batch of prompts, a token at a time.

What a prompt gets does not depend on its neighbours, on padding or on its place in the batch: no
token is dropped for want of capacity, and every row draws from a stream of its own.

Shapes: B batch, S source, T generated, D d_model.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from switchlm.errors import CheckpointError, ConfigError, DataError
from switchlm.generation.cache import StaticCache
from switchlm.generation.inference import dropless, evaluation_mode
from switchlm.generation.sampling import GREEDY, Sampling, next_tokens, uniforms
from switchlm.model.transformer import SwitchTransformer


@dataclass(frozen=True, kw_only=True)
class Generated:
    """tokens_BT: int64, the end token included where there is one, then padding.

    finished_B: bool, false where the limit of tokens cut the output off.
    """

    tokens_BT: Tensor
    finished_B: Tensor

    def rows(self, end_id: int) -> list[list[int]]:
        """Return each row's tokens before its end token."""
        rows = self.tokens_BT.tolist()
        return [row[: row.index(end_id)] if end_id in row else row for row in rows]


def generate(
    model: SwitchTransformer,
    inputs_BS: Tensor,
    segments_BS: Tensor | None = None,
    *,
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    seeds: int | Sequence[int] = 0,
    encoder_capacity: bool = False,
) -> Generated:
    """Return up to `max_new_tokens` tokens for each prompt; stops when all rows have ended.

    inputs_BS: int64 prompts, one a row. segments_BS: int, 0 at padding and 1 elsewhere; None where
    nothing is padded. seeds: one a row, or one for all, with which equal prompts give equal
    samples. encoder_capacity: enforce the encoder's capacity as configured, each prompt by itself
    (as transformers' `generate` does); the decoder, which sees one token at a time, drops none.

    Raises ConfigError for a limit or seeds that make no sense, DataError for an empty
    prompt or a token that the vocabulary lacks, CheckpointError for a model that gives no numbers.
    """
    batch = inputs_BS.shape[0]
    if max_new_tokens < 1:
        raise ConfigError(f"At least 1 new token must be allowed, got {max_new_tokens}.")
    seeds = [seeds] * batch if isinstance(seeds, int) else list(seeds)
    if len(seeds) != batch:
        raise ConfigError(f"There are {len(seeds)} seeds for {batch} prompts; give one a prompt.")
    if inputs_BS.shape[1] == 0 or (segments_BS is not None and not (segments_BS != 0).any(1).all()):
        raise DataError("A prompt is empty: there is nothing to generate from.")
    check_vocabulary(int(inputs_BS.max()), model.config.vocabulary_size)

    config, device = model.config, inputs_BS.device
    drawn_BT = uniforms(seeds, max_new_tokens).to(device) if sampling.temperature else None
    token_B1 = torch.full((batch, 1), config.pad_id, device=device)
    finished_B = torch.zeros(batch, dtype=torch.bool, device=device)
    tokens: list[Tensor] = []
    with evaluation_mode(model):
        encoded_BSD = encode_prompts(model, inputs_BS, segments_BS, encoder_capacity)
        cache = StaticCache(model, encoded_BSD, max_new_tokens)
        with dropless(model.decoder):
            for step in range(max_new_tokens):
                output = model.decode(
                    token_B1, encoded_BSD, input_segments_BS=segments_BS, cache=cache
                )
                if step == 0 and not output.logits_BTV.isfinite().all():
                    raise CheckpointError(
                        "The model's logits are not finite: its weights are damaged, or too large "
                        "for the number format that it computes in."
                    )
                token_B = next_tokens(
                    output.logits_BTV[:, -1],
                    sampling,
                    None if drawn_BT is None else drawn_BT[:, step],
                )
                token_B = token_B.masked_fill(finished_B, config.pad_id)
                finished_B = finished_B | (token_B == config.end_id)
                tokens.append(token_B)
                token_B1 = token_B[:, None]
                if finished_B.all():
                    break
    return Generated(tokens_BT=torch.stack(tokens, 1), finished_B=finished_B)


def check_vocabulary(highest: int, vocabulary_size: int) -> None:
    """Raise DataError where the highest token id of a text is not in the vocabulary."""
    if highest >= vocabulary_size:
        raise DataError(
            f"A prompt has the token id {highest}, but the model's vocabulary ends at "
            f"{vocabulary_size - 1}: the tokenizer is another model's."
        )


def encode_prompts(
    model: SwitchTransformer,
    inputs_BS: Tensor,
    segments_BS: Tensor | None,
    enforce_capacity: bool = False,
) -> Tensor:
    """Return encoded_BSD; no prompt depends on another one or on padding.

    Where capacity is enforced, or experts choose their tokens, prompts go through the encoder one
    by one and without padding, since all tokens of a batch would compete for the same places.
    """
    router = model.config.router
    if not model.config.num_experts or not (
        enforce_capacity or router.selection == "expert_choice"
    ):
        with dropless(model.encoder):
            return model.encode(inputs_BS, segments_BS)[0]
    if segments_BS is None:
        segments_BS = torch.ones_like(inputs_BS)
    rows = []
    for input_S, segment_S in zip(inputs_BS, segments_BS, strict=True):
        real_S = segment_S != 0
        row_SD = model.encode(input_S[real_S][None])[0][0]
        full_SD = row_SD.new_zeros(len(input_S), row_SD.shape[1])
        full_SD[real_S] = row_SD
        rows.append(full_SD)
    return torch.stack(rows)


def pad_prompts(prompts: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Return (inputs_BS, segments_BS) of prompts of unequal length, padded on the right."""
    longest = max((len(prompt) for prompt in prompts), default=0)
    inputs_BS = torch.full((len(prompts), longest), pad_id)
    segments_BS = torch.zeros(len(prompts), longest, dtype=torch.int32)
    for row, prompt in enumerate(prompts):
        inputs_BS[row, : len(prompt)] = torch.tensor(prompt, dtype=torch.int64)
        segments_BS[row, : len(prompt)] = 1
    return inputs_BS, segments_BS
