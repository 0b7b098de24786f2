import dataclasses

import pytest
import torch
import transformers

from switchlm.huggingface import load
from switchlm.huggingface.adapters import AdapterConfig, save_adapters
from switchlm.model import lora
from switchlm.model.presets import preset
from switchlm.model.transformer import SwitchTransformer


def test_the_copy_has_the_same_weights_and_tokenizer(run_json, nano, tmp_path):
    out = tmp_path / "copy"
    result = run_json("convert", "--model", nano, "--out", out)
    assert "model.safetensors" in result["files"]
    (model, tokenizer), (copy, its_tokenizer) = load.load(nano), load.load(out)
    assert copy.config == model.config
    for name, tensor in model.state_dict().items():
        assert torch.equal(copy.state_dict()[name], tensor)
    assert its_tokenizer.to_json() == tokenizer.to_json()
    transformers.SwitchTransformersForConditionalGeneration.from_pretrained(out)


def test_adapters_are_merged(run, refuse, nano, tmp_path):
    model, _ = load.load(nano)
    lora.apply(model, 2, 4.0)
    with torch.no_grad():
        for pair in lora.adapters(model).values():
            pair.normal_()
    save_adapters(model, AdapterConfig(rank=2, alpha=4.0), tmp_path / "adapters")
    command = ("convert", "--model", nano, "--adapters", tmp_path / "adapters", "--out")
    assert run(*command, tmp_path / "full").exit_code == 0
    full = load.load(tmp_path / "full")[0].state_dict()
    expected = lora.merged(model).state_dict()
    assert all(torch.equal(full[name], expected[name]) for name in expected)
    assert run(*command, tmp_path / "half", "--dtype", "bfloat16").exit_code == 0
    half = load.load(tmp_path / "half")[0].state_dict()
    assert all(torch.equal(half[name], expected[name].bfloat16()) for name in expected)
    assert "There are no adapters in" in refuse(*command[:4], nano, *command[5:], tmp_path / "x")


def test_weights_are_cast(run, nano, tmp_path):
    result = run("convert", "--model", nano, "--out", tmp_path / "half", "--dtype", "bfloat16")
    assert result.exit_code == 0
    model, _ = load.load(tmp_path / "half")
    assert {tensor.dtype for tensor in model.parameters()} == {torch.bfloat16}


@pytest.fixture
def gated(tmp_path):
    """A model that transformers cannot represent."""
    config = dataclasses.replace(preset("nano"), gated=True, activation="gelu")
    with pytest.warns(UserWarning, match="gated"):
        load.save(SwitchTransformer(config), None, tmp_path / "gated")
    return tmp_path / "gated"


def test_what_transformers_cannot_represent_is_refused(refuse, gated, tmp_path):
    message = refuse("convert", "--model", gated, "--to", "huggingface", "--out", tmp_path / "x")
    assert "no gated feed-forward" in message
    assert "--to native" in message
    assert not (tmp_path / "x").exists()


def test_native_keeps_everything(run, gated, tmp_path):
    result = run("convert", "--model", gated, "--to", "native", "--out", tmp_path / "x")
    assert result.exit_code == 0
    assert "no gated feed-forward" in result.stderr
    assert load.load(tmp_path / "x")[0].config.gated


def test_other_files_of_the_user_are_not_replaced(refuse, nano, tmp_path):
    tmp_path.joinpath("thesis.tex").write_text("years of work")
    assert "thesis.tex" in refuse("convert", "--model", nano, "--out", tmp_path)
    assert tmp_path.joinpath("thesis.tex").read_text() == "years of work"


def test_weights_beyond_float16_are_refused_and_nothing_is_written(tmp_path, refuse, nano):
    model, tokenizer = load.load(nano)
    with torch.no_grad():
        model.embedding.weight[3, 5] = 1e5
    load.save(model, tokenizer, tmp_path / "large")
    out = tmp_path / "half"
    command = ("convert", "--model", tmp_path / "large", "--to", "native", "--dtype", "float16")
    message = refuse(*command, "--out", out)
    assert "do not fit into float16: the largest is 1e+05" in message
    assert not out.exists()
