"""One training step of one process of a job that does not exist: its memory, and what it sends.

The model, `parallel.apply` and `training_step` are the real ones; tensors are fake and have shapes
only, and so has the job. Loads are balanced (parallel/balanced.py).
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim import Optimizer

from switchlm.data.batch import Batch
from switchlm.data.config import DataConfig
from switchlm.data.span_corruption import Noise
from switchlm.errors import ConfigError
from switchlm.model.transformer import SwitchTransformer
from switchlm.parallel.apply import apply
from switchlm.parallel.balanced import balance
from switchlm.parallel.fake import fake_job
from switchlm.parallel.ledger import Collective, Ledger
from switchlm.parallel.memory import Bytes, Memory
from switchlm.parallel.mesh import Mesh
from switchlm.recipes.config import RunConfig
from switchlm.training.optimizer import build_optimizer
from switchlm.training.precision import set_router_dtype
from switchlm.training.step import training_step


@dataclass(frozen=True, kw_only=True)
class StepFigures:
    """What a step of one process took.

    peak: bytes in memory at the fullest moment. collectives: in order, all of the step.
    """

    peak: Bytes
    collectives: tuple[Collective, ...]


@dataclass(frozen=True, kw_only=True)
class Simulation:
    """A simulated step. rows: of the batch, in each micro-batch of a process. seconds: it took."""

    ranks: int
    rows: int
    parameters: int
    step: StepFigures
    seconds: float


def simulate(config: RunConfig, ranks: int) -> Simulation:
    """Simulate a step of rank 0 of `ranks` processes.

    Raises ConfigError where the mesh does not fit the number of ranks, the batch or the model.
    """
    started = time.perf_counter()
    with fake_job(config.mesh, ranks) as mesh:
        rows = rows_of_a_share(config.data.batch_size, mesh.num_shares)
        with torch.device("meta"):
            model = SwitchTransformer(config.model)
        parameters = sum(parameter.numel() for parameter in model.parameters())
        apply(model, mesh, wire_dtype=wire_dtype(config))
        balance(model)
        mesh.total(torch.zeros(1))  # makes its group, which cannot be made among fake tensors
        with FakeTensorMode(allow_non_fake_inputs=True):
            model.to_empty(device="cpu")
            batches = [blank_batch(config.data, rows)] * config.training.accumulate
            step = measure_step(model, batches, config, mesh)
    return Simulation(
        ranks=ranks,
        rows=rows,
        parameters=parameters,
        step=step,
        seconds=time.perf_counter() - started,
    )


def measure_step(
    model: SwitchTransformer, batches: Sequence[Batch], config: RunConfig, mesh: Mesh
) -> StepFigures:
    """Train one step, real or fake, and return what it took."""
    training = config.training
    optimizer: Optimizer = build_optimizer(model, training)
    set_router_dtype(model, training.precision)
    for stack in (model.encoder, model.decoder):
        stack.activation_checkpointing = training.activation_checkpointing
    with Memory(model, optimizer.state.values()) as memory, Ledger(mesh) as ledger:
        training_step(
            model.train(),
            optimizer,
            batches,
            gradient_clip=training.gradient_clip,
            precision=training.precision,
            mesh=mesh,
        )
    return StepFigures(peak=memory.peak, collectives=tuple(ledger.collectives))


def wire_dtype(config: RunConfig) -> torch.dtype | None:
    """Return the dtype in which weights are gathered; None is their own."""
    return None if config.training.precision == "float32" else torch.bfloat16


def rows_of_a_share(batch_size: int, num_shares: int) -> int:
    """Return the rows of a batch that each share has; raises ConfigError if it is not whole."""
    if batch_size % num_shares:
        raise ConfigError(
            f"data.batch_size {batch_size} cannot be shared out evenly among {num_shares} shares "
            "of the batch (mesh.replicas x data x expert); use a multiple."
        )
    return batch_size // num_shares


def row_lengths(config: DataConfig) -> tuple[int, int, bool]:
    """Return the lengths of inputs and targets, and whether rows come with segments.

    Packed rows whose target length is left open get what one long example needs.
    """
    noise = Noise(density=config.noise_density, mean_span=config.mean_span)
    raw_length = noise.raw_length(config.input_length)
    exact = int(noise.corrupted_lengths(np.array([raw_length]))[1][0])
    targets = config.target_length or exact
    return config.input_length, targets, config.pack or targets != exact


def blank_batch(config: DataConfig, rows: int) -> Batch:
    """Return rows of the shape that the data section makes, with nothing in them."""
    inputs, targets, segments = row_lengths(config)
    return Batch(
        inputs_BS=torch.zeros(rows, inputs, dtype=torch.int64),
        targets_BT=torch.zeros(rows, targets, dtype=torch.int64),
        input_segments_BS=torch.ones(rows, inputs, dtype=torch.int32) if segments else None,
        target_segments_BT=torch.ones(rows, targets, dtype=torch.int32) if segments else None,
        source_B=torch.zeros(rows, dtype=torch.int32),
    )
