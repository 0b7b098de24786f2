"""Evaluate a model on a task: generate an answer for every example, and compute metrics.

Shapes: B batch, S source, T target, D d_model, N examples.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice

import numpy as np
import torch
from torch import Tensor

from switchlm.data.tasks.loader import encode_texts
from switchlm.data.tasks.round_trip import comparable
from switchlm.data.tasks.task import Example, Task
from switchlm.data.text.tokenizer import Tokenizer
from switchlm.evaluation.baselines import labels_to_rank
from switchlm.evaluation.metrics import RESAMPLES, Interval, measure
from switchlm.generation.decode import (
    check_finite,
    check_vocabulary,
    dropless,
    encode_prompts,
    evaluation_mode,
    generate,
    prompt_batches,
)
from switchlm.model.losses import token_losses
from switchlm.model.transformer import SwitchTransformer, shift_right
from switchlm.parallel.mesh import ALONE, Mesh

_NO_LIMIT = 2**30  # tokens


@dataclass(frozen=True, kw_only=True)
class TaskScore:
    """metrics: in per cent, in the order of the task; the first is the main one.
    predictions: one per example, in order.
    truncated_inputs: the number of inputs that were truncated.
    unfinished: the number of answers that the limit of new tokens ended.
    """

    task: str
    metrics: dict[str, Interval]
    predictions: tuple[str, ...]
    truncated_inputs: int
    unfinished: int

    @property
    def value(self) -> float:
        """The main metric, in per cent."""
        return next(iter(self.metrics.values())).value


def score_task(
    model: SwitchTransformer,
    tokenizer: Tokenizer,
    task: Task,
    examples: Sequence[Example],
    *,
    input_length: int = 512,
    max_new_tokens: int | None = None,
    batch_size: int = 32,
    rank_labels: bool = False,
    skip_special: bool = False,
    resamples: int = RESAMPLES,
    report: Callable[[int], None] = lambda done: None,
    mesh: Mesh = ALONE,
) -> TaskScore:
    """Generate an answer for every example, greedily, and compute the metrics of the task.

    input_length: tokens; longer inputs are truncated at the end, as in training.
    max_new_tokens: the end token included; None: the length of the longest reference.
    rank_labels: predict the most probable of the labels (`labels_to_rank`) instead of generating.
    skip_special: leave special tokens, such as sentinels, out of the answers.
    report: called with the number of examples done.
    mesh: of the processes that each call this with the same unsharded model; each evaluates a part
        of the examples, and all return the score of all.

    No token is dropped, so an answer does not depend on the other examples of the batch. Raises
    errors as `labels_to_rank`, `generate` and `measure` do.
    """
    labels = labels_to_rank(task, examples) if rank_labels else ()
    writer = tokenizer.without_special() if skip_special else tokenizer
    prompts, truncated = encode_texts([e.input for e in examples], tokenizer, input_length)
    label_ids = encode_texts(labels, tokenizer, _NO_LIMIT)[0]
    if max_new_tokens is None and not rank_labels:
        references = [text for example in examples for text in example.references]
        max_new_tokens = max(map(len, encode_texts(references, tokenizer, _NO_LIMIT)[0]), default=1)

    answer_of: dict[int, str] = {}
    unfinished = 0
    batches = prompt_batches(model, [ids.tolist() for ids in prompts], batch_size)
    mine = islice(batches, mesh.global_rank, None, mesh.world_size)
    for chosen, inputs_BS, segments_BS in mine:
        if rank_labels:
            best_B = label_losses(model, inputs_BS, segments_BS, label_ids).argmin(1).tolist()
            answers = [labels[label] for label in best_B]
        else:
            output = generate(model, inputs_BS, segments_BS, max_new_tokens=max_new_tokens or 1)
            unfinished += int((~output.finished_B).sum())
            rows = output.rows(model.config.end_ids)
            answers = [answer.strip() for answer in writer.decode_all(rows)]
        answer_of |= zip(chosen, answers, strict=True)
        report(len(answer_of))
    parts = mesh.gather((answer_of, unfinished))
    all_answers = dict(chain.from_iterable(answers.items() for answers, _ in parts))
    predictions = tuple(all_answers[place] for place in range(len(examples)))
    return TaskScore(
        task=task.name,
        metrics=_measure(task, predictions, examples, tokenizer, resamples),
        predictions=predictions,
        truncated_inputs=truncated,
        unfinished=sum(number for _, number in parts),
    )


def _measure(
    task: Task,
    predictions: Sequence[str],
    examples: Sequence[Example],
    tokenizer: Tokenizer,
    resamples: int,
) -> dict[str, Interval]:
    """Compute the metrics, whatever the white space around added tokens, which is not encoded."""
    written = [
        replace(e, references=tuple(comparable(text, tokenizer) for text in e.references))
        for e in examples
    ]
    answers = [comparable(answer, tokenizer) for answer in predictions]
    return measure(task.metrics, answers, written, task.labels, resamples=resamples)


def label_losses(
    model: SwitchTransformer,
    inputs_BS: Tensor,
    segments_BS: Tensor | None,
    labels: Sequence[np.ndarray],
) -> Tensor:
    """Return the negative log likelihood of each label, [B, labels], float32, in nats.

    labels: the token ids of each, the end token included. No token is dropped.
    """
    losses = []
    check_vocabulary(int(inputs_BS.max()), model.config.vocabulary_size)
    with evaluation_mode(model), dropless(model.decoder):
        encoded_BSD = encode_prompts(model, inputs_BS, segments_BS)
        for ids in labels:
            check_vocabulary(int(ids.max()), model.config.vocabulary_size)
            targets_BT = torch.from_numpy(ids).to(inputs_BS).expand(len(inputs_BS), -1)
            logits_BTV = model.decode(
                shift_right(targets_BT, None, model.config.start_id),
                encoded_BSD,
                input_segments_BS=segments_BS,
            ).logits_BTV
            check_finite(logits_BTV)
            losses.append(token_losses(logits_BTV, targets_BT).sum(1))
    return torch.stack(losses, 1)
