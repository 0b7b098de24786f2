"""Work on texts outside of the event loop: parsing, tokenizing, decoding, in a few threads.

A text is bounded by its characters before it is tokenized, so a long one costs nothing.
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from switchlm.errors import DataError
from switchlm.generation.decode import check_vocabulary
from switchlm.serving.engine import Engine
from switchlm.serving.requests import BusyError, as_exception

Result = TypeVar("Result")
NUM_THREADS = 2
MAX_WAITING = 512  # requests that wait for a thread, or have one
CHARACTERS_PER_TOKEN = 32  # of a text that is short enough, on average; English has about 4


class Texts:
    """Prepares the texts of requests to an engine."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._threads = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="switchlm-texts")
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

        return await asyncio.get_running_loop().run_in_executor(self._threads, call)

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
        check_vocabulary(max(ids), config.vocabulary_size)
        return ids

    def encode(self, text: str, max_tokens: int) -> tuple[int, ...]:
        """Return the ids of a text; DataError if it is far too long for so many tokens."""
        if len(text) > CHARACTERS_PER_TOKEN * max_tokens:
            raise _too_long(f"{len(text):,} characters", max_tokens - 1)
        return tuple(self._engine.tokenizer.encode(text))


def _too_long(length: str, max_tokens: int) -> DataError:
    return DataError(f"The text has {length}; this server takes at most {max_tokens:,} tokens.")
