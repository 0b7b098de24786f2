"""The class against that of transformers, on the same weights; see also conftest.py."""

import dataclasses
import importlib
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
import transformers
from tests.transformers.models import HF, assert_same, pair_of, save
from transformers import DynamicCache, EncoderDecoderCache

from switchlm.errors import ConfigError, MissingExtraError
from switchlm.generation.decode import generate
from switchlm.huggingface import load
from switchlm.transformers import SwitchTransformersForConditionalGeneration
from switchlm.transformers.model import CACHE

WAYS = {
    "greedy": {"do_sample": False},
    "greedy without a cache": {"do_sample": False, "use_cache": False},
    "sampling": {"do_sample": True, "top_k": 20, "top_p": 0.9, "temperature": 1.3},
    "a static cache": {"cache_implementation": "static", "num_beams": 2},
    "penalties": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "min_new_tokens": 5},
    "biases": {"bad_words_ids": [[20]], "suppress_tokens": [10], "forced_eos_token_id": 1},
    "min-p": {"do_sample": True, "min_p": 0.05, "typical_p": 0.9},
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


ALL = {"output_attentions": True, "output_hidden_states": True, "output_router_logits": True}
LOGITS = {"decoder_input_ids": torch.tensor([[0, 20, 30, 40]] * 3)}


@pytest.mark.parametrize("return_dict", [True, False])
@pytest.mark.parametrize("kind", ["sparse", "dense"])
def test_forward_returns_what_transformers_returns(pairs, batch, kind, return_dict):
    inputs, labels = batch
    flags = ALL if kind == "sparse" else {**ALL, "output_router_logits": None}
    for options in (flags, {}, {"decoder_attention_mask": (labels != -100).long(), **flags}):
        options = {**inputs, "labels": labels, "return_dict": return_dict, **options}
        assert_same(*(model(**options) for model in pairs[kind]))


def test_what_is_not_given_is_as_the_configuration_says(ours, batch):
    options = {**batch[0], "labels": batch[1]}
    expected = ours(**options, output_router_logits=True, use_cache=False, return_dict=False)
    config = ours.config
    config.output_router_logits, config.use_cache, config.return_dict = True, False, False
    assert_same(ours(**options), expected)
    assert len(ours(**options, output_hidden_states=True)) == len(expected) + 2


@pytest.mark.parametrize("kind", ["sparse", "dense"])
def test_embeddings_and_the_encoder_may_be_given_as_in_transformers(pairs, batch, kind):
    inputs, labels = batch
    shifted = pairs[kind][0].prepare_decoder_input_ids_from_labels(labels)
    results, ids = [], {**inputs, "labels": labels}
    for model in pairs[kind]:
        embed = model.get_input_embeddings()
        mask = {"attention_mask": inputs["attention_mask"]}
        by_embeddings = model(
            inputs_embeds=embed(inputs["input_ids"]),
            decoder_inputs_embeds=embed(shifted),
            labels=labels,
            **mask,
        )
        encoded = model.get_encoder()(**inputs, output_hidden_states=True)
        given = model(encoder_outputs=encoded, labels=labels, **mask)
        results.append((by_embeddings, given))
        torch.testing.assert_close(by_embeddings.loss, model(**ids).loss)
        options = {"max_new_tokens": 4, "do_sample": False, **mask}
        assert torch.equal(
            model.generate(encoder_outputs=encoded, **options),
            model.generate(inputs_embeds=embed(inputs["input_ids"]), **options),
        )
    assert_same(*results)


def test_gradients_are_those_of_transformers(pairs, batch):
    gradients = []
    for model in pairs["sparse"]:
        model.zero_grad()
        model(**batch[0], labels=batch[1], output_router_logits=True).loss.backward()
        if isinstance(model, SwitchTransformersForConditionalGeneration):
            block = model.model.decoder.blocks[1]
            parts = block.cross_attention.query, block.feedforward.router
        else:
            _, cross, last = model.decoder.block[1].layer
            parts = cross.EncDecAttention.q, last.mlp.router.classifier
        gradients.append([part.weight.grad for part in parts])
    assert gradients[0][1].abs().max() > 1e-4
    assert_same(*gradients)


@pytest.mark.parametrize("beams", [1, 2])
def test_a_masked_prefix_continues_as_alone_and_as_in_transformers(pairs, batch, beams):
    tokens = torch.tensor([[0, 0, 0, 5, 20], [0, 7, 9, 11, 30], [0, 0, 8, 3, 40]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [0, 1, 1, 1, 1]])
    prefix = {"decoder_input_ids": tokens, "decoder_attention_mask": mask}
    options = {"max_new_tokens": 8, "num_beams": beams, "do_sample": False}
    ours, theirs = (model.generate(**batch[0], **prefix, **options) for model in pairs["sparse"])
    assert torch.equal(ours, theirs)
    (alone,) = pairs["sparse"][0].generate(
        batch[0]["input_ids"][:1], decoder_input_ids=tokens[:1, 2:], **options
    )
    assert torch.equal(ours[0, 5:], alone[3:])


@pytest.mark.parametrize("kind", ["sparse", "dense"])
def test_a_loop_with_the_returned_cache_gives_the_tokens_of_generate(pairs, batch, kind):
    rows = []
    for model in pairs[kind]:
        cache, token, tokens = None, torch.zeros(3, 1, dtype=torch.long), []
        encoded = model.get_encoder()(**batch[0])
        for _ in range(8):
            with torch.no_grad():
                output = model(
                    attention_mask=batch[0]["attention_mask"],
                    encoder_outputs=encoded,
                    decoder_input_ids=token,
                    past_key_values=cache,
                    use_cache=True,
                )
            cache, token = output[CACHE], output.logits[:, -1:].argmax(-1)
            tokens.append(token)
        rows.append(torch.cat(tokens, 1))
    assert torch.equal(*rows)
    assert cache.get_seq_length() == 8
    generated = pairs[kind][0].generate(**batch[0], max_new_tokens=8, do_sample=False)
    assert torch.equal(rows[0], generated[:, 1:])


