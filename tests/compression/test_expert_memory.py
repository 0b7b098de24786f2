import os
import threading
import time

import pytest
import torch

from switchlm.compression import expert_files, expert_memory
from switchlm.compression.expert_files import STAGE, ExpertFiles, Recipe
from switchlm.compression.expert_memory import ExpertMemory
from switchlm.errors import CheckpointError, ConfigError
from switchlm.huggingface.weights import TensorOffset

NUMBERS = 1024
SIZE = 4 * NUMBERS  # bytes of an expert here


class RecordingFiles(ExpertFiles):
    """Records which experts are read, and blocks reads while the gate is closed."""

    def __init__(self, paths):
        super().__init__(paths)
        self.read_offsets = []
        self.gate = threading.Event()
        self.gate.set()

    def read(self, recipe, buffer):
        assert self.gate.wait(5)
        self.read_offsets.append(recipe.parts["up"].offset)
        super().read(recipe, buffer)


@pytest.fixture
def path(tmp_path):
    """A file of 16 experts, in reverse order; all numbers of the n-th are n."""
    path = tmp_path / "experts"
    numbers = torch.arange(16.0).flip(0).repeat_interleave(NUMBERS)
    path.write_bytes(numbers.numpy().tobytes())
    return path


def recipe(path, expert, dtype=None):
    offset = TensorOffset(path, (15 - expert) * SIZE, (NUMBERS,), torch.float32)
    return Recipe({"up": offset}, dtype)


@pytest.fixture
def make(path):
    made = []

    def make(experts, readers=2, dtype=None, num_bytes=None):
        recipes = {("layer", expert): recipe(path, expert, dtype) for expert in range(16)}
        files = RecordingFiles([path])
        memory = ExpertMemory(recipes, files, num_bytes or experts * SIZE, readers)
        made.append(memory)
        return memory, files

    yield make
    for memory in made:
        memory.close()


def take(memory, experts):
    """Return the experts in the order in which they are ready; check their numbers."""
    order = []
    with memory.acquire([("layer", expert) for expert in experts]) as ready:
        for (_, expert), tensors in ready:
            assert torch.equal(tensors["up"], torch.full((NUMBERS,), float(expert)))
            order.append(expert)
    return order


@pytest.mark.parametrize("experts", [1, 2, 16])
def test_each_is_read_once_in_the_order_of_the_file(make, experts):
    memory, files = make(experts, readers=1)
    assert take(memory, [3, 9, 4, 12]) == [12, 9, 4, 3]
    assert files.read_offsets == sorted(files.read_offsets)
    assert len(files.read_offsets) == 4
    assert memory.counters.misses == 4


def test_what_is_in_memory_comes_first_and_the_oldest_is_evicted(make):
    memory, files = make(3)
    for expert in (1, 2, 3):
        take(memory, [expert])
    assert take(memory, [1]) == [1]  # now 2 is the one used longest ago
    assert take(memory, [9, 3]) == [3, 9]
    files.read_offsets.clear()
    take(memory, [1, 3, 9])
    assert not files.read_offsets
    assert memory.counters.hits == 5
    assert memory.counters.most_bytes_held == memory.counters.bytes_held == 3 * SIZE


def test_the_next_is_read_while_one_is_used(make):
    memory, files = make(2, readers=1)
    with memory.acquire([("layer", 1), ("layer", 2)]) as ready:
        next(ready)
        for _ in range(500):
            if len(files.read_offsets) == 2:
                break
            threading.Event().wait(0.01)
        assert len(files.read_offsets) == 2


def test_memory_in_use_is_not_used_for_another(make):
    memory, files = make(2)
    with memory.acquire([("layer", 1)]) as ready:
        _, tensors = next(ready)
        for expert in range(2, 12):
            take(memory, [expert])
        assert torch.equal(tensors["up"], torch.ones(NUMBERS))
        assert memory.counters.most_bytes_held <= 2 * SIZE
    files.read_offsets.clear()
    take(memory, [11])
    assert not files.read_offsets


