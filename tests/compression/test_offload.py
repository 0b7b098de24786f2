import dataclasses

import pytest
import torch

from switchlm.checkpoint import huggingface
from switchlm.compression.offload import OffloadedExperts, load_offloaded, memory_of
from switchlm.generation.decode import generate
from switchlm.model.presets import preset
from switchlm.model.transformer import SwitchTransformer

EXPERT = 2 * 32 * 64 * 4  # bytes of one of nano's


@pytest.fixture(scope="module")
def varied():
    """A nano model whose greedy output is long and varied."""
    torch.manual_seed(0)
    config = dataclasses.replace(preset("nano"), initialisation_scale=4.0, tied_head=False)
    return SwitchTransformer(config).eval()


@pytest.fixture(scope="module")
def folder(varied, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "varied"
    huggingface.save(varied, None, folder, max_shard_bytes=60_000)  # several shards
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
