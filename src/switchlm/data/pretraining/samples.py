"""Sample numbers to a batch: which source, which text, which mask, how long rows are.

Shapes: B rows of the batch, E examples in them, S inputs, T targets, L raw positions.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from switchlm.data.batch import Batch
from switchlm.data.config import DataConfig
from switchlm.data.order import Int64, Mixture, derive_key, hash_numbers
from switchlm.data.pretraining.rows import (
    Examples,
    PackedDocuments,
    Rows,
    RunningText,
    cut,
    join,
    running_rows,
    target_length_for,
)
from switchlm.data.pretraining.span_corruption import Noise, check_sentinels, corrupt, noise_mask
from switchlm.data.text.token_cache import TokenCache
from switchlm.data.text.tokenizer import Tokenizer
from switchlm.errors import DataError


@dataclass(frozen=True, kw_only=True)
class RowShape:
    """raw_length: tokens that, masked, fill a row of inputs exactly.

    segments: whether rows need them; False where every row is full and one example.
    """

    noise: Noise
    raw_length: int
    input_length: int
    target_length: int
    pack: bool
    segments: bool

    @classmethod
    def of(cls, config: DataConfig, caches: Sequence[TokenCache], num_sentinels: int) -> "RowShape":
        """Work out the shape; raises DataError where targets or sentinels do not suffice."""
        noise = Noise(density=config.noise_density, mean_span=config.mean_span)
        raw_length = noise.raw_length(config.input_length)
        check_sentinels(int(noise.counts(np.array([raw_length]))[1][0]), num_sentinels)
        exact = int(noise.corrupted_lengths(np.array([raw_length]))[1][0])
        target_length = config.target_length or exact
        if config.pack and config.target_length is None:
            pieces = [
                cut(cache, np.ones(len(cache.hashes_D), bool), raw_length) for cache in caches
            ]
            target_length = target_length_for(pieces, noise, config.input_length)
        if target_length < exact:
            raise DataError(
                f"data.target_length {target_length} is too short: inputs of {config.input_length} "
                f"tokens leave {exact} tokens of targets. Raise it, or leave it out."
            )
        return cls(
            noise=noise,
            raw_length=raw_length,
            input_length=config.input_length,
            target_length=target_length,
            pack=config.pack,
            segments=config.pack or target_length != exact,
        )

    def rows(self, cache: TokenCache, chosen_D: np.ndarray, seed: int) -> Rows:
        """Return the rows of the chosen documents of a source."""
        if not self.pack:
            return RunningText(cache, chosen_D, self.raw_length, seed)
        return PackedDocuments(
            cache,
            cut(cache, chosen_D, self.raw_length),
            self.noise,
            input_length=self.input_length,
            target_length=self.target_length,
            seed=seed,
        )


class Samples:
    """A mixture of sources of rows, masked by span corruption."""

    def __init__(
        self,
        rows: Sequence[Rows],
        mixture: Mixture,
        shape: RowShape,
        tokenizer: Tokenizer,
        seed: int,
    ) -> None:
        self._rows = rows
        self._mixture = mixture
        self._shape = shape
        self._sentinels = np.array(tokenizer.sentinel_ids, dtype=np.int64)
        self._end_id = tokenizer.end_id
        self._pad_id = tokenizer.pad_id
        self._mask_key = derive_key(seed, "mask")

    def has_rows(self, source: int) -> bool:
        """Return whether the source of that index has any text here."""
        return self._rows[source].num_rows > 0

    def batch(self, sample_B: Int64, only_source: int | None = None) -> Batch:
        """Return the samples of those numbers; a pure function of the seed and each number."""
        if only_source is None:
            source_B, index_B = self._mixture.assign(sample_B)
        else:
            source_B, index_B = np.full_like(sample_B, only_source), sample_B
        examples = self._gather(source_B, index_B)
        sample_key_E = hash_numbers(self._mask_key, sample_B[examples.row_E])
        key_E = hash_numbers(sample_key_E, examples.place_E)
        mask_EL = noise_mask(examples.length_E, self._shape.noise, key_E)
        done = corrupt(
            examples.tokens_EL, examples.length_E, mask_EL, self._sentinels, self._end_id
        )
        rows, row_E, shape = len(sample_B), examples.row_E, self._shape
        inputs_BS, input_segments_BS = self._lay_out(
            done.inputs, done.input_length_N, row_E, rows, shape.input_length
        )
        targets_BT, target_segments_BT = self._lay_out(
            done.targets, done.target_length_N, row_E, rows, shape.target_length
        )
        return Batch(
            inputs_BS=inputs_BS,
            targets_BT=targets_BT,
            input_segments_BS=input_segments_BS,
            target_segments_BT=target_segments_BT,
            source_B=torch.from_numpy(source_B.astype(np.int32)),
        )

    def _lay_out(
        self, values: Int64, length_E: Int64, row_E: Int64, num_rows: int, length: int
    ) -> tuple[Tensor, Tensor | None]:
        """Put examples into rows, one after the other; full rows of one example need no segments.

        Returns int64 tokens and int32 segments, both [rows, length].
        """
        if not self._shape.segments:
            return torch.from_numpy(values.reshape(num_rows, length)), None
        first_E = np.searchsorted(row_E, row_E)  # the first example of each example's row
        row_start_E = (np.cumsum(length_E) - length_E)[first_E]
        # Where an example's first token goes, against where it stands in `values`.
        shift_E = row_E * length - row_start_E
        position = np.arange(len(values)) + np.repeat(shift_E, length_E)
        tokens = np.full(num_rows * length, self._pad_id, dtype=np.int64)
        segments = np.zeros(num_rows * length, dtype=np.int32)
        tokens[position] = values
        segments[position] = np.repeat(np.arange(len(row_E)) - first_E + 1, length_E)
        shape = (num_rows, length)
        return torch.from_numpy(tokens.reshape(shape)), torch.from_numpy(segments.reshape(shape))

    def _gather(self, source_B: Int64, index_B: Int64) -> Examples:
        """Return the raw text of all rows, in the order of the batch."""
        running = [rows for rows in self._rows if isinstance(rows, RunningText)]
        if len(running) == len(self._rows):
            return running_rows(running, source_B, index_B)
        parts = []
        for source in np.unique(source_B):
            row_B = np.flatnonzero(source_B == source)
            part = self._rows[source].examples(index_B[row_B])
            parts.append(replace(part, row_E=row_B[part.row_E]))
        return join(parts)
