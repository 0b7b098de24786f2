"""What all sources of batches share: the samples of a step, shares of them, batches made ahead."""

from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from typing import Protocol

import numpy as np

from switchlm.data.batch import Batch
from switchlm.data.order import Int64
from switchlm.errors import DataError


def sample_numbers(step: int, batch_size: int, rank: int = 0, world_size: int = 1) -> Int64:
    """Return the numbers of the samples that `rank` of `world_size` sees at `step`."""
    if batch_size % world_size:
        raise DataError(
            f"A batch of {batch_size} rows (data.batch_size; of tasks finetune.batch_size) "
            f"cannot be shared out evenly among {world_size} workers; use a multiple."
        )
    share = batch_size // world_size
    return np.arange(share) + (step * batch_size + rank * share)


def made_ahead(
    make: Callable[[int], Batch], start_step: int, prefetch: int
) -> Generator[tuple[int, Batch], None, None]:
    """Yield (step, make(step)) for ever, `prefetch` batches made ahead in a background thread."""
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="switchlm-loader") as worker:
        ahead = deque(
            worker.submit(make, step) for step in range(start_step, start_step + prefetch)
        )
        try:
            for step in count(start_step):
                ahead.append(worker.submit(make, step + prefetch))
                yield step, ahead.popleft().result()
        finally:
            worker.shutdown(wait=False, cancel_futures=True)


class Shareable(Protocol):
    """A source of batches that gives each worker its rows of them."""

    @property
    def sources(self) -> tuple[str, ...]:
        """The names that Batch.source_B indexes."""

    def sample_ids(self, step: int, rank: int = 0, world_size: int = 1) -> Int64:
        """Return the numbers of the samples of a worker at a step."""

    def iterate(
        self, start_step: int = 0, prefetch: int = 2, rank: int = 0, world_size: int = 1
    ) -> Generator[tuple[int, Batch], None, None]:
        """Yield (step, rows of a worker) for ever."""

    def held_out(
        self, num_batches: int, source: str | None = None, rank: int = 0, world_size: int = 1
    ) -> list[Batch]:
        """Return a worker's rows of the held-out batches."""


class LoaderShare:
    """One worker's rows of every batch of a loader."""

    def __init__(self, whole: Shareable, rank: int, world_size: int) -> None:
        """Raises DataError where the rows of a batch cannot be shared out evenly."""
        whole.sample_ids(0, rank, world_size)
        self.whole, self.rank, self.world_size = whole, rank, world_size

    @property
    def sources(self) -> tuple[str, ...]:
        """The names of the mixture."""
        return self.whole.sources

    def iterate(self, start_step: int = 0) -> Generator[tuple[int, Batch], None, None]:
        """Yield (step, rows of this worker) for ever."""
        return self.whole.iterate(start_step, rank=self.rank, world_size=self.world_size)

    def held_out(self, num_batches: int) -> list[Batch]:
        """Return this worker's rows of the held-out batches."""
        return self.whole.held_out(num_batches, rank=self.rank, world_size=self.world_size)
