"""Quantised folders: round trips, memory, and errors for damaged ones."""

import dataclasses
import json
import random
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

import switchlm
from switchlm.compression.quantise import round_to_nearest
from switchlm.data.text.tokenizer import Tokenizer
from switchlm.errors import CheckpointError, SwitchLMError
from switchlm.huggingface import load
from switchlm.huggingface.config import family_of
from switchlm.huggingface.names import entries
from switchlm.huggingface.quantised import (
    KEY,
    Quantisation,
    parts,
    save_quantised,
    weights_of_model,
)
from switchlm.kernels.cpu.quantised import matrix
from switchlm.model.presets import preset
from switchlm.model.quantised import QuantisedExperts, quantised_modules
from switchlm.model.transformer import SwitchTransformer

WAYS = [(8, "experts"), (8, "all"), (4, "experts"), (4, "all")]
FILE = "quantised.safetensors"
SHAPES = {
    "nano": {},
    "gated": {"gated": True, "activation": "gelu", "tied_head": False},
    "attention": {"attention_experts": True},
    "dense": {"num_experts": 0},
}


def build(**changes):
    torch.manual_seed(0)
    return SwitchTransformer(dataclasses.replace(preset("nano"), **changes)).eval()


def write(model, folder, bits=8, what="experts", **options):
    quantisation = Quantisation(bits=bits, what=what)
    save_quantised(
        weights_of_model(model),
        model.config,
        Tokenizer.bytes(),
        folder,
        quantisation,
        round_to_nearest(quantisation),
        **options,
    )
    return folder


@torch.no_grad()
def dequantised(model, folder, bits, what):
    """Return a floating-point model with the dequantised weights of the folder."""
    stored = {}
    for path in folder.glob("*.safetensors"):
        stored |= load_file(path)
    quantisation = Quantisation(bits=bits, what=what)
    copy = SwitchTransformer(model.config).eval()
    state = copy.state_dict()
    for entry in entries(model.config, family_of(model.config)):
        place = state[entry.name]
        if not quantisation.includes(entry):
            place.copy_(stored[entry.name])
            continue
        both = stored[entry.name], stored[f"{entry.name}.scale"]
        if entry.expert is not None:
            both = tuple(tensor[entry.expert] for tensor in both)
            place = place[entry.expert].t()
        place.copy_(matrix(*both, entry.shape[0]).dequantise())
    return copy


@pytest.mark.parametrize(("bits", "what"), WAYS)
@pytest.mark.parametrize("shape", list(SHAPES))
def test_the_loaded_model_is_the_dequantised_one(tmp_path, bits, what, shape):
    model = build(**SHAPES[shape])
    folder = write(model, tmp_path / "q", bits, what)
    loaded, tokenizer = switchlm.load(folder)
    assert tokenizer is not None
    assert loaded.config == model.config == load.load_config(folder)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    twin = dequantised(model, folder, bits, what)
    batch = torch.randint(3, 200, (2, 40)), torch.randint(3, 200, (2, 8))
    with torch.no_grad():
        found, expected = loaded(*batch).logits_BTV, twin(*batch).logits_BTV
        plain = model(*batch).logits_BTV
    error = (found - expected).abs().max() / expected.abs().max()
    # Rows are rounded to 8 bits each, or to bfloat16.
    assert error < 0.03
    if shape != "dense" or what == "all":
        assert not torch.equal(found, plain)


@pytest.mark.parametrize(("bits", "what"), WAYS)
def test_weights_in_memory_are_codes(tmp_path, bits, what):
    model = build()
    loaded, _ = switchlm.load(write(model, tmp_path / "q", bits, what))
    experts = [part for part in loaded.modules() if isinstance(part, QuantisedExperts)]
    assert len(experts) == 2
    for part in experts:
        assert not list(part.parameters())
        assert not list(part.buffers())
        for one in (*part.up, *part.down):
            # 32 x 64: bytes and a scale per output; at 4 bits outputs are padded to 64.
            limit = 2048 + 4 * 64 if bits == 8 else 64 * 64 // 2 + 4 * 64 * 2
            assert sum(t.nbytes for t in vars(one).values() if isinstance(t, torch.Tensor)) <= limit
    floats = sum(parameter.nbytes for parameter in loaded.parameters())
    assert floats < sum(parameter.nbytes for parameter in model.parameters()) * (
        0.03 if what == "all" else 0.6
    )


def test_a_folder_of_several_files_is_the_same(tmp_path):
    model = build()
    one = write(model, tmp_path / "one", 4, "all")
    several = write(model, tmp_path / "several", 4, "all", max_shard_bytes=20_000)
    files = sorted(several.glob("*.safetensors"))
    assert len(files) > 2
    whole = load_file(one / FILE)
    found = {}
    for path in files:
        found |= load_file(path)
    assert found.keys() == whole.keys()
    assert all(torch.equal(found[key], whole[key]) for key in whole)
    assert len(list(quantised_modules(switchlm.load(several)[0]))) > 0


