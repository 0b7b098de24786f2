"""Work on texts outside of the event loop: parsing, tokenizing, decoding, in a few threads.

A text is bounded by its characters before it is tokenized, so a long one costs nothing. A regular
expression of a tokenizer may still take very long, and a thread cannot be ended: another takes its
place. With many such threads the server is no longer healthy, until they are done.
"""

import asyncio
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from switchlm.errors import DataError
from switchlm.generation.decode import check_vocabulary
from switchlm.serving.engine import Engine
from switchlm.serving.requests import BusyError, as_exception

Result = TypeVar("Result")
NUM_THREADS = 2
MAX_WAITING = 512  # requests that wait for a thread, or have one
STUCK_SECONDS = 10.0  # in which the longest text is tokenized a hundred times
MOST_STUCK = 8  # threads
CHARACTERS_PER_TOKEN = 32  # of a text that is short enough, on average; English has about 4


class Texts:
    """Prepares the texts of requests to an engine."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._threads = Threads(NUM_THREADS)
        self._waiting = 0

    async def prepare(self, function: Callable[[], Result]) -> Result:
        """Return `function()`, computed in a thread; BusyError if too many wait for one."""
        if self._waiting >= MAX_WAITING:
            self._engine.statistics.count_request("refused")
            raise BusyError(self._waiting, 1)
        self._waiting += 1
        try:
            return await self.run(function)
        finally:
            self._waiting -= 1

    async def run(self, function: Callable[[], Result]) -> Result:
        """Return `function()`, computed in a thread."""

        def call() -> Result:
            try:
                return function()
            except BaseException as error:
                raise as_exception(error) from None

        future = asyncio.wrap_future(self._threads.submit(call))
        try:
            while not (await asyncio.wait([future], timeout=STUCK_SECONDS / 10))[0]:
                self._threads.replace_stuck()
            return future.result()
        finally:
            future.cancel()  # if nobody waits for it any longer

    @property
    def are_stuck(self) -> bool:
        """Whether so many texts take too long that no thread is left for others."""
        return self._threads.num_stuck > MOST_STUCK

    def prompt(self, prompt: str | tuple[int, ...]) -> tuple[int, ...]:
        """Return the ids of a prompt, of a text or given, with what the tokenizer puts around them.

        Raises DataError for a prompt that is empty or too long, or has ids that are no tokens.
        """
        config, longest = self._engine.model.config, self._engine.max_source
        ids = self.encode(prompt, longest) if isinstance(prompt, str) else prompt
        if not ids or ids == (config.end_id,):
            raise DataError("The text is empty: there is nothing to generate from.")
        if isinstance(prompt, str) or ids[-1] != config.end_id:
            ids = tuple(self._engine.tokenizer.complete(ids, config.end_id))
        if len(ids) > longest:
            raise _too_long(f"{len(ids) - 1:,} tokens", longest - 1)
        if min(ids) < 0:
            raise DataError(f"The prompt has the token id {min(ids)}; ids begin with 0.")
        if not isinstance(prompt, str) and max(ids) >= config.vocabulary_size:
            raise DataError(
                f"The prompt has the token id {max(ids)}; ids of this model end at "
                f"{config.vocabulary_size - 1}."
            )
        check_vocabulary(max(ids), config.vocabulary_size)
        return ids

    def encode(self, text: str, max_tokens: int) -> tuple[int, ...]:
        """Return the ids of a text; DataError if it is far too long for so many tokens."""
        if len(text) > CHARACTERS_PER_TOKEN * max_tokens:
            raise _too_long(f"{len(text):,} characters", max_tokens - 1)
        return tuple(self._engine.tokenizer.encode(text))


class Threads:
    """Calls functions in a number of threads, without those in which a function does not end.

    The threads do not keep the process from ending.
    """

    def __init__(self, number: int) -> None:
        self._calls: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]]] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._began: dict[threading.Thread, float] = {}  # of the threads that call something
        self._stuck: set[threading.Thread] = set()
        for _ in range(number):
            self._start()

    def submit(self, function: Callable[[], Result]) -> "Future[Result]":
        """Return the future of `function()`."""
        future: Future[Result] = Future()
        self._calls.put((future, function))
        return future

    def replace_stuck(self) -> None:
        """Start a thread for each that has been busy for too long, up to MOST_STUCK."""
        with self._lock:
            limit = time.monotonic() - STUCK_SECONDS
            late = [thread for thread, began in self._began.items() if began < limit]
            for thread in late:
                if thread not in self._stuck and len(self._stuck) < MOST_STUCK:
                    self._stuck.add(thread)
                    self._start()

    @property
    def num_stuck(self) -> int:
        """The number of threads that have been busy for too long, replaced or not."""
        limit = time.monotonic() - STUCK_SECONDS
        with self._lock:
            return sum(began < limit for began in self._began.values())

    def _start(self) -> None:
        threading.Thread(target=self._run, name="switchlm-texts", daemon=True).start()

    def _run(self) -> None:
        me = threading.current_thread()
        while True:
            future, function = self._calls.get()
            if not future.set_running_or_notify_cancel():
                continue
            with self._lock:
                self._began[me] = time.monotonic()
            try:
                future.set_result(function())
            except BaseException as error:
                future.set_exception(error)
            with self._lock:
                del self._began[me]
                if me in self._stuck:  # it has been replaced
                    self._stuck.remove(me)
                    return


def _too_long(length: str, max_tokens: int) -> DataError:
    return DataError(f"The text has {length}; this server takes at most {max_tokens:,} tokens.")
