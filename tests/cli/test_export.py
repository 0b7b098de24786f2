import dataclasses

import pytest
import torch
import transformers

from switchlm.checkpoint import huggingface
from switchlm.data.tokenizer import Tokenizer
from switchlm.generation.decode import generate
from switchlm.model.presets import preset
from switchlm.model.transformer import SwitchTransformer

TEXT = "two <extra_id_0> three"


def lively(name, folder, **changes):
    """Save a model whose greedy output is long and varied."""
    torch.manual_seed(0)
    config = dataclasses.replace(preset(name), initialisation_scale=4.0, **changes)
    huggingface.save(SwitchTransformer(config), Tokenizer.bytes(), folder)
    return folder


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
    ours = generate(huggingface.load(dense)[0], inputs["input_ids"], max_new_tokens=12)
    assert torch.equal(tokens[:, 1:], ours.tokens_BT)


def test_a_sparse_model_is_no_t5(refuse, nano, tmp_path):
    message = refuse("export", "--model", nano, "--to", "t5", "--out", tmp_path / "t5")
    assert "4 experts" in message
    assert "switchlm distill --teacher" in message
    assert not (tmp_path / "t5").exists()


def test_tokens_that_differ_are_said(run, tmp_path, monkeypatch):
    dense = lively("dense-nano", tmp_path / "dense")
    monkeypatch.setattr("switchlm.export.t5.t5_tokens", lambda *_: [104])
    command = ("export", "--model", dense, "--to", "t5", "--out", tmp_path / "t5")
    assert run(*command).exit_code == 0
    result = run(*command, "--check", TEXT)
    assert result.exit_code == 1
    assert "says something else" in result.stderr
