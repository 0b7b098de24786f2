"""Memory is reused after its last tensor is freed, and never before."""

from collections.abc import Iterator

import pytest
import torch

from switchlm.kernels import select
from switchlm.kernels.cpu import memory

SHAPE = (2, 1024, 1024)


def free_bytes() -> int:
    """Return the free bytes of the pool."""
    return sum(size * len(blocks) for size, blocks in memory._free.items())


@pytest.fixture(autouse=True)
def _nothing_free() -> Iterator[None]:
    memory.release()
    yield
    memory.release()


def test_the_memory_of_a_freed_tensor_is_reused() -> None:
    first = memory.empty_reused(SHAPE, torch.float32)
    address = first.data_ptr()
    del first
    assert free_bytes() == 8 << 20
    again = memory.empty_reused((2 * 1024 * 1024,), torch.float32)
    assert again.data_ptr() == address
    assert free_bytes() == 0


def test_a_view_keeps_the_memory() -> None:
    first = memory.empty_reused(SHAPE, torch.float32)
    row = first[1, 5].fill_(3.0)
    address = first.data_ptr()
    del first
    second = memory.empty_reused(SHAPE, torch.float32).fill_(7.0)
    assert second.data_ptr() != address
    assert torch.equal(row, torch.full((1024,), 3.0))


def test_a_gradient_keeps_the_memory_until_it_is_freed() -> None:
    weight = torch.zeros(SHAPE, requires_grad=True)

    class Fill(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, weight: torch.Tensor) -> torch.Tensor:
            return weight.new_zeros(())

        @staticmethod
        def backward(ctx: object, gradient: torch.Tensor) -> torch.Tensor:
            return memory.empty_reused(SHAPE, torch.float32).fill_(1.0)

    addresses = set()
    for _ in range(3):
        Fill.apply(weight).backward()
        assert weight.grad is not None
        assert free_bytes() == 0  # the gradient is the buffer, not a copy of it
        addresses.add(weight.grad.data_ptr())
        weight.grad = None
        assert free_bytes() == 8 << 20
    assert len(addresses) == 1


def test_blocks_of_unused_sizes_are_released() -> None:
    del_me = memory.empty_reused(SHAPE, torch.float32)
    del del_me
    kept = memory.empty_reused((3, 1024, 1024), torch.float32)
    assert free_bytes() == 0
    assert kept.shape == (3, 1024, 1024)


def test_similar_lengths_share_a_block() -> None:
    addresses = set()
    for rows in (1500, 1400, 1530):
        tensor = memory.empty_reused((rows, 1024), torch.float32)
        addresses.add(tensor.data_ptr())
        del tensor
    assert len(addresses) == 1


def test_a_layer_trains_in_the_same_memory_every_step() -> None:
    x_RD = torch.randn(4100, 32)
    up_EDF = torch.randn(32, 32, 1100, requires_grad=True)
    down_EFD = torch.randn(32, 1100, 32, requires_grad=True)
    counts_E = torch.full((32,), 128)
    addresses = set()
    for _ in range(3):
        select.expert_feedforward(x_RD, counts_E, up_EDF, down_EFD).sum().backward()
        assert up_EDF.grad is not None
        assert down_EFD.grad is not None
        addresses |= {up_EDF.grad.data_ptr(), down_EFD.grad.data_ptr()}
        assert free_bytes() == 20 << 20  # the hidden rows; the gradients were not copied
        up_EDF.grad = down_EFD.grad = None
    assert len(addresses) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(0, 3), (2, 3), (3, 1024, 1024)])
def test_shape_and_dtype(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tensor = memory.empty_reused(shape, dtype)
    assert tensor.shape == shape
    assert tensor.dtype == dtype
    assert tensor.is_contiguous()
    assert torch.equal(tensor.zero_(), torch.zeros(shape, dtype=dtype))
