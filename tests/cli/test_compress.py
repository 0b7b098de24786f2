import json
from pathlib import Path

import pytest
import transformers

import switchlm
from switchlm.data.text.tokenizer import Tokenizer
from switchlm.errors import CheckpointError
from switchlm.huggingface import load
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
def test_every_command_takes_the_quantised_model(run, run_json, compressed, text_file, bits, what):
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


def test_sizes_are_reported(run_json, nano, tmp_path):
    out = tmp_path / "c"
    found = run_json("compress", "--model", nano, "--bits", 8, "--what", "all", "--out", out)
    before, after = (step["bytes"] for step in found["steps"])
    assert after == (out / "quantised.safetensors").stat().st_size
    assert before == (Path(nano) / "model.safetensors").stat().st_size
    assert after < 0.5 * before
    assert 0 < found["steps"][1]["weight_error"] < 0.02


def test_what_rounding_loses_is_said_without_text(run, nano, tmp_path):
    said = run("compress", "--model", nano, "--bits", 4, "--out", tmp_path / "c").output
    assert "Rounding changed the weights by" in " ".join(said.split())


def test_transformers_refuses_it(compressed):
    with pytest.raises(OSError, match="no file named"):
        transformers.SwitchTransformersForConditionalGeneration.from_pretrained(
            compressed("--bits", 8)
        )


def test_commands_that_need_float_weights_are_errors(refuse, compressed, text_file, tmp_path):
    out = compressed("--bits", 4)
    again = refuse("compress", "--model", out, "--bits", 8, "--out", tmp_path / "x")
    assert "quantised to 4 bits" in again
    assert "The model is quantised" in refuse("convert", "--model", out, "--out", tmp_path / "x")
    text = ("--data", text_file, "--out", tmp_path / "run")
    assert "quantised to 4 bits" in refuse("pretrain", "--init-from", out, *text)
    tune = ("finetune", "--model", out, "--task", text_file, "--out", tmp_path / "run")
    assert "quantised to 4 bits" in refuse(*tune)
    with pytest.raises(CheckpointError, match="training it needs floating-point"):
        load.load_weights(SwitchTransformer(preset("nano")), out)
    model, tokenizer = switchlm.load(out)
    with pytest.raises(CheckpointError, match="quantised"):
        switchlm.save(model, tokenizer, tmp_path / "x")


@pytest.mark.parametrize(("options", "message"), [
    (("--bits", "5"), "--bits is 5"),
    (("--bits", "4", "--group-size", "48"), "The group size is 48"),
    ((), "nothing to do"),
    (("--calibrate",), "how many --bits"),
    (("--keep-experts", "4"), "of the 4 experts"),
    (("--keep-experts", "0"), "at least 1"),
    (("--keep-experts", "2", "--merge-experts", "2"), "of the 2 experts"),
    (("--keep-experts", "2"), "There is no text"),
])  # fmt: skip
def test_impossible_options_are_refused(refuse, nano, tmp_path, options, message):
    out = tmp_path / "x"
    assert message in refuse("compress", "--model", nano, "--out", out, *options)
    assert not out.exists()


@pytest.fixture
def texts(tmp_path):
    """A folder of several documents, so that some can be held out."""
    folder = tmp_path / "texts"
    folder.mkdir()
    for i in range(12):
        lines = (f"Sentence {j} of text {i} says {i * j}.\n" for j in range(40))
        (folder / f"{i}.txt").write_text("".join(lines))
    return folder


SHORT = ("--batches", 2, "--batch-size", 4, "--input-length", 64)


def test_calibration_is_reported_beside_rounding(run, run_json, nano, texts, tmp_path):
    command = ("compress", "--model", nano, "--data", texts, *SHORT, "--bits", 4, "--calibrate")
    found = run_json(*command, "--out", tmp_path / "q")
    assert [step["step"] for step in found["steps"]] == [
        "as it was", "4 bits, rounded to nearest", "4 bits, calibrated",
    ]  # fmt: skip
    assert all(0 < step["loss"] < 10 for step in found["steps"])
    assert found["plan"]["quantisation"]["bits"] == 4
    shown = run(*command, "--out", tmp_path / "again")
    assert "calibrated" in shown.stdout
    first = (tmp_path / "q" / "quantised.safetensors").read_bytes()
    assert (tmp_path / "again" / "quantised.safetensors").read_bytes() == first


def test_a_short_text_is_measured_on_with_a_warning(run, nano, tmp_path):
    text = tmp_path / "short.txt"
    text.write_text("A text of one row and a half. " * 3)
    options = ("--data", text, *SHORT, "--out", tmp_path / "q")
    result = run("compress", "--model", nano, "--bits", 8, *options)
    assert result.exit_code == 0, result.output
    assert "a single document" in result.stderr


def test_fine_tuned_pruned_merged_and_quantised_it_still_generates(
    run, run_json, nano, texts, tmp_path
):
    """Each step's output is the next one's model."""
    task = tmp_path / "task"
    task.mkdir()
    for split in ("train", "validation"):
        rows = (
            json.dumps({"input": f"is {i} odd?", "target": ["no", "yes"][i % 2]}) for i in range(40)
        )
        (task / f"{split}.jsonl").write_text("\n".join(rows))
    steps = ("training.steps=2", "training.evaluate_every=2", "training.checkpoint_every=2")
    settings = [part for step in steps for part in ("--set", step)]
    lengths = ("--set", "finetune.input_length=32", "--set", "finetune.target_length=8")
    tuned = tmp_path / "tuned"
    result = run("finetune", "--model", nano, "--task", task, "--out", tuned, *settings, *lengths)
    assert result.exit_code == 0, result.output
    few = tmp_path / "few"
    options = ("--task", task, "--batches", 2, "--batch-size", 8, "--input-length", 32)
    pruned = run_json(
        "compress", "--model", tuned, *options, "--keep-experts", 3, "--by", "gradient",
        "--merge-experts", 2, "--out", few,
    )  # fmt: skip
    assert len(pruned["steps"]) == 3
    assert {len(kept) for kept in pruned["kept"].values()} == {3}
    assert {sum(map(len, groups)) for groups in pruned["merged"].values()} == {3}
    assert run_json("inspect", "--model", few)["shape"]["num_experts"] == 2
    small = tmp_path / "small"
    again = ("compress", "--model", few, *options, "--bits", 4, "--what", "all", "--calibrate")
    assert run(*again, "--out", small).exit_code == 0
    assert run_json("inspect", "--model", small)["shape"]["num_experts"] == 2
    assert run("generate", "--model", small, "is 3 odd?").exit_code == 0
    scores = run_json("evaluate", "--model", small, "--task", task, "--input-length", 32)
    assert scores["tasks"]


def test_of_a_dense_model_all_matrices_are_quantised(run, refuse, tmp_path):
    dense = tmp_path / "dense"
    load.save(SwitchTransformer(preset("dense-nano")), Tokenizer.bytes(), dense)
    result = run("compress", "--model", dense, "--bits", 8, "--out", tmp_path / "small")
    assert result.exit_code == 0, result.output
    assert "is dense: all its matrices are quantised" in result.stderr
    whole, small = (
        sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        for folder in (dense, tmp_path / "small")
    )
    assert small < whole / 2
    command = ("compress", "--model", dense, "--bits", 8, "--what", "experts")
    assert "is dense and has none" in refuse(*command, "--out", tmp_path / "none")
    assert not (tmp_path / "none").exists()
