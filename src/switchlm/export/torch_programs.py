"""Programs of `torch.export`, in .pt2 files that PyTorch runs without this package."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from switchlm.data.text.tokenizer import Tokenizer
from switchlm.export.folder import describe, new_folder
from switchlm.export.steps import ENCODER_INPUTS, STEP_INPUTS, Program, examples, programs
from switchlm.model.transformer import SwitchTransformer

FILES = ("encoder.pt2", "decoder_step.pt2")
_OPENING = """import numpy as np
import torch
from tokenizers import Tokenizer


def run(file):
    program = torch.export.load(file).module()
    return lambda *arrays: [y.numpy() for y in program(*map(torch.from_numpy, arrays))]


encode, step = run("encoder.pt2"), run("decoder_step.pt2")"""


def trace(
    model: SwitchTransformer, capacity_factor: float | None = None
) -> tuple[ExportedProgram, ExportedProgram]:
    """Return the exported encoder and decoder step; batch, source and places are dynamic."""
    dims = {name: Dim(name) for name in ("batch", "source", "places")}
    traced = []
    inputs = (ENCODER_INPUTS, STEP_INPUTS)
    for program, names, example in zip(
        programs(model, capacity_factor), inputs, examples(model.config), strict=True
    ):
        free: Any = tuple(
            {place: dims[word] for place, word in shape.items()} for shape in names.values()
        )
        with torch.no_grad():
            traced.append(torch.export.export(program, example, dynamic_shapes=free))
    return traced[0], traced[1]


def write_torch(
    model: SwitchTransformer,
    tokenizer: Tokenizer,
    folder: Path,
    *,
    capacity_factor: float | None = None,
) -> None:
    """Write the two programs of a model; see steps.programs and folder.describe."""
    with new_folder(folder) as partial:
        for program, file in zip(trace(model, capacity_factor), FILES, strict=True):
            take_out(program.state_dict)
            torch.export.save(program, partial / file)
        describe(
            partial,
            model.config,
            tokenizer,
            opening=_OPENING,
            programs=FILES,
            capacity_factor=capacity_factor,
        )


def take_out(weights: dict[str, Tensor]) -> None:
    """Copy what is a part of a larger piece of memory: all of the piece would be saved."""
    for name, weight in weights.items():
        if weight.untyped_storage().nbytes() > weight.nbytes:
            weights[name] = nn.Parameter(weight.detach().clone(), requires_grad=False)


def open_torch(folder: Path) -> tuple[Program, Program]:
    """Return the programs of a folder, which take and give arrays."""

    def run(file: str) -> Program:
        program = torch.export.load(folder / file).module()

        def call(*arrays: np.ndarray) -> list[np.ndarray]:
            return [y.numpy() for y in program(*map(torch.from_numpy, arrays))]

        return call

    return run(FILES[0]), run(FILES[1])
