"""Saved models load here and in transformers; missing and unexpected tensors are errors."""

import dataclasses
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import switchlm
from switchlm.data.text.tokenizer import Tokenizer
from switchlm.errors import CheckpointError
from switchlm.model.config import Initialisation, ModelConfig, RouterConfig
from switchlm.model.transformer import SwitchTransformer

NANO = ModelConfig(
    vocabulary_size=384,
    d_model=16,
    d_ff=24,
    d_kv=8,
    num_heads=2,
    num_encoder_layers=4,
    num_decoder_layers=3,
    num_experts=3,
    initialisation=Initialisation(scale=1.0),
)
HF = RouterConfig(mode="hf", capacity_factor=None, evaluation_capacity_factor=None)
DROPLESS = RouterConfig(capacity_factor=None, evaluation_capacity_factor=None)
CASES = {
    "paper": NANO,
    "paper step 3": dataclasses.replace(NANO, sparse_step=3, router=DROPLESS),
    "every layer": dataclasses.replace(NANO, sparse_step=1, router=DROPLESS, dropout=0.1),
    "hf": dataclasses.replace(NANO, sparse_step=3, router=HF),
    "hf with capacity": dataclasses.replace(
        NANO, router=dataclasses.replace(HF, expert_capacity=2, z_weight=0.1)
    ),
    "hf, other step in the decoder": dataclasses.replace(
        NANO, sparse_step=4, decoder_sparse_step=1, router=HF
    ),
    "hf, dense decoder": dataclasses.replace(NANO, decoder_sparse_step=0, router=HF),
    "untied": dataclasses.replace(NANO, tied_head=False, router=DROPLESS),
    "t5x": dataclasses.replace(NANO, router=RouterConfig(mode="t5x", min_capacity=2)),
    "gelu": dataclasses.replace(NANO, activation="gelu", router=DROPLESS),
    "no-token-left-behind": dataclasses.replace(NANO, router=RouterConfig(reroute_overflow=True)),
    "xxl": dataclasses.replace(NANO, activation="gelu", gated=True, tied_head=False),
    "gated relu": dataclasses.replace(NANO, gated=True),
    "attention": dataclasses.replace(NANO, attention_experts=True, router=DROPLESS),
    "bias": dataclasses.replace(NANO, attention_experts=True, router=RouterConfig(balance="bias")),
    "top 2": dataclasses.replace(NANO, router=RouterConfig(experts_per_token=2)),
    "expert choice": dataclasses.replace(NANO, router=RouterConfig(selection="expert_choice")),
    "t5 1.0": NANO.dense_twin(),
    "t5 1.1": dataclasses.replace(
        NANO, num_experts=0, activation="gelu", gated=True, tied_head=False
    ),
    "t5 gelu": dataclasses.replace(NANO, num_experts=0, activation="gelu"),
}
# What transformers cannot load, or computes differently.
NOT_THERE = ("paper step 3", "xxl", "gated relu", "attention", "bias", "top 2", "expert choice")


def quiet(message: str) -> None:
    """Ignore reports."""


def build(config: ModelConfig) -> SwitchTransformer:
    model = SwitchTransformer(config).eval()
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.add_(0.1 * torch.randn_like(tensor))
    return model


def same_tensors(one: SwitchTransformer, two: SwitchTransformer) -> None:
    expected, found = one.state_dict(), two.state_dict()
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensor, found[name]), name


@pytest.fixture
def nano(tmp_path: Path) -> Path:
    folder = tmp_path / "nano"
    switchlm.save(build(NANO), None, folder)
    return folder


def edit_weights(folder: Path, change) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize("name", CASES)
def test_saved_models_load_exactly(name, tmp_path):
    model = build(CASES[name])
    said: list[str] = []
    switchlm.save(model, None, tmp_path / "model", max_shard_bytes=20_000, report=said.append)
    again, tokenizer = switchlm.load(tmp_path / "model", report=said.append)
    assert again.config == model.config
    assert tokenizer is None
    assert not again.training
    same_tensors(model, again)
    assert bool(said) == (name in NOT_THERE)
    card = (tmp_path / "model" / "README.md").read_text()
    assert all(message in card for message in said)


