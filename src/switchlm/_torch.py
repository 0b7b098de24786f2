"""All private names of PyTorch that this package uses, behind functions with public names.

They may change with any release; pyproject.toml bounds the releases that are tested.
"""

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

# Tensors with shapes but no numbers, and modes that see every operator: simulated steps.
__all__ = ["FakeTensor", "FakeTensorMode", "TorchDispatchMode", "tree_iter"]


def in_dispatch_mode() -> bool:
    """Whether a mode (such as a FLOP counter) sees every operator here: no kernel may bypass it."""
    return bool(torch._C._len_torch_dispatch_stack())


def is_transformed() -> bool:
    """Whether functions are transformed here (vmap, forward gradients), which kernels cannot be."""
    return (
        torch._C._functorch.peek_interpreter_stack() is not None
        or torch.autograd.forward_ad._current_level >= 0
    )


def active_fake_mode() -> FakeTensorMode | None:
    """Return the active fake tensor mode, if any."""
    mode = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE)
    assert mode is None or isinstance(mode, FakeTensorMode)
    return mode


def start_fake_job(num_processes: int) -> None:
    """Become process 0 of a job whose collectives return at once and move nothing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group(
        "fake", rank=0, world_size=num_processes, store=FakeStore()
    )


def clear_sharding_cache() -> None:
    """Clear DTensor's cache of operators, which refers to the groups of a job that has ended."""
    from torch.distributed.tensor.debug import _clear_sharding_prop_cache

    _clear_sharding_prop_cache()


def local_shape_and_offset(tensor: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return shape and offset of the part of a tensor (or all of it) that this process holds."""
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    if not isinstance(tensor, DTensor):
        return tuple(tensor.shape), (0,) * tensor.dim()
    shape, offset = compute_local_shape_and_global_offset(
        tensor.shape, tensor.device_mesh, tensor.placements
    )
    return tuple(shape), tuple(offset)


def flatten(mesh: Any, name: str) -> Any:
    """Return the axes of a DeviceMesh as a single one of that name."""
    return mesh._flatten(name)


def all_to_all(x_RD: Tensor, received: list[int], sent: list[int], group: Any) -> Tensor:
    """Send rows to every process of a group, with gradients; the public function has none."""
    from torch.distributed._functional_collectives import all_to_all_single_autograd

    rows: Tensor = all_to_all_single_autograd(x_RD, received, sent, group)
    return rows


def group_of_name(name: str) -> Any:
    """Return the process group of this name in functional collectives."""
    return torch.distributed.distributed_c10d._resolve_process_group(name)  # type: ignore[arg-type]


def norms(tensors: list[Tensor]) -> list[Tensor]:
    """Return the Euclidean norm of each tensor, by few kernels."""
    return list(torch._foreach_norm(tensors))


def int8_matmul(a_MK: Tensor, b_KN: Tensor) -> Tensor:
    """Multiply int8 matrices into int32."""
    return torch._int_mm(a_MK, b_KN)


def int4_matmul(x_RK: Tensor, codes: Tensor, group_size: int, scale_GN2: Tensor) -> Tensor:
    """Multiply bfloat16 rows with int4 codes, packed for the CPU."""
    return torch._weight_int4pack_mm_for_cpu(x_RK, codes, group_size, scale_GN2)


def multiplies_quickly(dtype: torch.dtype) -> bool:
    """Whether this processor has instructions for matmul in bfloat16 or float16."""
    names = {
        torch.bfloat16: "_is_mkldnn_bf16_supported",
        torch.float16: "_is_mkldnn_fp16_supported",
    }
    try:
        return bool(getattr(torch.ops.mkldnn, names[dtype])())
    except (AttributeError, RuntimeError):  # a build for another processor
        return True
