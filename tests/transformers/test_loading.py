import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file

from switchlm.data.text.tokenizer import Tokenizer
from switchlm.errors import CheckpointError, ConfigError
from switchlm.huggingface import weights
from switchlm.transformers import SwitchTransformersForConditionalGeneration
from switchlm.transformers.loading import device_of

load = SwitchTransformersForConditionalGeneration.from_pretrained


def test_options_of_transformers_work(folder, tmp_path, monkeypatch):
    config = transformers.AutoConfig.from_pretrained(folder)
    config.use_cache = False
    generation = transformers.GenerationConfig(num_beams=3)
    ours = load(
        folder,
        config=config,
        output_attentions=True,
        generation_config=generation,
        attn_implementation="eager",
        low_cpu_mem_usage=True,
        device_map={"": "cpu"},
        torch_dtype="torch.bfloat16",
        use_safetensors=True,
    )
    assert (ours.config.use_cache, ours.config.output_attentions) == (False, True)
    assert ours.generation_config.num_beams == 3
    assert ours.dtype == torch.bfloat16
    asked = []

    def download(name, **options):
        asked.append((name, options))
        return shutil.copytree(folder, tmp_path / "cached")

    monkeypatch.setattr(weights, "_download", download)
    load("some/model", cache_dir=tmp_path, token="secret", revision="main")
    options = {"cache_dir": tmp_path, "token": "secret", "revision": "main"}
    assert asked == [("some/model", {**options, "local_files_only": False})]


def test_max_shard_size_splits_the_files(ours, tmp_path):
    ours.save_pretrained(tmp_path, max_shard_size="100KB", safe_serialization=True)
    shards = list(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 2
    assert max(shard.stat().st_size for shard in shards) < 110_000
    ours.save_pretrained(tmp_path / "bytes", max_shard_size=100_000)
    assert len(list((tmp_path / "bytes").glob("model-*.safetensors"))) == len(shards)


def test_a_given_state_dict_is_saved(ours, tmp_path):
    zeros = {name: torch.zeros_like(one) for name, one in ours.state_dict().items()}
    ours.save_pretrained(tmp_path, state_dict=zeros)
    assert not load(tmp_path).model.embedding.weight.any()
    assert ours.model.embedding.weight.any()


@pytest.mark.parametrize("kind", ["sparse", "dense"])
@pytest.mark.parametrize("size", [400, 360])
def test_resized_embeddings_are_those_of_transformers(
    folder, dense_folder, batch, tmp_path, kind, size
):
    from tests.transformers.models import pair_of

    ours, theirs = pair_of(folder if kind == "sparse" else dense_folder)
    kept = min(size, ours.config.vocab_size)
    for model in (ours, theirs):
        model.resize_token_embeddings(size, mean_resizing=False)
        assert model.config.vocab_size == size
    logits = [model(**batch[0], labels=batch[1]).logits for model in (ours, theirs)]
    assert logits[0].shape == logits[1].shape == (3, 6, size)
    torch.testing.assert_close(logits[0][..., :kept], logits[1][..., :kept], rtol=1e-4, atol=1e-4)
    ours.save_pretrained(tmp_path)
    again = load(tmp_path)
    torch.testing.assert_close(again(**batch[0], labels=batch[1]).logits, logits[0])


def test_saving_keeps_other_files_and_replaces_the_weights(ours, tmp_path):
    (tmp_path / "optimizer.pt").write_text("momentum")
    (tmp_path / "model-00001-of-00002.safetensors").write_text("old")
    Tokenizer.bytes(50).save(tmp_path)
    ours.save_pretrained(tmp_path)
    ours.save_pretrained(tmp_path)
    assert (tmp_path / "optimizer.pt").read_text() == "momentum"
    again = load(tmp_path)
    assert len(again.tokenizer.sentinel_ids) == 50
    assert [path.name for path in tmp_path.glob(".*")] == [".switchlm.json"]


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


def test_errors(ours, folder):
    for options, message in (
        ({"quantization_config": "x"}, "from_pretrained does not support quantization_config='x'"),
        ({"use_safetensors": 1}, "does not support use_safetensors='1'"),
        ({"dtype": "float31"}, "no dtype 'float31'"),
        ({"attn_implementation": "eagre"}, "no attn_implementation='eagre'.*mean 'eager'"),
        ({"device_map": {"a": 0, "b": 1}}, "names one device, got 0, 1"),
        ({"device_map": "nowhere"}, "no device 'nowhere' here"),
        ({"device_map": "meta"}, "cannot be loaded on the device 'meta'"),
        ({"config": 3}, "configuration of transformers, got int"),
        ({"config": transformers.T5Config()}, r"config\.\w+ is .*, but the saved model has"),
    ):
        with pytest.raises(ConfigError, match=message):
            load(folder, **options)
    with pytest.raises(ConfigError, match="save_pretrained does not support push_to_hub='True'"):
        ours.save_pretrained("nowhere", push_to_hub=True)
    with pytest.raises(ConfigError, match="max_shard_size '5 apples' is not a size"):
        ours.save_pretrained("nowhere", max_shard_size="5 apples")
    with pytest.raises(ConfigError, match=r"embedding is an nn\.Embedding, got Linear"):
        ours.set_input_embeddings(torch.nn.Linear(2, 2))
    assert device_of("cpu") == torch.device("cpu")
