import dataclasses

import pytest

from switchlm.huggingface import load
from switchlm.model import count
from switchlm.model.presets import preset
from switchlm.model.transformer import SwitchTransformer

SHORT = ("--input-length", 48, "--batch-size", 4, "--batches", 2)


def test_sizes_are_those_of_the_configuration(run_json, nano):
    config = preset("nano")
    for model in (("--model", nano), ("--preset", "nano")):
        result = run_json("inspect", *model)
        assert result["parameters"] == count.parameters(config)
        assert result["active_parameters"] == count.active_parameters(config)
        assert result["flops_per_token"] == count.flops_per_token(config, 512, 114)
        assert result["encoder_layers"] == ["dense", "switch"]
        assert result["router"]["mode"] == "paper"
        assert "routing" not in result


def test_large_presets_are_inspected_without_weights(run_json):
    result = run_json("inspect", "--preset", "switch-c-2048")
    assert round(result["parameters"] / 1e9, 1) == 1571.3
    assert result["decoder_layers"] == ["switch"] * 15


def test_tables(run, nano, text_file):
    plain = run("inspect", "--model", nano)
    assert plain.exit_code == 0
    assert f"{count.parameters(preset('nano')):,}" in plain.stdout
    routed = run("inspect", "--model", nano, "--data", text_file, *SHORT)
    assert routed.exit_code == 0
    assert "encoder.blocks.1.feedforward" in routed.stdout
    assert "decoder.blocks.1.feedforward" in routed.stdout
    shown = " ".join(routed.stdout.split())
    assert "of 4 experts are dead" in shown
    assert "more than its share of" not in shown, "one source has all"


def test_experts_are_shown_by_source(run, nano, text_file, tmp_path):
    digits = tmp_path / "digits.txt"
    digits.write_text("".join(f"{number * 7919}\n" for number in range(600)))
    data = ("--data", f"words={text_file}", "--data", f"digits={digits}")
    result = run("inspect", "--model", nano, *data, *SHORT)
    assert result.exit_code == 0
    shown = " ".join(result.stdout.replace("│", " ").split())
    assert "more than" in shown
    assert "digits x" in shown
    assert "number " in shown


def test_routing_of_a_text(run_json, nano, text_file):
    layers = run_json("inspect", "--model", nano, "--data", text_file, *SHORT)["routing"]
    assert [layer["name"] for layer in layers] == [
        "encoder.blocks.1.feedforward",
        "decoder.blocks.1.feedforward",
    ]
    assert sum(layers[0]["load_E"]) == 2 * 4 * 48
    assert {"number", "word start", "sentinel"} <= set(layers[0]["class_load"])
    assert layers[0]["source_load"] == {"story": layers[0]["load_E"]}


def test_a_dense_model_is_reported(run, tmp_path, nano, text_file):
    _, tokenizer = load.load(nano)
    dense = SwitchTransformer(dataclasses.replace(preset("nano"), num_experts=0))
    load.save(dense, tokenizer, tmp_path / "dense")
    result = run("inspect", "--model", tmp_path / "dense", "--data", text_file, *SHORT)
    assert result.exit_code == 0
    assert "dense: it has no experts" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "either --model DIR or --preset"),
        (["--model", "x", "--preset", "nano"], "either --model DIR or --preset"),
        (["--preset", "nanno"], "Did you mean 'nano'?"),
        (["--preset", "nano", "--data", "x"], "--data needs --model"),
        (["--model", "/no/where"], "There is no folder"),
    ],
)
def test_mistakes_are_errors(refuse, arguments, message):
    assert message in refuse("inspect", *arguments)
