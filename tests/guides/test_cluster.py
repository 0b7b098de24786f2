"""The commands of docs/guides/cluster.md and examples/slurm.sh are ones that can be typed."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser

from switchlm.cli.main import load
from switchlm.recipes.config import run_config

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "examples" / "slurm.sh"
GUIDE = (ROOT / "docs" / "guides" / "cluster.md").read_text(encoding="utf-8")
VARIABLES = {"$GPUS": "8", "$SLURM_NNODES": "2", "$HEAD": "node0", "$SLURM_JOB_ID": "7"}


def commands():
    blocks = re.findall(r"^```\n(.*?)^```$", GUIDE, re.S | re.M)
    yield from (line for block in blocks for line in block.splitlines() if "switchlm" in line)
    script = SCRIPT.read_text(encoding="utf-8").replace("\\\n", " ")
    yield next(line for line in script.splitlines() if line.startswith("srun"))


@pytest.mark.parametrize("line", list(commands()))
def test_the_commands_parse(line):
    for name, value in VARIABLES.items():
        line = line.replace(name, value)
    assert "$" not in line
    arguments = shlex.split(line)
    if "torchrun" in arguments:
        started = get_args_parser().parse_args(arguments[arguments.index("torchrun") + 1 :])
        assert started.module
        arguments = [started.training_script, *started.training_script_args]
    _, name, *arguments = arguments[arguments.index("switchlm") :]
    context = load(name).make_context(name, arguments)
    run = run_config(
        preset=context.params["preset"],
        values={},
        sources=context.params["data"],
        overrides=context.params["set_"],
    )
    processes = 16 if "--nnodes" in line or "srun" in line else 8
    assert run.mesh.shape(processes)[2] == 8
    assert run.model.num_experts % run.mesh.expert == 0


def test_the_script_is_one_of_bash():
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)


def test_links_of_the_guide_exist():
    for target in re.findall(r"\b(?:examples|docs)/[\w./]+\w", GUIDE):
        assert (ROOT / target).exists(), target
