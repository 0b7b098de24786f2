"""The two programs in ONNX, for onnxruntime and whatever else reads it. Needs the extra `onnx`."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch

from switchlm.data.text.tokenizer import Tokenizer
from switchlm.errors import MissingExtraError
from switchlm.export.folder import describe, new_folder
from switchlm.export.steps import (
    ENCODER_INPUTS,
    ENCODER_OUTPUTS,
    STEP_INPUTS,
    STEP_OUTPUTS,
    Program,
)
from switchlm.export.torch_programs import trace
from switchlm.model.transformer import SwitchTransformer

FILES = ("encoder.onnx", "decoder_step.onnx")
_OPENING = """import numpy as np
import onnxruntime
from tokenizers import Tokenizer


def run(file):
    session = onnxruntime.InferenceSession(file)
    names = [one.name for one in session.get_inputs()]
    return lambda *arrays: session.run(None, dict(zip(names, arrays)))


encode, step = run("encoder.onnx"), run("decoder_step.onnx")"""


def need(*packages: str) -> None:
    """Raise MissingExtraError for the first package that is not installed."""
    for package in packages:
        if find_spec(package) is None:
            raise MissingExtraError(package, "onnx", "ONNX")


def write_onnx(
    model: SwitchTransformer,
    tokenizer: Tokenizer,
    folder: Path,
    *,
    capacity_factor: float | None = None,
) -> None:
    """Write the two programs of a model; weights of any size lie beside, in *.onnx.data."""
    need("onnx", "onnxscript")
    names = ((ENCODER_INPUTS, ENCODER_OUTPUTS), (STEP_INPUTS, STEP_OUTPUTS))
    with new_folder(folder) as partial:
        traced = trace(model, capacity_factor)
        for program, (inputs, outputs), file in zip(traced, names, FILES, strict=True):
            with _quiet():
                torch.onnx.export(
                    program,
                    f=partial / file,
                    input_names=list(inputs),
                    output_names=list(outputs),
                    dynamic_shapes=tuple(inputs.values()),
                    dynamo=True,
                    external_data=True,
                    verbose=False,
                )
        describe(
            partial,
            model.config,
            tokenizer,
            opening=_OPENING,
            programs=FILES,
            capacity_factor=capacity_factor,
        )


def open_onnx(folder: Path) -> tuple[Program, Program]:
    """Return the programs of a folder, run by onnxruntime."""
    need("onnxruntime")
    import onnxruntime

    def run(file: str) -> Program:
        session = onnxruntime.InferenceSession(str(folder / file))
        names = [one.name for one in session.get_inputs()]

        def call(*arrays: np.ndarray) -> list[np.ndarray]:
            return session.run(None, dict(zip(names, arrays, strict=True)))

        return call

    return run(FILES[0]), run(FILES[1])


@contextmanager
def _quiet() -> Iterator[None]:
    """Hold back what the exporter says about packages that it does not need here."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
