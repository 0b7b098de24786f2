"""Named tensors to safetensors files and back, by torch.distributed.checkpoint (DCP).

DCP's own file format keeps its index as a pickle (`.metadata`), which runs code when read. Its
Hugging Face writer and reader keep the same planning, slicing and resharding, but write safetensors
with the offsets in their headers: bit-exact, mapped into memory when read, and no pickle anywhere.
Only tensors are handed to it, since DCP pickles all else.

DCP up to torch 2.13 syncs its files before it flushes them; the caller must sync them again.
"""

import warnings
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from switchlm.errors import CheckpointError

FILE_BYTES = 2**28  # the writer holds one file in memory twice; a larger tensor has its own


def save(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Write CPU tensors into safetensors files of about `FILE_BYTES` each.

    Raises OSError, or whatever else the writing met.
    """
    _hush()
    writer = dcp.HuggingFaceStorageWriter(
        str(folder), fqn_to_index_mapping=_assign_files(tensors, FILE_BYTES)
    )
    planner = dcp.DefaultSavePlanner(flatten_state_dict=False)
    try:
        dcp.save(dict(tensors), storage_writer=writer, planner=planner, no_dist=True)
    except dcp.CheckpointException as error:
        raise _first_cause(error) from error


def load(folder: Path, into: dict[str, Tensor]) -> None:
    """Fill the tensors of `into` in place from the files of `folder`, by name.

    Raises CheckpointError if the files do not hold such tensors.
    """
    _hush()
    planner = dcp.DefaultLoadPlanner(flatten_state_dict=False)
    reader = dcp.HuggingFaceStorageReader(str(folder))
    try:
        dcp.load(into, storage_reader=reader, planner=planner, no_dist=True)
    except dcp.CheckpointException as error:
        raise CheckpointError(
            f"Cannot read the tensors of {str(folder)!r}: {_first_cause(error)}"
        ) from error


def stage(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return copies in the CPU's memory, contiguous and apart from one another."""
    contiguous = torch.contiguous_format
    return {
        name: tensor.detach().to("cpu", copy=True, memory_format=contiguous)
        for name, tensor in tensors.items()
    }


def _assign_files(tensors: dict[str, Tensor], file_bytes: int) -> dict[str, int] | None:
    files: dict[str, int] = {}
    index, filled = 1, 0
    for name, tensor in tensors.items():
        if filled and filled + tensor.nbytes > file_bytes:
            index, filled = index + 1, 0
        filled += tensor.nbytes
        files[name] = index
    return files or None


def _first_cause(error: dcp.CheckpointException) -> BaseException:
    return next((cause for cause, _ in error.failures.values()), error)


def _hush() -> None:
    # One process is what the caller meant; DCP warns of it at every call.
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")
