import copy
import dataclasses
import os

import pytest
import safetensors.torch
import torch

from switchlm.compression.offload import OffloadedExperts, load_offloaded, memory_of
from switchlm.compression.quantise import round_to_nearest
from switchlm.errors import CheckpointError
from switchlm.generation.decode import generate
from switchlm.huggingface import load
from switchlm.huggingface.quantised import Quantisation, save_quantised, weights_of_model
from switchlm.model.config import Initialisation
from switchlm.model.presets import preset
from switchlm.model.transformer import SwitchTransformer

EXPERT = 2 * 32 * 64 * 4  # bytes of one of nano's


@pytest.fixture(scope="module")
def varied():
    """A nano model whose greedy output is long and varied."""
    torch.manual_seed(0)
    config = dataclasses.replace(
        preset("nano"), initialisation=Initialisation(scale=4.0), tied_head=False
    )
    return SwitchTransformer(config).eval()


@pytest.fixture(scope="module")
def folder(varied, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "varied"
    load.save(varied, None, folder, max_shard_bytes=60_000)  # several shards
    return folder


@pytest.fixture
def prompts_BS():
    return torch.randint(3, 300, (3, 12), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("experts", [1, 3, 100])
def test_tokens_equal_those_of_the_model_in_memory(varied, folder, prompts_BS, experts):
    offloaded = load_offloaded(folder, experts * EXPERT)
    expected = generate(varied, prompts_BS, max_new_tokens=24)
    found = generate(offloaded.model, prompts_BS, max_new_tokens=24)
    assert torch.equal(found.tokens_BT, expected.tokens_BT)
    counters = offloaded.memory.counters
    assert 0 < counters.most_bytes_held <= experts * EXPERT
    assert counters.bytes_read == counters.experts_read * EXPERT
    assert (counters.experts_read == 8) == (experts == 100)
    offloaded.memory.close()


def test_nothing_of_the_experts_is_loaded_with_the_model(folder):
    offloaded = load_offloaded(folder, EXPERT)
    assert offloaded.memory.counters.bytes_read == 0
    assert not any(".experts." in name for name, _ in offloaded.model.named_parameters())
    assert not any(parameter.is_meta for parameter in offloaded.model.parameters())
    found = [part for part in offloaded.model.modules() if isinstance(part, OffloadedExperts)]
    assert len(found) == 2
    assert memory_of(offloaded.model) is offloaded.memory
    offloaded.memory.close()


def test_the_decoder_predicts_the_next_layers_experts(tmp_path, prompts_BS):
    torch.manual_seed(1)
    shape = {"num_encoder_layers": 6, "num_decoder_layers": 6, "num_experts": 16}
    model = SwitchTransformer(dataclasses.replace(preset("nano"), **shape)).eval()
    load.save(model, None, tmp_path / "deep")
    offloaded = load_offloaded(tmp_path / "deep", 12 * EXPERT)
    expected = generate(model, prompts_BS[:1], max_new_tokens=8)
    found = generate(offloaded.model, prompts_BS[:1], max_new_tokens=8)
    assert torch.equal(found.tokens_BT, expected.tokens_BT)
    counters = offloaded.memory.counters
    assert counters.guesses > 0
    assert counters.wrong_guesses < counters.guesses
    offloaded.memory.close()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_files_of_16_bits_compute_in_the_dtype_asked_for(varied, tmp_path, prompts_BS, dtype):
    halved = copy.deepcopy(varied).to(dtype)
    load.save(halved, None, tmp_path / "half")
    expected, _ = load.load(tmp_path / "half", dtype=torch.float32)
    offloaded = load_offloaded(tmp_path / "half", 8 * EXPERT, dtype=torch.float32)
    assert torch.equal(
        generate(offloaded.model, prompts_BS, max_new_tokens=12).tokens_BT,
        generate(expected, prompts_BS, max_new_tokens=12).tokens_BT,
    )
    offloaded.memory.close()
    kept = load_offloaded(tmp_path / "half", 8 * EXPERT)
    assert kept.model.embedding.weight.dtype == dtype
    generate(kept.model, prompts_BS, max_new_tokens=2)
    assert kept.memory.counters.bytes_held == kept.memory.counters.experts_read * EXPERT // 2
    kept.memory.close()


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("bits", [8, 4])
def test_quantised_experts_stay_on_the_disk_too(varied, tmp_path, prompts_BS, bits, gated):
    torch.manual_seed(2)
    activation = "gelu" if gated else "relu"
    config = dataclasses.replace(varied.config, gated=gated, activation=activation)
    quantisation = Quantisation(bits=bits, group_size=32)
    save_quantised(
        weights_of_model(SwitchTransformer(config)),
        config,
        None,
        tmp_path / "small",
        quantisation,
        round_to_nearest(quantisation),
    )
    expected, _ = load.load(tmp_path / "small")
    offloaded = load_offloaded(tmp_path / "small", 2 * EXPERT)
    found = generate(offloaded.model, prompts_BS, max_new_tokens=12)
    assert torch.equal(found.tokens_BT, generate(expected, prompts_BS, max_new_tokens=12).tokens_BT)
    assert offloaded.memory.counters.bytes_read > 0
    offloaded.memory.close()


def test_switch_layers_in_attention_are_read_from_the_disk_too(tmp_path, prompts_BS):
    torch.manual_seed(3)
    config = dataclasses.replace(preset("nano"), attention_experts=True)
    model = SwitchTransformer(config).eval()
    load.save(model, None, tmp_path / "attention")
    offloaded = load_offloaded(tmp_path / "attention", 2 * EXPERT)
    expected, found = (generate(m, prompts_BS, max_new_tokens=8) for m in (model, offloaded.model))
    assert torch.equal(found.tokens_BT, expected.tokens_BT)
    offloaded.memory.close()


def test_pickled_weights_are_refused(varied, tmp_path):
    load.save(varied, None, tmp_path / "pickled")
    [file] = (tmp_path / "pickled").glob("*.safetensors")
    torch.save(safetensors.torch.load_file(file), tmp_path / "pickled" / "pytorch_model.bin")
    file.unlink()
    with pytest.raises(CheckpointError, match=r"pickles .* cannot be read in parts"):
        load_offloaded(tmp_path / "pickled", EXPERT)


def test_a_shard_cut_short_in_use_ends_generation_with_an_error(varied, tmp_path, prompts_BS):
    load.save(varied, None, tmp_path / "cut")
    offloaded = load_offloaded(tmp_path / "cut", EXPERT)
    [file] = (tmp_path / "cut").glob("*.safetensors")
    os.truncate(file, file.stat().st_size // 4)
    with pytest.raises(CheckpointError, match=r"was cut short|changed while"):
        generate(offloaded.model, prompts_BS, max_new_tokens=2)
    offloaded.memory.close()