@pytest.mark.parametrize("name", [name for name in CASES if name not in NOT_THERE])
def test_transformers_loads_what_is_saved(name, tmp_path, assert_close):
    transformers = pytest.importorskip("transformers")
    model = build(CASES[name])
    switchlm.save(model, None, tmp_path, max_shard_bytes=20_000)
    kind = json.loads((tmp_path / "config.json").read_text())["architectures"][0]
    theirs, info = getattr(transformers, kind).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    inputs, targets = torch.randint(3, 384, (2, 9)), torch.randint(3, 384, (2, 5))
    mask = torch.ones_like(inputs)
    mask[0, 5:] = 0
    output = theirs(input_ids=inputs, attention_mask=mask, decoder_input_ids=targets)
    dropped = [routing.dropped for routing in model(inputs, targets, mask).routing]
    if model.config.router.mode != "hf" and any(dropped):
        pytest.skip("capacity binds here, which transformers cannot express")
    assert_close(model(inputs, targets, mask).logits_BTV, output.logits, "logits")


@pytest.mark.parametrize("name", NOT_THERE)
def test_features_that_transformers_lacks_are_reported(name, tmp_path):
    with pytest.warns(UserWarning, match="transformers"):
        switchlm.save(build(CASES[name]), None, tmp_path / "model")


