"""What is asked of the engine, and what it tells while it works on it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from switchlm.errors import SwitchLMError
from switchlm.generation.sampling import GREEDY, Sampling

Reason = Literal["stop", "length", "deadline", "cancelled", "error"]


class BusyError(SwitchLMError):
    """The queue is full. retry_after: whole seconds after which to try again."""

    def __init__(self, waiting: int, retry_after: int) -> None:
        super().__init__(
            f"The server is busy: {waiting} requests wait already. Try again in {retry_after} s."
        )
        self.retry_after = retry_after


class ClosingError(SwitchLMError):
    """The server is shutting down and takes nothing new."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """ids: the prompt, end token included. limit: of new tokens. stops: texts that end the output.

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
    """A piece of output. reason: why it is the last, None if it is not.

    token: the new one, None where the end brought none. message: what went wrong, for an error.
    """

    piece: str = ""
    token: int | None = None
    reason: Reason | None = None
    message: str = ""


@dataclass(eq=False)
class Ticket:
    """A request on its way. listener: called in the engine's thread with every event.

    unheard: what the listener raised at the last one, which then nobody heard.
    """

    request: Request
    listener: Callable[[Event], None]
    arrived: float
    cancelled: bool = False
    num_tokens: int = 0
    first_token: float | None = None
    unheard: Exception | None = None

    def cancel(self) -> None:
        """Nobody wants it any more: its slot is free after the step that is running."""
        self.cancelled = True
