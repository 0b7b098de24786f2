"""One thread that owns the model: continuous batching (Yu et al. 2022, Orca).

Requests wait in a bounded queue, first come first served. Between two decoding steps those that fit
are encoded, together, and take free slots; those that are done, cancelled or out of time free
theirs. An error belongs to the request that caused it: what fails in a batch is tried again one by
one, and only what fails alone is given up. Events reach the server's event loop with one wake-up
per step.
"""

import asyncio
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from typing import TypeVar

from torch import Tensor

from switchlm.data.text.tokenizer import Tokenizer
from switchlm.generation.decode import evaluation_mode
from switchlm.generation.slots import Slots
from switchlm.generation.text_stream import TextStream
from switchlm.model.transformer import SwitchTransformer
from switchlm.serving.requests import (
    BusyError,
    ClosingError,
    Event,
    PendingRequest,
    Reason,
    Request,
)
from switchlm.serving.statistics import Statistics

Result = TypeVar("Result")
Listener = Callable[[Event], None]
MOST_ENCODED = 8192  # tokens, padding included, encoded between two steps


class Engine:
    """Generates for many at once; its public methods may be called from any thread.

    num_slots: how many outputs grow side by side.
    max_source, max_target: the longest prompt and output, in tokens.
    queue: how many requests may wait.
    """

    def __init__(
        self,
        model: SwitchTransformer,
        tokenizer: Tokenizer,
        *,
        num_slots: int = 32,
        max_source: int = 1024,
        max_target: int = 512,
        queue: int = 256,
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.max_source, self.max_target = max_source, max_target
        self.num_slots, self.queue = num_slots, queue
        self.statistics = Statistics()
        self._waiting: deque[PendingRequest] = deque()
        self._calls: deque[Callable[[], None]] = deque()
        self._changed = threading.Condition()
        self._closing = False
        self._streams: dict[PendingRequest, TextStream] = {}
        self._joining = 0  # neither in the queue any more nor in a slot yet
        self._thread = threading.Thread(target=self._run, name="switchlm-engine", daemon=True)
        self._started: Future[None] = Future()

    def start(self) -> None:
        """Take the memory of all slots and begin; what goes wrong there is raised here."""
        self._thread.start()
        self._started.result()

    def submit(self, request: Request, listener: Listener) -> PendingRequest:
        """Queue a request. Raises BusyError when the queue is full, ClosingError after `close`."""
        return self.submit_all([request], [listener])[0]

    def submit_all(
        self, requests: Sequence[Request], listeners: Sequence[Listener]
    ) -> list[PendingRequest]:
        """Queue all of these, or none; raises as `submit` does."""
        now = time.monotonic()
        submitted = []
        for request, listener in zip(requests, listeners, strict=True):
            assert 0 < len(request.ids) <= self.max_source, "prompts are bounded before they come"
            assert 0 < request.limit <= self.max_target, "limits are bounded before they come"
            submitted.append(PendingRequest(request, listener, now))
        with self._changed:
            try:
                self._check_room(len(self._waiting), len(submitted))
            except BusyError:
                for _ in submitted:
                    self.statistics.finished("refused")
                raise
            self._waiting.extend(submitted)
            self._changed.notify()
        return submitted

    def call(self, function: Callable[[], Result]) -> "Future[Result]":
        """Run something with the model between two steps, in the engine's thread."""
        future: Future[Result] = Future()

        def run() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(function())
            except Exception as error:
                future.set_exception(error)

        with self._changed:
            self._check_room(len(self._calls), 1)
            self._calls.append(run)
            self._changed.notify()
        return future

    def _check_room(self, waiting: int, more: int) -> None:
        if self._closing:
            raise ClosingError
        if waiting + more > self.queue:
            raise BusyError(waiting, self.statistics.seconds_for(waiting, self.num_slots))

    def close(self, seconds: float | None = None) -> None:
        """Take nothing new, finish what was accepted, and end; wait for that."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(seconds)

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_active(self) -> int:
        return len(self._streams) + self._joining

    # What follows runs in the engine's own thread.

    def _run(self) -> None:
        try:
            with evaluation_mode(self.model, drop=False):
                slots = Slots(
                    self.model,
                    num_slots=self.num_slots,
                    max_source=self.max_source,
                    max_target=self.max_target,
                )
        except BaseException as error:
            self._started.set_exception(error)
            return
        self._started.set_result(None)
        try:
            while self._wait_for_work(slots):
                if self._calls:  # one at a time, so that decoding goes on between many
                    self._calls.popleft()()
                with evaluation_mode(self.model, drop=False):
                    self._advance(slots)
                    while not self._calls and (slots.requests or self._waiting):
                        self._advance(slots)
        finally:
            self._abandon(slots)

    def _abandon(self, slots: Slots) -> None:
        """Let nobody wait for ever, should this thread end by a mistake of its own."""
        with self._changed:
            self._closing = True
            left = [*slots.requests, *self._waiting]
            self._waiting.clear()
        while self._calls:
            self._calls.popleft()()
        for pending in left:
            self._fail(pending, RuntimeError("the engine has ended"))

    def _wait_for_work(self, slots: Slots) -> bool:
        """Return False when all is done and nothing more will come."""
        with self._changed:
            while not (slots.requests or self._waiting or self._calls):
                if self._closing:
                    return False
                self._changed.wait()
        return True

    def _advance(self, slots: Slots) -> None:
        self._sweep(slots)
        self._admit(slots)
        if slots.requests:
            self._step(slots)

    def _sweep(self, slots: Slots) -> None:
        """Let go of what nobody waits for any more, in slots and in the queue."""
        now = time.monotonic()
        for row in reversed(range(len(slots.requests))):
            reason = _given_up(slots.requests[row], now)
            if reason:
                self._leave(slots, row, reason)
        with self._changed:
            reasons = {pending: _given_up(pending, now) for pending in self._waiting}
        gone = {pending: reason for pending, reason in reasons.items() if reason}
        for pending, reason in gone.items():  # counted first: an empty queue has all counts
            self._finish(pending, reason)
        with self._changed:
            for pending in gone:
                self._waiting.remove(pending)

    def _admit(self, slots: Slots) -> None:
        """Encode the next requests and give them free slots."""
        new: list[PendingRequest] = []
        with self._changed:
            longest = 0
            while self._waiting and len(new) < slots.num_free:
                longest = max(longest, len(self._waiting[0].request.ids))
                if new and longest * (len(new) + 1) > MOST_ENCODED:
                    break
                self._joining += 1
                new.append(self._waiting.popleft())
        if not new:
            return
        for pending, encoded_SD in zip(new, self._encoded(slots, new), strict=True):
            if isinstance(encoded_SD, Exception):
                self._fail(pending, encoded_SD)
            else:
                self._join(slots, pending, encoded_SD)
            self._joining -= 1

    def _join(self, slots: Slots, pending: PendingRequest, encoded_SD: Tensor) -> None:
        request = pending.request
        try:
            stream = TextStream(self.tokenizer, request.stops)
            slots.add(
                pending,
                encoded_SD,
                sampling=request.sampling,
                seed=request.seed,
                limit=request.limit,
            )
        except Exception as error:
            self._fail(pending, error)
            return
        self._streams[pending] = stream

    def _encoded(
        self, slots: Slots, submitted: Sequence[PendingRequest]
    ) -> list[Tensor | Exception]:
        try:
            return [*slots.encode([pending.request.ids for pending in submitted])]
        except Exception as error:
            if len(submitted) == 1:
                return [error]
        return [one for pending in submitted for one in self._encoded(slots, [pending])]

    def _step(self, slots: Slots) -> None:
        """Add a token to every row, and tell of it."""
        begin = time.monotonic()
        tokens = self._tokens(slots, 0, len(slots.requests))
        now = time.monotonic()
        self.statistics.stepped(len(tokens), now - begin)
        # From the last row on, since a row that leaves is replaced by the last.
        for row in reversed(range(len(tokens))):
            pending, token = slots.requests[row], tokens[row]
            if isinstance(token, Exception):
                slots.remove(row)
                self._fail(pending, token)
                continue
            if pending.first_token is None:
                pending.first_token = now
                self.statistics.began(now - pending.arrived)
            pending.num_tokens += 1
            try:
                self._tell(slots, row, pending, token)
            except Exception as error:
                slots.remove(row)
                self._fail(pending, error)

    def _tokens(self, slots: Slots, first: int, last: int) -> list[int | Exception]:
        """Return the next token of those rows, or what went wrong with a row alone."""
        try:
            damaged = ValueError("the model's output is not finite")
            return [damaged if token is None else token for token in slots.step(first, last)]
        except Exception as error:
            if last - first == 1:
                return [error]
        return [one for row in range(first, last) for one in self._tokens(slots, row, row + 1)]

    def _tell(self, slots: Slots, row: int, pending: PendingRequest, token: int) -> None:
        stream = self._streams[pending]
        piece = stream.push(token)
        if token == self.model.config.end_id or stream.stopped:
            self._leave(slots, row, "stop", piece, token)
        elif pending.num_tokens == pending.request.limit:
            self._leave(slots, row, "length", piece, token)
        else:
            pending.listener(Event(piece=piece, token=token))

    def _leave(
        self, slots: Slots, row: int, reason: Reason, piece: str = "", token: int | None = None
    ) -> None:
        pending = slots.requests[row]
        slots.remove(row)
        try:
            rest = self._streams[pending].finish()
        except Exception as error:
            self._fail(pending, error)
        else:
            self._finish(pending, reason, piece + rest, token)

    def _fail(self, pending: PendingRequest, error: Exception) -> None:
        message = " ".join(f"{type(error).__name__}: {error}".split())
        self._finish(pending, "error", message=message)

    def _finish(
        self,
        pending: PendingRequest,
        reason: Reason,
        piece: str = "",
        token: int | None = None,
        message: str = "",
    ) -> None:
        self.statistics.finished(
            reason, time.monotonic() - pending.arrived, len(pending.request.ids), pending.num_tokens
        )
        self._streams.pop(pending, None)
        # The client is gone, its event loop closed: nobody is left to be told.
        with suppress(Exception):
            pending.listener(Event(piece=piece, token=token, reason=reason, message=message))


def _given_up(pending: PendingRequest, now: float) -> Reason | None:
    """Return why a request is not wanted any more, None if it is."""
    if pending.cancelled:
        return "cancelled"
    seconds = pending.request.seconds
    if seconds is not None and now - pending.arrived > seconds:
        return "deadline"
    return None


class EventBridge:
    """Carries events from the engine's thread into a loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._events: deque[tuple[asyncio.Queue[tuple[int, Event]], int, Event]] = deque()
        self._called = False

    def put(self, queue: "asyncio.Queue[tuple[int, Event]]", number: int, event: Event) -> None:
        """Put (number, event) into the queue, soon."""
        self._events.append((queue, number, event))
        if not self._called:
            self._called = True
            self._loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        self._called = False
        while self._events:
            queue, number, event = self._events.popleft()
            queue.put_nowait((number, event))


async def events(
    engine: Engine, bridge: EventBridge, requests: Sequence[Request]
) -> AsyncGenerator[tuple[int, Event], None]:
    """Yield (number of the request, event) until all have ended.

    All requests are queued, or none: raises BusyError or ClosingError before the first event.
    Whoever stops listening cancels what is left.
    """
    queue: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()

    def listener(number: int) -> Callable[[Event], None]:
        return lambda event: bridge.put(queue, number, event)

    submitted = engine.submit_all(requests, [listener(place) for place in range(len(requests))])
    left = len(requests)
    try:
        while left:
            number, event = await queue.get()
            left -= event.reason is not None
            yield number, event
    finally:
        for pending in submitted:
            pending.cancel()
