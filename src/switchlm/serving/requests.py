"""Requests: bodies of the HTTP interface, requests to the engine, its events, outputs.

Every field of a body has a type and bounds; other fields are errors.
"""

from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from switchlm.errors import SwitchLMError
from switchlm.generation.sampling import GREEDY, LARGEST_SEED, Sampling, seeds_from

Reason = Literal["stop", "length", "deadline", "cancelled", "error"]


class RequestError(SwitchLMError):
    """A request that was refused or failed.

    status: of HTTP.
    retry_after: seconds after which to try again; None: unknown.
    """

    def __init__(self, message: str, status: int, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.status, self.retry_after = status, retry_after


class BusyError(RequestError):
    """The queue is full."""

    def __init__(self, waiting: int, retry_after: int) -> None:
        message = f"The server is busy: {waiting} requests are waiting."
        super().__init__(f"{message} Try again in {retry_after} s.", 429, retry_after)


class ClosingError(RequestError):
    """The server is shutting down."""

    def __init__(self) -> None:
        super().__init__("The server is shutting down and takes no new requests.", 503, 5)


@dataclass(frozen=True, kw_only=True)
class Request:
    """ids: the prompt, end token included.
    limit: of new tokens.
    stops: texts that end the output.
    seconds: how long it may take, waiting included; None: no limit.
    """

    ids: tuple[int, ...]
    limit: int
    sampling: Sampling = GREEDY
    seed: int = field(default_factory=lambda: seeds_from(None, 1)[0])
    stops: tuple[str, ...] = ()
    seconds: float | None = None


@dataclass(frozen=True, kw_only=True)
class Event:
    """A piece of output.

    token: the new token; None: the output ended without one.
    reason: why the output ended; None: it has not.
    message: of an error.
    """

    piece: str = ""
    token: int | None = None
    reason: Reason | None = None
    message: str = ""


@dataclass(eq=False)
class PendingRequest:
    """A request that the engine has accepted.

    listener: called in the engine's thread with every event.
    received, first_token: time.monotonic() of both.
    """

    request: Request
    listener: Callable[[Event], None]
    received: float
    cancelled: bool = False
    num_tokens: int = 0
    first_token: float | None = None

    def cancel(self) -> None:
        """Cancel the request: its slot is free after the current step."""
        self.cancelled = True


Numbered = AsyncGenerator[tuple[int, Event], None]
# Message and HTTP status of the reasons that are failures.
_FAILURES = {
    "error": ("This request failed: {}.", 500),
    "deadline": ("The request took longer than the server allows.", 504),
    "cancelled": ("The request was cancelled.", 499),
}


@dataclass
class Output:
    """The output of a request so far; reason: why it ended, None: it has not."""

    pieces: list[str] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    reason: Reason | None = None

    @property
    def text(self) -> str:
        return "".join(self.pieces)

    def add(self, event: Event) -> None:
        """Append an event. Raises RequestError for a failure."""
        self.pieces.append(event.piece)
        if event.token is not None:
            self.tokens.append(event.token)
        self.reason = event.reason
        if event.reason in _FAILURES:
            message, status = _FAILURES[event.reason]
            raise RequestError(message.format(event.message), status)


async def collect(events: Numbered, number: int) -> list[Output]:
    """Return the complete outputs of a number of requests; a failure ends all of them."""
    outputs = [Output() for _ in range(number)]
    async with aclosing(events):
        async for place, event in events:
            outputs[place].add(event)
    return outputs


MAX_CHARACTERS = 2**18  # of any text; the engine also has a limit in tokens
MAX_PROMPTS = 32


def _encodable(text: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError("the text holds half a surrogate pair, which is no character") from None
    return text


Text = Annotated[str, Field(max_length=MAX_CHARACTERS), AfterValidator(_encodable)]
Stop = Annotated[str, Field(min_length=1, max_length=256), AfterValidator(_encodable)]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Generation(_Body):
    """Fields of /v1/completions and /v1/fill. Greedy without temperature, top_k and top_p.

    seed: of the first output, the next one has the next seed; None: random ones.
    max_tokens: of the output.
    """

    model: Annotated[str, Field(max_length=1024)] | None = None
    max_tokens: Annotated[int, Field(ge=1, le=2**20)] | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=1, le=2**20)] | None = None
    seed: Annotated[int, Field(ge=0, le=LARGEST_SEED)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=8)] | None = None
    stream: bool = False
    user: Annotated[str, Field(max_length=1024)] | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def sampling(self) -> Sampling:
        """The sampling options; greedy if the body has none."""
        if self.temperature is None and self.top_k is None and self.top_p is None:
            return GREEDY
        return Sampling(
            temperature=1.0 if self.temperature is None else self.temperature,
            top_k=self.top_k,
            top_p=1.0 if self.top_p is None else self.top_p,
        )


class StreamOptions(_Body):
    """include_usage: end a stream with the number of tokens."""

    include_usage: bool = False


class Completion(Generation):
    """The body of /v1/completions, as in the OpenAI API; n outputs per prompt."""

    prompt: Text | Annotated[list[Text], Field(min_length=1, max_length=MAX_PROMPTS)]
    n: Annotated[int, Field(ge=1, le=8)] = 1
    stream_options: StreamOptions | None = None

    @property
    def prompts(self) -> list[str]:
        """All prompts, one or several."""
        return [self.prompt] if isinstance(self.prompt, str) else self.prompt


class Fill(Generation):
    """The body of /v1/fill: a text with blanks, <extra_id_0> and so on."""

    text: Text


class Route(_Body):
    """The body of /v1/route.

    output: None: the greedy output of the model.
    enforce_capacity: drop tokens beyond the capacity, as in training.
    """

    text: Text
    output: Text | None = None
    enforce_capacity: bool = False
    model: Annotated[str, Field(max_length=1024)] | None = None
