"""What the processes of a run tell one another about a checkpoint: answers, and errors.

Each step of a save or a load is taken by all ranks together or by none: an error of one is raised
on all of them and names it. Words travel as JSON over a gloo group that nothing else uses, so that
a save may go on in the background while training talks over its own.
"""

import json
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

    def each(self, work: Callable[[], T]) -> list[T]:
        """Do `work` on every rank; return all results (JSON values), by rank, to all of them.

        An error of any is raised on all: OSError for one of a disk, else CheckpointError.
        """
        if self.size == 1:
            return [work()]
        found, problem = _try(work)
        answers = self._gather({"value": found, "error": _told(problem)})
        failed = [rank for rank, answer in enumerate(answers) if answer["error"] is not None]
        if failed:
            told = answers[failed[0]]["error"]
            more = f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""
            _raise(told["kind"], f"Rank {failed[0]}{more}: {told['message']}", problem)
        return [answer["value"] for answer in answers]

    def first(self, work: Callable[[], T]) -> T:
        """Do `work` on rank 0, and return its result (a JSON value), or raise its error, on all."""
        if self.size == 1:
            return work()
        found, problem = _try(work) if self.is_first else (None, None)
        answer = self._spread({"value": found, "error": _told(problem)})
        told = answer["error"]
        if told is not None:
            _raise(told["kind"], told["message"], problem)
        value: T = answer["value"]
        return value

    def send(self, tensor: Tensor, rank: int) -> None:
        """Send a contiguous CPU tensor to another rank, which waits for it in `receive`."""
        dist.send(_bytes(tensor), group=self.group, group_dst=rank)

    def receive(self, tensor: Tensor, rank: int) -> None:
        """Fill a contiguous CPU tensor with what another rank sends."""
        dist.recv(_bytes(tensor), group=self.group, group_src=rank)

    def _gather(self, value: Any) -> list[Any]:
        content = _encode(value)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(sizes, torch.tensor([content.numel()]), group=self.group)
        longest = max(int(size) for size in sizes)
        padded = torch.zeros(longest, dtype=torch.uint8)
        padded[: content.numel()] = content
        contents = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(contents, padded, group=self.group)
        return [_decode(part[: int(size)]) for part, size in zip(contents, sizes, strict=True)]

    def _spread(self, value: Any) -> Any:
        content = _encode(value)
        size = torch.tensor([content.numel()])
        dist.broadcast(size, group=self.group, group_src=0)
        if not self.is_first:
            content = torch.empty(int(size), dtype=torch.uint8)
        dist.broadcast(content, group=self.group, group_src=0)
        return _decode(content)


ALONE = Ranks()


def _try(work: Callable[[], T]) -> tuple[T | None, Exception | None]:
    problem: Exception | None = None
    try:
        return work(), None
    except Exception as error:
        if isinstance(error, dist.DistError):
            raise
        problem = error  # whatever it is: the others wait to hear of it before it is raised
    return None, problem


def _told(problem: Exception | None) -> dict[str, str] | None:
    """Return kind and message of an error."""
    if problem is None:
        return None
    if isinstance(problem, CheckpointError):
        return {"kind": "checkpoint", "message": str(problem)}
    if isinstance(problem, OSError | SafetensorError):
        return {"kind": "disk", "message": str(problem)}
    return {"kind": "other", "message": f"{type(problem).__name__}: {problem}"}


def _raise(kind: str, message: str, own: Exception | None) -> None:
    """Raise what another rank, or this one, met; what nobody foresaw is raised as it is here."""
    if own is not None and kind == "other":
        raise own
    raise (OSError if kind == "disk" else CheckpointError)(message) from own


def _encode(value: Any) -> Tensor:
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)


def _decode(content: Tensor) -> Any:
    return json.loads(content.numpy().tobytes())


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().reshape(-1).view(torch.uint8)
