"""Batches of masked text (span corruption) from a mixture of sources.

A batch is a pure function of (seed, step), in any order, on any number of workers.

Shapes: B rows of the batch, E examples in them, S inputs, T targets, L raw positions.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from switchlm.data import order
from switchlm.data.batch import Batch, StepLoader, pad_rows, padded_length
from switchlm.data.config import DataConfig
from switchlm.data.order import Int64, Mixture, derive_key, hash_numbers
from switchlm.data.pretraining.describe import describe_mixture, remarks
from switchlm.data.pretraining.rows import (
    Examples,
    PackedDocuments,
    RunningText,
    cut,
    join,
    running_rows,
    target_length_for,
)
from switchlm.data.pretraining.span_corruption import Noise, corrupt, noise_mask
from switchlm.data.pretraining.streamed import StreamedRows, Windows, check_shares
from switchlm.data.text import sources
from switchlm.data.text.cache_folder import cache_folder, keep_limit
from switchlm.data.text.sources import Source
from switchlm.data.text.token_cache import TokenCache, open_cache
from switchlm.data.text.tokenizer import Tokenizer
from switchlm.data.text.vocabulary import open_tokenizer
from switchlm.errors import DataError, nearest
from switchlm.files import Report

Rows = RunningText | PackedDocuments | StreamedRows
_HELD_OUT_SEED = 0  # not the run's seed, so that all runs are evaluated on the same masked text


@dataclass(frozen=True, kw_only=True)
class RowShape:
    """The lengths of rows.

    raw_length: tokens before masking that fill a row of inputs.
    input_length, target_length: the most tokens in a row; if rows are not packed, of every row.
    """

    noise: Noise
    raw_length: int
    input_length: int
    target_length: int
    pack: bool

    @classmethod
    def of(cls, config: DataConfig, caches: Sequence[TokenCache], num_sentinels: int) -> "RowShape":
        """Compute the lengths; DataError if target_length does not suffice."""
        noise = Noise(
            density=config.noise_density, mean_span=config.mean_span, most_spans=num_sentinels
        )
        raw_length = noise.raw_length(config.input_length)
        exact = int(noise.corrupted_lengths(np.array([raw_length]))[1][0])
        target_length = config.target_length or exact
        if target_length < exact:
            raise DataError(
                f"data.target_length {target_length} is too short: inputs of {config.input_length} "
                f"tokens leave {exact} tokens of targets. Raise it, or leave it out."
            )
        if not config.pack:
            target_length = exact
        elif config.target_length is None:
            pieces = [
                cut(cache, np.ones(len(cache.hashes_D), bool), raw_length) for cache in caches
            ]
            target_length = target_length_for(pieces, noise, config.input_length)
        return cls(
            noise=noise,
            raw_length=raw_length,
            input_length=config.input_length,
            target_length=target_length,
            pack=config.pack,
        )

    def rows(
        self, cache: TokenCache, chosen_D: np.ndarray, seed: int
    ) -> RunningText | PackedDocuments:
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

    @property
    def raw_length(self) -> int:
        """Tokens that fill a row."""
        return self._shape.raw_length

    def has_rows(self, source: int) -> bool:
        """Return whether the source with that index has any text."""
        return self._rows[source].num_rows > 0

    def batch(self, sample_B: Int64, share: slice, only_source: int | None = None) -> Batch:
        """Return some rows of the batch of the samples with these numbers.

        A row is a pure function of the seed and its number; all are as long as the batch needs.
        """
        if only_source is None:
            source_B, index_B = self._mixture.assign(sample_B)
        else:
            source_B, index_B = np.full_like(sample_B, only_source), sample_B
        input_length, target_length = self._lengths(source_B, index_B)
        sample_B, source_B, index_B = sample_B[share], source_B[share], index_B[share]
        examples = self._gather(source_B, index_B)
        sample_key_E = hash_numbers(self._mask_key, sample_B[examples.row_E])
        key_E = hash_numbers(sample_key_E, examples.place_E)
        mask_EL = noise_mask(examples.length_E, self._shape.noise, key_E)
        done = corrupt(
            examples.tokens_EL, examples.length_E, mask_EL, self._sentinels, self._end_id
        )
        inputs_BS, input_segments_BS = self._pad_rows(
            done.inputs, done.input_length_N, examples.row_E, input_length
        )
        targets_BT, target_segments_BT = self._pad_rows(
            done.targets, done.target_length_N, examples.row_E, target_length
        )
        return Batch(
            inputs_BS=inputs_BS,
            targets_BT=targets_BT,
            input_segments_BS=input_segments_BS,
            target_segments_BT=target_segments_BT,
            source_B=torch.from_numpy(source_B.astype(np.int32)),
        )

    def _lengths(self, source_B: Int64, index_B: Int64) -> tuple[int, int]:
        """Return the lengths of inputs and targets in the batch with these rows."""
        limits = self._shape.input_length, self._shape.target_length
        if not self._shape.pack:
            return limits
        needed_S2 = [
            rows.longest(index_B[source_B == source])
            for source, rows in enumerate(self._rows)
            if not isinstance(rows, RunningText) and (source_B == source).any()
        ]
        inputs, targets = np.max(needed_S2, axis=0).tolist()
        return padded_length(inputs, limits[0]), padded_length(targets, limits[1])

    def _pad_rows(
        self, values: Int64, length_E: Int64, row_E: Int64, length: int
    ) -> tuple[Tensor, Tensor | None]:
        """Pad rows; full rows of one example need no segments."""
        if not self._shape.pack:
            return torch.from_numpy(values.reshape(-1, length)), None
        return pad_rows(values, length_E, row_E, int(row_E[-1]) + 1, length, self._pad_id)

    def _gather(self, source_B: Int64, index_B: Int64) -> Examples:
        """Return the raw tokens of all rows, in the order of the batch."""
        running = [rows for rows in self._rows if isinstance(rows, RunningText)]
        if len(running) == len(self._rows):
            return running_rows(running, source_B, index_B)
        parts = []
        for source in np.unique(source_B):
            row_B = np.flatnonzero(source_B == source)
            part = self._rows[source].examples(index_B[row_B])
            parts.append(replace(part, row_E=row_B[part.row_E]))
        return join(parts)


class Loader(StepLoader):
    """Batches of masked text; `sources` are the names of the mixture."""

    def __init__(
        self,
        train: Samples,
        held_out: Samples | None,
        tokenizer: Tokenizer,
        names: tuple[str, ...],
        batch_size: int,
        text_hash: str = "",
    ) -> None:
        """text_hash: see `hash_of_text`."""
        super().__init__(names, batch_size, tokenizer)
        self._train, self._held_out = train, held_out
        self.text_hash = text_hash

    def make(self, sample_B: Int64, share: slice) -> Batch:
        return self._train.batch(sample_B, share)

    def held_out(self, num_batches: int, source: str | None = None) -> list[Batch]:
        """Return a fixed set of batches of held-out documents, the same for every seed.

        source: name of the source of all rows; None takes the mixture of training.
        """
        if self._held_out is None:
            raise DataError(
                "No text is held out for evaluation: data.held_out_share is 0, or the text does "
                f"not fill two rows of {self._train.raw_length} tokens, one to train on and one to "
                "hold out. Give more text, a smaller data.input_length, or a share above 0."
            )
        only = None if source is None else self._source_index(source)
        return [
            self._held_out.batch(self.sample_ids(step), self.own_rows, only_source=only)
            for step in range(num_batches)
        ]

    def example(self) -> tuple[str, str]:
        """Return inputs and targets of a held-out row (else of a training row) as text."""
        samples = self._held_out or self._train
        batch = samples.batch(np.arange(1), slice(None))
        inputs, targets = batch.inputs_BS[0].tolist(), batch.targets_BT[0].tolist()
        return self.tokenizer.decode(inputs), self.tokenizer.decode(targets)

    def _source_index(self, name: str) -> int:
        if name not in self.sources:
            raise DataError(f"There is no data source {name!r}.{nearest(name, self.sources)}")
        index = self.sources.index(name)
        if self._held_out is not None and not self._held_out.has_rows(index):
            raise DataError(f"The data source {name!r} has no held-out text: it is too short.")
        return index


def open_data(
    config: DataConfig,
    *,
    seed: int,
    cache_dir: Path | None = None,
    tokenizer: Tokenizer | None = None,
    report: Report | None = None,
) -> Loader:
    """Read the sources, train or load the tokenizer, tokenize, and return the loader.

    cache_dir: folder of the token cache; None takes that of the configuration.
    tokenizer: used instead of that of the configuration.
    report: called with lines of progress.
    """
    say = report or (lambda line: None)
    folder = cache_dir or cache_folder(config)
    parsed = sources.with_revisions(sources.parse_all(config.sources), folder, say)
    tokenizer = tokenizer or open_tokenizer(config, parsed, folder, say)
    windows = {
        place: Windows(source, tokenizer, folder, config, say)
        for place, source in enumerate(parsed)
        if sources.is_hub(source)
    }
    for one in windows.values():
        one.extend()
    caches = [
        windows[place].known[0]
        if place in windows
        else open_cache(
            source,
            tokenizer,
            folder,
            columns=config.columns,
            max_documents=config.max_documents,
            report=say,
        )
        for place, source in enumerate(parsed)
    ]
    windows = {place: one for place, one in windows.items() if not one.complete}
    check_shares(bool(windows), [source.weight for source in parsed])
    if cache_dir is None:
        keep_limit(config, [cache.folder for cache in caches], say)
    shape = RowShape.of(config, caches, len(tokenizer.sentinel_ids))
    caches, held_out = _split(config, caches, shape.raw_length)
    train_rows: list[Rows] = [
        shape.rows(cache, ~chosen_D, seed) for cache, chosen_D in zip(caches, held_out, strict=True)
    ]
    for place, one in windows.items():
        train_rows[place] = _streamed(one, train_rows[place], shape, config.held_out_share, seed)
        say(f"{parsed[place].name}: the beginning is here; training reads on while it goes")
    held_out_rows = [
        shape.rows(cache, chosen_D, _HELD_OUT_SEED)
        for cache, chosen_D in zip(caches, held_out, strict=True)
    ]
    for source, rows in zip(parsed, train_rows, strict=True):
        if not rows.num_rows:
            raise DataError(
                f"The data source {source.name!r} has {rows.num_tokens} tokens to train on, less "
                f"than one row of {shape.raw_length}. Give more text or lower data.input_length."
            )
    shares_S = order.probabilities(
        [rows.num_tokens for rows in train_rows],
        [source.weight for source in parsed],
        config.mixing,
        config.mixing_exponent,
    )
    names = tuple(source.name for source in parsed)
    for line in describe_mixture(parsed, train_rows, held_out_rows, shares_S):
        say(line)
    for line in remarks(config, shape.noise, shape.raw_length, names, train_rows, held_out_rows):
        say(line)
    return Loader(
        Samples(train_rows, Mixture(shares_S, seed), shape, tokenizer, seed),
        _held_out(held_out_rows, shares_S, shape, tokenizer),
        tokenizer,
        names,
        config.batch_size,
        hash_of_text(parsed, caches),
    )


def _streamed(
    windows: Windows, first: Rows, shape: RowShape, share: float, seed: int
) -> StreamedRows:
    """Return rows of all windows; of later ones no text is trained on whose hash holds it out."""

    def rows(cache: TokenCache) -> RunningText | PackedDocuments:
        if cache is windows.known[0]:
            assert not isinstance(first, StreamedRows)
            return first
        return shape.rows(cache, cache.hashes_D >= np.uint64(share * 2.0**64), seed)

    return StreamedRows(windows, rows)


def _split(
    config: DataConfig, caches: list[TokenCache], least: int
) -> tuple[list[TokenCache], list[np.ndarray]]:
    """Return the caches, and which documents of each are held out, bool [D].

    Where documents are too few or too large for the wanted share, the end of one becomes a document
    of its own. Records of a group are never split, since other sources have their translations.
    """
    aligned = config.group_column is not None
    held_out = order.choose_held_out(
        [cache.hashes_D for cache in caches],
        [cache.lengths_D for cache in caches],
        config.held_out_share,
        least,
        aligned=aligned,
    )
    for place, (cache, chosen_D) in enumerate(zip(caches, held_out, strict=True)):
        tail = order.choose_tail(
            cache.hashes_D, cache.lengths_D, chosen_D, config.held_out_share, least
        )
        if tail is not None and not aligned:
            caches[place] = cache.split(*tail)
            held_out[place] = np.insert(chosen_D, tail[0] + 1, True)
    return caches, held_out


def hash_of_text(parsed: Sequence[Source], caches: Sequence[TokenCache]) -> str:
    """Return a hash of the documents of all sources, in order, wherever their files are."""
    state = hashlib.sha256()
    for source, cache in zip(parsed, caches, strict=True):
        state.update(f"{source.name} {source.weight} {len(cache.hashes_D)} ".encode())
        state.update(cache.hashes_D.data)
        state.update(cache.offsets.data)
    return state.hexdigest()


def _held_out(
    rows: Sequence[Rows], shares_S: np.ndarray, shape: RowShape, tokenizer: Tokenizer
) -> Samples | None:
    """Return held-out samples of the sources that have any, in the mixture of training."""
    shares_S = shares_S * np.array([part.num_rows > 0 for part in rows])
    if not shares_S.any():
        return None
    mixed = Mixture(shares_S / shares_S.sum(), _HELD_OUT_SEED)
    return Samples(rows, mixed, shape, tokenizer, _HELD_OUT_SEED)
