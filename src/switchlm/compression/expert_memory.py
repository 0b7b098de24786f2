"""The experts in memory: a cache of those used last, within a budget of bytes.

A layer acquires all experts that it needs at once (`acquire`), and computes with each when it is
ready. Missing ones are read by threads, in the order of the files, while the layer computes.
Experts that are predicted to be needed (`prefetch`) are read when no other reads are pending.

An expert in use is never evicted; of the others the least recently used is evicted first. There is
no deadlock: readers wait for memory only while all experts in memory are in use, and every layer
can take those that are ready in any order and then releases them.
"""

import threading
import time
from collections import OrderedDict, deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor

from switchlm.compression.expert_files import ExpertFiles, Recipe, new_buffer
from switchlm.errors import CheckpointError, ConfigError

READERS = 2
PATIENCE = 1.0  # seconds without anything to read after which a reader ends

Key = tuple[str, int]  # the name of a layer, and the number of an expert
Tensors = Mapping[str, Tensor]


@dataclass
class Counters:
    """Statistics, in experts; an expert counts each time that a layer acquires it.

    hits: already in memory.
    foreseen: hits that were prefetched and not used before.
    misses: not in memory, or still being read.
    guesses: experts that were not in memory and predicted to be needed.
    wrong_guesses: of those, not needed.
    bytes_read: from the files.
    bytes_held: by experts now.
    waited: seconds that layers waited for experts.
    """

    hits: int = 0
    foreseen: int = 0
    misses: int = 0
    guesses: int = 0
    wrong_guesses: int = 0
    experts_read: int = 0
    bytes_read: int = 0
    bytes_held: int = 0
    most_bytes_held: int = 0
    waited: float = 0.0

    @property
    def hit_rate(self) -> float:
        """The fraction of acquired experts that were in memory."""
        return self.hits / max(self.hits + self.misses, 1)


@dataclass(eq=False)
class _Entry:
    """An expert that is in memory or being read.

    users: the number of layers that have acquired it.
    buffer: None until a reader begins.
    """

    key: Key
    users: int = 0
    predicted: bool = False
    buffer: Tensor | None = None
    tensors: Tensors | None = None
    error: BaseException | None = None

    @property
    def is_done(self) -> bool:
        return self.tensors is not None or self.error is not None


