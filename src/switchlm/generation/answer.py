"""Generate text from text: at once or streamed, for one text or many; fill blanks.

The end token is appended to a text, as in training. An output is the same alone, streamed, or in a
batch with others (see decode.py). A model pre-trained by span corruption can fill blanks:

    text      def <extra_id_0>(self): return <extra_id_1>
    output    <extra_id_0>size<extra_id_1>self._size</s>
    filled    def size(self): return self._size
"""

import re
from collections.abc import Collection, Generator, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from switchlm.data.text.tokenizer import Tokenizer
from switchlm.errors import DataError
from switchlm.generation.beam import Beams, Output, beam_search
from switchlm.generation.decode import limits_of, prompt_batches, steps
from switchlm.generation.sampling import GREEDY, Sampling, seeds_from
from switchlm.generation.text_stream import TextStream
from switchlm.model.transformer import SwitchTransformer


@dataclass(frozen=True, kw_only=True)
class Answer:
    """The output of a model for a text.

    output: the decoded output, sentinels included.
    spans: the text for each blank, by its number.
    finished: false if the limit of tokens ended the output.
    """

    output: str
    spans: dict[int, str]
    finished: bool


@dataclass(frozen=True, kw_only=True)
class ScoredAnswer(Answer):
    """An answer of a beam search; score: see beam.py."""

    score: float


class OutputBuilder:
    """The tokens and the text of one output, up to the first stop string."""

    def __init__(
        self, tokenizer: Tokenizer, stops: Sequence[str] = (), end_ids: Collection[int] = ()
    ) -> None:
        self._tokenizer = tokenizer
        self._end_ids = end_ids
        self._stream = TextStream(tokenizer, stops)
        self._tokens: list[int] = []
        self._output = ""

    def push(self, token: int) -> bool:
        """Add a token; return whether a stop string is complete."""
        if token not in self._end_ids:  # which are no text, whatever piece they are
            self._tokens.append(token)
            self._output += self._stream.push(token)
        return self._stream.stopped

    def text_from(self, start: int) -> str:
        """Return the text from character `start` on."""
        return self._output[start:]

    def close(self, finished: bool) -> Answer:
        """Return the answer; call it once, after the last token."""
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
    seed: int | None = None,
    stops: Sequence[str] = (),
) -> Generator[str, None, Answer]:
    """Yield the output piece by piece, none empty; return the answer.

    seed: of a sample, which it repeats; None: a random one.
    stops: texts that end the output and are not part of it.

    Raises DataError for an empty text, and for tokens that the model's vocabulary lacks,
    ConfigError for an empty stop string.
    """
    builder = OutputBuilder(tokenizer, stops, model.config.end_ids)
    prompts = _prompts(model, tokenizer, [text])
    finished, sent = False, 0
    for step in steps(
        model,
        torch.tensor(prompts, device=model.embedding.weight.device),
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        seeds=seed,
        ends=lambda row, token: builder.push(token),
    ):
        finished = bool(step.finished_B[0])
        if piece := builder.text_from(sent):
            sent += len(piece)
            yield piece
    result = builder.close(finished)
    if piece := builder.text_from(sent):
        yield piece
    return result


def answer(
    model: SwitchTransformer,
    tokenizer: Tokenizer,
    text: str,
    *,
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    seed: int | None = None,
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
    seed: int | None = None,
    stops: Sequence[str] = (),
) -> Iterator[tuple[int, Answer]]:
    """Yield (index, answer) of each text, as `answer` returns it; the longest texts first.

    Texts of similar length are decoded together.

    max_new_tokens: for all, or one per text.
    seed: of the first text; the next one has the next seed, so equal texts have different samples.

    Raises as `stream` does; the message has the number of an empty text, from 1.
    """
    prompts, limits = _prompts(model, tokenizer, texts), limits_of(max_new_tokens, len(texts))
    seeds = seeds_from(seed, len(prompts))
    for indices, inputs_BS, segments_BS in prompt_batches(model, prompts, batch_size):
        builders = [OutputBuilder(tokenizer, stops, model.config.end_ids) for _ in indices]

        def ends(row: int, token: int, builders: list[OutputBuilder] = builders) -> bool:
            return builders[row].push(token)

        finished = [False] * len(builders)
        for step in steps(
            model,
            inputs_BS,
            segments_BS,
            max_new_tokens=[limits[index] for index in indices],
            sampling=sampling,
            seeds=[seeds[index] for index in indices],
            ends=ends,
        ):
            finished = step.finished_B.tolist()
        for index, builder, ended in zip(indices, builders, finished, strict=True):
            yield index, builder.close(ended)


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
    """Yield (index, answers) of each text: the `beams.width` best answers, the best first.

    Otherwise as `answer_all`. Stop strings truncate the outputs after the search.
    """

    def read(output: Output) -> ScoredAnswer:
        builder = OutputBuilder(tokenizer, stops, model.config.end_ids)
        for token in output.tokens:
            if builder.push(token):
                break
        return ScoredAnswer(**vars(builder.close(output.finished)), score=output.score)

    OutputBuilder(tokenizer, stops)  # raises for an invalid stop string
    prompts, limits = _prompts(model, tokenizer, texts), limits_of(max_new_tokens, len(texts))
    for indices, inputs_BS, segments_BS in prompt_batches(model, prompts, batch_size):
        batch_limits = [limits[index] for index in indices]
        found = beam_search(model, inputs_BS, segments_BS, max_new_tokens=batch_limits, beams=beams)
        for index, outputs in zip(indices, found, strict=True):
            yield index, [read(output) for output in outputs]


