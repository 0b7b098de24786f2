"""Ranks that are named after a failed collective: ranks are threads, with a store on loopback."""

import json
import re
import threading
import time

import pytest
import torch.distributed as dist
from tests.parallel.test_launch import clients

from switchlm.errors import ConfigError, LostRankError
from switchlm.parallel import heartbeat as module
from switchlm.parallel.heartbeat import Heartbeat, is_collective_error, run_with_timeout

BROKEN = "[/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:4711"


@pytest.fixture(autouse=True)
def _soon(monkeypatch):
    monkeypatch.setattr(module, "ANSWER_SECONDS", 1.0)
    monkeypatch.setattr(module, "READ_SECONDS", 1.0)


@pytest.fixture
def heartbeats():
    host, stores = clients(3)
    yield [Heartbeat(store, rank, 3) for rank, store in enumerate(stores)]
    del host


def fail_in(heartbeats, errors):
    """Raise an error (None: none) in each rank's heartbeat; return the errors that come out."""
    found = {}

    def run(rank, error):
        try:
            with heartbeats[rank].report_lost_ranks():
                raise error
        except Exception as told:
            found[rank] = told

    threads = [threading.Thread(target=run, args=each) for each in errors.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    return found


def test_the_silent_rank_is_named_with_its_step_by_all_others(heartbeats):
    heartbeats[2].beat(41)
    found = fail_in(heartbeats, {0: RuntimeError(BROKEN), 1: RuntimeError(BROKEN)})
    for rank in (0, 1):
        assert isinstance(found[rank], LostRankError)
        message = str(found[rank])
        assert message.startswith(f"A collective failed on rank {rank}. rank 2 (host ")
        assert re.search(
            r"last heard of at step 41, \d s ago; it was killed, or it hangs\.", message
        )
        assert message.count("was last heard") == 1
        assert BROKEN in message


def test_ranks_that_wait_for_the_lost_one_are_not_called_lost(heartbeats):
    """Rank 1 was killed. Rank 2's own collective fails only once rank 0 is gone."""
    late = threading.Event()

    told = []

    def wait():
        try:
            with heartbeats[2].report_lost_ranks():
                late.wait(20)
                heartbeats[2]._store = Stopped()  # its host, rank 0, has ended by now
                raise RuntimeError(BROKEN)
        except LostRankError as error:
            told.append(str(error))

    thread = threading.Thread(target=wait)
    thread.start()
    try:
        message = str(fail_in(heartbeats, {0: RuntimeError(BROKEN)})[0])
    finally:
        late.set()
        thread.join(20)
    assert "rank 1 (host " in message
    assert message.count("was last heard") == 1
    assert "Waiting for it: 0, 2." in message
    assert told[0] == message.replace("failed on rank 0", "failed on rank 2")


def test_a_rank_that_runs_on_without_an_answer_is_named_if_none_is_lost(heartbeats):
    late = threading.Event()

    def hang():
        with heartbeats[1].report_lost_ranks():
            late.wait(20)

    thread = threading.Thread(target=hang)
    thread.start()
    try:
        found = fail_in(heartbeats, {0: RuntimeError(BROKEN), 2: RuntimeError(BROKEN)})
    finally:
        late.set()
        thread.join(20)
    for error in found.values():
        assert "rank 1 (host " in str(error)
        assert str(error).count("was last heard") == 1


def test_a_rank_without_a_step_is_named_too(heartbeats):
    found = fail_in(heartbeats, {0: RuntimeError(BROKEN), 1: RuntimeError(BROKEN)})
    assert "was last heard of before its first step" in str(found[0])


def test_a_rank_that_failed_by_itself_is_to_blame_and_keeps_its_error(heartbeats):
    own = OSError("No space left on device")
    found = fail_in(heartbeats, {0: own, 1: RuntimeError(BROKEN)})
    assert found[0] is own
    assert "failed: OSError: No space left on device." in str(found[1])
    assert "was last heard" not in str(found[1]), "nobody is called lost while one has said why"


def test_if_all_answer_the_message_names_the_network(heartbeats):
    found = fail_in(heartbeats, dict.fromkeys(range(3), RuntimeError(BROKEN)))
    for error in found.values():
        assert "All ranks still answer: look at the network between the hosts" in str(error)


def test_if_the_store_is_gone_its_host_is_named():
    host, stores = clients(1)
    heartbeat = Heartbeat(stores[0], 1, 2)
    del host
    with pytest.raises(LostRankError, match="rank 0, or the host it runs on, is gone"):
        fail_and_raise(heartbeat)


def fail_and_raise(heartbeat):
    with heartbeat.report_lost_ranks():
        raise RuntimeError(BROKEN)


def test_a_stores_host_that_stopped_does_not_hold_the_others():
    _host, stores = clients(1)
    heartbeat = Heartbeat(stores[0], 1, 2)
    heartbeat._store = Stopped()
    start = time.monotonic()
    with pytest.raises(LostRankError, match="is gone, stopped or cut off"):
        fail_and_raise(heartbeat)
    assert time.monotonic() - start < 4


class Stopped:
    def set(self, key, value):
        threading.Event().wait()


def test_rank_0_stays_until_the_others_have_read(heartbeats):
    """It may host the store: if it ended first, the others would report it as lost."""
    left = {}

    def run(rank, wait):
        time.sleep(wait)
        try:
            fail_and_raise(heartbeats[rank])
        except LostRankError:
            left[rank] = time.monotonic()

    threads = [threading.Thread(target=run, args=each) for each in [(0, 0), (1, 0.5)]]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert left[0] > left[1] - 0.2


def test_other_errors_pass_as_they_are(heartbeats):
    own = ConfigError("mesh.data must be at least 1, got 0.")
    assert fail_in(heartbeats, {1: own})[1] is own


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (RuntimeError(BROKEN), True),
        (dist.DistBackendError("NCCL error"), True),
        (dist.DistNetworkError("reset"), True),
        (RuntimeError("shapes do not fit"), False),
        (ValueError("gloo"), False),
    ],
)
def test_errors_of_collectives(error, expected):
    assert is_collective_error(error) is expected


