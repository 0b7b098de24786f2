"""Continuous batching (Yu et al. 2022, Orca) in one thread, which owns the model.

Requests wait in a bounded queue, first come, first served. Between two decoding steps, the next
requests are encoded together and added to free slots; finished, cancelled and overdue ones are
removed. If a batch fails, its requests are repeated one by one, and only those that fail alone end
with an error. Events wake the server's event loop once per step.

Failures of requests are caught as BaseException: a panic of a library in Rust is no Exception.
"""

import asyncio
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from typing import Any, TypeVar

from torch import Tensor

from switchlm.data.text.tokenizer import Tokenizer
from switchlm.errors import CheckpointError
from switchlm.generation.decode import NOT_FINITE, evaluation_mode
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
    as_exception,
)
from switchlm.serving.statistics import Statistics

Result = TypeVar("Result")
Listener = Callable[[Event], None]
MAX_ENCODED = 8192  # tokens, padding included, encoded between two steps


class Engine:
    """Generates for many requests at a time; public methods may be called from any thread.

    num_slots: the rows of the decoding batch.
    skip_special: leave special tokens, such as sentinels, out of the texts.
    max_source, max_target: the longest prompt and output, in tokens.
    queue: how many requests may wait.
    ended: done when the thread has ended, with the error that ended it, if one did.
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
        skip_special: bool = False,
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.writer = tokenizer.without_special() if skip_special else tokenizer
        self.max_source, self.max_target = max_source, max_target
        self.num_slots, self.queue = num_slots, queue
        self.statistics = Statistics()
        self._waiting: deque[PendingRequest] = deque()
        self._calls: deque[tuple[Future[Any], Callable[[], Any]]] = deque()
        self._changed = threading.Condition()
        self._closing = False
        self._streams: dict[PendingRequest, TextStream] = {}
        self._joining: list[PendingRequest] = []  # between queue and slot
        self._thread = threading.Thread(target=self._run, name="switchlm-engine", daemon=True)
        self._started: Future[None] = Future()
        self.ended: Future[None] = Future()

    def start(self) -> None:
        """Start the thread and allocate all slots; raises an error of the allocation."""
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
            assert 0 < len(request.ids) <= self.max_source, "the prompt is too long"
            assert 0 < request.limit <= self.max_target, "the limit is too large"
            submitted.append(PendingRequest(request, listener, now))
        with self._changed:
            try:
                self._check_queue(len(self._waiting), len(submitted))
            except BusyError:
                for _ in submitted:
                    self.statistics.count_request("refused")
                raise
            self._waiting.extend(submitted)
            self._changed.notify()
        return submitted

    def call(self, function: Callable[[], Result]) -> "Future[Result]":
        """Run a function between two steps, in the engine's thread."""
        future: Future[Result] = Future()
        with self._changed:
            self._check_queue(len(self._calls), 1)
            self._calls.append((future, function))
            self._changed.notify()
        return future

    def _check_queue(self, waiting: int, more: int) -> None:
        if self._closing:
            raise ClosingError
        if waiting + more > self.queue:
            raise BusyError(waiting, self.statistics.seconds_for(waiting, self.num_slots))

    def close(self, seconds: float | None = None) -> None:
        """Refuse new requests, finish the accepted ones, and join the thread."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(seconds)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_active(self) -> int:
        return len(self._streams) + len(self._joining)

    # All methods below run in the engine's thread.

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
            self._serve(slots)
        except BaseException as error:
            self._fail_all(slots)
            self.ended.set_exception(error)
        else:
            self._fail_all(slots)
            self.ended.set_result(None)

    def _serve(self, slots: Slots) -> None:
        while self._wait_for_work(slots):
            self._run_call()  # one at a time, between decoding steps
            with evaluation_mode(self.model, drop=False):
                self._advance(slots)
                while not self._calls and (slots.requests or self._waiting):
                    self._advance(slots)

    def _run_call(self) -> None:
        """Run the next call that is not cancelled."""
        while self._calls:
            future, function = self._calls.popleft()
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(function())
                except BaseException as error:
                    future.set_exception(as_exception(error))
                return

    def _fail_all(self, slots: Slots) -> None:
        """Fail the requests and calls that are left if this thread ends with an error."""
        error = RuntimeError("the engine has ended")
        with self._changed:
            self._closing = True
            unfinished = [*slots.requests, *self._joining, *self._waiting]
            self._joining.clear()
            self._waiting.clear()
        while self._calls:
            future, _ = self._calls.popleft()
            if future.set_running_or_notify_cancel():
                future.set_exception(error)
        for pending in unfinished:
            self._fail(pending, error)

    def _wait_for_work(self, slots: Slots) -> bool:
        """Return False when all requests are finished and the engine is closing."""
        with self._changed:
            while not (slots.requests or self._waiting or self._calls):
                if self._closing:
                    return False
                self._changed.wait()
        return True

    def _advance(self, slots: Slots) -> None:
        self._remove_aborted(slots)
        self._admit(slots)
        if slots.requests:
            self._step(slots)

    def _remove_aborted(self, slots: Slots) -> None:
        """Remove cancelled and overdue requests from slots and queue."""
        now = time.monotonic()
        for row in reversed(range(len(slots.requests))):
            reason = _abort_reason(slots.requests[row], now)
            if reason:
                self._end(slots, row, reason)
        with self._changed:
            reasons = {pending: _abort_reason(pending, now) for pending in self._waiting}
        aborted = {pending: reason for pending, reason in reasons.items() if reason}
        for (
            pending,
            reason,
        ) in aborted.items():  # before the queue is empty, so that its counts are complete
            self._finish(pending, reason)
        with self._changed:
            for pending in aborted:
                self._waiting.remove(pending)

    def _admit(self, slots: Slots) -> None:
        """Encode the next requests and add them to free slots."""
        with self._changed:
            longest, new = 0, self._joining
            while self._waiting and len(new) < slots.num_free:
                longest = max(longest, len(self._waiting[0].request.ids))
                if new and longest * (len(new) + 1) > MAX_ENCODED:
                    break
                new.append(self._waiting.popleft())
        for pending, encoded_SD in zip([*new], self._encoded(slots, new), strict=True):
            if isinstance(encoded_SD, BaseException):
                self._fail(pending, encoded_SD)
            else:
                self._add(slots, pending, encoded_SD)
            new.remove(pending)

    def _add(self, slots: Slots, pending: PendingRequest, encoded_SD: Tensor) -> None:
        request = pending.request
        try:
            stream = TextStream(self.writer, request.stops)
            slots.add(
                pending,
                encoded_SD,
                sampling=request.sampling,
                seed=request.seed,
                limit=request.limit,
            )
        except BaseException as error:
            self._fail(pending, error)
            return
        self._streams[pending] = stream

    def _encoded(
        self, slots: Slots, submitted: Sequence[PendingRequest]
    ) -> list[Tensor | BaseException]:
        given = [pending.request.encoded_SD for pending in submitted]
        rest = [pending.request.ids for pending in submitted if pending.request.encoded_SD is None]
        try:
            new = iter(slots.encode(rest) if rest else [])
            return [next(new) if encoded_SD is None else encoded_SD for encoded_SD in given]
        except BaseException as error:
            if len(submitted) == 1:
                return [error]
        return [one for pending in submitted for one in self._encoded(slots, [pending])]

    def _step(self, slots: Slots) -> None:
        """Add a token to every row, and emit its event."""
        begin = time.monotonic()
        tokens = self._tokens(slots, 0, len(slots.requests))
        now = time.monotonic()
        self.statistics.count_step(len(tokens), now - begin)
        # From the last row on: a row that is removed is replaced by the last.
        for row in reversed(range(len(tokens))):
            pending, token = slots.requests[row], tokens[row]
            if isinstance(token, BaseException):
                slots.remove(row)
                self._fail(pending, token)
                continue
            if pending.first_token is None:
                pending.first_token = now
                self.statistics.count_first_token(now - pending.received)
            pending.num_tokens += 1
            try:
                self._emit(slots, row, pending, token)
            except BaseException as error:
                slots.remove(row)
                self._fail(pending, error)

    def _tokens(self, slots: Slots, first: int, last: int) -> list[int | BaseException]:
        """Return the next token of rows `first` to before `last`, or the error of a row."""
        try:
            damaged = CheckpointError(NOT_FINITE)
            return [damaged if token is None else token for token in slots.step(first, last)]
        except BaseException as error:
            if last - first == 1:
                return [error]
        return [one for row in range(first, last) for one in self._tokens(slots, row, row + 1)]

    def _emit(self, slots: Slots, row: int, pending: PendingRequest, token: int) -> None:
        stream = self._streams[pending]
        ended = token in self.model.config.end_ids
        piece = "" if ended else stream.push(token)
        if ended or stream.stopped:
            self._end(slots, row, "stop", piece, token)
        elif pending.num_tokens == pending.request.limit:
            self._end(slots, row, "length", piece, token)
        else:
            pending.listener(Event(piece=piece, token=token))

    def _end(
        self, slots: Slots, row: int, reason: Reason, piece: str = "", token: int | None = None
    ) -> None:
        pending = slots.requests[row]
        slots.remove(row)
        try:
            rest = self._streams[pending].finish()
        except BaseException as error:
            self._fail(pending, error)
        else:
            self._finish(pending, reason, piece + rest, token)

    def _fail(self, pending: PendingRequest, error: BaseException) -> None:
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
        self.statistics.count_request(
            reason,
            time.monotonic() - pending.received,
            len(pending.request.ids),
            pending.num_tokens,
        )
        self._streams.pop(pending, None)
        # The event loop of a disconnected client may be closed.
        with suppress(Exception):
            pending.listener(Event(piece=piece, token=token, reason=reason, message=message))


def _abort_reason(pending: PendingRequest, now: float) -> Reason | None:
    """Return why a request is aborted; None: it is not."""
    if pending.cancelled:
        return "cancelled"
    seconds = pending.request.seconds
    if seconds is not None and now - pending.received > seconds:
        return "deadline"
    return None


class EventBridge:
    """Passes events from the engine's thread to an event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._events: deque[tuple[asyncio.Queue[tuple[int, Event]], int, Event]] = deque()
        self._called = False

    def put(self, queue: "asyncio.Queue[tuple[int, Event]]", number: int, event: Event) -> None:
        """Schedule the loop to put (number, event) into the queue."""
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
    """Yield (index of the request, event) until all have ended.

    All requests are queued, or none: raises BusyError or ClosingError before the first event.
    Closing the generator cancels unfinished requests.
    """
    queue: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()

    def listener(number: int) -> Callable[[Event], None]:
        return lambda event: bridge.put(queue, number, event)

    submitted = engine.submit_all(requests, [listener(place) for place in range(len(requests))])
    unfinished = len(requests)
    try:
        while unfinished:
            number, event = await queue.get()
            unfinished -= event.reason is not None
            yield number, event
    finally:
        for pending in submitted:
            pending.cancel()
