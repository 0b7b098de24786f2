"""Read one checkpoint folder: verified completely before a tensor is written to.

Shapes and offsets in the headers show whether the stored parts cover every tensor exactly once.
Error messages name the experts of a missing part of an expert stack [E, ...].
"""

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from switchlm.checkpoint import format, layout
from switchlm.checkpoint.collective import ALONE, Ranks
from switchlm.checkpoint.format import (
    CODES,
    TensorSpec,
    damaged,
    flatten_state,
    readable,
    tensor_specs,
    unflatten_state,
)
from switchlm.checkpoint.layout import FileRegion, Region, full_region, overlap, volume
from switchlm.errors import CheckpointError

STATE = "state.json"
SHOWN = 5  # problems in a message
MOST_CELLS = 2**24  # of the grid that all cuts of a tensor make; limits allocations


def load_folder(
    folder: Path, into: Mapping[str, Any] | None = None, ranks: Ranks = ALONE
) -> dict[str, Any]:
    """Return the state in `folder`, which may be a copy of a checkpoint under any name.

    into: sections of the state (such as `model`) with tensors to fill in place, which may be
        DTensors on any mesh; each rank reads its own part. The returned state has these tensors;
        all others are new, full, and on the CPU. A section must have exactly the tensors of the
        checkpoint, in shape and dtype.

    Raises CheckpointError, on all ranks, for a damaged folder, for parts of tensors that are
    missing or stored twice, and for a section that does not match, before anything is written into
    the tensors of `into`.
    """
    format.verify(folder, ranks)
    return read_verified(folder, into, ranks)


def read_verified(
    folder: Path, into: Mapping[str, Any] | None = None, ranks: Ranks = ALONE
) -> dict[str, Any]:
    """Return the state in a folder that `format.verify` has passed; see `load_folder`."""
    paths = sorted(folder.glob("*.safetensors"))[ranks.rank :: ranks.size]
    headers = ranks.on_all_ranks(lambda: _headers(folder, paths))
    state: dict[str, Any] = {}

    def prepare() -> None:
        with _explain(folder):
            state.update(_prepare(folder, headers, into or {}))

    def fill() -> None:
        with _explain(folder):
            layout.load(folder, state["values"], state["stored"])

    ranks.on_all_ranks(prepare)
    ranks.on_all_ranks(fill)
    joined: dict[str, Any] = state["joined"]
    return joined


def _headers(folder: Path, paths: list[Path]) -> list[tuple[str, FileRegion]]:
    with _explain(folder):
        return list(layout.index(paths))


