"""A run in a child process: it runs commands, returns metrics, and reports its failure."""

import random

import pytest

from switchlm.data.text.tokenizer import Tokenizer
from switchlm.errors import WorkerError
from switchlm.parallel.mesh import ALONE
from switchlm.recipes.compare_worker import CompareWorker
from switchlm.recipes.config import run_config, to_sections, with_vocabulary
from switchlm.recipes.start import open_run


@pytest.fixture
def start_worker(tmp_path):
    draw = random.Random(0)
    texts = tmp_path / "texts"
    texts.mkdir()
    for number in range(40):
        text = " ".join(draw.choices(["token", "expert", "router", "gate"], k=120))
        (texts / f"{number}.txt").write_text(text, encoding="utf-8")
    started = []

    def start(*overrides):
        config = run_config(
            preset="nano",
            sources=[str(texts)],
            overrides=[
                *("data.input_length=32", "data.batch_size=2", "training.log_every=2"),
                *("training.evaluate_every=2", "training.evaluate_batches=1"),
                *overrides,
            ],
        )
        tokenizer = Tokenizer.bytes()
        sections = to_sections(with_vocabulary(config, tokenizer))
        with open_run(tmp_path / "run", False, ALONE) as run:
            run.begin({"config.yaml": sections}, tokenizer, text="")
        started.append(CompareWorker(run.folder, threads=1))
        return started[-1]

    yield start
    for worker in started:
        worker.close()


def test_it_trains_up_to_the_step_of_the_command(start_worker):
    worker = start_worker()
    worker.send("advance 2")
    assert [line["step"] for line in worker.read_lines() if "loss" in line] == [2]
    worker.send("advance 6")
    assert [line["step"] for line in worker.read_lines() if "loss" in line] == [4, 6]
    worker.send("finish")
    list(worker.read_lines())
    assert worker.evaluations[-1]["step"] == 6
    assert (worker.folder.model / "model.safetensors").exists()


def test_a_child_that_fails_is_an_error(start_worker):
    worker = start_worker("model.d_model=30")
    worker.folder.config.write_text("model: {d_model: none}\n")
    worker.send("advance 2")
    with pytest.raises(WorkerError, match="ended with status 1"):
        list(worker.read_lines())


@pytest.mark.slow
def test_a_run_that_diverges_says_so_in_one_sentence(start_worker):
    worker = start_worker("training.learning_rate=1e30", "training.warmup_steps=0")
    worker.send("advance 100")
    with pytest.raises(WorkerError, match=r"run' failed\. Training stopped at step"):
        list(worker.read_lines())
