"""`Batch`, the one record that leaves this package, and what all its sources have in common.

A source of batches gives every data-parallel worker its rows of each step, prepared ahead in a
background thread.
"""

from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import count
from typing import Any, Protocol, Self

import numpy as np
import torch
from torch import Tensor

from switchlm.data.order import Int64
from switchlm.errors import DataError


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Rows of inputs and targets for an encoder-decoder.

    inputs_BS, targets_BT: int64 token ids. Targets end with the end token; the model shifts them.
    input_segments_BS, target_segments_BT: int32; 0 is padding, packed examples count from 1 and
        never attend to one another. None says that every row is one full example without padding,
        which spares the model its masks.
    source_B: int32, the index of the source in the mixture that each row came from.
    """

    inputs_BS: Tensor
    targets_BT: Tensor
    input_segments_BS: Tensor | None
    target_segments_BT: Tensor | None
    source_B: Tensor

    def to(self, device: torch.device | str) -> Self:
        """Return the batch on `device`; copies only what is elsewhere."""
        move: dict[str, Any] = {
            name: None if value is None else value.to(device, non_blocking=True)
            for name, value in vars(self).items()
        }
        return replace(self, **move)

    @property
    def target_mask_BT(self) -> Tensor:
        """Bool, true where a target counts in the loss."""
        if self.target_segments_BT is None:
            return torch.ones_like(self.targets_BT, dtype=torch.bool)
        return self.target_segments_BT != 0

    @property
    def num_tokens(self) -> int:
        """Real input and target tokens, padding left out."""
        inputs = self.inputs_BS.numel()
        if self.input_segments_BS is not None:
            inputs = int((self.input_segments_BS != 0).sum())
        return inputs + int(self.target_mask_BT.sum())


def sample_numbers(step: int, batch_size: int, rank: int = 0, world_size: int = 1) -> Int64:
    """Return the numbers of the samples that `rank` of `world_size` sees at `step`."""
    if batch_size % world_size:
        raise DataError(
            f"A batch of {batch_size} rows (data.batch_size; of tasks finetune.batch_size) "
            f"cannot be shared out evenly among {world_size} workers; use a multiple."
        )
    share = batch_size // world_size
    return np.arange(share) + (step * batch_size + rank * share)


def prefetch_batches(
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


class BatchSource(Protocol):
    """What training reads: a loader, or anything else that gives batches by step."""

    @property
    def sources(self) -> tuple[str, ...]:
        """The names that Batch.source_B indexes."""
        ...

    def iterate(self, start_step: int) -> Generator[tuple[int, Batch], None, None]:
        """Yield (step, batch) from `start_step` on without end; the batch depends on it alone."""
        ...

    def held_out(self, num_batches: int) -> list[Batch]:
        """Return a fixed set of batches for evaluation."""
        ...


class ShardableLoader(Protocol):
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


class ShardedLoader:
    """One worker's rows of every batch of a loader."""

    def __init__(self, whole: ShardableLoader, rank: int, world_size: int) -> None:
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
