import time

import pytest
import torch

from switchlm.errors import ConfigError
from switchlm.model.count import active_parameters, parameters
from switchlm.model.presets import PRESETS, preset
from switchlm.model.transformer import SwitchTransformer

# Billions, as published for the released checkpoints.
RELEASED = {
    "switch-base-8": 0.62,
    "switch-base-16": 1.07,
    "switch-base-32": 1.98,
    "switch-base-64": 3.79,
    "switch-base-128": 7.42,
    "switch-base-256": 14.7,
    "switch-large-128": 26.3,
    "switch-xxl-128": 394.7,
    "switch-c-2048": 1571.3,
}


@pytest.mark.parametrize(("name", "billions"), RELEASED.items())
def test_released_models_have_their_published_size(name: str, billions: float) -> None:
    digits = len(str(billions).split(".")[1])
    assert round(parameters(preset(name)) / 1e9, digits) == billions


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_builds_without_memory_in_a_moment(name: str) -> None:
    start = time.process_time()
    with torch.device("meta"):
        model = SwitchTransformer(preset(name))
    assert all(parameter.is_meta for parameter in model.parameters())
    assert time.process_time() - start < 5


def test_sparse_layers_of_the_released_models() -> None:
    for name, layers in (("switch-base-8", 6), ("switch-large-128", 12), ("switch-xxl-128", 12)):
        config = preset(name)
        for decoder in (False, True):
            sparse = [n for n in range(24) if config.is_sparse(n, decoder=decoder)]
            assert sparse[:layers] == list(range(1, 2 * layers, 2)), "every second, from layer 1"
    everywhere = preset("switch-c-2048")
    assert all(everywhere.is_sparse(layer, decoder=d) for layer in range(15) for d in (False, True))


@pytest.mark.parametrize("name", [name for name in PRESETS if name.startswith("dense-")])
def test_dense_twins_have_no_experts(name: str) -> None:
    config = preset(name)
    assert config.num_experts == 0
    assert parameters(config) == active_parameters(config)


def test_t5_base_is_the_twin_of_switch_base() -> None:
    assert parameters(preset("dense-base")) == 222_903_552
    assert preset("switch-base-64").dense_twin() == preset("dense-base")


def test_an_unknown_preset_names_the_near_miss() -> None:
    with pytest.raises(ConfigError, match=r"no preset 'switch-base-12'.*Did you mean"):
        preset("switch-base-12")
    with pytest.raises(ConfigError, match=r"Known: .*nano"):
        preset("gpt")
