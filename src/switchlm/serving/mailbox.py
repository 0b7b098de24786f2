"""Bring the engine's events to the event loop: one wake-up for all that a step tells."""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence

from switchlm.serving.engine import Engine
from switchlm.serving.request import Event, Request


class Mailbox:
    """Carries events from the engine's thread into a loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._letters: deque[tuple[asyncio.Queue[tuple[int, Event]], int, Event]] = deque()
        self._called = False

    def post(self, queue: "asyncio.Queue[tuple[int, Event]]", number: int, event: Event) -> None:
        """Put (number, event) into the queue, soon."""
        self._letters.append((queue, number, event))
        if not self._called:
            self._called = True
            self._loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        self._called = False
        while self._letters:
            queue, number, event = self._letters.popleft()
            queue.put_nowait((number, event))


async def events(
    engine: Engine, mailbox: Mailbox, requests: Sequence[Request]
) -> AsyncGenerator[tuple[int, Event], None]:
    """Yield (number of the request, event) until all have ended.

    All requests are queued, or none: raises BusyError or ClosingError before the first event.
    Whoever stops listening cancels what is left.
    """
    queue: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()

    def listener(number: int) -> Callable[[Event], None]:
        return lambda event: mailbox.post(queue, number, event)

    tickets = engine.submit_all(requests, [listener(place) for place in range(len(requests))])
    left = len(requests)
    try:
        while left:
            number, event = await queue.get()
            left -= event.reason is not None
            yield number, event
    finally:
        for ticket in tickets:
            ticket.cancel()
