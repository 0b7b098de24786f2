"""Sample numbers to a batch: which source, which text, which mask, laid out in rows.

Suffixes: B rows of the batch, E examples in them, S inputs, T targets, L raw positions.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from switchlm.data.batch import Batch
from switchlm.data.mixture import Mixture
from switchlm.data.order import Int64, derive_key, hash_numbers
from switchlm.data.rows import Examples, RunningText, join
from switchlm.data.span_corruption import Noise, corrupt, noise_mask
from switchlm.data.tokenizer import Tokenizer


class Samples:
    """A mixture of sources of rows, masked by span corruption."""

    def __init__(
        self,
        rows: Sequence[RunningText],
        mixture: Mixture,
        noise: Noise,
        tokenizer: Tokenizer,
        *,
        seed: int,
        input_length: int,
        target_length: int | None,
    ) -> None:
        self._rows = rows
        self._mixture = mixture
        self._noise = noise
        self._sentinels = np.array(tokenizer.sentinel_ids, dtype=np.int64)
        self._end_id = tokenizer.end_id
        self._pad_id = tokenizer.pad_id
        self._mask_key = derive_key(seed, "mask")
        self._lengths = (input_length, target_length)

    def batch(self, sample_B: Int64, only_source: int | None = None) -> Batch:
        """Return the samples of those numbers; a pure function of the seed and each number."""
        if only_source is None:
            source_B, index_B = self._mixture.assign(sample_B)
        else:
            source_B, index_B = np.full_like(sample_B, only_source), sample_B
        examples = self._gather(source_B, index_B)
        sample_key_E = hash_numbers(self._mask_key, sample_B[examples.row_E])
        key_E = hash_numbers(sample_key_E, np.arange(len(examples.row_E)))
        mask_EL = noise_mask(examples.length_E, self._noise, key_E)
        done = corrupt(
            examples.tokens_EL, examples.length_E, mask_EL, self._sentinels, self._end_id
        )
        rows = len(sample_B)
        return Batch(
            inputs_BS=torch.from_numpy(done.inputs.reshape(rows, -1)),
            targets_BT=torch.from_numpy(done.targets.reshape(rows, -1)),
            input_segments_BS=None,
            target_segments_BT=None,
            source_B=torch.from_numpy(source_B.astype(np.int32)),
        )

    def _gather(self, source_B: Int64, index_B: Int64) -> Examples:
        """Return the raw text of all rows, in the order of the batch."""
        parts = []
        for source in np.unique(source_B):
            row_B = np.flatnonzero(source_B == source)
            part = self._rows[source].examples(index_B[row_B])
            parts.append(replace(part, row_E=row_B[part.row_E]))
        return join(parts)
