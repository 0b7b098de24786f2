"""Stored regions that do not tile a tensor are found; the oracle counts every element."""

import itertools
import random

import numpy as np
import pytest
import torch

from switchlm.checkpoint.layout import FileRegion, Region
from switchlm.checkpoint.read import check_parts
from switchlm.errors import CheckpointError

EXPERTS = "model/encoder.blocks.1.feedforward.experts.up"


def grid(shape: tuple[int, ...], generator: random.Random) -> list[Region]:
    """Cut every dim at random places; the regions of the grid tile the shape."""
    sides = []
    for size in shape:
        cuts = sorted(
            {0, size, *(generator.randint(0, size) for _ in range(generator.randint(0, 3)))}
        )
        sides.append(list(itertools.pairwise(cuts)))
    return [tuple(region) for region in itertools.product(*sides)]


def covered(shape: tuple[int, ...], regions: list[Region]) -> bool:
    counts = np.zeros(shape, dtype=int)
    for region in regions:
        counts[tuple(slice(a, b) for a, b in region)] += 1
    return bool((counts == 1).all())


def check(shapes: dict[str, tuple[int, ...]], regions: dict[str, list[Region]]) -> None:
    specs = {name: (torch.float32, shape) for name, shape in shapes.items()}
    stored = {
        name: [FileRegion(region, "F32", "file") for region in held]
        for name, held in regions.items()
    }
    check_parts("It", specs, stored)


def found(shape: tuple[int, ...], regions: list[Region], name: str = EXPERTS) -> str | None:
    try:
        check({name: shape}, {name: regions})
    except CheckpointError as error:
        return str(error)
    return None


@pytest.mark.parametrize("seed", range(300))
def test_it_finds_what_counting_every_number_finds(seed: int) -> None:
    generator = random.Random(seed)
    shape = tuple(generator.randint(1, 6) for _ in range(generator.randint(0, 3)))
    regions = grid(shape, generator)
    generator.shuffle(regions)
    assert found(shape, regions) is None
    harm = generator.choice(["remove", "double", "move", "none"])
    index = generator.randrange(len(regions))
    if harm == "remove":
        del regions[index]
    elif harm == "double":
        regions.append(regions[index])
    elif harm == "move":
        regions[index] = regions[generator.randrange(len(regions))]
    assert (found(shape, regions) is None) == covered(shape, regions)


def test_parts_that_are_no_grid_may_tile_too() -> None:
    pinwheel: list[Region] = [
        ((0, 1), (0, 2)), ((0, 2), (2, 3)), ((2, 3), (1, 3)), ((1, 3), (0, 1)), ((1, 2), (1, 2)),
    ]  # fmt: skip
    assert found((3, 3), pinwheel) is None
    assert found((3, 3), pinwheel[:-1]) == (
        f"It does not hold every tensor exactly once: a part of expert 1 of {EXPERTS} is missing."
    )


def one(expert: int) -> Region:
    return ((expert, expert + 1), (0, 4), (0, 2))


@pytest.mark.parametrize(
    ("experts", "message"),
    [
        ([0, 1, 2, 4], f"expert 3 of {EXPERTS} is missing"),
        ([0, 1], f"experts 2 to 4 of {EXPERTS} are missing"),
        ([0, 1, 2, 3, 3, 4], f"expert 3 of {EXPERTS} is stored twice"),
        ([1, 1, 2, 3, 4], f"expert 0 of {EXPERTS} is missing; expert 1 of {EXPERTS} is stored"),
        ([], f"{EXPERTS} is missing"),
        ([0, 1, 2, 3, 4, 5], f"a part of {EXPERTS} lies outside its shape"),
    ],
)
def test_experts_are_named(experts: list[int], message: str) -> None:
    assert message in (found((5, 4, 2), [one(expert) for expert in experts]) or "")


def test_half_an_expert_and_rows_are_named() -> None:
    regions = [one(0), one(1), ((2, 3), (0, 2), (0, 2))]
    assert f"a part of expert 2 of {EXPERTS} is missing" in (found((3, 4, 2), regions) or "")
    assert "rows 2 to 3 of model/w are missing" in (found((4,), [((0, 2),)], "model/w") or "")
    assert "model/s is stored twice" in (found((), [(), ()], "model/s") or "")


def test_unknown_and_empty_tensors() -> None:
    with pytest.raises(CheckpointError, match="x is stored, but is no part of it"):
        check({}, {"x": [((0, 1),)]})
    check({"x": (0, 3)}, {})
    check({"x": (0, 3)}, {"x": [((0, 0), (0, 3))]})


def test_ten_thousand_parts_take_no_time() -> None:
    shape = (2048, 64, 64)
    regions = [((e, e + 1), (r, r + 16), (0, 64)) for e in range(2048) for r in range(0, 64, 16)]
    assert found(shape, regions) is None
    assert "expert 2047" in (found(shape, regions[:-1]) or "")


def test_parts_that_cut_a_tensor_absurdly_are_refused() -> None:
    shape = (1000, 1000, 1000)
    diagonal = [((n, n + 1),) * 3 for n in range(1000)]
    assert "do not fit together" in (found(shape, diagonal) or "")