def test_experts_are_contiguous_and_files_aligned(tmp_path):
    folder = write(build(), tmp_path / "q", 4)
    content = (folder / FILE).read_bytes()
    length = int.from_bytes(content[:8], "little")
    table = json.loads(content[8 : 8 + length])
    sizes = {"F32": 4, "BF16": 2, "U8": 1}
    for key, entry in table.items():
        if key != "__metadata__":
            assert (8 + length + entry["data_offsets"][0]) % sizes[entry["dtype"]] == 0
    assert table["encoder.blocks.1.feedforward.experts.up"]["shape"] == [4, 1, 32, 32]


def test_a_scale_may_not_be_narrower_than_its_inputs():
    entry = next(e for e in entries(build(d_model=24).config, "switch") if e.expert == 0)
    with pytest.raises(switchlm.errors.ConfigError, match="24 inputs"):
        parts(entry, 4, Quantisation(bits=4))


def change_config(folder, **values):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, **values}))


def change_tensors(folder, change):
    tensors = load_file(folder / FILE)
    change(tensors)
    save_file(tensors, folder / FILE)


UP = "encoder.blocks.1.feedforward.experts.up"


@pytest.mark.parametrize(("change", "words"), [
    (lambda t: t.pop(UP), "missing"),
    (lambda t: t.pop(f"{UP}.scale"), "missing"),
    (lambda t: t.update(other=torch.zeros(1)), "'other'"),
    (lambda t: t.update({UP: t[UP].float()}), "float32"),
    (lambda t: t.update({UP: t[UP][:3].clone()}), "[3, 64, 32]"),
    (lambda t: t.update({f"{UP}.scale": t[f"{UP}.scale"].double()}), "float64"),
    (lambda t: t.update({"embedding.weight": t["embedding.weight"].to(torch.int8)}), "int8"),
    (lambda t: t.update({"encoder.blocks.9.attention_norm.weight": torch.ones(32)}), "layers"),
])  # fmt: skip
def test_mismatched_tensors_are_refused(tmp_path, change, words):
    folder = write(build(), tmp_path / "q")
    change_tensors(folder, change)
    with pytest.raises(CheckpointError) as caught:
        switchlm.load(folder)
    assert words in str(caught.value)


@pytest.mark.parametrize(("section", "words"), [
    ({"quant_method": "gptq", "bits": 4}, "'gptq'"),
    ({"quant_method": "switchlm", "bits": 3}, "bits"),
    ({"quant_method": "switchlm", "bits": 8, "group_size": 7}, "group size is 7"),
    ({"quant_method": "switchlm", "bits": 8, "what": "norms"}, "what"),
    ({"quant_method": "switchlm", "bits": 8, "extra": 1}, "extra"),
    ({"quant_method": "switchlm", "bits": 4}, "needs"),
    ("int8", "'int8'"),
    ([], "[]"),
])  # fmt: skip
def test_invalid_sections_are_refused(tmp_path, section, words):
    folder = write(build(), tmp_path / "q")
    change_config(folder, **{KEY: section})
    with pytest.raises(CheckpointError) as caught:
        switchlm.load(folder)
    assert words in str(caught.value)


@pytest.mark.parametrize("values", [
    {"d_model": 10**12}, {"num_experts": 10**9}, {"num_experts": 60_000}, {"num_layers": 10**9},
    {"vocab_size": 10**9}, {"num_layers": 1}, {"d_ff": -1}, {"tie_word_embeddings": False},
])  # fmt: skip
def test_hostile_configurations_are_refused_at_once(tmp_path, values):
    folder = write(build(), tmp_path / "q")
    change_config(folder, **values)
    start = time.perf_counter()
    with pytest.raises(CheckpointError):
        switchlm.load(folder)
    assert time.perf_counter() - start < 1


def test_mutated_files_give_errors_of_our_own(tmp_path):
    folder = write(build(), tmp_path / "q", 4, "all")
    content = (folder / FILE).read_bytes()
    length = int.from_bytes(content[:8], "little")
    draw = random.Random(0)
    refused = 0
    for _ in range(60):
        mutated = bytearray(content)
        for _ in range(draw.randint(1, 4)):
            mutated[draw.randrange(8 + length)] = draw.randrange(256)
        if draw.random() < 0.2:
            mutated = mutated[: draw.randrange(len(mutated))]
        (folder / FILE).write_bytes(mutated)
        try:
            switchlm.load(folder)
        except SwitchLMError:
            refused += 1
    assert refused > 40


def test_the_old_folder_stays_when_writing_fails(tmp_path):
    model = build()
    folder = write(model, tmp_path / "q")
    before = (folder / FILE).read_bytes()
    model.encoder.blocks[1].feedforward.experts.up.data[2, 3, 4] = torch.inf
    with pytest.raises(CheckpointError, match="not finite"):
        write(model, folder)
    assert (folder / FILE).read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["q"]
