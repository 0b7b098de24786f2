"""Batches of input and target texts: tokenised once, padded or packed, in a mixture of tasks.

The batch of a step is a pure function of (seed, step), as in pre-training; its rows are as long as
the longest of them needs. Suffixes: E examples, N rows, B rows of the batch, S inputs, T targets.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Literal

import numpy as np
import torch

from switchlm.config import check_choice
from switchlm.data.batch import Batch, StepLoader, pad_rows, padded_length
from switchlm.data.order import Int64, Mixture, probabilities
from switchlm.data.pretraining.rows import pack as pack_examples
from switchlm.data.pretraining.rows import shuffle
from switchlm.data.tasks.round_trip import describe_losses
from switchlm.data.tasks.task import Example
from switchlm.data.text.tokenizer import Tokenizer
from switchlm.errors import DataError, nearest
from switchlm.files import Report

_CHUNK = 4096  # texts encoded at once
LongTargets = Literal["refuse", "truncate"]


class PairLoader(StepLoader):
    """Batches of input and target texts.

    `sources` are the names of the tasks, drawn in proportion to their tokens (paper, section 4.1).
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

        examples_by_task: training examples by the name of their task.
        input_length, target_length: the most tokens in a row, the end token included.
        held_out: examples for held-out batches by the name of their task.
        pack: pack several examples into a row, separated by segments.
        long_targets: raise DataError for a longer target, or truncate and count it. Inputs are
            truncated.
        report: called with a line for each task: its size, and the number of truncated texts.

        Raises DataError if a task has no examples.
        """
        check_choice(long_targets, LongTargets, "long_targets")
        if not examples_by_task:
            raise DataError("There is no task to train on: give at least one.")
        super().__init__(tuple(examples_by_task), batch_size, tokenizer)
        self._lengths = input_length, target_length
        self._seed = seed
        tokenise = partial(
            TokenPairs,
            tokenizer=tokenizer,
            input_length=input_length,
            target_length=target_length,
            long_targets=long_targets,
        )
        self._parts = [
            tokenise(name, examples, pack=pack) for name, examples in examples_by_task.items()
        ]
        shares_S = probabilities(
            [part.num_tokens for part in self._parts], [None] * len(self._parts), "proportional", 1
        )
        self._mixture = Mixture(shares_S, seed)
        self._held_out = {
            self._index(name): tokenise(name, examples)
            for name, examples in (held_out or {}).items()
        }
        for part, share in zip(self._parts, shares_S, strict=True):
            report(part.describe(share))
            if part.losses is not None:
                report(part.losses)

    def make(self, sample_B: Int64, share: slice) -> Batch:
        source_B, index_B = self._mixture.assign(sample_B)
        num_rows_B = np.array([part.num_rows for part in self._parts])[source_B]
        _, row_B = shuffle(index_B, num_rows_B, self._seed)
        return self._batch(self._parts, source_B, row_B, share)

    def held_out(self, num_batches: int, source: str | None = None) -> list[Batch]:
        """Return at most `num_batches` batches of the held-out examples, the same for every seed.

        Tasks alternate, so that a few batches have all tasks; each example comes once. The last
        examples are left out if they do not fill a batch; if all do not, they are repeated.
        """
        only = range(len(self.sources)) if source is None else [self._index(source)]
        places = sorted(
            (row, task)
            for task, part in self._held_out.items()
            if task in only
            for row in range(min(part.num_rows, num_batches * self.batch_size))
        )
        if not places:
            return []
        full_batches = max(len(places) // self.batch_size, 1)
        batches = []
        for step in range(min(full_batches, num_batches)):
            chosen = [places[number] for number in (self.sample_ids(step) % len(places)).tolist()]
            row_B, source_B = np.array(chosen).T
            batches.append(self._batch(self._held_out, source_B, row_B, self.own_rows))
        return batches

    def _batch(
        self,
        parts: Sequence["TokenPairs"] | Mapping[int, "TokenPairs"],
        source_B: Int64,
        row_B: Int64,
        share: slice,
    ) -> Batch:
        """Return some rows of the batch that has row `row_B` of each source."""
        places = list(zip(source_B.tolist(), row_B.tolist(), strict=True))
        needed_2 = np.max([parts[source].row_length_N2[row] for source, row in places], axis=0)
        rows = [parts[source].row(row) for source, row in places[share]]
        source_B = source_B[share]
        row_E = np.repeat(np.arange(len(rows)), [len(row) for row in rows])
        sides = []
        for side, (needed, limit) in enumerate(zip(needed_2.tolist(), self._lengths, strict=True)):
            ids = [pair[side] for row in rows for pair in row]
            length_E = np.array([len(one) for one in ids])
            length, pad_id = padded_length(needed, limit), self.tokenizer.pad_id
            sides.append(pad_rows(np.concatenate(ids), length_E, row_E, len(rows), length, pad_id))
        (inputs_BS, input_segments_BS), (targets_BT, target_segments_BT) = sides
        return Batch(
            inputs_BS=inputs_BS,
            targets_BT=targets_BT,
            input_segments_BS=input_segments_BS,
            target_segments_BT=target_segments_BT,
            source_B=torch.from_numpy(source_B.astype(np.int32)),
        )

    def _index(self, name: str) -> int:
        if name not in self.sources:
            raise DataError(f"There is no task {name!r}.{nearest(name, self.sources)}")
        return self.sources.index(name)


class TokenPairs:
    """The tokens of a task's examples, and the examples of each row; see `PairLoader`."""

    def __init__(
        self,
        name: str,
        examples: Sequence[Example],
        tokenizer: Tokenizer,
        *,
        input_length: int,
        target_length: int,
        long_targets: LongTargets,
        pack: bool = False,
    ) -> None:
        """Raises DataError if there are no examples, or a target is too long."""
        if not examples:
            raise DataError(f"The task {name!r} has no examples.")
        self._name = name
        self._inputs, cut_inputs = encode_texts(
            [example.input for example in examples], tokenizer, input_length
        )
        self._targets, cut_targets = encode_texts(
            [example.target for example in examples], tokenizer, target_length
        )
        if cut_targets and long_targets == "refuse":
            lengths = [len(tokenizer.complete(tokenizer.encode(e.target))) for e in examples]
            longest = int(np.argmax(lengths))
            raise DataError(
                f"{cut_targets:,} of {len(examples):,} targets of the task {name!r} are "
                f"longer than {target_length} tokens, the longest {lengths[longest]:,}: "
                f"{examples[longest].target[:60]!r}. Raise the target length "
                "(finetune.target_length), or truncate long targets (finetune.truncate_targets)."
            )
        self._cut = "".join(
            f"; {count:,} {side} truncated to {length} tokens"
            for side, count, length in (
                ("inputs", cut_inputs, input_length),
                ("targets", cut_targets, target_length),
            )
            if count
        )
        input_length_E = np.array([len(ids) for ids in self._inputs])
        target_length_E = np.array([len(ids) for ids in self._targets])
        self.num_tokens = int(input_length_E.sum() + target_length_E.sum())
        texts = [example.target for example in examples]
        self.losses = describe_losses(
            name, texts, self._inputs, self._targets, tokenizer, target_length
        )
        self._order_E = np.arange(len(examples))
        self._first_N = np.arange(len(examples) + 1)
        if pack:
            self._order_E, self._first_N = pack_examples(
                input_length_E, target_length_E, input_length, target_length
            )
        self.num_rows = len(self._first_N) - 1
        length_E2 = np.stack([input_length_E, target_length_E], axis=1)[self._order_E]
        self.row_length_N2 = np.add.reduceat(length_E2, self._first_N[:-1], axis=0)

    def row(self, number: int) -> list[tuple[Int64, Int64]]:
        """Return the input and target ids of the examples in a row."""
        chosen = self._order_E[self._first_N[number] : self._first_N[number + 1]].tolist()
        return [(self._inputs[example], self._targets[example]) for example in chosen]

    def describe(self, share: float) -> str:
        """Return a line on the size of the task, and on truncated texts."""
        return (
            f"{self._name}: {len(self._inputs):,} examples, {self.num_tokens:,} tokens, "
            f"{share:.1%} of the rows{self._cut}"
        )


def encode_texts(
    texts: Sequence[str], tokenizer: Tokenizer, length: int
) -> tuple[list[Int64], int]:
    """Return completed ids, at most `length`, and the number of truncated texts.

    Added tokens in a text are their ids, as in generation: `</s>` too, where an output would end.
    """
    room = max(0, length - len(tokenizer.complete([])))
    found: list[Int64] = []
    cut = 0
    for start in range(0, len(texts), _CHUNK):
        for ids in tokenizer.encode_all(texts[start : start + _CHUNK]):
            cut += len(ids) > room
            found.append(np.array(tokenizer.complete(ids[:room]), dtype=np.int64))
    return found, cut
