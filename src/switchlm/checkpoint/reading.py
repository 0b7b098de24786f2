"""Read one checkpoint folder: verified as a whole before a single tensor is touched."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from switchlm.checkpoint import manifest, tensors
from switchlm.checkpoint.state import describe, join, split
from switchlm.errors import CheckpointError

STATE = "state.json"


def load_folder(folder: Path, into: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return the state in `folder`, which may be a copy of a checkpoint under any name.

    into: sections of the state (such as `model`) with tensors to fill in place; these are the
    tensors of the state returned, all others are new, on the CPU. A section must have exactly the
    tensors of the checkpoint, in shape and dtype.

    Raises CheckpointError for a damaged folder or a section that does not fit, before anything is
    written into the tensors of `into`.
    """
    manifest.verify(folder)
    return read_verified(folder, into)


def read_verified(folder: Path, into: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return the state in a folder that `manifest.verify` has passed; see `load_folder`."""
    try:
        structure = json.loads((folder / STATE).read_bytes())
        state = _fill(folder, structure, into or {})
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise CheckpointError(
            f"The checkpoint {str(folder)!r} is damaged: {STATE} cannot be read ({error})."
        ) from error
    except OSError as error:
        raise CheckpointError(f"Cannot read the checkpoint {str(folder)!r}: {error}.") from error
    return state


def _fill(folder: Path, structure: Any, into: Mapping[str, Any]) -> dict[str, Any]:
    stored = {name: (dtype, shape) for name, dtype, shape in describe(structure)}
    given, _ = split(into)
    for section in into:
        _match(folder, section, stored, given)
    _bound(folder, stored)
    values = {
        name: given[name] if name in given else torch.empty(shape, dtype=dtype)
        for name, (dtype, shape) in stored.items()
    }
    tensors.load(folder, values)
    state = join(structure, values)
    if not isinstance(state, dict):
        raise TypeError(f"it holds a {type(state).__name__} instead of named sections")
    return state


def _match(
    folder: Path,
    section: str,
    stored: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    given: Mapping[str, Tensor],
) -> None:
    saved = {name for name in stored if name.split("/")[0] == section}
    wanted = {name for name in given if name.split("/")[0] == section}
    problems = [f"{name} is missing" for name in sorted(wanted - saved)]
    problems += [f"{name} is not wanted" for name in sorted(saved - wanted)]
    for name in sorted(wanted & saved):
        kind = (given[name].dtype, tuple(given[name].shape))
        if kind != stored[name]:
            problems.append(f"{name} is {_kind(*stored[name])}, not {_kind(*kind)}")
    if problems:
        more = f", and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise CheckpointError(
            f"The checkpoint {str(folder)!r} does not fit: in it {', '.join(problems[:5])}{more}. "
            "Load it with the configuration that it was saved with."
        )


def _bound(folder: Path, stored: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> None:
    # Nothing is allocated that the files cannot hold, whatever the structure claims.
    held = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    claimed = sum(math.prod(shape) * dtype.itemsize for dtype, shape in stored.values())
    if claimed > held or any(size < 0 for _, shape in stored.values() for size in shape):
        raise CheckpointError(
            f"The checkpoint {str(folder)!r} is damaged: {STATE} claims {claimed} bytes of "
            f"tensors, its files hold {held}."
        )


def _kind(dtype: torch.dtype, shape: tuple[int, ...]) -> str:
    return f"{str(dtype).removeprefix('torch.')} {list(shape)}"
