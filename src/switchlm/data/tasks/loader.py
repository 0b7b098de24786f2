"""Pairs of texts to batches: tokenised once, cut or refused, padded or packed, mixed by task.

The batch of a step is a pure function of (seed, step), as in pre-training. Suffixes: E examples, N
rows, B rows of the batch, S inputs, T targets.
"""

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from switchlm.data.batch import Batch, ShardedLoader, prefetch_batches, sample_numbers
from switchlm.data.order import Int64, Mixture, probabilities
from switchlm.data.pretraining.rows import pack as share_out
from switchlm.data.pretraining.rows import shuffle
from switchlm.data.tasks.task import Example
from switchlm.data.text.tokenizer import Tokenizer
from switchlm.errors import DataError, nearest
from switchlm.files import Report

_CHUNK = 4096  # texts encoded at once
LongTargets = Literal["refuse", "truncate"]


@dataclass(frozen=True, kw_only=True)
class Limits:
    """input_length, target_length: tokens in a row, the end token included.

    long_targets: refuse a target that is longer, or truncate and count it. Inputs are truncated.
    """

    input_length: int
    target_length: int
    long_targets: LongTargets = "refuse"


class PairLoader:
    """Batches of input and target texts as a pure function of (seed, step).

    `sources` are the names of the tasks, drawn in proportion to their tokens (paper, section 4.1).
    `truncated_inputs` and `truncated_targets` count, by task, the examples for training that were
    cut at the end.
    """

    def __init__(
        self,
        examples_by_task: Mapping[str, Sequence[Example]],
        tokenizer: Tokenizer,
        *,
        input_length: int,
        target_length: int,
        batch_size: int,
        seed: int,
        held_out: Mapping[str, Sequence[Example]] | None = None,
        pack: bool = False,
        long_targets: LongTargets = "refuse",
        report: Report = lambda line: None,
    ) -> None:
        """Tokenise everything.

        examples_by_task, held_out: examples to train on, and to give as held-out batches, by the
            name of their task.
        pack: put several examples into a row, separated by segments.
        report: called with what a user should know, such as how many inputs were truncated.

        Raises DataError where a task has no examples, or a target longer than the limit.
        """
        if not examples_by_task:
            raise DataError("There is no task to train on: give at least one.")
        limits = Limits(
            input_length=input_length, target_length=target_length, long_targets=long_targets
        )
        self.tokenizer = tokenizer
        self.sources = tuple(examples_by_task)
        self.batch_size = batch_size
        self._limits = limits
        self._seed = seed
        self._parts = [
            TokenPairs(name, examples, tokenizer, limits, pack=pack)
            for name, examples in examples_by_task.items()
        ]
        shares_S = probabilities(
            [part.num_tokens for part in self._parts], [None] * len(self._parts), "proportional", 1
        )
        self._mixture = Mixture(shares_S, seed)
        self.truncated_inputs = {part.name: part.truncated_inputs for part in self._parts}
        self.truncated_targets = {part.name: part.truncated_targets for part in self._parts}
        self._held_out = [
            (
                self.sources.index(_known(name, self.sources)),
                TokenPairs(name, examples, tokenizer, limits),
            )
            for name, examples in (held_out or {}).items()
        ]
        for part, share in zip(self._parts, shares_S, strict=True):
            report(part.describe(share, limits))

    def sample_ids(self, step: int, rank: int = 0, world_size: int = 1) -> Int64:
        """Return the numbers of the samples that `rank` of `world_size` sees at `step`."""
        return sample_numbers(step, self.batch_size, rank, world_size)

    def batch(self, step: int, rank: int = 0, world_size: int = 1) -> Batch:
        """Return the rows of the global batch of `step` that fall to `rank`."""
        source_B, index_B = self._mixture.assign(self.sample_ids(step, rank, world_size))
        rows = _Rows(self.tokenizer, self._limits, len(source_B))
        for source in np.unique(source_B):
            place_N = np.flatnonzero(source_B == source)
            part = self._parts[source]
            _, row_N = shuffle(index_B[place_N], part.num_rows, self._seed)
            for place, row in zip(place_N.tolist(), row_N.tolist(), strict=True):
                rows.put(place, part, row)
        return rows.batch(source_B)

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
        """Return at most `num_batches` batches of the held-out examples, the same for every seed.

        Tasks take turns, so that all are met in a few batches, each example once. What does not
        fill a batch is left out, unless there is less than one batch, which repeats.
        """
        only = self.sources if source is None else (_known(source, self.sources),)
        parts = [(s, part) for s, part in self._held_out if self.sources[s] in only]
        places = sorted(
            (row, source, part_number)
            for part_number, (source, part) in enumerate(parts)
            for row in range(min(part.num_rows, num_batches * self.batch_size))
        )
        if not places:
            return []
        whole = max(len(places) // self.batch_size, 1)
        batches = []
        for step in range(min(whole, num_batches)):
            numbers = self.sample_ids(step, rank, world_size) % len(places)
            rows = _Rows(self.tokenizer, self._limits, len(numbers))
            chosen = [places[number] for number in numbers.tolist()]
            for place, (row, _, part_number) in enumerate(chosen):
                rows.put(place, parts[part_number][1], row)
            batches.append(rows.batch(np.array([source for _, source, _ in chosen])))
        return batches


def _known(name: str, sources: Sequence[str]) -> str:
    if name not in sources:
        raise DataError(f"There is no task {name!r}.{nearest(name, sources)}")
    return name


class TokenPairs:
    """The tokens of a task's examples, and which of them share a row."""

    def __init__(
        self,
        name: str,
        examples: Sequence[Example],
        tokenizer: Tokenizer,
        limits: Limits,
        *,
        pack: bool = False,
    ) -> None:
        """Raises DataError where there are none, or a target is longer than the limit."""
        if not examples:
            raise DataError(f"The task {name!r} has no examples.")
        self.name = name
        self._inputs, self.truncated_inputs = encode_texts(
            [example.input for example in examples], tokenizer, limits.input_length
        )
        self._targets, self.truncated_targets = encode_texts(
            [example.target for example in examples], tokenizer, limits.target_length
        )
        if self.truncated_targets and limits.long_targets == "refuse":
            lengths = [len(tokenizer.encode_plain([e.target])[0]) + 1 for e in examples]
            longest = int(np.argmax(lengths))
            raise DataError(
                f"{self.truncated_targets:,} of {len(examples):,} targets of the task {name!r} are "
                f"longer than {limits.target_length} tokens, the longest {lengths[longest]:,}: "
                f"{examples[longest].target[:60]!r}. Raise the target length "
                "(finetune.target_length), or have long targets cut (finetune.truncate_targets)."
            )
        input_length_E = np.array([len(ids) for ids in self._inputs])
        target_length_E = np.array([len(ids) for ids in self._targets])
        self.num_tokens = int(input_length_E.sum() + target_length_E.sum())
        self._order_E = np.arange(len(examples))
        self._first_N = np.arange(len(examples) + 1)
        if pack:
            # One size for both limits: the larger share of a row, counted in input tokens.
            share_E = -(-target_length_E * limits.input_length // limits.target_length)
            size_E = np.maximum(input_length_E, share_E)
            self._order_E, self._first_N = share_out(size_E, limits.input_length)
        self.num_rows = len(self._first_N) - 1

    def row(self, number: int) -> list[tuple[Int64, Int64]]:
        """Return the input and target ids of the examples in a row."""
        chosen = self._order_E[self._first_N[number] : self._first_N[number + 1]].tolist()
        return [(self._inputs[example], self._targets[example]) for example in chosen]

    def describe(self, share: float, limits: Limits) -> str:
        """Return a line on how much there is, and what was cut."""
        cut = ""
        if self.truncated_inputs:
            cut += f"; {self.truncated_inputs:,} inputs cut to {limits.input_length} tokens"
        if self.truncated_targets:
            cut += f"; {self.truncated_targets:,} targets cut to {limits.target_length} tokens"
        return (
            f"{self.name}: {len(self._inputs):,} examples, {self.num_tokens:,} tokens, "
            f"{share:.1%} of the rows{cut}"
        )


def encode_texts(
    texts: Sequence[str], tokenizer: Tokenizer, length: int
) -> tuple[list[Int64], int]:
    """Return ids that end with the end token, at most `length`, and how many texts were cut."""
    found: list[Int64] = []
    cut = 0
    for start in range(0, len(texts), _CHUNK):
        for ids in tokenizer.encode_plain(texts[start : start + _CHUNK]):
            cut += len(ids) >= length
            found.append(np.append(ids[: length - 1], tokenizer.end_id))
    return found, cut


class _Rows:
    """A batch in the making: examples are put into its rows, one after the other."""

    def __init__(self, tokenizer: Tokenizer, limits: Limits, num_rows: int) -> None:
        sides = (limits.input_length, limits.target_length)
        self._tokens = [np.full((num_rows, side), tokenizer.pad_id) for side in sides]
        self._segments = [np.zeros((num_rows, side), dtype=np.int32) for side in sides]

    def put(self, place: int, part: TokenPairs, row: int) -> None:
        at = [0, 0]
        for segment, pair in enumerate(part.row(row), start=1):
            for side, ids in enumerate(pair):
                filled = slice(at[side], at[side] + len(ids))
                self._tokens[side][place, filled] = ids
                self._segments[side][place, filled] = segment
                at[side] += len(ids)

    def batch(self, source_B: Int64) -> Batch:
        inputs_BS, targets_BT = map(torch.from_numpy, self._tokens)
        segments: list[Tensor] = [torch.from_numpy(side) for side in self._segments]
        return Batch(
            inputs_BS=inputs_BS,
            targets_BT=targets_BT,
            input_segments_BS=segments[0],
            target_segments_BT=segments[1],
            source_B=torch.from_numpy(source_B.astype(np.int32)),
        )
