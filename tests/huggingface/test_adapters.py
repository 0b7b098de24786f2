import json

import pytest
import torch

from switchlm.errors import CheckpointError
from switchlm.huggingface.adapters import AdapterConfig, load_adapters, save_adapters
from switchlm.model import lora
from switchlm.model.presets import preset
from switchlm.model.transformer import SwitchTransformer


def nano():
    torch.manual_seed(0)
    return SwitchTransformer(preset("nano"))


@pytest.fixture
def saved(tmp_path):
    """A folder of adapters that are not zero, and the model with them."""
    model = nano()
    lora.apply(model, 2, 4.0)
    with torch.no_grad():
        for pair in lora.adapters(model).values():
            pair.normal_()
    save_adapters(model, AdapterConfig(rank=2, alpha=4.0, base="nano"), tmp_path / "adapters")
    return tmp_path / "adapters", model


def test_adapters_are_added_to_their_base_model(saved):
    folder, model = saved
    again = nano()
    assert load_adapters(again, folder) == AdapterConfig(rank=2, alpha=4.0, base="nano")
    one, other = lora.merged(model).state_dict(), lora.merged(again).state_dict()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_they_are_a_small_part_of_the_model(saved):
    folder, model = saved
    size = sum(pair.numel() for pair in lora.adapters(model).values())
    assert (folder / "adapters.safetensors").stat().st_size == pytest.approx(4 * size, abs=8192)


def test_a_model_of_another_shape_is_refused_and_unchanged(saved):
    folder, _ = saved
    model = SwitchTransformer(preset("dense-nano"))
    before = list(model.state_dict())
    with pytest.raises(CheckpointError, match=r"not for this model: .* missing here.* 'nano'"):
        load_adapters(model, folder)
    assert list(model.state_dict()) == before


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("adapters.json", None, "There are no adapters in"),
        ("adapters.json", "{", "Cannot read adapters.json"),
        ("adapters.json", json.dumps({"rank": 0, "alpha": 1.0}), "rank of at least 1"),
        ("adapters.json", json.dumps({"rank": 3, "alpha": 1.0}), "not for this model"),
        ("adapters.json", json.dumps({"rnk": 3}), "Did you mean 'rank'"),
        ("adapters.safetensors", "no tensors", "is damaged"),
        ("adapters.safetensors", None, "is missing"),
    ],
)
def test_damaged_adapters_are_errors(saved, file, content, message):
    folder, _ = saved
    (folder / file).unlink()
    if content is not None:
        (folder / file).write_text(content)
    with pytest.raises(CheckpointError, match=message):
        load_adapters(nano(), folder)


def test_an_adapter_of_peft_is_told_apart(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="convert_adapter"):
        load_adapters(nano(), tmp_path)
