import pytest

from switchlm.config import from_mapping, to_mapping
from switchlm.errors import ConfigError
from switchlm.training.config import TrainingConfig


def test_it_survives_a_round_trip():
    config = TrainingConfig(betas=(0.8, 0.95), seconds=3.5, wandb="project", gradient_clip=None)
    assert from_mapping(TrainingConfig, to_mapping(config)) == config


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("steps", 0, "training.steps must be at least 1, got 0"),
        ("log_every", 0, "training.log_every must be at least 1, got 0"),
        ("checkpoint_every", 0, "training.checkpoint_every must be at least 1, or null for never"),
        ("learning_rate", 0.0, "training.learning_rate must be positive, got 0.0"),
        ("seconds", -1.0, "training.seconds must be positive"),
        ("gradient_clip", 0.0, "training.gradient_clip must be positive"),
        ("weight_decay", -0.1, "training.weight_decay must be 0 or more"),
        ("betas", [0.9], "training.betas must be two numbers"),
        ("betas", [0.9, 1.0], "training.betas must be two numbers"),
        ("decay_steps", 0, "training.decay_steps must be at least 1, or null"),
        ("schedule", "cosine", "training.schedule is 'cosine'"),
        ("precision", "selectiv", "Did you mean 'selective'"),
    ],
)
def test_values_out_of_range_are_named(name, value, message):
    with pytest.raises(ConfigError, match=message):
        from_mapping(TrainingConfig, {name: value}, "training")


def test_a_decay_longer_than_the_run_is_refused():
    with pytest.raises(ConfigError, match="decay_steps is 50, but the run has only 10 steps"):
        TrainingConfig(steps=10, schedule="wsd", decay_steps=50)
