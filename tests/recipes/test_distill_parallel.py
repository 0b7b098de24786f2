"""`switchlm distill` under torchrun, as a user types it: the result of one process."""

import json
import os
import random
import sys

import pytest
from tests import commands

pytestmark = pytest.mark.slow

SETTINGS = {
    "training.steps": 8,
    "training.evaluate_every": 8,
    "training.evaluate_batches": 2,
    "data.batch_size": 4,
    "data.input_length": 48,
    "data.held_out_share": 0.1,
    "router.group_rows": 1,
    "router.exploration": "argmax",
}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with text, and a teacher."""
    folder = tmp_path_factory.mktemp("home")
    draw = random.Random(0)
    (folder / "text").mkdir()
    for number in range(40):
        words = " ".join(f"w{draw.randrange(50)}" for _ in range(400))
        (folder / "text" / f"{number}.txt").write_text(words, encoding="utf-8")
    run(folder, 1, "pretrain", "--preset", "nano", "--data", "text", "--out", "teacher")
    return folder


def run(home, processes, *arguments):
    start = [sys.executable]
    if processes > 1:
        start += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [
        *(*start, "-m", "switchlm", *arguments, "--json"),
        *(f"--set={name}={value}" for name, value in SETTINGS.items()),
    ]
    environment = {**os.environ, "HOME": str(home), "OMP_NUM_THREADS": "1"}
    done = commands.run(command, cwd=home, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "arguments",
    [
        ["--set=mesh.data=2"],
        ["--set=mesh.tensor=2", "--cache-logits=logits", "--top-k=9"],
        [
            *("--set=mesh.expert=2", "--student=nano", "--set=model.num_experts=2"),
            "--set=distillation.feedforward=most_used",
        ],
    ],
    ids=["data", "tensor, cached", "sparse student"],
)
def test_the_result_is_that_of_one_process(home, request, arguments):
    name = request.node.callspec.id.replace(", ", "-").replace(" ", "-")
    results = []
    for processes in (1, 2):
        own = arguments if processes == 2 else arguments[1:]
        distil = ["distill", "--teacher", "teacher", "--out", f"{name}-{processes}", *own]
        results.append(json.loads(run(home, processes, *distil)))
    alone, together = results
    for role in ("student", "teacher"):
        assert together[f"{role}_loss"] == pytest.approx(alone[f"{role}_loss"], rel=1e-5)
    assert together["parameters"] == alone["parameters"]