def _prompts(
    model: SwitchTransformer, tokenizer: Tokenizer, texts: Sequence[str]
) -> list[list[int]]:
    """Return the tokens of each text, completed. Raises DataError for an empty text."""
    prompts = []
    for number, text in enumerate(texts, 1):
        ids = tokenizer.encode(text)
        if not ids:
            which = "The text" if len(texts) == 1 else f"Text {number}"
            raise DataError(f"{which} is empty: there is nothing to generate from.")
        prompts.append(tokenizer.complete(ids, model.config.end_id))
    return prompts


def read_spans(
    output: list[int], tokenizer: Tokenizer, length: int | None = None
) -> dict[int, str]:
    """Return the text after each sentinel by blank; of several, the first.

    length: how many characters of the decoded output to read; None: all.
    """
    blank_of = {sentinel: number for number, sentinel in enumerate(tokenizer.sentinel_ids)}
    if length is not None and length >= len(tokenizer.decode(output)):
        length = None
    starts = [place for place, token in enumerate(output) if token in blank_of]
    spans: dict[int, str] = {}
    for start, end in pairwise([*starts, len(output)]):
        text = tokenizer.decode(output[start + 1 : end])
        if length is not None:
            if len(tokenizer.decode(output[: start + 1])) > length:
                break  # a stop string ended the output within the sentinel
            beyond = max(0, len(tokenizer.decode(output[:end])) - length)
            text = text[: max(0, len(text) - beyond)]
        spans.setdefault(blank_of[output[start]], text)
    return spans


BLANK = re.compile(r"<extra_id_([0-9]{1,9})>")  # int() refuses thousands of digits
TOKENS_PER_BLANK = 32


def put_into_blanks(text: str, spans: dict[int, str]) -> str:
    """Return the text with each blank replaced by its span; a blank without one stays."""
    return BLANK.sub(lambda match: spans.get(int(match[1]), match[0]), text)


def count_blanks(text: str, tokenizer: Tokenizer) -> int:
    """Return the number of different blanks in a text.

    Raises DataError for a text without blanks, or a blank without a sentinel in the tokenizer.
    """
    numbers = {int(number) for number in BLANK.findall(text)}
    if not numbers:
        raise DataError(
            "The text has no blank to fill. Write <extra_id_0>, <extra_id_1>, ... where the model "
            "is to insert text."
        )
    if max(numbers) >= (known := len(tokenizer.sentinel_ids)):
        has = f"only <extra_id_0> to <extra_id_{known - 1}>" if known else "no sentinels"
        raise DataError(
            f"The text has the blank <extra_id_{max(numbers)}>, but this tokenizer has {has}."
        )
    return len(numbers)


def fill(
    model: SwitchTransformer,
    tokenizer: Tokenizer,
    text: str,
    *,
    max_new_tokens: int | None = None,
    sampling: Sampling = GREEDY,
    seed: int | None = None,
) -> str:
    """Return `text` with the model's spans in its blanks; a blank without a span stays.

    max_new_tokens: None: 32 per blank.

    Raises DataError for a text without blanks.
    """
    limit = max_new_tokens or TOKENS_PER_BLANK * count_blanks(text, tokenizer)
    result = answer(model, tokenizer, text, max_new_tokens=limit, sampling=sampling, seed=seed)
    return put_into_blanks(text, result.spans)
