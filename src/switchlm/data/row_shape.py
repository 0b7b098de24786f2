"""The shape of a row: how long inputs and targets are, and how raw text is cut to fill them."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from switchlm.data.cache import TokenCache
from switchlm.data.config import DataConfig
from switchlm.data.packing import PackedDocuments, cut, target_length_for
from switchlm.data.rows import Rows, RunningText
from switchlm.data.span_corruption import Noise, check_sentinels
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