def test_the_tokenizer_is_saved_and_loaded(tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizer = Tokenizer.bytes()
    switchlm.save(build(NANO), tokenizer, tmp_path)
    _, again = switchlm.load(tmp_path)
    text = "sparse <extra_id_0> naïve"
    assert again.encode(text) == tokenizer.encode(text)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs(text, add_special_tokens=False).input_ids == tokenizer.encode(text)


def test_run_folders_are_models_too(tmp_path):
    model = build(NANO)
    switchlm.save(model, None, tmp_path / "run" / "model")
    same_tensors(model, switchlm.load(tmp_path / "run")[0])


def test_shards_and_index(tmp_path):
    switchlm.save(build(NANO), None, tmp_path, max_shard_bytes=20_000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert [shard.name for shard in shards] == sorted(set(index["weight_map"].values()))
    assert all(shard.stat().st_size < 40_000 for shard in shards)
    sizes = [
        tensor.numel() * tensor.element_size()
        for shard in shards
        for tensor in load_file(shard).values()
    ]
    assert index["metadata"]["total_size"] == sum(sizes)


def test_saving_replaces_a_model_and_nothing_else(nano):
    model = build(NANO)
    switchlm.save(model, None, nano, max_shard_bytes=20_000)
    same_tensors(model, switchlm.load(nano)[0])
    assert not (nano / "model.safetensors").exists()
    (nano / "thesis.tex").write_text("years of work")
    with pytest.raises(CheckpointError, match=r"thesis\.tex"):
        switchlm.save(model, None, nano)
    assert (nano / "thesis.tex").exists()
    assert sorted(nano.parent.iterdir()) == [nano]


def test_relative_folders_work(tmp_path, monkeypatch):
    model = build(NANO)
    monkeypatch.chdir(tmp_path)
    switchlm.save(model, None, "deep/model")
    same_tensors(model, switchlm.load("deep/model")[0])
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["model"]


def test_a_failing_save_changes_nothing(nano, monkeypatch):
    before = {path.name: path.read_bytes() for path in nano.iterdir()}

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        switchlm.save(build(NANO), None, nano)
    assert {path.name: path.read_bytes() for path in nano.iterdir()} == before
    assert sorted(nano.parent.iterdir()) == [nano]


def test_models_with_replaced_layers_are_not_saved(tmp_path):
    model = build(NANO)
    model.encoder.blocks[0].feedforward = torch.nn.Linear(16, 16)
    with pytest.raises(CheckpointError, match=r"encoder\.blocks\.0\.feedforward"):
        switchlm.save(model, None, tmp_path / "model")
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtype_is_kept_or_cast(dtype, tmp_path):
    model = build(NANO).to(dtype)
    switchlm.save(model, None, tmp_path)
    assert {tensor.dtype for tensor in switchlm.load(tmp_path)[0].parameters()} == {dtype}
    cast, _ = switchlm.load(tmp_path, dtype=torch.float32)
    same_tensors(model.float(), cast)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_t5_with_wo_in_float32_computes_in_one_dtype(dtype, their_t5, theirs_on_disk):
    """transformers keeps `wo` in float32, always in float16 and, before version 5, in bfloat16."""
    theirs = their_t5(d_ff=4000).to(dtype)
    with torch.no_grad():
        for block in (*theirs.encoder.block, *theirs.decoder.block):
            block.layer[-1].DenseReluDense.wo.weight.mul_(40)  # too large for float16
            block.layer[-1].DenseReluDense.wo.float()
    folder = theirs_on_disk(theirs)
    theirs = type(theirs).from_pretrained(folder).eval()
    model, _ = switchlm.load(folder)
    downs = {p.dtype for name, p in model.named_parameters() if name.endswith("down.weight")}
    assert downs == {torch.float32 if dtype == torch.float16 else torch.bfloat16}
    others = {p.dtype for name, p in model.named_parameters() if not name.endswith("down.weight")}
    assert others == {dtype}
    ids = torch.tensor([[5, 9, 30, 1]])
    with torch.no_grad():
        expected = theirs(input_ids=ids, decoder_input_ids=ids).logits
        found = model(ids, ids).logits_BTV
    assert found.dtype == expected.dtype == dtype
    error = (found - expected).abs().max() / expected.abs().max()
    assert error < (0.05 if dtype == torch.bfloat16 else 0.005)


def test_dtypes_may_differ_between_tensors(nano):
    def narrow(tensors):
        for key, tensor in tensors.items():
            if "router" not in key:
                tensors[key] = tensor.to(torch.bfloat16)

    edit_weights(nano, narrow)
    model, _ = switchlm.load(nano)
    layer = model.encoder.blocks[1].feedforward
    assert layer.router.weight.dtype == torch.float32
    assert layer.experts.up.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "key",
    [
        "shared.weight",
        "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
        "decoder.block.1.layer.2.mlp.router.classifier.weight",
        "decoder.block.1.layer.2.mlp.experts.expert_1.wo.weight",
        "decoder.block.1.layer.2.mlp.experts.expert_2.wi.weight",
        "encoder.block.3.layer.0.layer_norm.weight",
        "encoder.block.0.layer.1.mlp.wi.weight",
        "decoder.final_layer_norm.weight",
    ],
)
def test_missing_and_misshapen_tensors_are_named(key, nano):
    edit_weights(nano, lambda tensors: tensors.update({key: tensors[key][:1]}))
    with pytest.raises(CheckpointError, match=rf"'{key}' has the shape"):
        switchlm.load(nano)
    edit_weights(nano, lambda tensors: tensors.pop(key))
    with pytest.raises(CheckpointError, match=rf"missing '{key}'"):
        switchlm.load(nano)


def test_a_missing_last_expert_or_layer_is_named(nano):
    def drop(part):
        return lambda tensors: [tensors.pop(key) for key in list(tensors) if part in key]

    edit_weights(nano, drop("expert_2."))
    with pytest.raises(CheckpointError, match=r"missing '.*expert_2\.wi\.weight'"):
        switchlm.load(nano)
    edit_weights(nano, drop("expert_1."))
    with pytest.raises(CheckpointError, match=r"missing '.*expert_1\.wi\.weight'.* and more"):
        switchlm.load(nano)
    edit_weights(nano, drop("encoder.block.2."))
    with pytest.raises(CheckpointError, match=r"encoder\.block\.3, but not number 2"):
        switchlm.load(nano)


@pytest.mark.parametrize(
    "key",
    [
        "stray.weight",
        "encoder.block.0.layer.0.SelfAttention.q.bias",
        "encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight",
        "encoder.block.01.layer.0.layer_norm.weight",
        "encoder.block.1.layer.1.mlp.wo.weight",
    ],
)
def test_unexpected_tensors_are_named(key, nano):
    edit_weights(nano, lambda tensors: tensors.update({key: torch.ones(16)}))
    with pytest.raises(CheckpointError, match=rf"{key}|not every n-th"):
        switchlm.load(nano)


def test_duplicates_must_be_equal(nano):
    def copy(tensors):
        for key in ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"):
            tensors[key] = tensors["shared.weight"].clone()

    edit_weights(nano, copy)
    assert switchlm.load(nano)[0].config == NANO
    edit_weights(nano, lambda tensors: tensors["encoder.embed_tokens.weight"].add_(1))
    with pytest.raises(CheckpointError, match=r"'encoder\.embed_tokens\.weight' differs"):
        switchlm.load(nano)


@pytest.mark.parametrize("name", ["encoder.embed_tokens.weight", "lm_head.weight"])
def test_the_embedding_under_another_name(name, nano):
    model, _ = switchlm.load(nano)
    edit_weights(nano, lambda tensors: tensors.update({name: tensors.pop("shared.weight")}))
    same_tensors(model, switchlm.load(nano)[0])


def test_cross_attention_bias_of_old_t5_is_ignored(tmp_path):
    switchlm.save(build(CASES["t5 1.0"]), None, tmp_path)
    key = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
    edit_weights(tmp_path, lambda tensors: tensors.update({key: torch.ones(32, 2)}))
    with pytest.warns(UserWarning, match="EncDecAttention"):
        switchlm.load(tmp_path)


def test_tied_but_unscaled_t5_gets_a_separate_head(their_t5, theirs_on_disk, assert_close):
    """transformers 5 saves such models where `tie_word_embeddings` was false at the start."""
    transformers = pytest.importorskip("transformers")
    theirs = their_t5()
    theirs.config.scale_decoder_outputs = False
    ours, _ = switchlm.load(theirs_on_disk(theirs))
    assert not ours.config.tied_head
    inputs, targets = torch.randint(3, 48, (2, 9)), torch.randint(3, 48, (2, 5))
    expected = theirs(input_ids=inputs, decoder_input_ids=targets).logits
    assert_close(ours(inputs, targets).logits_BTV, expected, "logits")
    assert transformers.__version__


def test_folders_without_a_model(tmp_path):
    with pytest.raises(CheckpointError, match="neither a model folder"):
        switchlm.load(tmp_path)
    with pytest.raises(CheckpointError, match="no folder"):
        switchlm.load(tmp_path / "nowhere")
    edit = tmp_path / "config.json"
    edit.write_text('{"model_type": "t5"}')
    with pytest.raises(CheckpointError, match="no weights"):
        switchlm.load(tmp_path)


def test_an_index_that_differs_from_its_files(tmp_path):
    switchlm.save(build(NANO), None, tmp_path, max_shard_bytes=20_000)
    path = tmp_path / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    shard = index["weight_map"].pop("encoder.final_layer_norm.weight")
    path.write_text(json.dumps(index))
    with pytest.raises(
        CheckpointError, match=r"only the file has 'encoder\.final_layer_norm\.weight'"
    ):
        switchlm.load(tmp_path)
    index["weight_map"] |= {"encoder.final_layer_norm.weight": shard, "ghost.weight": shard}
    path.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"only the index has 'ghost\.weight'"):
        switchlm.load(tmp_path)
    (tmp_path / shard).unlink()
    with pytest.raises(CheckpointError, match=rf"{shard}' is missing"):
        switchlm.load(tmp_path)


