import pytest
import torch
from tests.transformers.models import pair_of, save

from switchlm.transformers import SwitchTransformersForConditionalGeneration


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return save(tmp_path_factory.mktemp("models") / "switch")


@pytest.fixture(scope="session")
def dense_folder(tmp_path_factory):
    changes = {"num_experts": 0, "gated": True, "activation": "gelu", "tied_head": True}
    return save(tmp_path_factory.mktemp("models") / "t5", **changes)


@pytest.fixture(scope="session")
def pairs(folder, dense_folder):
    """Models that no test changes."""
    return {"sparse": pair_of(folder), "dense": pair_of(dense_folder)}


@pytest.fixture(scope="session")
def pair(pairs):
    return pairs["sparse"]


@pytest.fixture
def ours(folder):
    return SwitchTransformersForConditionalGeneration.from_pretrained(folder)


@pytest.fixture(scope="session")
def batch():
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randint(3, 300, (3, 12), generator=generator)
    mask = torch.ones_like(inputs)
    mask[1, 8:] = 0
    labels = torch.randint(3, 300, (3, 6), generator=generator)
    labels[0, 4:] = -100
    return {"input_ids": inputs, "attention_mask": mask}, labels
