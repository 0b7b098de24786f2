"""Answers to many texts, in padded batches: by greedy choice or sampling, or by beam search.

Texts of similar length share a batch; what each is answered is what it is answered alone.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from switchlm.data.text.tokenizer import Tokenizer
from switchlm.generation.answer import Answer, Writer, prompt_of
from switchlm.generation.beam import Beams, Output, beam_search
from switchlm.generation.decode import limits_of, pad_prompts, steps
from switchlm.generation.sampling import GREEDY, Sampling
from switchlm.model.transformer import SwitchTransformer


@dataclass(frozen=True, kw_only=True)
class ScoredAnswer(Answer):
    """One of the answers that a beam search found; score: see beam.py."""

    score: float


def answer_all(
    model: SwitchTransformer,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    *,
    max_new_tokens: int | Sequence[int],
    batch_size: int,
    sampling: Sampling = GREEDY,
    seed: int = 0,
    stops: Sequence[str] = (),
) -> Iterator[tuple[int, Answer]]:
    """Yield the number of each text and the answer to it, which is that of `answer`.

    Texts of similar length share a padded batch, so they are answered out of order, the longest
    first: what does not fit into memory shows at once.

    max_new_tokens: for all, or one a text.

    Raises as `stream` does; an empty text is told by its number, from 1.
    """
    for batch in _batches(model, tokenizer, texts, max_new_tokens, batch_size):
        writers = [Writer(tokenizer, stops) for _ in batch.places]

        def ends(row: int, token: int, writers: list[Writer] = writers) -> bool:
            return writers[row].push(token)

        finished = [False] * len(writers)
        for step in steps(
            model,
            batch.inputs_BS,
            batch.segments_BS,
            max_new_tokens=batch.limits,
            sampling=sampling,
            seeds=seed,
            ends=ends,
        ):
            finished = step.finished_B.tolist()
        for place, writer, ended in zip(batch.places, writers, finished, strict=True):
            yield place, writer.close(ended)


def best_answers(
    model: SwitchTransformer,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    *,
    max_new_tokens: int | Sequence[int],
    batch_size: int,
    beams: Beams,
    stops: Sequence[str] = (),
) -> Iterator[tuple[int, list[ScoredAnswer]]]:
    """Yield the number of each text and the `beams.width` best answers to it, the best first.

    Otherwise as `answer_all`. The search knows nothing of stop strings: they cut its outputs.
    """

    def read(output: Output) -> ScoredAnswer:
        writer = Writer(tokenizer, stops)
        for token in output.tokens:
            if writer.push(token):
                break
        said = writer.close(output.finished)
        return ScoredAnswer(
            output=said.output, spans=said.spans, finished=said.finished, score=output.score
        )

    Writer(tokenizer, stops)  # a bad stop string shows before the work
    for batch in _batches(model, tokenizer, texts, max_new_tokens, batch_size):
        found = beam_search(
            model, batch.inputs_BS, batch.segments_BS, max_new_tokens=batch.limits, beams=beams
        )
        for place, outputs in zip(batch.places, found, strict=True):
            yield place, [read(output) for output in outputs]


@dataclass(frozen=True, kw_only=True)
class _Batch:
    """Padded prompts; places: which text each is.

    limits: of the tokens of each output.
    """

    places: list[int]
    inputs_BS: Tensor
    segments_BS: Tensor
    limits: list[int]


def _batches(
    model: SwitchTransformer,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    max_new_tokens: int | Sequence[int],
    batch_size: int,
) -> Iterator[_Batch]:
    """Yield prompts of similar length together, the longest first."""
    prompts = [prompt_of(model, tokenizer, text, place) for place, text in enumerate(texts, 1)]
    limits = limits_of(max_new_tokens, len(texts))
    device = model.embedding.weight.device
    order = sorted(range(len(prompts)), key=lambda place: -len(prompts[place]))
    for first in range(0, len(order), batch_size):
        places = order[first : first + batch_size]
        inputs_BS, segments_BS = pad_prompts([prompts[p] for p in places], model.config.pad_id)
        yield _Batch(
            places=places,
            inputs_BS=inputs_BS.to(device),
            segments_BS=segments_BS.to(device),
            limits=[limits[p] for p in places],
        )
