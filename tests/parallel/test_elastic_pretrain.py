"""`switchlm pretrain` in several processes that are killed, stopped, asked to end, or srun's."""

import random
import re
import signal
import sys
import time
from contextlib import ExitStack

import pytest
from safetensors.torch import load_file
from tests.parallel.jobs import Job, free_port, torchrun
from tests.parallel.processes import launch_names, run_switchlm

from switchlm.training.monitor import read_metrics

STEPS = 40
WORDS = "the moon river stone bird sings over green old trees slowly while we listen"


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    chance = random.Random(0)
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n\n".join(" ".join(chance.choices(WORDS.split(), k=50)) for _ in range(100)))
    return path


def pretrain(text, out, *more, timeout=20):
    settings = {
        "training.steps": STEPS,
        "training.checkpoint_every": 5,
        "training.log_every": 1,
        "training.evaluate_every": "null",
        "data.input_length": 64,
        "data.batch_size": 8,
        "mesh.expert": 2,
        "mesh.timeout": timeout,
    }
    sets = [part for name, value in settings.items() for part in ("--set", f"{name}={value}")]
    return ["-m", "switchlm", "pretrain", "--preset", "nano", "--data", f"{text}",
            "--out", f"{out}", *sets, *more]  # fmt: skip


def wait_for_step(run, step, job):
    until = time.monotonic() + 90
    while not any((run / "checkpoints").glob(f"step-*{step}")):
        assert job.process.poll() is None, job.text
        assert time.monotonic() < until, job.text
        time.sleep(0.05)


def result(run):
    """What a run comes to: its tensors, and its lines without what depends on time."""
    tensors = {}
    for path in (run / "model").glob("*.safetensors"):
        tensors |= load_file(path)
    timed = ("seconds", "tokens_per_second")
    lines = [
        {key: value for key, value in line.items() if key not in timed}
        for line in read_metrics(run / "metrics.jsonl")
    ]
    return {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}, lines


@pytest.fixture(scope="module")
def undisturbed(text, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    _, _, *command = pretrain(text, folder / "run")
    done = run_switchlm(2, folder, command)
    assert done.returncode == 0, done.stderr
    return result(folder / "run")


@pytest.mark.slow
def test_killed_ranks_leave_no_trace_in_the_result(text, tmp_path, undisturbed):
    run = tmp_path / "run"
    with Job(tmp_path / "log", torchrun(*pretrain(text, run), restarts=2)) as job:
        for step, rank in [(10, 1), (20, 0)]:
            wait_for_step(run, step, job)
            job.send(rank, signal.SIGKILL)
        assert job.finish() == 0, job.text
    tensors, lines = result(run)
    assert tensors == undisturbed[0]
    assert lines == undisturbed[1]
    assert len(lines) == STEPS


@pytest.mark.slow
@pytest.mark.parametrize("stopped", [0, 1])
def test_a_stopped_rank_is_named(text, tmp_path, stopped):
    run = tmp_path / "run"
    command = torchrun(*pretrain(text, run, timeout=5))
    with Job(tmp_path / "log", command) as job:
        wait_for_step(run, 10, job)
        pid = job.workers()[stopped]
        job.send(stopped, signal.SIGSTOP)
        start = time.monotonic()
        while 1 - stopped in job.workers():
            assert time.monotonic() - start < 5 + 10, job.text
            time.sleep(0.05)
        assert job.finish() == 1
    assert re.search(rf"Error: .*rank {stopped} \(host \S+, process {pid}\) was last h", job.text)


@pytest.mark.slow
def test_sigterm_saves_and_resume_goes_on(text, tmp_path, undisturbed):
    run = tmp_path / "run"
    with Job(tmp_path / "log", torchrun(*pretrain(text, run))) as job:
        wait_for_step(run, 10, job)
        job.process.send_signal(signal.SIGTERM)
        assert job.finish() == 1
    last = read_metrics(run / "metrics.jsonl")[-1]["step"]
    assert (run / "checkpoints" / f"step-{last:08d}").is_dir(), "not a step is lost"
    with Job(tmp_path / "log", torchrun(*pretrain(text, run, "--resume"))) as job:
        assert job.finish() == 0, job.text
    assert result(run) == undisturbed


@pytest.mark.slow
def test_two_agents_come_to_the_result_of_one_though_one_was_struck(text, tmp_path, undisturbed):
    run, port = tmp_path / "run", free_port()
    command = torchrun(*pretrain(text, run), nodes=2, processes=1, port=port, restarts=2)
    with (
        Job(tmp_path / "log0", command) as first,
        Job(tmp_path / "log1", command) as second,
    ):
        wait_for_step(run, 10, first)
        struck = first if 1 in first.workers() else second
        struck.send(1, signal.SIGKILL)
        assert first.finish() == 0, first.text
        assert second.finish() == 0, second.text
    assert result(run) == undisturbed


def srun(command, folder, number):
    """Start the processes that srun would, with its names, without SLURM."""
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    for rank in range(number):
        names = launch_names(rank, number, slurm=True)
        yield Job(folder / f"log{rank}", [sys.executable, *command], **address, **names)


def test_processes_with_the_names_of_srun_train_without_torchrun(text, tmp_path, undisturbed):
    _, _, *command = pretrain(text, tmp_path / "run")
    done = run_switchlm(2, tmp_path, command, slurm=True)
    assert done.returncode == 0, done.stderr
    assert result(tmp_path / "run") == undisturbed


@pytest.mark.slow
def test_processes_of_srun_train_without_torchrun(text, tmp_path, undisturbed):
    with ExitStack() as opened:
        command = pretrain(text, tmp_path / "run")
        jobs = [opened.enter_context(job) for job in srun(command, tmp_path, 2)]
        for job in jobs:
            assert job.finish() == 0, job.text
    assert result(tmp_path / "run") == undisturbed
    assert "Model: " in jobs[0].text
    assert jobs[1].text == "", "rank 0 speaks for all"


@pytest.mark.slow
@pytest.mark.parametrize("lost", [0, 1])
def test_a_killed_process_of_srun_is_named_by_the_other(text, tmp_path, lost):
    """Rank 0 hosts the store here: without it nobody can be asked."""
    with ExitStack() as opened:
        command = pretrain(text, tmp_path / "run", timeout=5)
        jobs = [opened.enter_context(job) for job in srun(command, tmp_path, 2)]
        wait_for_step(tmp_path / "run", 10, jobs[0])
        jobs[lost].process.kill()
        start = time.monotonic()
        assert jobs[1 - lost].finish() == 1
        assert time.monotonic() - start < 5 + 10
    expected = r"rank 1 \(host .* was last heard" if lost else "rank 0, or the host it runs on, is"
    assert re.search(expected, jobs[1 - lost].text), jobs[1 - lost].text
