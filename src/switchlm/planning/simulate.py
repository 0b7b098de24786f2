"""One training step of one process of a job that does not exist: its memory, and what it sends.

The model, `parallel.apply` and `training_step` are the real ones; tensors are fake and have shapes
only, and so has the job: collectives return at once and move nothing.

Fake tensors carry no values, so what the routers choose is not known. Here every expert takes the
same number of tokens of the whole batch, which is what the balance loss trains for (section 2.2);
what exceeds the capacity is dropped. Real loads differ from step to step: the fullest process then
holds more rows, up to the capacity, and the others fewer.

Shapes: P processes of the expert axis, E experts in all, L experts of this process.
"""

import functools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim import Optimizer

from switchlm import _torch
from switchlm.data.batch import Batch
from switchlm.data.config import DataConfig
from switchlm.data.pretraining.span_corruption import Noise
from switchlm.errors import ConfigError
from switchlm.model import count
from switchlm.model.config import ModelConfig
from switchlm.model.dispatch import Rows
from switchlm.model.router import Router
from switchlm.model.routing import Routing
from switchlm.model.switch import switch_layers
from switchlm.model.transformer import SwitchTransformer
from switchlm.parallel.apply import apply
from switchlm.parallel.expert import AllToAllDispatcher
from switchlm.parallel.mesh import Mesh, MeshConfig
from switchlm.planning.recorder import Bytes, Collective, CollectiveRecorder, MemoryRecorder
from switchlm.recipes.config import RunConfig, wire_dtype
from switchlm.training.optimizer import build_optimizer
from switchlm.training.step import prepare_for_training, training_step

LARGEST = 2**16  # processes; a group of them lists all its members


@contextmanager
def fake_job(config: MeshConfig, num_processes: int) -> Iterator[Mesh]:
    """Be process 0 of a job of `num_processes` that does not exist, and yield its mesh.

    Raises ConfigError if the mesh does not fit them, or if a real job is running here.
    """
    if dist.is_initialized():
        raise ConfigError("This process is part of a real job; simulate in a process of its own.")
    if not 1 <= num_processes <= LARGEST:
        raise ConfigError(f"ranks must lie in 1..{LARGEST}, got {num_processes}.")
    config.shape(num_processes)
    _torch.start_fake_job(num_processes)
    try:
        yield Mesh.of(config, "cpu")
    finally:
        dist.destroy_process_group()
        # An equal mesh of the next job would be taken for this one's.
        _torch.forget_sharding()


def balanced_loads(
    assignments: int, num_experts: int, process: int, capacity: int
) -> NDArray[np.int64]:
    """Return load_E: how many of its assignments a process sends to each expert.

    The remainder of the division goes to the experts in turn, from process to process, so that all
    have the same load in the end.

    capacity: what an expert takes of one process at most.
    """
    base, rest = divmod(assignments, num_experts)
    load_E = np.full(num_experts, base, dtype=np.int64)
    load_E[(process * rest + np.arange(rest)) % num_experts] += 1
    return np.minimum(load_E, capacity)


@functools.cache
def exchanged(
    assignments: int, num_experts: int, processes: int, here: int, capacity: int
) -> tuple[list[int], list[int]]:
    """Return the rows that process `here` sends to each process, and those that it receives."""
    loads_PE = np.stack(
        [balanced_loads(assignments, num_experts, p, capacity) for p in range(processes)]
    )
    loads_PPL = loads_PE.reshape(processes, processes, -1).sum(-1)
    return loads_PPL[here].tolist(), loads_PPL[:, here].tolist()


def balance(model: nn.Module) -> None:
    """Let all experts of a sharded model have the same load, whatever the routers say."""
    for layer in switch_layers(model).values():
        if isinstance(layer.dispatcher, AllToAllDispatcher):
            layer.dispatcher = BalancedDispatcher(layer.dispatcher, layer.router)


