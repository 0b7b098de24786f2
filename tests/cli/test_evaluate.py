import math
import shutil

import pytest

from switchlm.config import to_mapping, write_yaml
from switchlm.data.config import DataConfig
from switchlm.huggingface import load
from switchlm.recipes.trained_with import metadata_of

SHORT = ("--input-length", 48, "--batch-size", 4, "--batches", 3)


def test_losses_by_source_add_up(run_json, nano, text_file):
    sources = ("--data", f"a={text_file}:1", "--data", f"b={text_file}:3")
    result = run_json("evaluate", "--model", nano, *sources, *SHORT)
    parts = result["sources"]
    assert set(parts) == {"a", "b"}
    assert sum(part["tokens"] for part in parts.values()) == result["tokens"]
    weighted = sum(part["loss"] * part["tokens"] for part in parts.values())
    assert weighted / result["tokens"] == pytest.approx(result["loss"])
    assert result["perplexity"] == pytest.approx(math.exp(result["loss"]))
    assert 3 < result["loss"] < 30, "of an untrained model"


def test_the_table_shows_the_same(run, run_json, nano, text_file):
    line = ("evaluate", "--model", nano, "--data", text_file, *SHORT)
    shown = run(*line)
    assert shown.exit_code == 0
    result = run_json(*line)
    assert f"{result['loss']:.4f}" in shown.stdout
    assert f"{result['bits_per_byte']:.3f}" in shown.stdout
    assert "story" in shown.stdout


def test_a_run_is_measured_on_what_it_held_out(run_json, nano, tmp_path):
    texts = tmp_path / "texts"
    texts.mkdir()
    for i in range(40):
        texts.joinpath(f"{i}.txt").write_text(f"Document {i} has the number {i * 7}. " * 8)
    model, tokenizer = load.load(nano)
    load.save(model, tokenizer, tmp_path / "run" / "model")
    tmp_path.joinpath("run", "config.yaml").write_text(
        f"data: {{sources: ['{texts}'], input_length: 48, batch_size: 4, held_out_share: 0.2}}\n"
    )
    result = run_json("evaluate", "--model", tmp_path / "run", "--batches", 2)
    assert set(result["sources"]) == {"texts"}
    everything = run_json("evaluate", "--model", tmp_path / "run", "--data", texts, "--batches", 2)
    assert everything["loss"] != result["loss"]


def test_runs_that_held_out_other_texts_do_not_compare(refuse, nano, tmp_path):
    line = ["evaluate", "--batches", 1]
    for name in ("one", "two"):
        texts = tmp_path / name / "of" / name
        texts.mkdir(parents=True)
        for n in range(40):
            texts.joinpath(f"{n}.txt").write_text(f"Document {n} of {name}. " * 8)
        shutil.copytree(nano, tmp_path / name / "model")
        settings = "input_length: 48, batch_size: 4, held_out_share: 0.2"
        tmp_path.joinpath(name, "config.yaml").write_text(
            f"data: {{sources: ['{texts}'], {settings}}}\n"
        )
        line += ["--model", tmp_path / name]
    message = refuse(*line)
    assert "was measured on one, but" in message
    assert "on two, which do not compare" in message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Give some with --data"),
        (["--data", "/no/such/file"], "no file, folder or glob"),
        (["--data", "python:nonsense"], "python:stdlib"),
        (["--data", "{text}", "--input-length", "2"], "input_length"),
        (["--data", "{text}", "--input-length", "60000"], "less than one row"),
    ],
)
def test_mistakes_are_errors(refuse, nano, text_file, arguments, message):
    arguments = [argument.format(text=text_file) for argument in arguments]
    assert message in refuse("evaluate", "--model", nano, *arguments)


def test_a_text_too_short_for_a_row_is_an_error(refuse, nano, tmp_path):
    tmp_path.joinpath("short.txt").write_text("Too short.")
    message = refuse("evaluate", "--model", nano, "--data", tmp_path / "short.txt")
    assert "less than one row" in message


