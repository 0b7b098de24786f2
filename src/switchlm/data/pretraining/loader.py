"""Batches, any of them, in any order, on any number of workers: a pure function of (seed, step)."""

from collections.abc import Generator, Sequence
from pathlib import Path

import numpy as np

from switchlm.data import order
from switchlm.data.batch import Batch, ShardedLoader, prefetch_batches, sample_numbers
from switchlm.data.config import DataConfig
from switchlm.data.order import Int64, Mixture, choose_aligned, choose_held_out
from switchlm.data.pretraining.rows import Rows
from switchlm.data.pretraining.samples import RowShape, Samples
from switchlm.data.text import sources
from switchlm.data.text.token_cache import TokenCache, open_cache
from switchlm.data.text.tokenizer import Tokenizer
from switchlm.data.text.vocabulary import open_tokenizer
from switchlm.errors import DataError, nearest
from switchlm.files import Report

MOST_LINES = 16  # to tell of sources one by one
_HELD_OUT_SEED = 0  # runs with other seeds are measured on the same masked text


class Loader:
    """Batches as a pure function of (seed, step). `sources` are the names of the mixture."""

    def __init__(
        self,
        train: Samples,
        held_out: Samples | None,
        tokenizer: Tokenizer,
        names: tuple[str, ...],
        batch_size: int,
    ) -> None:
        self.tokenizer = tokenizer
        self.sources = names
        self.batch_size = batch_size
        self._train = train
        self._held_out = held_out

    def sample_ids(self, step: int, rank: int = 0, world_size: int = 1) -> Int64:
        """Return the numbers of the samples that `rank` of `world_size` sees at `step`."""
        return sample_numbers(step, self.batch_size, rank, world_size)

    def batch(self, step: int, rank: int = 0, world_size: int = 1) -> Batch:
        """Return the rows of the global batch of `step` that fall to `rank`."""
        return self._train.batch(self.sample_ids(step, rank, world_size))

    def iterate(
        self, start_step: int = 0, prefetch: int = 2, rank: int = 0, world_size: int = 1
    ) -> Generator[tuple[int, Batch], None, None]:
        """Yield (step, batch) for ever, `prefetch` batches made ahead in a background thread."""
        return prefetch_batches(
            lambda step: self.batch(step, rank, world_size), start_step, prefetch
        )

    def share(self, rank: int, world_size: int) -> ShardedLoader:
        """Return what `rank` of `world_size` workers reads: its rows of every batch."""
        return ShardedLoader(self, rank, world_size)

    def held_out(
        self, num_batches: int, source: str | None = None, rank: int = 0, world_size: int = 1
    ) -> list[Batch]:
        """Return a fixed set of batches of documents never trained on, the same for every seed.

        source: only rows of that source; otherwise the mixture of training.
        rank, world_size: as in `batch`.
        """
        if self._held_out is None:
            raise DataError(
                "No document is held out for evaluation. Set data.held_out_share above zero, and "
                "give text of more than one document and more than two rows."
            )
        only = None if source is None else self._source_index(source)
        return [
            self._held_out.batch(self.sample_ids(step, rank, world_size), only_source=only)
            for step in range(num_batches)
        ]

    def example(self) -> tuple[str, str]:
        """Return inputs and targets of a held-out row (else of a training row) as text."""
        samples = self._held_out or self._train
        batch = samples.batch(np.arange(1))
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
    """Read the sources, make or load the tokenizer, tokenize, and return the loader.

    cache_dir: where tokens are kept; `~/.cache/switchlm` unless told.
    tokenizer: used instead of the one that the configuration names.
    report: called with a line of progress now and then.
    """
    say = report or (lambda line: None)
    folder = cache_dir or Path.home() / ".cache" / "switchlm"
    parsed = sources.parse_all(config.sources)
    tokenizer = tokenizer or open_tokenizer(config, parsed, folder, say)
    caches = [
        open_cache(
            source,
            tokenizer,
            folder,
            columns=config.columns,
            max_documents=config.max_documents,
            report=say,
        )
        for source in parsed
    ]
    shape = RowShape.of(config, caches, len(tokenizer.sentinel_ids))
    held_out = _choose_held_out(config, caches, shape.raw_length)
    train_rows = [
        shape.rows(cache, ~chosen_D, seed) for cache, chosen_D in zip(caches, held_out, strict=True)
    ]
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
    for line in _words(names, train_rows, held_out_rows, shares_S):
        say(line)
    return Loader(
        Samples(train_rows, Mixture(shares_S, seed), shape, tokenizer, seed),
        _held_out(held_out_rows, shares_S, shape, tokenizer),
        tokenizer,
        names,
        config.batch_size,
    )


def _words(
    names: Sequence[str], train: Sequence[Rows], held_out: Sequence[Rows], shares_S: np.ndarray
) -> list[str]:
    """Return what is told of the mixture: a line a source, or one line of very many."""

    def line(who: str, places: Sequence[int], share: str) -> str:
        read, kept = (sum(part[place].num_tokens for place in places) for part in (train, held_out))
        return f"{who}: {read:,} tokens to train on, {kept:,} held out, {share} of the rows"

    every = range(len(names))
    if len(names) <= MOST_LINES:
        return [line(names[place], [place], f"{shares_S[place]:.1%}") for place in every]
    least, most = int(shares_S.argmin()), int(shares_S.argmax())
    shares = f"{shares_S[least]:.2%} ({names[least]}) to {shares_S[most]:.2%} ({names[most]}) each"
    return [line(f"{len(names)} sources", every, shares)]


def _choose_held_out(
    config: DataConfig, caches: Sequence[TokenCache], least: int
) -> list[np.ndarray]:
    """Return bool [D] for each source; with groups, the same ones in all of them."""
    share = config.held_out_share
    if config.group_column is None:
        return [choose_held_out(one.hashes_D, one.lengths_D, share, least) for one in caches]
    hashes_SD = [one.hashes_D for one in caches]
    return choose_aligned(hashes_SD, [one.lengths_D for one in caches], share, least)


def _held_out(
    rows: list[Rows], shares_S: np.ndarray, shape: RowShape, tokenizer: Tokenizer
) -> Samples | None:
    """Return held-out samples in the mixture of training, of the sources that have any."""
    shares_S = shares_S * np.array([part.num_rows > 0 for part in rows])
    if not shares_S.any():
        return None
    mixed = Mixture(shares_S / shares_S.sum(), _HELD_OUT_SEED)
    return Samples(rows, mixed, shape, tokenizer, _HELD_OUT_SEED)
