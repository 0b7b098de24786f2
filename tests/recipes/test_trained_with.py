"""A model folder carries what it was trained with, through every command that copies it."""

import torch

from switchlm.config import to_mapping, write_yaml
from switchlm.data.config import DataConfig
from switchlm.data.tasks.mixture import TaskOptions
from switchlm.data.text.tokenizer import Tokenizer
from switchlm.huggingface.load import load, load_metadata, save
from switchlm.huggingface.quantised import Quantisation
from switchlm.model import lora
from switchlm.model.presets import preset
from switchlm.model.transformer import SwitchTransformer
from switchlm.recipes.compress import quantise_folder
from switchlm.recipes.finetune_config import FinetuneConfig
from switchlm.recipes.trained_with import lengths, metadata_of, trained_with

TEXT = DataConfig(sources=("/secret/place",), input_length=64, mean_span=2.5, max_documents=7)
TASKS = FinetuneConfig(
    model="base",
    tasks=("/secret/file.jsonl",),
    columns=TaskOptions(template="q: {question}", metrics=("rouge1",)),
    input_length=40,
    target_length=12,
)


def trained(folder, **settings):
    torch.manual_seed(0)
    model = SwitchTransformer(preset("nano"))
    save(model, Tokenizer.bytes(), folder, metadata=metadata_of(model, **settings))


def test_every_copy_of_a_folder_carries_the_settings_and_no_places(tmp_path):
    trained(tmp_path / "first", data=TEXT)
    sections = trained_with(tmp_path / "first")
    assert sections["data"]["input_length"] == 64
    assert sections["data"]["mean_span"] == 2.5
    assert sections["data"].keys().isdisjoint({"sources", "max_documents", "tokenizer"})
    assert "secret" not in (tmp_path / "first" / "config.json").read_text()
    model, tokenizer = load(tmp_path / "first")
    save(model, tokenizer, tmp_path / "saved")
    lora.apply(model, 2, 4.0, 0)
    save(lora.merged(model), tokenizer, tmp_path / "merged")
    quantise_folder(
        str(tmp_path / "first"), tmp_path / "int8", Quantisation(bits=8), report=lambda line: None
    )
    for name in ("saved", "merged", "int8"):
        assert trained_with(tmp_path / name) == sections


def test_a_run_counts_before_its_model_and_has_the_places(tmp_path):
    trained(tmp_path / "run" / "model", data=TEXT)
    write_yaml(tmp_path / "run" / "config.yaml", {"data": to_mapping(TEXT)})
    sections = trained_with(tmp_path / "run")
    assert sections["data"]["sources"] == ["/secret/place"]
    model_s = trained_with(tmp_path / "run" / "model")["data"]
    assert {key: sections["data"][key] for key in model_s} == model_s


def test_the_model_of_an_older_run_is_described_by_the_run(tmp_path):
    model = SwitchTransformer(preset("nano"))
    save(model, None, tmp_path / "run" / "model")
    assert trained_with(tmp_path / "run" / "model") == {}
    write_yaml(tmp_path / "run" / "config.yaml", {"data": {"input_length": 64, "sources": ["x"]}})
    assert trained_with(tmp_path / "run" / "model") == {"data": {"input_length": 64}}


def test_a_fine_tuned_model_has_its_templates_and_the_settings_of_its_text(tmp_path):
    trained(tmp_path / "base", data=TEXT)
    model, tokenizer = load(tmp_path / "base")
    save(model, tokenizer, tmp_path / "tuned", metadata=metadata_of(model, None, TASKS))
    sections = trained_with(tmp_path / "tuned")
    assert sections["data"] == trained_with(tmp_path / "base")["data"]
    assert sections["finetune"]["columns"]["template"] == "q: {question}"
    assert "secret" not in (tmp_path / "tuned" / "config.json").read_text()
    assert load_metadata(tmp_path / "tuned").generation["eos_token_id"] == 1
    assert lengths(sections) == (40, 12)


def test_lengths_of_targets_follow_from_the_inputs():
    assert lengths({}) == (512, 114)
    assert lengths({"data": {"input_length": 64}}) == (64, 14)
    assert lengths({"data": {"input_length": 64, "target_length": 30}}) == (64, 30)
    assert lengths({"data": {"input_length": 64, "target_length": 30}}, 512) == (512, 114)
    assert lengths({"data": {"input_length": 64}}, None, 9) == (64, 9)
