"""Requests as the interface has them to requests of the engine, and events to answers."""

import asyncio
import secrets
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field

from switchlm.errors import DataError, SwitchLMError
from switchlm.generation.decode import check_vocabulary
from switchlm.generation.sampling import GREEDY, Sampling
from switchlm.serving.engine import Engine
from switchlm.serving.requests import LARGEST_SEED, Event, Generation, Reason, Request

Numbered = AsyncGenerator[tuple[int, Event], None]


class FailedError(SwitchLMError):
    """The engine gave a request up.

    status: of HTTP.
    """

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


@dataclass
class Output:
    """What has come of a request so far; reason: why it ended, None while it goes on."""

    pieces: list[str] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    reason: Reason | None = None

    @property
    def text(self) -> str:
        return "".join(self.pieces)

    def add(self, event: Event) -> None:
        """Take an event in. Raises FailedError for an end that is none of the model's doing."""
        self.pieces.append(event.piece)
        if event.token is not None:
            self.tokens.append(event.token)
        self.reason = event.reason
        check_end(event)


def check_end(event: Event) -> None:
    """Raise FailedError for an end that is none of the model's doing."""
    if event.reason == "error":
        raise FailedError(f"This request failed: {event.message}.", 500)
    if event.reason == "deadline":
        raise FailedError("The request took longer than the server allows.", 504)
    if event.reason == "cancelled":
        raise FailedError("The request was cancelled.", 499)


def sampling_of(body: Generation) -> Sampling:
    """Return how the body wants tokens chosen: greedy unless it says anything about it."""
    if body.temperature is None and body.top_k is None and body.top_p is None:
        return GREEDY
    return Sampling(
        temperature=1.0 if body.temperature is None else body.temperature,
        top_k=body.top_k,
        top_p=1.0 if body.top_p is None else body.top_p,
    )


async def requests_of(
    body: Generation,
    prompts: Sequence[str],
    engine: Engine,
    *,
    usual_limit: int,
    copies: int = 1,
    seconds: float | None,
) -> list[Request]:
    """Tokenise the prompts, off the event loop; `copies` of each, with seeds of their own.

    Raises DataError for a prompt that is empty or too long, and for too many tokens or outputs.
    """
    if len(prompts) * copies > engine.queue:
        raise DataError(
            f"This asks for {len(prompts) * copies} outputs at once, but the server's queue takes "
            f"{engine.queue}: send fewer prompts, or a smaller n, at a time."
        )
    limit = body.max_tokens or min(usual_limit, engine.max_target)
    if limit > engine.max_target:
        raise DataError(f"max_tokens is {limit:,}, but this server gives {engine.max_target:,}.")
    seed = secrets.randbelow(LARGEST_SEED) if body.seed is None else body.seed
    sampling = sampling_of(body)
    encoded = await asyncio.to_thread(lambda: [prompt_ids(text, engine) for text in prompts])
    return [
        Request(
            ids=ids,
            limit=limit,
            sampling=sampling,
            seed=(seed + copy) % (LARGEST_SEED + 1),
            stops=body.stops,
            seconds=seconds,
        )
        for ids in encoded
        for copy in range(copies)
    ]


def prompt_ids(text: str, engine: Engine) -> tuple[int, ...]:
    """Return the tokens of a prompt and the end token.

    Raises DataError for a prompt that is empty or longer than the server takes.
    """
    ids = engine.tokenizer.encode(text)
    if not ids:
        raise DataError("The text is empty: there is nothing to generate from.")
    if len(ids) >= engine.max_source:
        raise DataError(
            f"The text has {len(ids):,} tokens; this server takes {engine.max_source - 1:,}."
        )
    check_vocabulary(max(ids), engine.model.config.vocabulary_size)
    return (*ids, engine.model.config.end_id)


async def collected(events: Numbered, number: int) -> list[Output]:
    """Return the whole outputs of so many requests; the first that fails ends them all."""
    outputs = [Output() for _ in range(number)]
    async with aclosing(events):
        async for place, event in events:
            outputs[place].add(event)
    return outputs
