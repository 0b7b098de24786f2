"""`init_from`: a pre-training that starts from another model's weights and vocabulary."""

import dataclasses
import random

import pytest
import torch

from switchlm.data.text.tokenizer import Tokenizer
from switchlm.errors import CheckpointError, ConfigError
from switchlm.huggingface.load import load, save
from switchlm.model.presets import preset
from switchlm.model.transformer import SwitchTransformer
from switchlm.recipes.config import RunConfig, run_config
from switchlm.recipes.pretrain import pretrain

STILL = [
    "training.steps=1", "training.learning_rate=1e-12", "training.evaluate_every=null",
    "data.batch_size=4", "data.input_length=32", "data.held_out_share=0",
]  # fmt: skip
FEW_SENTINELS = 10


@pytest.fixture
def text(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    words = random.Random(0)
    path = tmp_path / "text.txt"
    path.write_text(" ".join(f"word{words.randrange(40)}" for _ in range(2000)), encoding="utf-8")
    return str(path)


@pytest.fixture
def dense(tmp_path):
    """A dense model with another vocabulary than the default, and more rows than its tokenizer."""
    tokenizer = Tokenizer.bytes(FEW_SENTINELS)
    torch.manual_seed(0)
    config = dataclasses.replace(
        preset("dense-nano"),
        vocabulary_size=tokenizer.vocabulary_size + 7,
        end_id=tokenizer.end_id,
        decoder_start_id=5,
    )
    model = SwitchTransformer(config)
    save(model, tokenizer, tmp_path / "dense")
    return model, str(tmp_path / "dense")


def config_of(model: SwitchTransformer, name: str, text: str, *overrides: str) -> RunConfig:
    base = RunConfig(model=model.config, init_from=name)
    return run_config(base, sources=[text], overrides=[*STILL, *overrides])


def test_upcycling_starts_every_expert_from_the_dense_network(tmp_path, text, dense):
    model, name = dense
    config = config_of(model, name, text, "model.num_experts=4")
    list(pretrain(config, tmp_path / "run"))
    sparse, tokenizer = load(tmp_path / "run")
    assert tokenizer is not None
    assert len(tokenizer.sentinel_ids) == FEW_SENTINELS
    assert sparse.config.start_id == 5
    layer, network = (one.encoder.blocks[1].feedforward for one in (sparse, model))
    for expert in range(4):
        assert torch.allclose(layer.experts.up[expert], network.up.weight.t(), atol=1e-9)
    assert torch.allclose(sparse.embedding.weight, model.embedding.weight, atol=1e-9)


def test_an_equal_model_starts_from_its_weights(tmp_path, text, dense):
    model, name = dense
    list(pretrain(config_of(model, name, text), tmp_path / "run"))
    again, _ = load(tmp_path / "run")
    for mine, theirs in zip(again.parameters(), model.parameters(), strict=True):
        assert torch.allclose(mine, theirs, atol=1e-9)


def test_a_resumed_run_continues_from_its_checkpoint_not_from_init_from(tmp_path, text, dense):
    model, name = dense
    moving = ["training.learning_rate=0.01", "training.warmup_steps=0", "model.num_experts=4"]
    four = config_of(model, name, text, *moving, "training.steps=4")
    list(pretrain(four, tmp_path / "whole"))
    two = config_of(model, name, text, *moving, "training.steps=2")
    list(pretrain(two, tmp_path / "broken"))
    (tmp_path / "dense").rename(tmp_path / "gone")
    list(pretrain(four, tmp_path / "broken", resume=True))
    whole, broken = (load(tmp_path / run)[0].state_dict() for run in ("whole", "broken"))
    assert all(torch.equal(whole[key], broken[key]) for key in whole)


def test_models_that_do_not_fit_are_errors(tmp_path, text, dense):
    model, name = dense
    wide = config_of(model, name, text, "model.d_ff=128")
    with pytest.raises(CheckpointError, match=r"d_ff 128 \(not 64\)"):
        list(pretrain(wide, tmp_path / "wide"))
    stated = config_of(model, name, text, "data.tokenizer=unigram")
    with pytest.raises(ConfigError, match=r"data\.tokenizer is 'unigram'"):
        list(pretrain(stated, tmp_path / "stated"))
    Tokenizer.bytes().save(tmp_path / "other")
    other = config_of(model, name, text, f"data.tokenizer={tmp_path / 'other'}")
    with pytest.raises(CheckpointError, match="different vocabularies"):
        list(pretrain(other, tmp_path / "other-run"))
    (tmp_path / "dense" / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no tokenizer\.json"):
        list(pretrain(config_of(model, name, text), tmp_path / "bare"))