class BalancedDispatcher(AllToAllDispatcher):
    """Carries rows as AllToAllDispatcher does, as many as `balanced_loads` says."""

    def __init__(self, like: AllToAllDispatcher, router: Router) -> None:
        super().__init__(like.experts, like.tensor)
        self._router = router
        self._assignments, self._capacity = 0, 0

    def dispatch(self, x_ND: Tensor, routing: Routing) -> Rows:
        """Return the rows of the experts here, sorted by expert; how many depends on shapes only.

        Which rows they are is not what the routers say.
        """
        groups = routing.fraction_GE.shape[0]
        capacity = self._router.capacity(math.ceil(x_ND.shape[0] / groups))
        self._assignments = routing.expert_A.numel()
        self._capacity = self._assignments if capacity is None else capacity * groups
        return super().dispatch(x_ND, routing)

    def exchange_counts(self, counts_E: Tensor) -> tuple[Tensor, list[int], list[int]]:
        """Return counts as they travel, whose values are not used, and the balanced loads."""
        counts_PL = self._exchange(counts_E)
        processes, here = 1, 0
        if self.experts is not None:
            processes, here = self.experts.size(), self.experts.get_local_rank()
        rows = exchanged(self._assignments, counts_E.numel(), processes, here, self._capacity)
        return counts_PL, *rows


@contextmanager
def fake_model(
    config: ModelConfig,
    mesh_config: MeshConfig,
    num_processes: int,
    shard: Callable[[SwitchTransformer, Mesh], None],
) -> Iterator[tuple[SwitchTransformer, Mesh]]:
    """Be process 0 of a job, as in `fake_job`; yield its part of a model, and its mesh.

    Tensors are fake in the body of the block, and every expert has the same load.

    shard: leaves of the model, which has no memory yet, what this process holds.
    """
    with fake_job(mesh_config, num_processes) as mesh:
        with torch.device("meta"):
            model = SwitchTransformer(config)
        shard(model, mesh)
        balance(model)
        mesh.all_reduce_sum(torch.zeros(1))  # makes its group, impossible among fake tensors
        with _torch.FakeTensorMode(allow_non_fake_inputs=True):
            model.to_empty(device="cpu")
            yield model, mesh


@dataclass(frozen=True, kw_only=True)
class Simulation:
    """A simulated step.

    rows: of the batch, in each micro-batch of a process.
    peak: bytes in memory at the fullest moment.
    collectives: in order, all of the step.
    seconds: it took to simulate.
    """

    parameters: int
    rows: int
    peak: Bytes
    collectives: tuple[Collective, ...]
    seconds: float


def simulate(config: RunConfig, ranks: int) -> Simulation:
    """Simulate a step of rank 0 of `ranks` processes.

    Raises ConfigError where the mesh does not fit the number of ranks, the batch or the model.
    """
    started = time.perf_counter()
    shard = functools.partial(apply, wire_dtype=wire_dtype(config))
    with fake_model(config.model, config.mesh, ranks, shard) as (model, mesh):
        rows = rows_of_a_share(config.data.batch_size, mesh.data_size)
        batches = [blank_batch(config.data, rows)] * config.training.accumulate
        peak, collectives = measure_step(model, batches, config, mesh)
    return Simulation(
        parameters=count.parameters(config.model),
        rows=rows,
        peak=peak,
        collectives=collectives,
        seconds=time.perf_counter() - started,
    )


def measure_step(
    model: SwitchTransformer, batches: Sequence[Batch], config: RunConfig, mesh: Mesh
) -> tuple[Bytes, tuple[Collective, ...]]:
    """Train one step, real or fake; return its peak of memory and its collectives, in order."""
    training = config.training
    optimizer: Optimizer = build_optimizer(model, training)
    prepare_for_training(model, training.precision, training.activation_checkpointing)
    with (
        MemoryRecorder(model, optimizer.state.values()) as memory,
        CollectiveRecorder(mesh) as recorder,
    ):
        training_step(
            model,
            optimizer,
            batches,
            gradient_clip=training.gradient_clip,
            precision=training.precision,
            mesh=mesh,
        )
    return memory.peak, tuple(recorder.collectives)


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
