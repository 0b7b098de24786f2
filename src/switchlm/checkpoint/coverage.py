"""Whether the stored parts of every tensor make it up exactly: no gap, nothing twice.

Found out from shapes and offsets alone, before any number is read. Parts of an expert stack
[E, ...] are named by the numbers of the experts.
"""

from collections.abc import Iterable, Mapping
from functools import lru_cache
from itertools import pairwise

from switchlm.checkpoint.layout import Box, overlap, volume, whole
from switchlm.errors import CheckpointError

SHOWN = 5

# How often the parts cover each index range of the first dim: (start, stop, fewest, most).
Bands = tuple[tuple[int, int, int, int], ...]


def check(
    shapes: Mapping[str, tuple[int, ...]], stored: Mapping[str, Iterable[Box]], where: str
) -> None:
    """Raise CheckpointError unless the boxes of each name tile its shape.

    where: what holds them, for the message, such as `The checkpoint 'run/checkpoints/step-1'`.
    """
    problems = [f"{name} is stored, but is no part of it" for name in stored if name not in shapes]
    for name, shape in shapes.items():
        boxes = tuple(sorted(box for box in stored.get(name, ()) if volume(box)))
        problems += _problems(name, shape, boxes)
        if len(problems) > SHOWN:
            break
    if problems:
        more = ", and more" if len(problems) > SHOWN else ""
        raise CheckpointError(
            f"{where} does not hold every tensor exactly once: {'; '.join(problems[:SHOWN])}{more}."
        )


def _problems(name: str, shape: tuple[int, ...], boxes: tuple[Box, ...]) -> list[str]:
    everything = whole(shape)
    for box in boxes:
        inside = len(box) == len(shape) and overlap(box, everything) == box
        if not inside:
            return [f"a part of {name} lies outside its shape {list(shape)}"]
    if volume(everything) == 0 or boxes == (everything,):
        return []
    if not boxes:
        return [f"{name} is missing"]
    bands = _bands(shape, boxes)
    missing = [(start, stop, most == 0) for start, stop, fewest, most in bands if fewest == 0]
    doubled = [(start, stop, fewest > 1) for start, stop, fewest, most in bands if most > 1]
    return [
        f"{_say(name, shape, bad)} {what}"
        for bad, what in ((missing, "missing"), (doubled, "stored twice"))
        if bad
    ]


def _say(name: str, shape: tuple[int, ...], bad: list[tuple[int, int, bool]]) -> str:
    """Name the ranges (start, stop, whether all of it) of the first dim: `expert 3 of w is`."""
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
def _bands(shape: tuple[int, ...], boxes: tuple[Box, ...]) -> Bands:
    """Sweep over the first dim; many tensors of a model are cut alike, hence the cache."""
    if not shape:
        return ((0, 1, len(boxes), len(boxes)),)
    starts: dict[int, list[Box]] = {}
    stops: dict[int, list[Box]] = {}
    for box in boxes:
        starts.setdefault(box[0][0], []).append(box)
        stops.setdefault(box[0][1], []).append(box)
    cuts = sorted({0, shape[0], *starts, *stops})
    bands = []
    active: list[Box] = []
    for start, stop in pairwise(cuts):
        ended = stops.get(start, ())
        if ended:
            active = [box for box in active if box[0][1] != start]
        active += starts.get(start, ())
        if not active:
            bands.append((start, stop, 0, 0))
            continue
        inner = _bands(shape[1:], tuple(sorted(box[1:] for box in active)))
        bands.append((start, stop, min(b[2] for b in inner), max(b[3] for b in inner)))
    return tuple(bands)
