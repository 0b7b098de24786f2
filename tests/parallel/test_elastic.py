"""Jobs under torchrun whose processes are killed, stopped and asked to end."""

import random
import re
import signal
import time

import pytest
import torch
from tests.parallel.jobs import Job, alive, free_port, torchrun, toy

STEPS, SAVED = 25, r"saved 10\b"


def undisturbed(world_size):
    """What the toy training comes to: the ranks' gradients, added up step by step."""
    weight = torch.zeros(8)
    for step in range(STEPS):
        total = torch.zeros(8)
        for rank in range(world_size):
            generator = torch.Generator().manual_seed(1000 * step + rank)
            total += torch.randint(-999, 999, (9,), generator=generator)[:8]
        weight += total
    return weight.tolist()


def result(folder):
    return [float(number) for number in (folder / "weight.txt").read_text().strip("[]").split(",")]


@pytest.mark.parametrize(
    "killed", [(0,), pytest.param((1, 0), marks=pytest.mark.slow)], ids=lambda ranks: f"{ranks}"
)
def test_killed_ranks_are_started_anew_and_the_result_is_the_undisturbed_one(tmp_path, killed):
    """The survivors lose a collective each time."""
    with Job(tmp_path / "log", torchrun(*toy(tmp_path), restarts=len(killed))) as job:
        for number, rank in enumerate(killed):
            job.wait_for(rf"saved 1{5 * number}\b")
            job.send(rank, signal.SIGKILL)
            job.wait_for(rf"(?s)(rank 0 from 1\d restarted True.*){{{number + 1}}}")
        assert job.finish() == 0, job.text
    assert job.text.count("restarted True") == 2 * len(killed)
    assert result(tmp_path) == undisturbed(2)


@pytest.mark.slow
def test_more_failures_than_restarts_end_the_job(tmp_path):
    with Job(tmp_path / "log", torchrun(*toy(tmp_path), restarts=0)) as job:
        job.wait_for(SAVED)
        job.send(1, signal.SIGKILL)
        assert job.finish() == 1
    assert not (tmp_path / "weight.txt").exists()


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_random_kills_of_four_ranks(tmp_path, seed):
    chance = random.Random(seed)
    with Job(tmp_path / "log", torchrun(*toy(tmp_path), processes=4, restarts=3)) as job:
        for kill in range(3):
            job.wait_for(rf"(?s)(rank 0 from.*){{{kill + 1}}}saved")
            time.sleep(chance.random())
            if job.process.poll() is None and not (tmp_path / "weight.txt").exists():
                job.send(chance.randrange(4), signal.SIGKILL)
        assert job.finish(150) == 0, job.text
    assert result(tmp_path) == undisturbed(4)


def stop_one(tmp_path, stopped, processes):
    """Stop a rank; return the job, and when each survivor had ended."""
    command = torchrun(*toy(tmp_path, timeout=5), processes=processes)
    with Job(tmp_path / "log", command) as job:
        job.wait_for(SAVED)
        pid = job.workers()[stopped]
        others = [rank for rank in range(processes) if rank != stopped]
        job.send(stopped, signal.SIGSTOP)
        start = time.monotonic()
        while set(others) & set(job.workers()):
            assert time.monotonic() - start < 30, job.text
            time.sleep(0.05)
        seconds = time.monotonic() - start
        assert job.finish() == 1
    return job, pid, seconds


def check_named(job, stopped, pid, seconds):
    assert seconds < 5 + 10, job.text
    errors = [line for line in job.text.splitlines() if "LostRankError" in line]
    assert errors
    for line in errors:
        assert re.search(rf"rank {stopped} \(host \S+, process {pid}\) was last heard", line)
        assert "it was killed, or it hangs" in line
        assert line.count("was last heard") == 1, "nobody else is blamed"


@pytest.mark.slow
def test_a_stopped_rank_is_named_and_leaves_no_orphans(tmp_path):
    job, pid, seconds = stop_one(tmp_path, 1, 2)
    check_named(job, 1, pid, seconds)


@pytest.mark.slow
@pytest.mark.parametrize("stopped", [0, 2])
def test_a_stopped_rank_of_four_is_named_by_those_who_are_left(tmp_path, stopped):
    job, pid, seconds = stop_one(tmp_path, stopped, 4)
    check_named(job, stopped, pid, seconds)


@pytest.mark.slow
def test_processes_whose_torchrun_was_killed_at_once_end_within_a_minute(tmp_path):
    with Job(tmp_path / "log", torchrun(*toy(tmp_path))) as job:
        until = time.monotonic() + 30
        while len(workers := job.workers()) < 2:
            assert time.monotonic() < until, job.text
        job.process.kill()
        until = time.monotonic() + 60
        while any(alive(pid) for pid in workers.values()):
            assert time.monotonic() < until, job.text
            time.sleep(0.1)
    assert "did not reach the store of the job" in job.text


@pytest.mark.slow
def test_sigterm_to_torchrun_saves_the_state_and_the_next_job_goes_on(tmp_path):
    with Job(tmp_path / "log", torchrun(*toy(tmp_path))) as job:
        job.wait_for(SAVED)
        job.process.send_signal(signal.SIGTERM)
        assert job.finish() == 1  # torchrun's own, whatever its processes say
    *_, last = map(int, re.findall(r"saved (\d+)", job.text))
    assert 10 <= last < STEPS
    command = torchrun(*toy(tmp_path))
    with Job(tmp_path / "log", command, SLURM_RESTART_COUNT="1") as job:
        assert job.finish() == 0, job.text
    assert f"rank 1 from {last} restarted True" in job.text
    assert result(tmp_path) == undisturbed(2)


@pytest.mark.slow
@pytest.mark.parametrize("rendezvous", ["static", "c10d"])
def test_two_agents_come_to_the_result_of_one(tmp_path, rendezvous):
    port = free_port()
    options = {"nodes": 2, "port": port, "rendezvous": rendezvous, "processes": 1}
    with (
        Job(tmp_path / "log0", torchrun(*toy(tmp_path), node=0, **options)) as first,
        Job(tmp_path / "log1", torchrun(*toy(tmp_path), node=1, **options)) as second,
    ):
        assert first.finish() == 0, first.text
        assert second.finish() == 0, second.text
    assert result(tmp_path) == undisturbed(2)


@pytest.mark.slow
@pytest.mark.parametrize("rendezvous", ["static", "c10d"])
@pytest.mark.parametrize("on_first", [True, False])
def test_a_kill_on_one_host_starts_both_anew(tmp_path, on_first, rendezvous):
    """Each agent counts its own restarts: the processes must agree which start this is."""
    port = free_port()
    options = {"nodes": 2, "port": port, "processes": 2, "restarts": 2, "rendezvous": rendezvous}
    with (
        Job(tmp_path / "log0", torchrun(*toy(tmp_path), node=0, **options)) as first,
        Job(tmp_path / "log1", torchrun(*toy(tmp_path), node=1, **options)) as second,
    ):
        jobs = [first, second]
        until = time.monotonic() + 60
        while not (tmp_path / "checkpoints" / "step-00000010").exists():
            assert time.monotonic() < until, first.text + second.text
            time.sleep(0.05)
        host_of_0 = next(job for job in jobs if 0 in job.workers())
        struck = host_of_0 if on_first else next(job for job in jobs if job is not host_of_0)
        struck.send(min(struck.workers()), signal.SIGKILL)
        assert first.finish() == 0, first.text
        assert second.finish() == 0, second.text
        for job in jobs:
            assert job.text.count("restarted True") >= 2, job.text
    assert result(tmp_path) == undisturbed(4)
