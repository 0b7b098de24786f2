"""Rows of a text that is tokenised while training reads it: a dataset of the hub.

The text is cut into windows, each with a token cache of its own. Training starts when the first one
is there, and the next one is made in the background while the last one is read. The first epoch
takes the windows in the order of the text, with the rows of each shuffled; the row of a number is
a function of the seed and the text, however much of it is cached, so that a run resumes exactly.

Shapes: N rows, D documents.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from threading import Lock, Thread

import numpy as np

from switchlm.data.config import DataConfig
from switchlm.data.order import Int64
from switchlm.data.pretraining.rows import Examples, PackedDocuments, RunningText, join
from switchlm.data.text import sources
from switchlm.data.text.readers import Document
from switchlm.data.text.sources import Source
from switchlm.data.text.token_cache import TokenCache, cache_path, open_at
from switchlm.data.text.tokenizer import Tokenizer
from switchlm.errors import DataError
from switchlm.files import Report

WINDOW = 2**26  # characters


@dataclass
class Windows:
    """The token caches of a source, made one after the other as they are asked for."""

    source: Source
    tokenizer: Tokenizer
    folder: Path
    config: DataConfig
    report: Report

    def __post_init__(self) -> None:
        self._caches: list[TokenCache] = []
        self._lock = Lock()  # also held by the thread that works ahead
        self._stream: Iterator[Document] = iter(())
        self._position = -1  # documents read of the stream; -1 before it is opened
        self._ended = False  # whether the stream had nothing for another window

    @property
    def known(self) -> list[TokenCache]:
        """The windows made so far."""
        return self._caches

    @property
    def complete(self) -> bool:
        """Whether the last window is known: one that the text did not fill."""
        return self._ended or (bool(self._caches) and self._caches[-1].characters < WINDOW)

    def extend(self) -> bool:
        """Make the next window, and begin the one after it; False if the text has ended."""
        with self._lock:
            if self.complete:
                return False
            try:
                self._caches.append(self._make(len(self._caches)))
            except DataError:
                if self._ended:
                    return False
                raise
        Thread(target=self._work_ahead, args=(len(self._caches),), daemon=True).start()
        return True

    def _work_ahead(self, number: int) -> None:
        with suppress(Exception), self._lock:  # whoever needs the window meets the error again
            if number == len(self._caches) and not self.complete:
                self._make(number)

    def _make(self, number: int) -> TokenCache:
        place = cache_path(
            self.source,
            self.tokenizer,
            self.folder,
            columns=self.config.columns,
            max_documents=self.config.max_documents,
            window=number,
        )
        return open_at(place, self.source, self.tokenizer, self._read, self.report)

    def _read(self, skipped: Counter[str]) -> Iterator[Document]:
        """Yield the documents of the next window, from where the stream is if it is there."""
        start = sum(len(cache.hashes_D) for cache in self._caches)
        if self._position != start:
            self._stream = sources.read(
                self.source,
                columns=self.config.columns,
                max_documents=self.config.max_documents,
                skipped=skipped,
            )
            self._position = sum(1 for _ in islice(self._stream, start))
        characters = 0
        self._ended = start > 0
        for document in self._stream:
            self._ended = False
            self._position += 1
            characters += len(document.text)
            yield document
            if characters >= WINDOW:
                return


class StreamedRows:
    """Rows of windows: `RunningText` or `PackedDocuments` of each.

    make_rows: gives the rows of a window that are trained on.
    """

    def __init__(
        self, windows: Windows, make_rows: Callable[[TokenCache], RunningText | PackedDocuments]
    ) -> None:
        self._windows, self._make_rows = windows, make_rows
        self._rows = [make_rows(cache) for cache in windows.known]

    @property
    def num_rows(self) -> int:
        """Rows of the windows that are known."""
        return sum(rows.num_rows for rows in self._rows)

    @property
    def num_tokens(self) -> int:
        """Tokens of the windows that are known."""
        return sum(rows.num_tokens for rows in self._rows)

    def examples(self, index_N: Int64) -> Examples:
        """Return the examples of the rows with these numbers; waits until their text is there."""
        parts = []
        for rows, row_N, inside_N in self._by_window(index_N):
            part = rows.examples(inside_N)
            parts.append(replace(part, row_E=row_N[part.row_E]))
        return join(parts)

    def longest(self, index_N: Int64) -> Int64:
        """Return the lengths of the longest inputs and targets of these rows, packed ones."""
        found = [
            rows.longest(inside_N)
            for rows, _, inside_N in self._by_window(index_N)
            if isinstance(rows, PackedDocuments)
        ]
        longest_2: Int64 = np.max(found, axis=0)
        return longest_2

    def _by_window(
        self, index_N: Int64
    ) -> Iterator[tuple[RunningText | PackedDocuments, Int64, Int64]]:
        """Yield the rows of each window, which of `index_N` are in it, and their numbers there."""
        while self.num_rows <= index_N.max() and self._windows.extend():
            self._rows.append(self._make_rows(self._windows.known[len(self._rows)]))
        ends_W = np.cumsum([rows.num_rows for rows in self._rows])
        pass_N, place_N = index_N // ends_W[-1], index_N % ends_W[-1]
        window_N = np.searchsorted(ends_W, place_N, side="right")
        for window in np.unique(window_N).tolist():
            rows, row_N = self._rows[window], np.flatnonzero(window_N == window)
            inside_N = place_N[row_N] - (ends_W[window] - rows.num_rows)
            yield rows, row_N, inside_N + pass_N[row_N] * rows.num_rows


def check_shares(streamed: bool, weights: list[float | None]) -> None:
    """Raise DataError if sources are mixed by their tokens, and one has not come to its end."""
    if streamed and len(weights) > 1 and None in weights:
        raise DataError(
            "A large dataset of the hub is read while training goes on, so that its share cannot "
            "follow from its size. Give every source a weight, as in hub:NAME:0.7, or bound it by "
            "data.max_documents."
        )
