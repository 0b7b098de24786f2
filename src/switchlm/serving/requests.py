"""The bodies of requests, and what the engine is asked for and tells while it works on it.

Every field has its type and bounds, and there are no others.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from switchlm.errors import SwitchLMError
from switchlm.generation.sampling import GREEDY, Sampling

Reason = Literal["stop", "length", "deadline", "cancelled", "error"]


class BusyError(SwitchLMError):
    """The queue is full.

    retry_after: whole seconds after which to try again.
    """

    def __init__(self, waiting: int, retry_after: int) -> None:
        super().__init__(
            f"The server is busy: {waiting} requests wait already. Try again in {retry_after} s."
        )
        self.retry_after = retry_after


class ClosingError(SwitchLMError):
    """The server is shutting down and takes nothing new."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """ids: the prompt, end token included.
    limit: of new tokens.
    stops: texts that end the output.

    seconds: how long it may take, waiting included; None for ever.
    """

    ids: tuple[int, ...]
    limit: int
    sampling: Sampling = GREEDY
    seed: int = 0
    stops: tuple[str, ...] = ()
    seconds: float | None = None


@dataclass(frozen=True, kw_only=True)
class Event:
    """A piece of output.

    reason: why it is the last, None if it is not.

    token: the new one, None where the end brought none.
    message: what went wrong, for an error.
    """

    piece: str = ""
    token: int | None = None
    reason: Reason | None = None
    message: str = ""


@dataclass(eq=False)
class PendingRequest:
    """A request on its way.

    listener: called in the engine's thread with every event.
    """

    request: Request
    listener: Callable[[Event], None]
    arrived: float
    cancelled: bool = False
    num_tokens: int = 0
    first_token: float | None = None

    def cancel(self) -> None:
        """Nobody wants it any more: its slot is free after the step that is running."""
        self.cancelled = True


MOST_CHARACTERS = 2**18  # of any text; the engine's own limit in tokens comes after it
MOST_PROMPTS = 32
LARGEST_SEED = 2**63 - 1


def _encodable(text: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError("the text holds half a surrogate pair, which is no character") from None
    return text


Text = Annotated[str, Field(max_length=MOST_CHARACTERS), AfterValidator(_encodable)]
Stop = Annotated[str, Field(min_length=1, max_length=256), AfterValidator(_encodable)]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Generation(_Body):
    """What both ways of generating take. Greedy unless a temperature is given.

    seed: with a temperature and no seed, every request draws anew.
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
        """The stop strings, none to all of them."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


class StreamOptions(_Body):
    """include_usage: end a stream with the number of tokens."""

    include_usage: bool = False


class Completion(Generation):
    """The body of /v1/completions, as the OpenAI API has it; n outputs for every prompt."""

    prompt: Text | Annotated[list[Text], Field(min_length=1, max_length=MOST_PROMPTS)]
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

    output: None takes the model's own greedy one.

    enforce_capacity: drop tokens as in training, instead of serving all as the server does.
    """

    text: Text
    output: Text | None = None
    enforce_capacity: bool = False
    model: Annotated[str, Field(max_length=1024)] | None = None
