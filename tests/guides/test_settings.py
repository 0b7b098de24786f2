"""docs/settings.md is what the dataclasses say, and the example configurations resolve."""

import importlib.util
from pathlib import Path

import pytest

from switchlm.config import read_yaml
from switchlm.recipes.config import run_config

ROOT = Path(__file__).resolve().parents[2]


def generator():
    spec = importlib.util.spec_from_file_location("make_settings", ROOT / "docs/make_settings.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_what_the_dataclasses_say():
    assert (ROOT / "docs" / "settings.md").read_text("utf-8") == generator().page()


@pytest.mark.parametrize("name", ["laptop", "one_gpu", "node"])
def test_the_example_configurations_resolve(name):
    run = run_config(values=read_yaml(ROOT / "examples" / f"{name}.yaml"))
    assert run.model.num_experts
    assert run.training.steps


def test_the_laptop_trains_as_the_demo():
    from switchlm.recipes.compare import configure

    run = run_config(values=read_yaml(ROOT / "examples" / "laptop.yaml"))
    demo = configure().sparse
    for name in ("model", "data"):
        assert getattr(run, name) == getattr(demo, name)
    assert run.training.learning_rate == demo.training.learning_rate
    assert run.training.betas == demo.training.betas
