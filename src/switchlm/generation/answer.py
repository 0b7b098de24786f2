"""Text in, text out: the whole answer, or piece by piece as it comes; many texts; blanks filled.

A text gets the end token, as in training. Its answer does not depend on how it was asked for:
alone, piece by piece, or in a padded batch with others. Filling blanks is what a model trained
by span corruption does without further training:

    text      def <extra_id_0>(self): return <extra_id_1>
    output    <extra_id_0>size<extra_id_1>self._size</s>
    filled    def size(self): return self._size
"""

import re
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass

import torch

from switchlm.data.text.tokenizer import Tokenizer
from switchlm.errors import DataError
from switchlm.generation.beam import Beams, Output, beam_search
from switchlm.generation.decode import limits_of, prompt_batches, steps
from switchlm.generation.sampling import GREEDY, Sampling
from switchlm.generation.text_stream import TextStream
from switchlm.model.transformer import SwitchTransformer


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a model says to a text.

    output: the decoded output, sentinels included.
    spans: the number of a blank to its span.
    finished: false where the limit of tokens cut the output off.
    """

    output: str
    spans: dict[int, str]
    finished: bool


@dataclass(frozen=True, kw_only=True)
class ScoredAnswer(Answer):
    """One of the answers that a beam search found; score: see beam.py."""

    score: float


class Writer:
    """One output as it is made: its tokens and its text, up to the first stop string."""

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._stream = TextStream(tokenizer, stops)
        self._tokens: list[int] = []
        self._output = ""

    def push(self, token: int) -> bool:
        """Add a token; return whether a stop string is complete."""
        self._tokens.append(token)
        self._output += self._stream.push(token)
        return self._stream.stopped

    def new(self, start: int) -> str:
        """Return the text from that character on."""
        return self._output[start:]

    def close(self, finished: bool) -> Answer:
        """Return all of it; call it once, when no more tokens come."""
        self._output += self._stream.finish()
        spans = read_spans(self._tokens, self._tokenizer, len(self._output))
        return Answer(output=self._output, spans=spans, finished=finished or self._stream.stopped)


def stream(
    model: SwitchTransformer,
    tokenizer: Tokenizer,
    text: str,
    *,
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    seed: int = 0,
    stops: Sequence[str] = (),
) -> Generator[str, None, Answer]:
    """Yield the output in pieces that are never empty, as they come; return all of it.

    stops: texts that end the output and stay out of it.

    Raises DataError for an empty text, and for tokens that the model's vocabulary lacks,
    ConfigError for an empty stop string.
    """
    writer = Writer(tokenizer, stops)
    prompts = _prompts(model, tokenizer, [text])
    finished, given = False, 0
    for step in steps(
        model,
        torch.tensor(prompts, device=model.embedding.weight.device),
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        seeds=seed,
        ends=lambda row, token: writer.push(token),
    ):
        finished = bool(step.finished_B[0])
        if piece := writer.new(given):
            given += len(piece)
            yield piece
    said = writer.close(finished)
    if piece := writer.new(given):
        yield piece
    return said


def answer(
    model: SwitchTransformer,
    tokenizer: Tokenizer,
    text: str,
    *,
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    seed: int = 0,
    stops: Sequence[str] = (),
) -> Answer:
    """Return what the model generates for `text`; arguments and errors are those of `stream`."""
    all_answers = answer_all(
        model,
        tokenizer,
        [text],
        max_new_tokens=max_new_tokens,
        batch_size=1,
        sampling=sampling,
        seed=seed,
        stops=stops,
    )
    return next(all_answers)[1]


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
    first.

    max_new_tokens: for all, or one a text.

    Raises as `stream` does; of several texts an empty one is told by its number, from 1.
    """
    prompts, limits = _prompts(model, tokenizer, texts), limits_of(max_new_tokens, len(texts))
    for places, inputs_BS, segments_BS in prompt_batches(model, prompts, batch_size):
        writers = [Writer(tokenizer, stops) for _ in places]

        def ends(row: int, token: int, writers: list[Writer] = writers) -> bool:
            return writers[row].push(token)

        finished = [False] * len(writers)
        for step in steps(
            model,
            inputs_BS,
            segments_BS,
            max_new_tokens=[limits[place] for place in places],
            sampling=sampling,
            seeds=seed,
            ends=ends,
        ):
            finished = step.finished_B.tolist()
        for place, writer, ended in zip(places, writers, finished, strict=True):
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
        return ScoredAnswer(**vars(writer.close(output.finished)), score=output.score)

    Writer(tokenizer, stops)  # a bad stop string shows before the work
    prompts, limits = _prompts(model, tokenizer, texts), limits_of(max_new_tokens, len(texts))
    for places, inputs_BS, segments_BS in prompt_batches(model, prompts, batch_size):
        here = [limits[place] for place in places]
        found = beam_search(model, inputs_BS, segments_BS, max_new_tokens=here, beams=beams)
        for place, outputs in zip(places, found, strict=True):
            yield place, [read(output) for output in outputs]


