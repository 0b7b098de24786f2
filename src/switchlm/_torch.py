"""All private functions of PyTorch that this package uses.

They may change with any release; pyproject.toml limits the releases to those that were tried.
"""

from typing import Any, cast

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn.modules.module import _IncompatibleKeys as IncompatibleKeys
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

# For simulated steps: tensors with shapes but no values, and modes that see every operator.
__all__ = ["FakeTensor", "FakeTensorMode", "IncompatibleKeys", "TorchDispatchMode", "tree_iter"]


def has_dispatch_mode() -> bool:
    """Whether a dispatch mode is active, such as a FLOP counter, which kernels must not bypass."""
    return bool(torch._C._len_torch_dispatch_stack())


def is_transformed() -> bool:
    """Whether vmap or forward-mode gradients are active, which kernels do not support."""
    return (
        torch._C._functorch.peek_interpreter_stack() is not None
        or torch.autograd.forward_ad._current_level >= 0
    )


def active_fake_mode() -> FakeTensorMode | None:
    """Return the active fake tensor mode, if any."""
    mode = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE)
    assert mode is None or isinstance(mode, FakeTensorMode)
    return mode


def unknown_size(number: int) -> int:
    """Return the number, of at least 1, as a size that torch.export assumes nothing about."""
    size: Any = torch.scalar_tensor(number, dtype=torch.int64).item()
    torch._check(size >= 1)
    return cast(int, size)  # int() would fix it


def start_fake_job(num_processes: int) -> None:
    """Become process 0 of a job whose collectives return at once and send nothing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group(
        "fake", rank=0, world_size=num_processes, store=FakeStore()
    )


def clear_sharding_cache() -> None:
    """Clear DTensor's cache of operators, which refers to the groups of an earlier job."""
    from torch.distributed.tensor.debug import _clear_sharding_prop_cache

    _clear_sharding_prop_cache()


def local_shape_and_offset(tensor: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the shape and the offset of this process's shard, which may be the full tensor."""
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    if not isinstance(tensor, DTensor):
        return tuple(tensor.shape), (0,) * tensor.dim()
    shape, offset = compute_local_shape_and_global_offset(
        tensor.shape, tensor.device_mesh, tensor.placements
    )
    return tuple(shape), tuple(offset)


def flatten(mesh: Any, name: str) -> Any:
    """Return the axes of a DeviceMesh flattened into one of that name."""
    return mesh._flatten(name)


def all_to_all(x_RD: Tensor, received: list[int], sent: list[int], group: Any) -> Tensor:
    """All-to-all of rows, with gradients, which the public function lacks."""
    from torch.distributed._functional_collectives import all_to_all_single_autograd

    rows: Tensor = all_to_all_single_autograd(x_RD, received, sent, group)
    return rows


def group_of_name(name: str) -> Any:
    """Return the process group of that name in functional collectives."""
    return torch.distributed.distributed_c10d._resolve_process_group(name)  # type: ignore[arg-type]


def second_connection(store: Any) -> Any:
    """Return another client of a store, as one waits for its own; type stubs lack the method."""
    return store.clone()


def norms(tensors: list[Tensor]) -> list[Tensor]:
    """Return the Euclidean norm of each tensor, with few kernel launches."""
    return list(torch._foreach_norm(tensors))


def int8_matmul(a_MK: Tensor, b_KN: Tensor) -> Tensor:
    """Multiply int8 matrices into int32."""
    return torch._int_mm(a_MK, b_KN)


def int4_matmul(x_RK: Tensor, codes: Tensor, group_size: int, scale_GN2: Tensor) -> Tensor:
    """Multiply bfloat16 rows with int4 codes, packed for the CPU."""
    return torch._weight_int4pack_mm_for_cpu(x_RK, codes, group_size, scale_GN2)


def has_fast_matmul(dtype: torch.dtype) -> bool:
    """Whether this processor has matmul instructions for bfloat16 or float16."""
    names = {
        torch.bfloat16: "_is_mkldnn_bf16_supported",
        torch.float16: "_is_mkldnn_fp16_supported",
    }
    try:
        return bool(getattr(torch.ops.mkldnn, names[dtype])())
    except (AttributeError, RuntimeError):  # a build for another processor
        return True
