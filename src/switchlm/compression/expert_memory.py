"""The experts that are in memory: the last ones used, within a budget of bytes.

Who needs experts says so for all of them at once (`want`), and takes each as it is ready. Those
that are missing are read by threads of their own, in the order of the files, while others compute.
What is only guessed to be needed (`guess`) is read when there is nothing else to do.

An expert that somebody wants is never evicted, one that is used last is evicted first. No deadlock:
readers wait for memory only while everything in memory is wanted, and of those who want it, each
can take what is ready in any order and then gives it back.
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
    """What happened so far, in experts; an expert counts once each time a layer wants it.

    hits: already in memory.
    foreseen: of those, read because of a guess and not used before.
    misses: had to be read, or were still being read.
    guesses: experts that were not in memory and were guessed to be wanted, of which `wrong_guesses`
        then were not.
    bytes_read: from the files.
    bytes_held: by experts now.
    waited: seconds that computing stood still for want of an expert.
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
        """The share of wanted experts that were in memory."""
        return self.hits / max(self.hits + self.misses, 1)


@dataclass(eq=False)
class _Entry:
    """An expert that is in memory or on its way.

    wanted: by how many.
    buffer: None until a reader begins.
    """

    key: Key
    wanted: int = 0
    guessed: bool = False
    buffer: Tensor | None = None
    tensors: Tensors | None = None
    error: BaseException | None = None

    @property
    def is_done(self) -> bool:
        return self.tensors is not None or self.error is not None


