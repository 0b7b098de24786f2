"""Requests to the engine, its events, and outputs."""

from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal

from torch import Tensor

from switchlm.errors import SwitchLMError
from switchlm.generation.sampling import GREEDY, Sampling, seeds_from

Reason = Literal["stop", "length", "deadline", "cancelled", "error"]


class RequestError(SwitchLMError):
    """A request that was refused or failed.

    status: of HTTP.
    param: the field of the body at fault, if it is one.
    headers: of the response.
    """

    def __init__(
        self,
        message: str,
        status: int,
        param: str | None = None,
        headers: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.headers = status, param, dict(headers)


class BusyError(RequestError):
    """The queue is full."""

    def __init__(self, waiting: int, retry_after: int) -> None:
        message = f"The server is busy: {waiting} requests are waiting."
        super().__init__(
            f"{message} Try again in {retry_after} s.",
            429,
            headers={"Retry-After": str(retry_after)},
        )


class ClosingError(RequestError):
    """The server is shutting down."""

    def __init__(self) -> None:
        message = "The server is shutting down and takes no new requests."
        super().__init__(message, 503, headers={"Retry-After": "5"})


@dataclass(frozen=True, kw_only=True)
class Request:
    """ids: the prompt, end token included.
    limit: of new tokens.
    stops: texts that end the output.
    seconds: how long it may take, waiting included; None: no limit.
    encoded_SD: the encoder's output for the prompt, if it is computed already.
    """

    ids: tuple[int, ...]
    limit: int
    sampling: Sampling = GREEDY
    seed: int = field(default_factory=lambda: seeds_from(None, 1)[0])
    stops: tuple[str, ...] = ()
    seconds: float | None = None
    encoded_SD: Tensor | None = None


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


def as_exception(error: BaseException) -> Exception:
    """Return an error as an Exception: a panic of a library in Rust is none."""
    if isinstance(error, Exception):
        return error
    return RuntimeError(f"{type(error).__name__}: {error}")


Numbered = AsyncGenerator[tuple[int, Event], None]
LATE = "The request took longer than the server allows."
# Message and HTTP status of the reasons that are failures.
_FAILURES = {
    "error": ("This request failed: {}.", 500),
    "deadline": (LATE, 504),
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
            raise RequestError(message.format(event.message.rstrip(".")), status)


async def collect(events: Numbered, number: int) -> list[Output]:
    """Return the complete outputs of a number of requests; a failure ends all of them."""
    outputs = [Output() for _ in range(number)]
    async with aclosing(events):
        async for place, event in events:
            outputs[place].add(event)
    return outputs
