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

    def on_all_ranks(self, work: Callable[[], T]) -> list[T]:
        """Do `work` on every rank; return all results (JSON values), by rank, to all of them.

        An error of any is raised on all: OSError for one of a disk, else CheckpointError.
        """
        if self.size == 1:
            return [work()]
        try:
            found = work()
        except Exception as error:
            answers = self._gather({"error": _tell(error)})
            raise _worst(answers) or error from error
        answers = self._gather({"value": found})
        problem = _worst(answers)
        if problem is not None:
            raise problem
        return [answer["value"] for answer in answers]

    def on_rank_zero(self, work: Callable[[], T]) -> T:
        """Do `work` on rank 0, and return its result (a JSON value), or raise its error, on all."""
        if self.size == 1:
            return work()
        answer = None
        if self.is_first:
            try:
                answer = {"value": work()}
            except Exception as error:
                self._spread({"error": _tell(error)})
                raise
        answer = self._spread(answer)
        if "error" in answer:
            raise _error(answer["error"], "")
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


def _tell(error: Exception) -> list[str]:
    """Return the kind of an error and its message, as `_error` takes them."""
    if isinstance(error, CheckpointError):
        return ["checkpoint", str(error)]
    if isinstance(error, OSError | SafetensorError):
        return ["disk", str(error)]
    return ["other", f"{type(error).__name__}: {error}"]


def _error(told: list[str], who: str) -> Exception:
    kind, message = told
    return (OSError if kind == "disk" else CheckpointError)(who + message)


def _worst(answers: list[dict[str, Any]]) -> Exception | None:
    """Return the error of the first rank that has one."""
    failed = [rank for rank, answer in enumerate(answers) if "error" in answer]
    if not failed:
        return None
    more = f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""
    return _error(answers[failed[0]]["error"], f"Rank {failed[0]}{more}: ")


def _encode(value: Any) -> Tensor:
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)


def _decode(content: Tensor) -> Any:
    return json.loads(content.numpy().tobytes())


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().reshape(-1).view(torch.uint8)
