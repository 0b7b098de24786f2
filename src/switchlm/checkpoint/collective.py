"""Collectives of a checkpoint: each step succeeds on all ranks, or raises the same error on all.

The error names the rank where it occurred. Messages use a gloo group of their own, so that a save
can run in the background while training uses its groups. They are pickled by torch.distributed;
files hold nothing pickled.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor

from switchlm.errors import CheckpointError, UserError

T = TypeVar("T")


class Ranks:
    """The processes of a group (None: this process alone). All must make the same calls."""

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.rank = 0 if group is None else dist.get_rank(group)
        self.size = 1 if group is None else dist.get_world_size(group)

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def on_all_ranks(self, work: Callable[[], T]) -> list[T]:
        """Run `work` on every rank; return the results of all ranks, in order, on each.

        An error of any is raised on all: OSError for one of a disk, else CheckpointError.
        """
        if self.size == 1:
            return [work()]
        result, error = _attempt(work)
        results = [result] * self.size
        dist.all_gather_object(results, result, group=self.group)
        failed = [rank for rank, found in enumerate(results) if "error" in found]
        if failed:
            more = f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""
            raise _remote_error(results[failed[0]], f"Rank {failed[0]}{more}: ") from error
        return [found["value"] for found in results]

    def on_rank_zero(self, work: Callable[[], T]) -> T:
        """Run `work` on rank 0, and return its result, or raise its error, on all."""
        if self.size == 1:
            return work()
        result, error = _attempt(work) if self.is_first else ({}, None)
        results = [result]
        dist.broadcast_object_list(results, group=self.group, group_src=0)
        if "error" in results[0]:
            raise error or _remote_error(results[0], "")
        value: T = results[0]["value"]
        return value

    def send(self, tensor: Tensor, rank: int) -> None:
        """Send a contiguous CPU tensor to another rank, which calls `receive`."""
        dist.send(_bytes(tensor), group=self.group, group_dst=rank)

    def receive(self, tensor: Tensor, rank: int) -> None:
        """Fill a contiguous CPU tensor with what another rank sends."""
        dist.recv(_bytes(tensor), group=self.group, group_src=rank)


ALONE = Ranks()


def _attempt(work: Callable[[], Any]) -> tuple[dict[str, Any], Exception | None]:
    """Return the value, or the message of the error and the error itself."""
    try:
        return {"value": work()}, None
    except Exception as error:
        message = str(error)
        if not isinstance(error, UserError | OSError | SafetensorError):
            message = f"{type(error).__name__}: {error}"
        of_disk = isinstance(error, OSError | SafetensorError)
        return {"error": message, "of_disk": of_disk}, error


def _remote_error(result: dict[str, Any], prefix: str) -> Exception:
    """Return the error of another rank."""
    return (OSError if result["of_disk"] else CheckpointError)(prefix + result["error"])


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().reshape(-1).view(torch.uint8)
