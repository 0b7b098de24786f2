"""The class against that of transformers, on the same weights."""

import dataclasses
import importlib
import sys

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import DynamicCache, EncoderDecoderCache, StaticCache

from switchlm.data.text.tokenizer import Tokenizer
from switchlm.errors import CheckpointError, ConfigError, MissingExtraError
from switchlm.generation.decode import generate
from switchlm.huggingface import load
from switchlm.model.config import Initialisation, RouterConfig
from switchlm.model.presets import preset
from switchlm.model.transformer import SwitchTransformer
from switchlm.transformers import SwitchTransformersForConditionalGeneration

HF = RouterConfig(
    mode="hf",
    capacity_factor=None,
    evaluation_capacity_factor=None,
    expert_capacity=64,
    exploration="argmax",
    z_weight=0.001,
)


def save(folder, **changes):
    torch.manual_seed(0)
    options = {
        "initialisation": Initialisation(scale=4.0),
        "tied_head": False,
        "router": HF,
        **changes,
    }
    config = dataclasses.replace(preset("nano"), **options)
    load.save(SwitchTransformer(config), Tokenizer.bytes(), folder)
    return folder


def pair_of(folder):
    """Return our model and that of transformers from the same files."""
    config = load.load_config(folder)
    name = "SwitchTransformers" if config.num_experts else "T5"
    theirs = getattr(transformers, f"{name}ForConditionalGeneration").from_pretrained(folder)
    return SwitchTransformersForConditionalGeneration.from_pretrained(folder), theirs.eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save(tmp_path_factory.mktemp("models") / "switch")


@pytest.fixture(scope="module")
def pair(folder):
    return pair_of(folder)


@pytest.fixture
def ours(folder):
    return SwitchTransformersForConditionalGeneration.from_pretrained(folder)


@pytest.fixture(scope="module")
def batch():
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randint(3, 300, (3, 12), generator=generator)
    mask = torch.ones_like(inputs)
    mask[1, 8:] = 0
    labels = torch.randint(3, 300, (3, 6), generator=generator)
    labels[0, 4:] = -100
    return {"input_ids": inputs, "attention_mask": mask}, labels


WAYS = {
    "greedy": {"do_sample": False},
    "greedy without a cache": {"do_sample": False, "use_cache": False},
    "sampling": {"do_sample": True, "top_k": 20, "top_p": 0.9, "temperature": 1.3},
    "beam": {"num_beams": 3, "length_penalty": 2.0, "num_return_sequences": 2},
    "sampled beam": {"num_beams": 2, "do_sample": True},
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())
def test_generate_gives_the_tokens_of_transformers(pair, batch, way):
    outputs = []
    for model in pair:
        torch.manual_seed(7)
        outputs.append(model.generate(**batch[0], max_new_tokens=12, **way))
    assert torch.equal(*outputs)
    assert len(outputs[0].unique()) > 5


def test_greedy_tokens_are_those_of_generation(pair, batch):
    inputs, mask = batch[0].values()
    ours = generate(pair[0].model, inputs, mask, max_new_tokens=12)
    theirs = pair[0].generate(**batch[0], max_new_tokens=12, do_sample=False)
    assert torch.equal(theirs[:, 1:], ours.tokens_BT)


def test_a_dense_model_works_the_same(tmp_path, batch):
    changes = {"num_experts": 0, "gated": True, "activation": "gelu"}
    outputs = [
        model.generate(**batch[0], max_new_tokens=8, num_beams=2)
        for model in pair_of(save(tmp_path / "t5", **changes))
    ]
    assert torch.equal(*outputs)


def test_generate_drops_nothing_where_forward_does(tmp_path, batch):
    tight = dataclasses.replace(HF, expert_capacity=1)
    model = SwitchTransformersForConditionalGeneration.from_pretrained(
        save(tmp_path / "tight", router=tight)
    )
    wide = SwitchTransformersForConditionalGeneration.from_pretrained(save(tmp_path / "wide"))
    assert wide.model.config.router.expert_capacity == 64
    options = {**batch[0], "do_sample": False, "max_new_tokens": 8}
    assert torch.equal(model.generate(**options), wide.generate(**options))
    assert model.model.encoder.blocks[1].feedforward.router.config.expert_capacity == 1
    inputs, labels = batch
    assert not torch.equal(model(**inputs, labels=labels).loss, wide(**inputs, labels=labels).loss)