class ExpertMemory:
    """All experts of a model, of which those used last are in memory; thread-safe.

    recipes: how to read each.
    budget: bytes of all experts in memory, and of the readers' buffers for conversion.

    Raises ConfigError for a budget smaller than the largest expert.
    """

    def __init__(
        self, recipes: Mapping[Key, Recipe], files: ExpertFiles, budget: int, readers: int = READERS
    ) -> None:
        self.counters = Counters()
        self.budget = budget
        self._recipes = recipes
        self._files = files
        self._readers = readers
        self._running = 0
        self._changed = threading.Condition()
        self._entries: OrderedDict[Key, _Entry] = OrderedDict()  # in the order of last use
        self._needed: deque[_Entry] = deque()
        self._predicted: deque[_Entry] = deque()
        self._free: dict[int, list[Tensor]] = {}  # by size
        self._predictions: dict[str, set[Key]] = {}  # by layer, not in memory when predicted
        largest = max((recipe.num_bytes() for recipe in recipes.values()), default=0)
        staging = readers * max((recipe.stage_bytes() for recipe in recipes.values()), default=0)
        if budget < largest + staging:
            raise ConfigError(
                f"The memory for experts is {budget:,} bytes, but one expert takes {largest:,}"
                + (f" and reading it {staging:,}" if staging else "")
                + f". Give at least {largest + staging:,}; with memory for more than all that a "
                "layer uses at a time, fewer are read twice."
            )
        self._bytes_for_experts = budget - staging

    def prepare(self) -> None:
        """Allocate the memory of experts now instead of while computing."""
        left = self._bytes_for_experts
        for recipe in self._recipes.values():
            size = recipe.num_bytes()
            left -= size
            if left < 0:
                return
            self._free.setdefault(size, []).append(new_buffer(size).zero_())

    @contextmanager
    def acquire(self, keys: Sequence[Key]) -> Iterator[Iterator[tuple[Key, Tensors]]]:
        """Yield an iterator over (key, tensors), in the order in which they are ready.

        Those in memory come first, then the others as they are read, in the order of the files. The
        tensors are valid until the next item: then their memory may hold another expert.
        """
        order = sorted(set(keys), key=lambda key: self._recipes[key].place())
        with self._changed:
            left = [self._acquire(key) for key in order]
            self._count_wrong_predictions(set(order))
            self._start_readers()
        try:
            yield self._take(left)
        finally:
            with self._changed:
                for entry in left:
                    self._release(entry)

    def prefetch(self, layer: str, experts: Sequence[int]) -> None:
        """Read these experts, in this order, when no other reads are pending.

        Earlier predictions that are not yet being read are cancelled. Prefetched experts take at
        most half of the memory, and do not evict others whose layer has not run since.
        """
        with self._changed:
            self._cancel_prefetch()
            expected = set()
            left = self._bytes_for_experts // 2
            for key in ((layer, expert) for expert in experts):
                if key not in self._entries:
                    left -= self._recipes[key].num_bytes()
                    if left < 0:
                        break
                    entry = self._entries[key] = _Entry(key, predicted=True)
                    self._predicted.append(entry)
                    expected.add(key)
            self._predictions[layer] = expected
            self.counters.guesses += len(expected)
            self._start_readers()

    def close(self) -> None:
        """Wait for pending reads, and close the files."""
        with self._changed:
            self._cancel_prefetch()
            self._readers = 0
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._running)
        self._files.close()

    def _take(self, left: list[_Entry]) -> Iterator[tuple[Key, Tensors]]:
        """Yield the entries of `left` as they are ready, and remove them from it."""
        while left:
            with self._changed:
                start = time.perf_counter()
                self._changed.wait_for(lambda: any(one.is_done for one in left))
                self.counters.waited += time.perf_counter() - start
                entry = next(one for one in left if one.is_done)
                if entry.error is not None:
                    raise entry.error
                assert entry.tensors is not None
            try:
                yield entry.key, entry.tensors
            finally:
                with self._changed:
                    left.remove(entry)
                    self._release(entry)

    def _acquire(self, key: Key) -> _Entry:
        entry = self._entries.get(key)
        if entry is None:
            entry = self._entries[key] = _Entry(key)
            self._needed.append(entry)
        elif entry in self._predicted:
            self._predicted.remove(entry)
            self._needed.append(entry)
        if entry.tensors is None:
            self.counters.misses += 1
        else:
            self.counters.hits += 1
            self.counters.foreseen += entry.predicted
        entry.predicted = False
        entry.users += 1
        self._entries.move_to_end(key)
        return entry

    def _count_wrong_predictions(self, wanted: set[Key]) -> None:
        """Count the wrong predictions for a layer, and make them the first to be evicted."""
        for layer in {layer for layer, _ in wanted}:
            for key in self._predictions.pop(layer, set()).difference(wanted):
                self.counters.wrong_guesses += 1
                entry = self._entries.get(key)
                if entry is not None and entry in self._predicted:
                    self._predicted.remove(entry)
                    self._remove(entry)
                elif entry is not None:
                    entry.predicted = False
                    self._entries.move_to_end(key, last=False)

    def _release(self, entry: _Entry) -> None:
        entry.users -= 1
        if not entry.users:
            if entry.buffer is None:  # not read, and no longer needed
                if entry in self._needed:
                    self._needed.remove(entry)
                self._remove(entry)
            self._changed.notify_all()

    def _remove(self, entry: _Entry) -> None:
        if self._entries.get(entry.key) is entry:
            del self._entries[entry.key]

    def _cancel_prefetch(self) -> None:
        while self._predicted:
            self._remove(self._predicted.popleft())

    def _start_readers(self) -> None:
        """Start readers for the pending reads."""
        while self._running < min(self._readers, len(self._needed) + len(self._predicted)):
            self._running += 1
            threading.Thread(target=self._run, name="switchlm-expert-reader", daemon=True).start()
        self._changed.notify_all()

    def _run(self) -> None:
        """Read what is needed, then what is predicted, until nothing is pending for `PATIENCE`."""
        for entry in iter(self._wait_for_work, None):
            self._read(entry)

    def _wait_for_work(self) -> _Entry | None:
        """Wait for what to read next; None ends the reader, which is no longer counted.

        That is decided under the lock, so that a later `acquire` starts another reader.
        """
        with self._changed:
            entry = self._next()
            while entry is None:
                in_time = self._changed.wait(PATIENCE)
                idle = not (self._needed or self._predicted)
                if not self._readers or (idle and not in_time):
                    self._running -= 1
                    self._changed.notify_all()
                    return None
                entry = self._next()
            return entry

    def _next(self) -> _Entry | None:
        """Return what to read next, with memory for it; None if there is none of either."""
        queue = self._needed or self._predicted
        if not queue:
            return None
        entry = queue[0]
        entry.buffer = self._make_buffer(self._recipes[entry.key].num_bytes(), entry.predicted)
        if entry.buffer is not None:
            queue.popleft()
            return entry
        if entry.predicted:
            self._cancel_prefetch()
        return None

    def _make_buffer(self, size: int, for_prefetch: bool) -> Tensor | None:
        """Return memory of that size; evict the least recently used experts if needed."""
        counters = self.counters
        while counters.bytes_held + size > self._bytes_for_experts:
            for victim in self._entries.values():
                idle = not victim.users and victim.tensors is not None
                if idle and not (for_prefetch and victim.predicted):
                    break
            else:
                return None
            self._remove(victim)
            assert victim.buffer is not None
            buffer, victim.buffer, victim.tensors = victim.buffer, None, None
            if buffer.numel() == size:
                return buffer
            counters.bytes_held -= buffer.numel()
        counters.bytes_held += size
        counters.most_bytes_held = max(counters.most_bytes_held, counters.bytes_held)
        if self._free.get(size):
            return self._free[size].pop()
        self._free.clear()  # of other sizes
        return new_buffer(size)

    def _read(self, entry: _Entry) -> None:
        recipe = self._recipes[entry.key]
        assert entry.buffer is not None
        try:
            self._files.read(recipe, entry.buffer)
        except BaseException as error:
            with self._changed:
                self._fail(entry, error)
                if isinstance(error, CheckpointError):
                    return
                self._running -= 1
            raise
        with self._changed:
            entry.tensors = recipe.tensors(entry.buffer)
            self.counters.experts_read += 1
            self.counters.bytes_read += recipe.file_bytes()
            self._changed.notify_all()

    def _fail(self, entry: _Entry, error: BaseException) -> None:
        """Raise the error in all users of an expert; a later `acquire` reads it again."""
        assert entry.buffer is not None
        self.counters.bytes_held -= entry.buffer.numel()
        entry.buffer, entry.error = None, error
        self._remove(entry)
        self._changed.notify_all()
