"""What the processes of a run tell one another about a checkpoint: answers, and errors.

Each step of a save or a load is taken by all ranks together or by none: an error of one is raised
on all of them and names it. Words travel over a gloo group that nothing else uses, so that a save
may go on in the background while training talks over its own. They are pickled on their way, as
torch.distributed does between the processes of one job; files hold nothing pickled.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor

from switchlm.errors import CheckpointError

T = TypeVar("T")


class Ranks:
    """The processes of a group, None being this one alone. All must make the same calls."""

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.rank = 0 if group is None else dist.get_rank(group)
        self.size = 1 if group is None else dist.get_world_size(group)

    @property
    def is_first(self) -> bool:
        """Whether this one decides where one must."""
        return self.rank == 0

    def on_all_ranks(self, work: Callable[[], T]) -> list[T]:
        """Do `work` on every rank; return all results, by rank, to all of them.

        An error of any is raised on all: OSError for one of a disk, else CheckpointError.
        """
        if self.size == 1:
            return [work()]
        answer, error = _attempt(work)
        answers = [answer] * self.size
        dist.all_gather_object(answers, answer, group=self.group)
        failed = [rank for rank, found in enumerate(answers) if "error" in found]
        if failed:
            more = f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""
            raise _told(answers[failed[0]], f"Rank {failed[0]}{more}: ") from error
        return [found["value"] for found in answers]

    def on_rank_zero(self, work: Callable[[], T]) -> T:
        """Do `work` on rank 0, and return its result, or raise its error, on all."""
        if self.size == 1:
            return work()
        answer, error = _attempt(work) if self.is_first else ({}, None)
        answers = [answer]
        dist.broadcast_object_list(answers, group=self.group, group_src=0)
        if "error" in answers[0]:
            raise error or _told(answers[0], "")
        value: T = answers[0]["value"]
        return value

    def send(self, tensor: Tensor, rank: int) -> None:
        """Send a contiguous CPU tensor to another rank, which waits for it in `receive`."""
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
        told = str(error)
        if not isinstance(error, CheckpointError | OSError | SafetensorError):
            told = f"{type(error).__name__}: {error}"
        of_disk = isinstance(error, OSError | SafetensorError)
        return {"error": told, "of_disk": of_disk}, error


def _told(answer: dict[str, Any], who: str) -> Exception:
    """Return the error that another rank told of."""
    return (OSError if answer["of_disk"] else CheckpointError)(who + answer["error"])


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().reshape(-1).view(torch.uint8)