@pytest.mark.parametrize("with_mask", [False, True])
def test_the_loss_is_that_of_transformers_with_router_losses(pair, batch, with_mask):
    inputs, labels = batch
    if with_mask:
        inputs = {**inputs, "decoder_attention_mask": (labels != -100).long()}
    ours, theirs = pair
    got = ours(**inputs, labels=labels)
    expected = theirs(**inputs, labels=labels, output_router_logits=True)
    torch.testing.assert_close(got.loss, expected.loss)
    counts = labels != -100
    torch.testing.assert_close(got.logits[counts], expected.logits[counts], rtol=1e-4, atol=1e-4)
    plain = theirs(**inputs, labels=labels)
    assert got.loss - plain.loss > 1e-3
    loss, logits, *_ = ours(**inputs, labels=labels, return_dict=False)
    assert torch.equal(loss, got.loss)
    assert torch.equal(logits, got.logits)


def test_generation_continues_from_a_cache_of_transformers(pair, batch):
    ours, _ = pair
    tokens = torch.tensor([[0, 20, 30, 40]] * 3)
    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
    with torch.no_grad():
        whole = ours(**batch[0], decoder_input_ids=tokens).logits
        first = ours(**batch[0], decoder_input_ids=tokens[:, :3], cache=cache)
        encoded = (first.encoder_last_hidden_state,)
        mask = batch[0]["attention_mask"]
        last = ours(
            attention_mask=mask,
            encoder_outputs=encoded,
            decoder_input_ids=tokens[:, 3:],
            past_key_values=cache,
        )
    assert cache.get_seq_length() == 4
    logits = torch.cat([first.logits, last.logits], 1)
    torch.testing.assert_close(logits, whole, rtol=1e-4, atol=1e-4)


def test_saved_models_are_loaded_by_both(ours, batch, tmp_path):
    ours.generation_config.num_beams = 2
    ours.save_pretrained(tmp_path / "copy")
    copy, theirs = pair_of(tmp_path / "copy")
    assert copy.generation_config.num_beams == 2
    assert copy.tokenizer.to_json() == ours.tokenizer.to_json()
    for name, tensor in ours.state_dict().items():
        assert torch.equal(copy.state_dict()[name], tensor)
    copied = copy.generate(**batch[0], max_new_tokens=5)
    assert torch.equal(copied, theirs.generate(**batch[0], max_new_tokens=5))
    half = SwitchTransformersForConditionalGeneration.from_pretrained(
        tmp_path / "copy", dtype="bfloat16", device_map="auto"
    )
    assert half.dtype == torch.bfloat16
    assert not half.training


def test_saving_keeps_other_files_and_replaces_the_weights(ours, tmp_path):
    (tmp_path / "optimizer.pt").write_text("momentum")
    (tmp_path / "model-00001-of-00002.safetensors").write_text("old")
    Tokenizer.bytes(50).save(tmp_path)
    ours.save_pretrained(tmp_path)
    ours.save_pretrained(tmp_path)
    assert (tmp_path / "optimizer.pt").read_text() == "momentum"
    again = SwitchTransformersForConditionalGeneration.from_pretrained(tmp_path)
    assert len(again.tokenizer.sentinel_ids) == 50
    assert not list(tmp_path.glob(".*"))


def test_saved_tensors_are_loaded_in_place_as_trainer_does(ours, tmp_path):
    ours.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    expected = {name: tensor.clone() for name, tensor in ours.state_dict().items()}
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(1.0)
    result = ours.load_state_dict(saved, strict=False)
    assert result.missing_keys == result.unexpected_keys == []
    for name, tensor in ours.state_dict().items():
        assert torch.equal(tensor, expected[name])
    ours.load_state_dict(expected)
    saved["more"] = saved.pop("shared.weight")
    result = ours.load_state_dict(saved, strict=False)
    assert (result.missing_keys, result.unexpected_keys) == (["shared.weight"], ["more"])
    with pytest.raises(CheckpointError, match="1 tensors are missing and 1 unknown"):
        ours.load_state_dict(saved)
    with pytest.raises(CheckpointError, match=r"shared.weight is \[2\] there"):
        ours.load_state_dict({"shared.weight": torch.zeros(2)})