class ExpertMemory:
    """All experts of a model, of which those used last are in memory; for any number of threads.

    recipes: how to read each.
    budget: bytes that all experts in memory may take, and what readers need to convert them.

    Raises ConfigError for a budget that not even the largest expert fits.
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
        self._entries: OrderedDict[Key, _Entry] = OrderedDict()  # the one used last comes last
        self._needed: deque[_Entry] = deque()
        self._guessed: deque[_Entry] = deque()
        self._spare: dict[int, list[Tensor]] = {}  # by size
        self._expected: dict[str, set[Key]] = {}  # by layer, what was not in memory when guessed
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
        """Take the memory that experts will need from the system now, instead of in between."""
        left = self._bytes_for_experts
        for recipe in self._recipes.values():
            size = recipe.num_bytes()
            left -= size
            if left < 0:
                return
            self._spare.setdefault(size, []).append(new_buffer(size).zero_())

    @contextmanager
    def want(self, keys: Sequence[Key]) -> Iterator[Iterator[tuple[Key, Tensors]]]:
        """Yield an iterator over (key, its tensors), as they are ready.

        Those in memory come first, the others as they are read, in the order of the files. A key's
        tensors are valid until the next is taken: then their memory may hold another expert.
        """
        order = sorted(set(keys), key=lambda key: self._recipes[key].place())
        with self._changed:
            left = [self._reserve(key) for key in order]
            self._judge(set(order))
            self._wake()
        try:
            yield self._take(left)
        finally:
            with self._changed:
                for entry in left:
                    self._release(entry)

    def guess(self, layer: str, experts: Sequence[int]) -> None:
        """Read these experts, in this order, when there is nothing better to do.

        What was guessed before and is not yet being read is forgotten. Guesses take at most half of
        the memory, and do not evict other guesses that their layer has not come to.
        """
        with self._changed:
            self._forget_guesses()
            expected = set()
            left = self._bytes_for_experts // 2
            for key in ((layer, expert) for expert in experts):
                if key not in self._entries:
                    left -= self._recipes[key].num_bytes()
                    if left < 0:
                        break
                    entry = self._entries[key] = _Entry(key, guessed=True)
                    self._guessed.append(entry)
                    expected.add(key)
            self._expected[layer] = expected
            self.counters.guesses += len(expected)
            self._wake()

    def close(self) -> None:
        """Wait for what is being read, and close the files."""
        with self._changed:
            self._forget_guesses()
            self._readers = 0
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._running)
        self._files.close()

    def _take(self, left: list[_Entry]) -> Iterator[tuple[Key, Tensors]]:
        """Yield the ready ones of `left`, taking them out, until there are none."""
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

    def _reserve(self, key: Key) -> _Entry:
        entry = self._entries.get(key)
        if entry is None:
            entry = self._entries[key] = _Entry(key)
            self._needed.append(entry)
        elif entry in self._guessed:
            self._guessed.remove(entry)
            self._needed.append(entry)
        if entry.tensors is None:
            self.counters.misses += 1
        else:
            self.counters.hits += 1
            self.counters.foreseen += entry.guessed
        entry.guessed = False
        entry.wanted += 1
        self._entries.move_to_end(key)
        return entry

    def _judge(self, wanted: set[Key]) -> None:
        """Count the guesses about a layer that were wrong, and give up their memory first."""
        for layer in {layer for layer, _ in wanted}:
            for key in self._expected.pop(layer, set()).difference(wanted):
                self.counters.wrong_guesses += 1
                entry = self._entries.get(key)
                if entry is not None and entry in self._guessed:
                    self._guessed.remove(entry)
                    self._forget(entry)
                elif entry is not None:
                    entry.guessed = False
                    self._entries.move_to_end(key, last=False)

    def _release(self, entry: _Entry) -> None:
        entry.wanted -= 1
        if not entry.wanted:
            if entry.buffer is None:  # nobody waits for it any more, nor has it been read
                if entry in self._needed:
                    self._needed.remove(entry)
                self._forget(entry)
            self._changed.notify_all()

    def _forget(self, entry: _Entry) -> None:
        if self._entries.get(entry.key) is entry:
            del self._entries[entry.key]

    def _forget_guesses(self) -> None:
        while self._guessed:
            self._forget(self._guessed.popleft())

    def _wake(self) -> None:
        """See to it that there are readers for what is to be read."""
        while self._running < min(self._readers, len(self._needed) + len(self._guessed)):
            self._running += 1
            threading.Thread(target=self._run, name="switchlm-expert-reader", daemon=True).start()
        self._changed.notify_all()

    def _run(self) -> None:
        """Read what is needed, then what is guessed, until there is nothing for a while."""
        for entry in iter(self._await, None):
            self._read(entry)

    def _await(self) -> _Entry | None:
        """Return what to read next; None after which the reader, no longer counted, ends.

        That is decided under the lock: whoever wants something later then starts another reader.
        """
        with self._changed:
            entry = self._next()
            while entry is None:
                in_time = self._changed.wait(PATIENCE)
                idle = not (self._needed or self._guessed)
                if not self._readers or (idle and not in_time):
                    self._running -= 1
                    self._changed.notify_all()
                    return None
                entry = self._next()
            return entry

    def _next(self) -> _Entry | None:
        """Return what to read next, with memory for it; None if there is neither."""
        queue = self._needed or self._guessed
        if not queue:
            return None
        entry = queue[0]
        entry.buffer = self._make_buffer(self._recipes[entry.key].num_bytes(), entry.guessed)
        if entry.buffer is not None:
            queue.popleft()
            return entry
        if entry.guessed:
            self._forget_guesses()
        return None

    def _make_buffer(self, size: int, for_guess: bool) -> Tensor | None:
        """Return memory of that size, that of what was used longest ago if need be."""
        counters = self.counters
        while counters.bytes_held + size > self._bytes_for_experts:
            for victim in self._entries.values():
                idle = not victim.wanted and victim.tensors is not None
                if idle and not (for_guess and victim.guessed):
                    break
            else:
                return None
            self._forget(victim)
            assert victim.buffer is not None
            buffer, victim.buffer, victim.tensors = victim.buffer, None, None
            if buffer.numel() == size:
                return buffer
            counters.bytes_held -= buffer.numel()
        counters.bytes_held += size
        counters.most_bytes_held = max(counters.most_bytes_held, counters.bytes_held)
        if self._spare.get(size):
            return self._spare[size].pop()
        self._spare.clear()  # of other sizes
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
        """Let those who want an expert know that it cannot be read; the next may try again."""
        assert entry.buffer is not None
        self.counters.bytes_held -= entry.buffer.numel()
        entry.buffer, entry.error = None, error
        self._forget(entry)
        self._changed.notify_all()
