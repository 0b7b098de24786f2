"""A run's configuration: base, preset, file, sources and overrides, in that order."""

import pytest

from switchlm.errors import ConfigError
from switchlm.model.presets import preset
from switchlm.recipes.config import RunConfig, from_sections, run_config, to_sections


def test_sections_round_trip_with_the_router_on_its_own():
    config = run_config(preset="switch-c-2048", overrides=["training.steps=7"])
    sections = to_sections(config)
    assert "router" not in sections["model"]
    assert sections["router"]["capacity_factor"] == 1.0
    assert from_sections(sections) == config


def test_later_settings_replace_earlier_ones_only():
    values = {"preset": "nano", "router": {"mode": "hf"}, "training": {"steps": 5, "seed": 3}}
    config = run_config(values=values, sources=["a.txt"], overrides=["training.steps=9"])
    assert config.model.d_model == preset("nano").d_model
    assert config.model.router.mode == "hf"
    assert (config.training.steps, config.training.seed) == (9, 3)
    assert config.data.sources == ("a.txt",)


def test_a_preset_on_the_command_line_replaces_that_of_the_file():
    config = run_config(preset="dense-nano", values={"preset": "small"})
    assert config.model == preset("dense-nano")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["training.step=1"], "training.step.*Did you mean 'steps'"),
        (["trainin.steps=1"], "trainin.*Did you mean 'training'"),
        (["router.modes=hf"], "Did you mean 'mode'"),
        (["router.mode=hff"], "Did you mean 'hf'"),
        (["kernels.switch=fuse"], "kernels.switch is 'fuse'. Did you mean 'fused'"),
        (["kernels.switch=triton"], "'triton'. Known: auto, fused, separate"),
        (["training.steps=many"], "training.steps must be of type int"),
        (["model=3"], "'model' must be a mapping"),
    ],
)
def test_mistakes_are_errors(overrides, message):
    with pytest.raises(ConfigError, match=message):
        run_config(overrides=overrides)


def test_a_configuration_without_kernels_has_the_default():
    sections = to_sections(run_config(overrides=["kernels.switch=fused"]))
    assert from_sections(sections).kernels.switch == "fused"
    del sections["kernels"]
    assert from_sections(sections).kernels.switch == "auto"


def test_small_presets_come_with_settings_and_the_default_is_tiny():
    tiny = run_config(preset="tiny")
    assert run_config() == tiny
    assert (tiny.data.input_length, tiny.data.batch_size) == (64, 128)
    assert (tiny.training.learning_rate, tiny.model.router.exploration) == (0.012, "argmax")
    assert run_config(preset="dense-tiny").training == tiny.training
    assert run_config(preset="nano").training == RunConfig().training
    assert run_config(preset="small").training.optimizer == "adafactor"


def test_stated_settings_and_models_come_before_those_of_the_preset():
    file = run_config(values={"preset": "tiny", "training": {"learning_rate": 0.5}})
    assert (file.training.learning_rate, file.data.batch_size) == (0.5, 128)
    assert run_config(preset="tiny", overrides=["data.batch_size=3"]).data.batch_size == 3
    own = run_config(values={"model": {"d_model": 64}})
    assert own.training == RunConfig().training