@pytest.mark.slow
def test_trainer_trains_and_resumes(ours, folder, tmp_path):
    pytest.importorskip("accelerate")
    torch.manual_seed(0)
    data = [
        {"input_ids": torch.randint(3, 300, (8,)), "labels": torch.randint(3, 300, (5,))}
        for _ in range(8)
    ]
    options = transformers.Seq2SeqTrainingArguments(
        output_dir=str(tmp_path),
        max_steps=4,
        save_steps=2,
        per_device_train_batch_size=4,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )

    def trainer(model):
        return transformers.Seq2SeqTrainer(model=model, args=options, train_dataset=data)

    trainer(ours).train()
    fresh = SwitchTransformersForConditionalGeneration.from_pretrained(folder)
    trainer(fresh).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for name, tensor in ours.state_dict().items():
        torch.testing.assert_close(fresh.state_dict()[name], tensor)
    last = SwitchTransformersForConditionalGeneration.from_pretrained(tmp_path / "checkpoint-4")
    assert torch.equal(last.model.embedding.weight, fresh.model.embedding.weight)


def test_gradient_checkpointing_changes_no_gradient(ours, batch):
    inputs, labels = batch
    gradients = []
    for switch in (ours.gradient_checkpointing_disable, ours.gradient_checkpointing_enable):
        switch()
        ours.zero_grad()
        ours.train()(**inputs, labels=labels).loss.backward()
        gradients.append(ours.model.encoder.blocks[0].attention.query.weight.grad.clone())
    assert ours.model.encoder.activation_checkpointing
    torch.testing.assert_close(*gradients)


def test_peft_trains_adapters_and_saves_them(ours, folder, batch, tmp_path):
    peft = pytest.importorskip("peft")
    inputs, labels = batch
    config = peft.LoraConfig(task_type="SEQ_2_SEQ_LM", r=4, target_modules=["query", "value"])
    adapted = peft.get_peft_model(ours, config)
    trainable = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    assert 0 < sum(p.numel() for p in trainable) < 5000
    optimizer = torch.optim.SGD(trainable, lr=0.1)
    losses = []
    for _ in range(3):
        loss = adapted(**inputs, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[2] < losses[1] < losses[0]
    adapted.save_pretrained(tmp_path / "adapter")
    fresh = SwitchTransformersForConditionalGeneration.from_pretrained(folder)
    again = peft.PeftModel.from_pretrained(fresh, tmp_path / "adapter").eval()
    options = {**inputs, "max_new_tokens": 6, "do_sample": False}
    assert torch.equal(again.generate(**options), adapted.eval().generate(**options))


def test_errors(ours, batch):
    load = SwitchTransformersForConditionalGeneration.from_pretrained
    with pytest.raises(
        ConfigError, match="from_pretrained does not support quantization_config='x'"
    ):
        load("anything", quantization_config="x")
    with pytest.raises(ConfigError, match="no dtype 'float31'"):
        load("anything", dtype="float31")
    with pytest.raises(ConfigError, match="takes a switchlm model, got T5Config"):
        SwitchTransformersForConditionalGeneration(transformers.T5Config())
    inputs, labels = batch
    with pytest.raises(ConfigError, match="forward does not support output_attentions='True'"):
        ours(**inputs, labels=labels, output_attentions=True)
    with pytest.raises(ConfigError, match="neither labels nor decoder_input_ids"):
        ours(**inputs)
    with pytest.raises(ConfigError, match="neither input_ids nor encoder_outputs"):
        ours(labels=labels)
    lengths = (StaticCache(config=ours.config, max_cache_len=8) for _ in range(2))
    with pytest.raises(ConfigError, match=r"StaticCache of a fixed length is not supported"):
        ours(**inputs, labels=labels, cache=EncoderDecoderCache(*lengths))


def test_without_transformers_the_extra_is_named(monkeypatch):
    monkeypatch.delitem(sys.modules, "switchlm.transformers")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"switchlm\[transformers\]"):
        importlib.import_module("switchlm.transformers")
