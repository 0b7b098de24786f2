"""The commands and settings of docs/guides/finetune.md are ones that can be typed."""

import re
import shlex
from pathlib import Path

import pytest
import torch

from switchlm.cli.main import load
from switchlm.huggingface.load import save
from switchlm.model.presets import preset
from switchlm.model.transformer import SwitchTransformer
from switchlm.recipes.finetune_config import finetune_run

ROOT = Path(__file__).resolve().parents[2]
GUIDE = (ROOT / "docs" / "guides" / "finetune.md").read_text(encoding="utf-8")
COMMANDS = [
    line
    for block in re.findall(r"^```\n(.*?)^```$", GUIDE, re.S | re.M)
    for line in block.splitlines()
]
SETTINGS = re.findall(r"`((?:finetune|training|model|router)\.\w+=\S+)`", GUIDE)


@pytest.mark.parametrize("line", COMMANDS)
def test_the_commands_parse(line):
    name, command, *arguments = shlex.split(line.removeprefix("torchrun --nproc-per-node 8 -m "))
    assert name == "switchlm"
    load(command).make_context(command, arguments)


def test_the_settings_are_there(tmp_path):
    torch.manual_seed(0)
    save(SwitchTransformer(preset("nano")), None, tmp_path / "nano")
    stated = {"model": str(tmp_path / "nano"), "tasks": ["sst2"]}
    assert len(SETTINGS) > 12
    usual = finetune_run({}, stated=stated)
    for setting in SETTINGS:
        assert finetune_run({}, stated=stated, overrides=[setting]) != usual, setting


def test_the_defaults_are_those_of_the_guide(tmp_path):
    torch.manual_seed(0)
    save(SwitchTransformer(preset("nano")), None, tmp_path / "nano")
    usual = finetune_run({}, stated={"model": str(tmp_path / "nano"), "tasks": ["sst2"]})
    assert "dropout 0.1, expert dropout 0.4" in GUIDE
    assert (usual.model.dropout, usual.model.expert_dropout) == (0.1, 0.4)
    assert f"{usual.training.steps:,} steps, and every {usual.training.evaluate_every}" in GUIDE
    assert f"`finetune.lora_alpha` ({usual.finetune.lora_alpha:.0f})" in GUIDE