def _prompts(
    model: SwitchTransformer, tokenizer: Tokenizer, texts: Sequence[str]
) -> list[list[int]]:
    """Return the tokens of each text and the end token. Raises DataError for an empty text."""
    prompts = []
    for number, text in enumerate(texts, 1):
        ids = tokenizer.encode(text)
        if not ids:
            which = "The text" if len(texts) == 1 else f"Text {number}"
            raise DataError(f"{which} is empty: there is nothing to generate from.")
        prompts.append([*ids, model.config.end_id])
    return prompts


def read_spans(
    output: list[int], tokenizer: Tokenizer, length: int | None = None
) -> dict[int, str]:
    """Return the text after each sentinel up to the next one; the first span of a blank counts.

    length: read so many characters of the decoded output; None reads all.
    """
    number_of = {sentinel: number for number, sentinel in enumerate(tokenizer.sentinel_ids)}
    runs: list[tuple[int | None, list[int]]] = [(None, [])]  # the first belongs to no blank
    for token in output:
        if token in number_of:
            runs.append((number_of[token], []))
        else:
            runs[-1][1].append(token)
    spans: dict[int, str] = {}
    left = len(tokenizer.decode(output)) if length is None else length
    for number, tokens in runs:
        if number is not None:
            left -= len(tokenizer.decode([tokenizer.sentinel_ids[number]]))
            if left < 0:
                break  # a stop string cut the sentinel itself
        text = tokenizer.decode(tokens)[:left]
        left -= len(text)
        if number is not None:
            spans.setdefault(number, text)
    return spans


BLANK = re.compile(r"<extra_id_(\d+)>")
TOKENS_PER_BLANK = 32


def put_into_blanks(text: str, spans: dict[int, str]) -> str:
    """Return the text with each blank replaced by its span; one without a span stays."""
    return BLANK.sub(lambda match: spans.get(int(match[1]), match[0]), text)


def count_blanks(text: str, tokenizer: Tokenizer) -> int:
    """Return how many different blanks a text has.

    Raises DataError when there is none, or one that the tokenizer has no sentinel for.
    """
    numbers = {int(number) for number in BLANK.findall(text)}
    if not numbers:
        raise DataError(
            "The text has no blank to fill. Write <extra_id_0>, <extra_id_1>, ... where the model "
            "shall put something in."
        )
    if max(numbers) >= len(tokenizer.sentinel_ids):
        raise DataError(
            f"The text has the blank <extra_id_{max(numbers)}>, but this tokenizer knows only "
            f"<extra_id_0> to <extra_id_{len(tokenizer.sentinel_ids) - 1}>."
        )
    return len(numbers)


def fill(
    model: SwitchTransformer,
    tokenizer: Tokenizer,
    text: str,
    *,
    max_new_tokens: int | None = None,
    sampling: Sampling = GREEDY,
    seed: int = 0,
) -> str:
    """Return `text` with the model's spans in its blanks; a blank the model left out stays.

    max_new_tokens: 32 a blank where left out.

    Raises DataError for a text without blanks.
    """
    limit = max_new_tokens or TOKENS_PER_BLANK * count_blanks(text, tokenizer)
    said = answer(model, tokenizer, text, max_new_tokens=limit, sampling=sampling, seed=seed)
    return put_into_blanks(text, said.spans)
