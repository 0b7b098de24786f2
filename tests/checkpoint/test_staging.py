"""Copies of tensors share no memory with them, and their buffers are kept."""

import pytest
import torch

from switchlm.checkpoint.staging import Staging
from switchlm.checkpoint.store import CheckpointStore


def test_copies_are_contiguous_and_apart() -> None:
    base = torch.arange(12.0).reshape(3, 4)
    parts = {"t": base.t(), "row": base[1], "scalar": base[0, 1], "none": base[:0]}
    expected = {name: part.clone() for name, part in parts.items()}
    land = Staging().copy(parts)
    base.zero_()
    copies = land()
    assert copies.keys() == parts.keys()
    for name, copy in copies.items():
        assert copy.is_contiguous()
        assert torch.equal(copy, expected[name])


def test_memory_is_kept_from_copy_to_copy() -> None:
    staging = Staging()
    staging.reserve({"a": torch.zeros(2000), "b": torch.zeros(5)})
    first = staging.copy({"a": torch.ones(2000), "b": torch.ones(5)})()
    places = {name: copy.data_ptr() for name, copy in first.items()}
    second = staging.copy({"a": torch.full((2000,), 2.0), "b": torch.zeros(6)})()
    assert second["a"].data_ptr() == places["a"]
    assert second["a"].eq(2).all()
    assert second["b"].shape == (6,)


def test_buffers_of_the_first_save_can_be_allocated_before(tmp_path) -> None:
    state = {"model": {"w": torch.randn(50, 3)}}
    with CheckpointStore(tmp_path) as store:
        store.prepare(state)
        store.wait()
        place = store._staging._buffers["model/w"].data_ptr()
        assert not list(tmp_path.iterdir())
        store.save(1, state, wait=True)
        assert store._staging._buffers["model/w"].data_ptr() == place
        assert torch.equal(store.load()["model"]["w"], state["model"]["w"])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("fits", [True, False])
def test_a_gpu_goes_on_while_copied(monkeypatch: pytest.MonkeyPatch, fits: bool) -> None:
    monkeypatch.setattr("switchlm.checkpoint.staging._fits_in_memory", lambda device, parts: fits)
    staging = Staging()
    weight = torch.randn(1000, 1000, device="cuda")
    for _ in range(3):
        expected = weight.cpu()
        land = staging.copy({"w": weight, "step": torch.tensor(3.0)})
        weight.mul_(2.0)
        copies = land()
        assert torch.equal(copies["w"], expected)
        assert copies["w"].is_pinned()
        assert copies["step"] == 3