def test_beats_are_at_most_one_a_second(heartbeats):
    for step in range(100):
        heartbeats[1].beat(step)
    assert json.loads(heartbeats[0]._store.get("beat/1"))["step"] == 0


def test_local_rank_0_runs_first():
    _host, stores = clients(3)
    order = []
    nodes = [Heartbeat(store, rank, 3, local_rank=rank) for rank, store in enumerate(stores)]

    def run(rank):
        with nodes[rank].local_rank_zero_first("text"):
            time.sleep(0.3 if rank == 0 else 0)
            order.append(rank)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in (2, 1, 0)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert order[0] == 0
    assert sorted(order) == [0, 1, 2]


def test_ranks_that_wait_for_local_rank_0_end_when_it_fails():
    _host, stores = clients(3)
    found, begun = {}, []
    nodes = [Heartbeat(store, rank, 3, local_rank=rank) for rank, store in enumerate(stores)]

    def run(rank):
        try:
            with nodes[rank].local_rank_zero_first("text"):
                begun.append(rank)
                raise OSError("No space left on device")
        except Exception as error:
            found[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in (2, 1, 0)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert begun == [0]
    assert isinstance(found[0], OSError)
    for rank in (1, 2):
        assert isinstance(found[rank], LostRankError)
        assert "(text), which failed: OSError: No space left on device." in str(found[rank])


def test_work_that_takes_too_long_gives_none():
    assert run_with_timeout(5, lambda: 3) == 3
    start = time.monotonic()
    assert run_with_timeout(0.2, lambda: time.sleep(30)) is None
    assert time.monotonic() - start < 5