def test_damaged_weights_are_an_error(refuse, nano, tmp_path, text_file):
    model, tokenizer = load.load(nano)
    model.embedding.weight.data[5] = float("nan")
    load.save(model, tokenizer, tmp_path / "bad")
    message = refuse("evaluate", "--model", tmp_path / "bad", "--data", text_file, *SHORT)
    assert "The loss of" in message


def test_a_run_on_tasks_is_measured_on_text_too(run_json, nano, text_file, tmp_path):
    """Its configuration has other sections, and no text."""
    shutil.copytree(nano, tmp_path / "tuned" / "model")
    (tmp_path / "tuned" / "config.yaml").write_text("finetune: {tasks: [sst2]}\n")
    options = ("--data", text_file, "--input-length", 64, "--batches", 1)
    found = run_json("evaluate", "--model", tmp_path / "tuned", *options)
    assert found["loss"] == run_json("evaluate", "--model", nano, *options)["loss"]


def test_experts_may_stay_on_disk(run, run_json, nano, text_file):
    line = ("evaluate", "--model", nano, "--data", text_file, *SHORT)
    assert "Experts on disk" in run(*line, "--expert-memory", "20kB").stderr
    found = run_json(*line, "--expert-memory", "20kB")
    assert found["experts"]["bytes_read"] > 0
    assert found["loss"] == pytest.approx(run_json(*line)["loss"], rel=1e-5)


def test_a_run_its_model_and_its_codes_are_measured_alike(run_json, run, nano, tmp_path, text_file):
    model, tokenizer = load.load(nano)
    settings = DataConfig(sources=(text_file,), input_length=40, mean_span=2.0, batch_size=4)
    about = metadata_of(model, settings)
    load.save(model, tokenizer, tmp_path / "run" / "model", metadata=about)
    write_yaml(tmp_path / "run" / "config.yaml", {"data": to_mapping(settings)})
    run("compress", "--model", tmp_path / "run", "--bits", 8, "--out", tmp_path / "int8")
    names = (tmp_path / "run", tmp_path / "run" / "model", tmp_path / "int8")
    models = [part for name in names for part in ("--model", name)]
    found = run_json("evaluate", *models, "--data", text_file, "--batches", 2)
    first, second, codes = found["models"]
    assert first["loss"] == second["loss"] == pytest.approx(codes["loss"], rel=0.01)
    assert first["settings"] == second["settings"] == codes["settings"]
    assert (first["settings"]["input_length"], first["settings"]["mean_span"]) == (40, 2.0)
    assert found["summary"]["story"]["loss"]["mean"] == pytest.approx(first["loss"], rel=0.01)
    shown = run("inspect", "--model", tmp_path / "int8")
    targets = first["settings"]["target_length"]
    assert f"(40 inputs, {targets} targets)" in shown.stdout


def test_models_measured_with_different_settings_have_no_mean(
    run, run_json, nano, tmp_path, text_file
):
    model, tokenizer = load.load(nano)
    about = metadata_of(model, DataConfig(input_length=40, batch_size=4))
    load.save(model, tokenizer, tmp_path / "short", metadata=about)
    load.save(
        model,
        tokenizer,
        tmp_path / "long",
        metadata=metadata_of(model, DataConfig(input_length=64, batch_size=4)),
    )
    line = (
        "evaluate",
        "--model",
        tmp_path / "short",
        "--model",
        tmp_path / "long",
        "--data",
        text_file,
    )
    assert run_json(*line, "--batches", 1)["summary"] is None
    shown = run(*line, "--batches", 1)
    assert "different settings" in shown.stderr
    assert "mean" not in shown.stdout
    same = run_json(*line, "--batches", 1, "--input-length", 48)
    assert same["summary"]["story"]["loss"]["std"] == 0
