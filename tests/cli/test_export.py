import dataclasses
import os
import re
import sys

import pytest
import torch
import transformers
from tests import commands

from switchlm.data.text.tokenizer import Tokenizer
from switchlm.generation.decode import generate
from switchlm.huggingface import load
from switchlm.model.config import Initialisation
from switchlm.model.presets import preset
from switchlm.model.transformer import SwitchTransformer

TEXT = "two <extra_id_0> three"


def lively(name, folder, **changes):
    """Save a model whose greedy output is long and varied."""
    torch.manual_seed(0)
    config = dataclasses.replace(preset(name), initialisation=Initialisation(scale=4.0), **changes)
    load.save(SwitchTransformer(config), Tokenizer.bytes(), folder)
    return folder


def output_of_the_readme(folder):
    """Run the README's Python in a new process; return the text that it prints."""
    readme = (folder / "README.md").read_text("utf-8")
    [code] = re.findall(r"^```python\n(.*?)^```$", readme, re.S | re.M)
    assert "switchlm" not in code
    code = code.replace("TEXT", TEXT) + "\nimport sys\nassert 'switchlm' not in sys.modules\n"
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = commands.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env={**environment, "PYTHONIOENCODING": "utf-8", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.removesuffix("\n")


@pytest.mark.parametrize("to", ["torch", "onnx"])
def test_programs_generate_the_same_in_a_process_without_switchlm(run_json, tmp_path, to):
    sparse = lively("nano", tmp_path / "sparse", tied_head=False)
    out = tmp_path / to
    result = run_json("export", "--model", sparse, "--to", to, "--out", out, "--check", TEXT)
    model, tokenizer = load.load(sparse)
    prompt = torch.tensor([[*tokenizer.encode(TEXT), 1]])
    [tokens] = generate(model, prompt, max_new_tokens=64).rows([1])
    assert len(set(tokens)) > 5
    assert result["output"] == tokenizer.decode(tokens)
    expected = tokenizer.backend.decode(tokens, skip_special_tokens=False)
    assert output_of_the_readme(out).splitlines() == expected.splitlines()
    assert not list(tmp_path.glob(".*.partial-*")), "nothing is left beside"


def test_a_t5_has_no_capacity_and_a_check_needs_a_text(refuse, nano, tmp_path):
    command = ("export", "--model", nano, "--out", tmp_path / "x", "--to")
    assert "--capacity-factor is for" in refuse(*command, "t5", "--capacity-factor", 2)
    assert "text to --check with is empty" in refuse(*command, "onnx", "--check", " ")
    assert "at least 0.01, got 0.0" in refuse(*command, "torch", "--capacity-factor", 0)


V1_1 = {"tied_head": False, "gated": True, "activation": "gelu"}


@pytest.mark.parametrize("changes", [{}, V1_1], ids=["v1.0", "v1.1"])
def test_a_dense_model_is_a_t5_to_transformers(run_json, tmp_path, changes):
    dense = lively("dense-nano", tmp_path / "dense", **changes)
    out = tmp_path / "t5"
    result = run_json("export", "--model", dense, "--to", "t5", "--out", out, "--check", TEXT)
    assert result["tokens"] > 5
    assert "tokenizer.json" in result["files"]
    theirs = transformers.AutoModelForSeq2SeqLM.from_pretrained(out)
    assert type(theirs) is transformers.T5ForConditionalGeneration
    inputs = transformers.AutoTokenizer.from_pretrained(out)(TEXT, return_tensors="pt")
    tokens = theirs.generate(inputs["input_ids"], max_new_tokens=12, do_sample=False)
    ours = generate(load.load(dense)[0], inputs["input_ids"], max_new_tokens=12)
    assert torch.equal(tokens[:, 1:], ours.tokens_BT)


def test_a_sparse_model_is_no_t5(refuse, nano, tmp_path):
    message = refuse("export", "--model", nano, "--to", "t5", "--out", tmp_path / "t5")
    assert "4 experts" in message
    assert "switchlm distill --teacher" in message
    assert not (tmp_path / "t5").exists()


def test_tokens_that_differ_are_an_error(run, tmp_path, monkeypatch):
    dense = lively("dense-nano", tmp_path / "dense")
    monkeypatch.setattr("switchlm.export.formats.t5_tokens", lambda *_: [104])
    command = ("export", "--model", dense, "--to", "t5", "--out", tmp_path / "t5")
    assert run(*command).exit_code == 0
    result = run(*command, "--check", TEXT)
    assert result.exit_code == 1
    assert "generates other tokens" in result.stderr