def test_the_states_and_scores_of_generate_are_those_of_transformers(pairs, batch):
    options = {
        "max_new_tokens": 3,
        "return_dict_in_generate": True,
        "output_scores": True,
        "output_logits": True,
        "output_attentions": True,
        "output_hidden_states": True,
        "num_beams": 2,
    }
    ours, theirs = (dict(model.generate(**batch[0], **options)) for model in pairs["sparse"])
    assert ours.pop(CACHE).get_seq_length() == theirs.pop(CACHE).get_seq_length()
    assert_same(ours, theirs)


def test_stop_strings_end_outputs(ours, batch):
    options = {**batch[0], "max_new_tokens": 12, "do_sample": False}
    whole = ours.generate(**options)
    text = ours.tokenizer.decode(whole[0].tolist())
    stopped = ours.generate(**options, stop_strings=[text[2]])[0].tolist()
    kept = ours.tokenizer.decode(stopped)
    assert kept == text[:3]


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


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_all_ends_of_a_folder_end_outputs_and_are_saved(pair, folder, batch, tmp_path, name):
    options = {**batch[0], "max_new_tokens": 12, "do_sample": False}
    free = pair[0].generate(**options)
    ends = [1, int(free[0, 4]), int(free[1, 6])]
    values = {"pad_token_id": 5, "decoder_start_token_id": 7, "eos_token_id": ends}
    copied = Path(shutil.copytree(folder, tmp_path / "copied"))
    config = json.loads((copied / "config.json").read_text())
    (copied / "generation_config.json").unlink()
    if name == "config.json":
        values = config | {"eos_token_id": ends}
    (copied / name).write_text(json.dumps(values))
    ours, theirs = pair_of(copied)
    expected = theirs.generate(**options)
    assert not torch.equal(expected, free)
    assert torch.equal(ours.generate(**options), expected)
    around = SwitchTransformersForConditionalGeneration(load.load(copied)[0])
    assert torch.equal(around.generate(**options), expected)
    ours.save_pretrained(tmp_path / "saved")
    written = json.loads((tmp_path / "saved" / name).read_text())
    assert {key: written[key] for key in values} == values
    load.save(load.load(copied)[0], None, tmp_path / "again")
    assert json.loads((tmp_path / "again" / name).read_text())["eos_token_id"] == ends
    for model in pair_of(tmp_path / "again"):
        assert torch.equal(model.generate(**options), expected)


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
    torch.manual_seed(0)
    inputs, labels = batch
    config = peft.LoraConfig(task_type="SEQ_2_SEQ_LM", r=4, target_modules=["query", "value"])
    adapted = peft.get_peft_model(ours, config)
    trainable = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    assert 0 < sum(p.numel() for p in trainable) < 5000
    # Without dropout, and from one start: where a token goes to another expert, a loss may rise.
    adapted.eval()
    optimizer = torch.optim.SGD(trainable, lr=0.01)
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
    assert torch.equal(again.generate(**options), adapted.generate(**options))


def test_errors(ours, batch):
    with pytest.raises(ConfigError, match="takes a switchlm model, got T5Config"):
        SwitchTransformersForConditionalGeneration(transformers.T5Config())
    inputs, labels = batch
    with pytest.raises(ConfigError, match="forward does not support head_mask='True'"):
        ours(**inputs, labels=labels, head_mask=True)
    ours.gradient_checkpointing_enable()
    with pytest.raises(ConfigError, match="keeps what gradient checkpointing recomputes"):
        ours(**inputs, labels=labels, output_attentions=True)
    ours.gradient_checkpointing_disable()
    with pytest.raises(ConfigError, match="needs the routing of the encoder"):
        ours(encoder_outputs=(torch.zeros(3, 2, 32),), labels=labels, output_router_logits=True)
    with pytest.raises(ConfigError, match="neither labels nor decoder_input_ids"):
        ours(**inputs)
    with pytest.raises(ConfigError, match="neither input_ids nor inputs_embeds"):
        ours(labels=labels)
    with pytest.raises(ConfigError, match="Ids and embeddings are both given"):
        ours(**inputs, inputs_embeds=torch.zeros(3, 12, 32), labels=labels)
    with pytest.raises(ConfigError, match=r"attention_mask must be of shape \[batch, length\]"):
        ours(inputs["input_ids"], inputs["attention_mask"][:, None], labels=labels)
    with pytest.raises(ConfigError, match="attention_mask has 4 columns for 12 tokens"):
        ours(inputs["input_ids"], inputs["attention_mask"][:, :4], labels=labels)
    with pytest.raises(ConfigError, match=r"labels are of shape \[3, 2\], the decoder's inputs of"):
        ours(**inputs, labels=labels[:, :2], **LOGITS)
    with pytest.raises(ConfigError, match="output_hidden_states is true or false here, got 2"):
        ours(**inputs, labels=labels, output_hidden_states=2)


def test_without_transformers_the_extra_is_named(monkeypatch):
    monkeypatch.delitem(sys.modules, "switchlm.transformers")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"switchlm\[transformers\]"):
        importlib.import_module("switchlm.transformers")
