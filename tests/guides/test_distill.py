"""The commands, settings and Python of docs/guides/distill.md are ones that can be typed."""

import ast
import re
import shlex
from pathlib import Path

import pytest
import torch

from switchlm.cli.main import load
from switchlm.data.text.tokenizer import Tokenizer
from switchlm.huggingface.load import save
from switchlm.model.presets import preset
from switchlm.model.transformer import SwitchTransformer
from switchlm.recipes.distill_config import TOP_K, DistillationConfig, configure

ROOT = Path(__file__).resolve().parents[2]
GUIDE = (ROOT / "docs" / "guides" / "distill.md").read_text(encoding="utf-8")
COMMANDS = [line for line in GUIDE.splitlines() if line.startswith("switchlm ")]
SETTINGS = re.findall(r"`((?:distillation|training|model|router)\.\w+=[\w.]+)`", GUIDE)


@pytest.mark.parametrize("line", COMMANDS)
def test_the_commands_parse(line):
    _, name, *arguments = shlex.split(line)
    load(name).make_context(name, arguments)


def test_the_settings_are_there(tmp_path):
    torch.manual_seed(0)
    teacher = tmp_path / "nano"
    save(SwitchTransformer(preset("nano")), Tokenizer.bytes(), teacher)
    assert len(SETTINGS) > 8
    for setting in SETTINGS:
        name, _, value = setting.partition("=")
        overrides = [setting]
        if name == "distillation.soft_weight" and value == "0":
            overrides.append("distillation.hard_weight=1")
        if name == "distillation.hard_weight" and value == "0":
            overrides.append("distillation.soft_weight=1")
        configure(teacher=str(teacher), overrides=overrides)


def test_the_defaults_are_those_of_the_guide():
    usual = DistillationConfig(teacher="runs/sparse")
    assert (usual.hard_weight, usual.soft_weight) == (0.75, 0.25)
    assert (usual.start, usual.feedforward) == ("teacher", "random")
    assert f"distillation.load_batches={usual.load_batches}`" in GUIDE
    assert f"target, {TOP_K} by default" in GUIDE.replace("\n", " ")


def test_the_python_calls_what_there_is():
    [code] = re.findall(r"^```python\n(.*?)^```$", GUIDE, re.S | re.M)
    imported = [node for node in ast.parse(code).body if isinstance(node, ast.ImportFrom)]
    namespace: dict[str, object] = {}
    exec(compile(ast.Module(body=[*imported], type_ignores=[]), "guide", "exec"), namespace)
    assert namespace["configure"] is configure