def _prepare(
    folder: Path, headers: list[list[tuple[str, FileRegion]]], into: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the tensors to fill, the stored regions of each, and the state with these tensors."""
    structure = json.loads((folder / STATE).read_bytes())
    specs = tensor_specs(structure)
    stored: dict[str, list[FileRegion]] = {}
    for name, part in chain.from_iterable(headers):
        stored.setdefault(name, []).append(part)
    _check_size(folder, specs)
    check_parts(f"The checkpoint {str(folder)!r} is damaged: it", specs, stored)
    given, _ = flatten_state(into)
    for section in into:
        _match(folder, section, specs, given)
    values = {
        name: given[name] if name in given else torch.empty(shape, dtype=dtype)
        for name, (dtype, shape) in specs.items()
    }
    joined = unflatten_state(structure, values)
    if not isinstance(joined, dict):
        raise TypeError(f"it holds a {type(joined).__name__} instead of named sections")
    return {"values": values, "stored": stored, "joined": joined}


@contextmanager
def _explain(folder: Path) -> Iterator[None]:
    """Raise errors of reading, and of damaged contents, as CheckpointError."""
    try:
        with readable(folder):
            yield
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise damaged(folder, f"{STATE} cannot be read ({error})") from error


def _match(
    folder: Path,
    section: str,
    stored: Mapping[str, TensorSpec],
    given: Mapping[str, Tensor],
) -> None:
    saved = {name for name in stored if name.split("/")[0] == section}
    wanted = {name for name in given if name.split("/")[0] == section}
    problems = [f"{name} is missing" for name in sorted(wanted - saved)]
    problems += [f"{name} is not expected" for name in sorted(saved - wanted)]
    for name in sorted(wanted & saved):
        kind = (given[name].dtype, tuple(given[name].shape))
        if kind != stored[name]:
            problems.append(f"{name} is {_kind(*stored[name])}, not {_kind(*kind)}")
    if problems:
        more = f", and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        raise CheckpointError(
            f"The checkpoint {str(folder)!r} does not match: in it {', '.join(problems[:SHOWN])}"
            f"{more}. Load it with the configuration that it was saved with."
        )


def _check_size(folder: Path, specs: Mapping[str, TensorSpec]) -> None:
    """Check that the files are large enough for the tensors, before these are allocated."""
    size_of_files = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    claimed = sum(math.prod(shape) * dtype.itemsize for dtype, shape in specs.values())
    if claimed > size_of_files or any(size < 0 for _, shape in specs.values() for size in shape):
        raise damaged(
            folder, f"{STATE} claims {claimed} bytes of tensors, its files hold {size_of_files}"
        )


def _kind(dtype: torch.dtype, shape: tuple[int, ...]) -> str:
    return f"{str(dtype).removeprefix('torch.')} {list(shape)}"


def check_parts(
    where: str,
    specs: Mapping[str, TensorSpec],
    stored: Mapping[str, list[FileRegion]],
) -> None:
    """Raise CheckpointError unless the stored regions tile every tensor, in its dtype.

    where: subject of the message, such as `The checkpoint 'run/checkpoints/step-1'`.
    specs: dtype and shape by name.
    stored: regions in files by name.
    """
    problems = [f"{name} is stored, but is no part of it" for name in stored if name not in specs]
    for name, (_, shape) in specs.items():
        regions = tuple(sorted(part.region for part in stored.get(name, ()) if volume(part.region)))
        problems += _problems(name, shape, regions)
        if len(problems) > SHOWN:
            break
    if problems:
        more = ", and more" if len(problems) > SHOWN else ""
        raise CheckpointError(
            f"{where} does not hold every tensor exactly once: {'; '.join(problems[:SHOWN])}{more}."
        )
    for name, (dtype, _) in specs.items():
        for part in stored.get(name, ()):
            if part.code != CODES[dtype]:
                raise CheckpointError(f"{where} holds {name} as {part.code}, not as {dtype}.")


def _problems(name: str, shape: tuple[int, ...], regions: tuple[Region, ...]) -> list[str]:
    everything = full_region(shape)
    for region in regions:
        inside = len(region) == len(shape) and overlap(region, everything) == region
        if not inside:
            return [f"a part of {name} lies outside its shape {list(shape)}"]
    if volume(everything) == 0 or regions == (everything,):
        return []
    if not regions:
        return [f"{name} is missing"]
    bands = _bands(shape, regions)
    missing = [(start, stop, most == 0) for start, stop, fewest, most in bands if fewest == 0]
    doubled = [(start, stop, fewest > 1) for start, stop, fewest, most in bands if most > 1]
    return [
        f"{_name_ranges(name, shape, bad)} {what}"
        for bad, what in ((missing, "missing"), (doubled, "stored twice"))
        if bad
    ]


def _name_ranges(name: str, shape: tuple[int, ...], bad: list[tuple[int, int, bool]]) -> str:
    """Format ranges (start, stop, whether complete) of the first dim: `expert 3 of w is`."""
    if not shape:
        return f"{name} is"
    unit = "expert" if ".experts." in name else "row"
    ranges = [
        str(start) if stop == start + 1 else f"{start} to {stop - 1}" for start, stop, _ in bad
    ]
    many = len(bad) > 1 or bad[0][1] > bad[0][0] + 1
    shown = ", ".join(ranges[:SHOWN]) + " and more" * (len(ranges) > SHOWN)
    units = f"{unit}{'s' * many} {shown} of {name}"
    if not all(entire for _, _, entire in bad):
        return f"a part of {units} is"
    return f"{units} {'are' if many else 'is'}"


@lru_cache(maxsize=64)
def _bands(shape: tuple[int, ...], regions: tuple[Region, ...]) -> list[tuple[int, int, int, int]]:
    """Return how often regions cover each range of the first dim: (start, stop, fewest, most).

    Counted over the cells of the grid that all cuts make. Cached, since many tensors of a model are
    cut in the same way.
    """
    cuts = [
        np.unique([0, size, *(side for region in regions for side in region[dim])])
        for dim, size in enumerate(shape)
    ]
    cells = [len(cut) - 1 for cut in cuts]
    if math.prod(cells) > MOST_CELLS:
        raise CheckpointError(
            f"The {len(regions)} parts of a tensor {list(shape)} do not fit together: the "
            "checkpoint is damaged."
        )
    counts = np.zeros(cells, dtype=np.int64)
    for region in regions:
        sides = zip(cuts, region, strict=True)
        counts[tuple(slice(*cut.searchsorted(side)) for cut, side in sides)] += 1
    bounds = cuts[0] if shape else np.array([0, 1])
    counts = counts.reshape(len(bounds) - 1, -1)
    columns = bounds[:-1], bounds[1:], counts.min(1), counts.max(1)
    return list(zip(*(column.tolist() for column in columns), strict=True))
