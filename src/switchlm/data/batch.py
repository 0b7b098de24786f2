"""`Batch`, and the base class of all loaders.

A loader gives every data-parallel worker its rows of each step, prefetched in a background thread.

Shapes: B rows of the batch, E examples in them, S inputs, T targets.
"""

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from dataclasses import dataclass, replace
from itertools import count
from typing import Any, Protocol, Self

import numpy as np
import torch
from torch import Tensor

from switchlm.data.order import Int64
from switchlm.data.text.tokenizer import Tokenizer
from switchlm.errors import DataError

LENGTH_MULTIPLE = 8  # of padded rows; tensor cores like it too


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Rows of inputs and targets for an encoder-decoder.

    inputs_BS, targets_BT: int64 token ids. Targets end with the end token; the model shifts them.
    input_segments_BS, target_segments_BT: int32; 0 is padding, packed examples count from 1 and
        never attend to each other. None if every row is one example without padding, which needs
        no masks.
    source_B: int32, the index of the source of each row in the mixture.
    """

    inputs_BS: Tensor
    targets_BT: Tensor
    input_segments_BS: Tensor | None
    target_segments_BT: Tensor | None
    source_B: Tensor

    def to(self, device: torch.device | str) -> Self:
        """Return the batch on `device`."""
        move: dict[str, Any] = {
            name: None if value is None else value.to(device, non_blocking=True)
            for name, value in vars(self).items()
        }
        return replace(self, **move)

    @property
    def target_mask_BT(self) -> Tensor:
        """Bool, true for targets that are not padding."""
        if self.target_segments_BT is None:
            return torch.ones_like(self.targets_BT, dtype=torch.bool)
        return self.target_segments_BT != 0

    @property
    def num_tokens(self) -> int:
        """The number of input and target tokens without padding."""
        inputs = self.inputs_BS.numel()
        if self.input_segments_BS is not None:
            inputs = int((self.input_segments_BS != 0).sum())
        return inputs + int(self.target_mask_BT.sum())


class BatchSource(Protocol):
    """A loader, or anything else that training reads batches from."""

    @property
    def sources(self) -> tuple[str, ...]:
        """The names that Batch.source_B indexes."""
        ...

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer of the texts, if there are any."""
        ...

    def iterate(self, start_step: int) -> Generator[tuple[int, Batch], None, None]:
        """Yield (step, batch) from `start_step` on; a batch depends on its step alone."""
        ...

    def held_out(self, num_batches: int) -> list[Batch]:
        """Return a fixed set of batches for evaluation."""
        ...


class StepLoader(ABC):
    """A worker's rows of every batch: a pure function of (seed, step), in any order.

    sources: the names that Batch.source_B indexes.
    batch_size: rows in the global batch of a step.
    rank, world_size: of the worker, set by `share`.
    """

    def __init__(self, sources: tuple[str, ...], batch_size: int, tokenizer: Tokenizer) -> None:
        self.sources, self.batch_size, self.tokenizer = sources, batch_size, tokenizer
        self.rank, self.world_size = 0, 1

    @abstractmethod
    def make(self, sample_B: Int64, share: slice) -> Batch:
        """Return some rows of the batch of the training samples with these numbers.

        Rows are as long as the whole batch needs: equally long for all workers.
        """

    def share(self, rank: int, world_size: int) -> Self:
        """Return the loader of one worker: its rows of every batch.

        Raises DataError if the workers would not have equally many rows.
        """
        if self.batch_size % world_size:
            raise DataError(
                f"A batch of {self.batch_size} rows (data.batch_size; of tasks "
                f"finetune.batch_size) cannot be divided evenly over {world_size} workers; use a "
                "multiple."
            )
        part = copy(self)
        part.rank, part.world_size = rank, world_size
        return part

    def sample_ids(self, step: int) -> Int64:
        """Return the numbers of the samples in the global batch of `step`."""
        return np.arange(self.batch_size) + step * self.batch_size

    @property
    def own_rows(self) -> slice:
        """This worker's rows of every global batch."""
        share = self.batch_size // self.world_size
        return slice(self.rank * share, (self.rank + 1) * share)

    def batch(self, step: int) -> Batch:
        """Return this worker's rows of the global batch of `step`."""
        return self.make(self.sample_ids(step), self.own_rows)

    def iterate(
        self, start_step: int = 0, prefetch: int = 2
    ) -> Generator[tuple[int, Batch], None, None]:
        """Yield (step, batch) without end, with `prefetch` batches made in a background thread."""
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="switchlm-loader") as worker:
            ahead = deque(
                worker.submit(self.batch, step) for step in range(start_step, start_step + prefetch)
            )
            try:
                for step in count(start_step):
                    ahead.append(worker.submit(self.batch, step + prefetch))
                    yield step, ahead.popleft().result()
            finally:
                worker.shutdown(wait=False, cancel_futures=True)


def padded_length(needed: int, limit: int) -> int:
    """Return `needed` tokens, rounded up so that few shapes occur, but at most `limit`."""
    return min(-(-needed // LENGTH_MULTIPLE) * LENGTH_MULTIPLE, limit)


def pad_rows(
    values: Int64, length_E: Int64, row_E: Int64, num_rows: int, length: int, pad_id: int
) -> tuple[Tensor, Tensor]:
    """Concatenate examples to rows, and pad these.

    values: the tokens of all examples, concatenated; examples of a row are neighbours.
    length_E: the number of tokens of each example.
    row_E: the row of each example.

    Returns int64 tokens and int32 segments (see `Batch`), both [num_rows, length].
    """
    first_E = np.searchsorted(row_E, row_E)  # the first example of each example's row
    row_start_E = (np.cumsum(length_E) - length_E)[first_E]
    # From the position of an example in `values` to that in the rows.
    shift_E = row_E * length - row_start_E
    position = np.arange(len(values)) + np.repeat(shift_E, length_E)
    tokens = np.full(num_rows * length, pad_id, dtype=np.int64)
    segments = np.zeros(num_rows * length, dtype=np.int32)
    tokens[position] = values
    segments[position] = np.repeat(np.arange(len(row_E)) - first_E + 1, length_E)
    shape = (num_rows, length)
    return torch.from_numpy(tokens.reshape(shape)), torch.from_numpy(segments.reshape(shape))