@pytest.mark.parametrize(
    ("kind", "edits", "own_head"),
    [
        ("MT5", {}, False),
        ("MT5", {"tie_word_embeddings": False}, True),
        ("T5", {}, False),
        ("T5", {"tie_word_embeddings": False, "scale_decoder_outputs": None}, False),
        ("T5", {"tie_word_embeddings": False, "scale_decoder_outputs": True}, False),
        ("T5", {"tie_word_embeddings": True, "scale_decoder_outputs": False}, False),
        ("T5", {}, True),
        ("T5", {"tie_word_embeddings": False, "scale_decoder_outputs": None}, True),
    ],
)
def test_the_head_is_scaled_where_transformers_scales_it(
    kind, edits, own_head, tmp_path, assert_close
):
    import transformers

    sizes = {"vocab_size": 48, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_heads": 2}
    config = getattr(transformers, f"{kind}Config")(
        **sizes, num_layers=1, decoder_start_token_id=0, dropout_rate=0.0
    )
    model_of = getattr(transformers, f"{kind}ForConditionalGeneration")
    model_of(config).save_pretrained(tmp_path)
    if own_head:
        tensors = load_file(tmp_path / "model.safetensors")
        tensors["lm_head.weight"] = torch.randn(48, 16)
        save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    values = json.loads((tmp_path / "config.json").read_text()) | edits
    values = {key: value for key, value in values.items() if value is not None}
    (tmp_path / "config.json").write_text(json.dumps(values))
    ids = torch.tensor([[5, 9, 30, 1]])
    ours, _ = switchlm.load(tmp_path, report=lambda line: None)
    switchlm.save(ours, None, tmp_path / "again")
    with torch.no_grad():
        expected = model_of.from_pretrained(tmp_path).eval()(input_ids=ids, decoder_input_ids=ids)
        again = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path / "again").eval()
        assert_close(ours(ids, ids).logits_BTV, expected.logits, "logits")
        found = again(input_ids=ids, decoder_input_ids=ids).logits
        assert_close(found, expected.logits, "logits of the saved model")


def test_a_tied_mt5_of_transformers_4_is_scaled_as_there(their_t5, theirs_on_disk):
    folder = theirs_on_disk(their_t5())
    values = json.loads((folder / "config.json").read_text())
    for version, tied in (("4.57.1", True), ("5.24.0", False)):
        changes = {"model_type": "mt5", "transformers_version": version}
        (folder / "config.json").write_text(json.dumps(values | changes))
        assert switchlm.load(folder)[0].config.tied_head is tied
