from pathlib import Path

import pytest
import transformers

import switchlm
from switchlm.checkpoint import huggingface
from switchlm.errors import CheckpointError
from switchlm.model.presets import preset
from switchlm.model.transformer import SwitchTransformer


@pytest.fixture
def compressed(run, nano, tmp_path):
    """Quantise the nano model; return its folder."""

    def compressed(*options):
        out = tmp_path / "compressed"
        result = run("compress", "--model", nano, "--out", out, *options)
        assert result.exit_code == 0, result.output
        return out

    return compressed


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("what", ["experts", "all"])
def test_every_verb_takes_the_quantised_model(run, run_json, compressed, text_file, bits, what):
    out = compressed("--bits", bits, "--what", what)
    assert run("generate", "--model", out, "a <extra_id_0> b").exit_code == 0
    sizes = run_json("inspect", "--model", out)
    assert sizes["quantisation"] == {"bits": bits, "group_size": 64, "what": what}
    options = ("--data", text_file, "--input-length", 64, "--batch-size", 4)
    assert run_json("inspect", "--model", out, *options)["routing"]
    assert run_json("evaluate", "--model", out, *options)["loss"] < 7


def test_the_loss_stays_close(run_json, compressed, nano, text_file):
    options = ("--data", text_file, "--input-length", 64, "--batch-size", 4)
    before = run_json("evaluate", "--model", nano, *options)["loss"]
    after = run_json("evaluate", "--model", compressed("--bits", 8), *options)["loss"]
    assert before != after
    assert abs(before - after) < 0.02


def test_sizes_are_told(run_json, nano, tmp_path):
    out = tmp_path / "c"
    found = run_json("compress", "--model", nano, "--bits", 8, "--what", "all", "--out", out)
    assert found["bytes_after"] == (out / "quantised.safetensors").stat().st_size
    assert found["bytes_before"] == (Path(nano) / "model.safetensors").stat().st_size
    assert found["bytes_after"] < 0.5 * found["bytes_before"]


def test_transformers_refuses_it(compressed):
    with pytest.raises(OSError, match="no file named"):
        transformers.SwitchTransformersForConditionalGeneration.from_pretrained(
            compressed("--bits", 8)
        )


def test_what_needs_float_weights_says_so(refuse, compressed, text_file, tmp_path):
    out = compressed("--bits", 4)
    again = refuse("compress", "--model", out, "--bits", 8, "--out", tmp_path / "x")
    assert "quantised to 4 bits" in again
    assert "The model is quantised" in refuse("convert", "--model", out, "--out", tmp_path / "x")
    text = ("--data", text_file, "--out", tmp_path / "run")
    assert "quantised to 4 bits" in refuse("pretrain", "--init-from", out, *text)
    tune = ("finetune", "--model", out, "--task", text_file, "--out", tmp_path / "run")
    assert "quantised to 4 bits" in refuse(*tune)
    with pytest.raises(CheckpointError, match="training it needs floating-point"):
        huggingface.fill(SwitchTransformer(preset("nano")), out)
    model, tokenizer = switchlm.load(out)
    with pytest.raises(CheckpointError, match="quantised"):
        switchlm.save(model, tokenizer, tmp_path / "x")


@pytest.mark.parametrize(("options", "words"), [
    (("--bits", "5"), "--bits is 5"),
    (("--bits", "4", "--group-size", "48"), "The group size is 48"),
])  # fmt: skip
def test_impossible_options_are_refused(refuse, nano, tmp_path, options, words):
    out = tmp_path / "x"
    assert words in refuse("compress", "--model", nano, "--out", out, *options)
    assert not out.exists()