@pytest.mark.parametrize("experts", [1, 2, 5])
def test_many_threads_get_their_experts_within_the_budget(make, experts):
    memory, _ = make(experts)
    failures = []

    def work(seed):
        generator = torch.Generator().manual_seed(seed)
        try:
            for _ in range(20):
                wanted = torch.randperm(16, generator=generator)[:4].tolist()
                memory.prefetch("layer", torch.randperm(16, generator=generator)[:3].tolist())
                assert sorted(take(memory, wanted)) == sorted(wanted)
        except BaseException as error:
            failures.append(error)
            raise

    threads = [threading.Thread(target=work, args=(seed,), daemon=True) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive(), "a deadlock"
    assert not failures
    assert memory.counters.most_bytes_held <= experts * SIZE


def test_idle_readers_end_and_are_replaced(make, monkeypatch):
    monkeypatch.setattr(expert_memory, "PATIENCE", 0.0005)
    memory, _ = make(2)

    def work():
        for turn in range(300):
            take(memory, [turn % 16, (turn + 5) % 16])
            time.sleep(0.0005 * (turn % 3))
        with memory.acquire([("layer", 1), ("layer", 2), ("layer", 3)]) as ready:
            for _ in ready:  # there is no memory for the third, for longer than readers wait
                time.sleep(0.05)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(20)
    assert not thread.is_alive(), "a wanted expert is never read"
    assert memory.counters.most_bytes_held <= 2 * SIZE


def test_right_predictions_are_hits_and_wrong_ones_are_counted(make):
    memory, _ = make(8)
    memory.prefetch("layer", [5, 6])
    for _ in range(500):
        if memory.counters.experts_read == 2:
            break
        threading.Event().wait(0.01)
    take(memory, [5, 7])
    counters = memory.counters
    assert (counters.guesses, counters.wrong_guesses) == (2, 1)
    assert (counters.hits, counters.foreseen, counters.misses) == (1, 1, 1)
    take(memory, [5])
    assert counters.foreseen == 1


def test_needed_experts_are_read_before_predicted_ones_and_the_latest_prediction_counts(make):
    memory, files = make(8, readers=1)
    files.gate.clear()
    memory.prefetch("layer", [1])  # a reader takes it, and waits at the gate
    threading.Event().wait(0.1)
    memory.prefetch("layer", [2])
    memory.prefetch("layer", [3])
    threading.Timer(0.1, files.gate.set).start()
    take(memory, [4])
    take(memory, [3])
    wanted = [(15 - expert) * SIZE for expert in (1, 4, 3)]
    assert files.read_offsets == wanted


def test_prefetching_takes_at_most_half_of_the_memory(make):
    memory, _ = make(4)
    memory.prefetch("layer", range(16))
    assert memory.counters.guesses == 2


def test_numbers_are_converted_once_as_they_are_read(make):
    memory, _ = make(0, dtype=torch.bfloat16, num_bytes=4 * SIZE)
    with memory.acquire([("layer", 7)]) as ready:
        for _, tensors in ready:
            assert tensors["up"].dtype == torch.bfloat16
            assert torch.equal(tensors["up"].float(), torch.full((NUMBERS,), 7.0))
    assert memory.counters.bytes_held == SIZE // 2


def test_long_parts_are_converted_a_piece_at_a_time(tmp_path):
    numbers = torch.randn(STAGE // 4 + 5)
    (tmp_path / "long").write_bytes(numbers.numpy().tobytes())
    offset = TensorOffset(tmp_path / "long", 0, tuple(numbers.shape), torch.float32)
    long = Recipe({"up": offset}, torch.bfloat16)
    memory = ExpertMemory({("layer", 0): long}, ExpertFiles([offset.file]), 3 * STAGE, 1)
    with memory.acquire([("layer", 0)]) as ready:
        assert torch.equal(next(ready)[1]["up"], numbers.bfloat16())
    memory.close()


@pytest.mark.parametrize("dtype", [None, torch.float32])
@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("before", [2, 4096, 10_001])
def test_large_parts_are_read_at_any_offset(tmp_path, monkeypatch, before, direct, dtype):
    if not direct:
        monkeypatch.setattr(expert_files, "_open_direct", lambda path: None)
    up, down = torch.randn(700_001).bfloat16(), torch.randn(2 * STAGE).bfloat16()
    path = tmp_path / "experts"
    data = bytes(before)
    for tensor in (up, down):
        data += tensor.view(torch.uint8).numpy().tobytes()
    path.write_bytes(data)  # the last part ends with the file
    parts = {
        "up": TensorOffset(path, before, (700_001,), torch.bfloat16),
        "down": TensorOffset(path, before + 2 * 700_001, (2 * STAGE,), torch.bfloat16),
    }
    recipe = Recipe(parts, dtype)
    buffer = expert_files.new_buffer(recipe.num_bytes())
    files = ExpertFiles([path])
    files.read(recipe, buffer)
    found = recipe.tensors(buffer)
    kind = dtype or torch.bfloat16
    assert torch.equal(found["up"], up.to(kind))
    assert torch.equal(found["down"], down.to(kind))
    os.truncate(path, before + 1_400_002 + 3 * STAGE)
    with pytest.raises(CheckpointError, match=r"was cut short|changed"):
        files.read(recipe, buffer)
    files.close()


def test_prepared_memory_is_used_by_experts(make, monkeypatch):
    memory, _ = make(4)
    memory.prepare()
    monkeypatch.setattr(expert_memory, "new_buffer", None)  # no more is to be taken
    for expert in range(16):
        take(memory, [expert])
    assert memory.counters.most_bytes_held == 4 * SIZE


def test_a_budget_below_one_expert_is_refused_with_what_is_needed(make):
    with pytest.raises(ConfigError, match=r"1,000 bytes, but one expert takes 4,096.*least 4,096"):
        make(0, num_bytes=1000)
    with pytest.raises(ConfigError, match=r"takes 2,048 and reading it"):
        make(0, num_bytes=2048, dtype=torch.bfloat16)


def test_a_truncated_or_changed_file_is_an_error(make, path):
    memory, _ = make(4)
    take(memory, [15])
    os.truncate(path, 3 * SIZE)
    with pytest.raises(CheckpointError, match="was cut short while the model was in use"):
        take(memory, [1])
    take(memory, [15])  # still in memory
    path.write_bytes(bytes(16 * SIZE))
    with pytest.raises(CheckpointError, match="experts changed while the model was in use"):
        take(memory, [14])


def test_a_missing_file_is_an_error(tmp_path):
    with pytest.raises(CheckpointError, match="Cannot open"):
        ExpertFiles([tmp_path / "nothing"])
