"""Simulate a training step of one process of a large job: its memory and its collectives.

The model, `parallel.apply` and `training_step` are the real ones; tensors are fake (shapes without
values) and so are the processes: collectives return at once and send nothing.

Without values the expert assignment is not known. Every expert is assumed to take the same number
of tokens of the batch, which is what the balance loss trains for (section 2.2); what exceeds the
capacity is dropped. Real loads differ from step to step: some processes hold more rows, up to the
capacity, and others fewer.

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
    """Become process 0 of a fake job of `num_processes`, and yield its mesh.

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
        # Otherwise the next job's equal mesh would reuse this one's groups.
        _torch.clear_sharding_cache()


def balanced_loads(
    assignments: int, num_experts: int, process: int, capacity: int
) -> NDArray[np.int64]:
    """Return load_E: how many of its assignments a process sends to each expert.

    The remainder of the division is assigned in turn over all processes, so that the total load of
    all experts is equal.

    capacity: the most that an expert takes from one process.
    """
    base, rest = divmod(assignments, num_experts)
    load_E = np.full(num_experts, base, dtype=np.int64)
    load_E[(process * rest + np.arange(rest)) % num_experts] += 1
    return np.minimum(load_E, capacity)


@functools.cache
def all_to_all_sizes(
    assignments: int, num_experts: int, processes: int, here: int, capacity: int
) -> tuple[list[int], list[int]]:
    """Return how many rows process `here` sends to, and receives from, each process."""
    loads_PE = np.stack(
        [balanced_loads(assignments, num_experts, p, capacity) for p in range(processes)]
    )
    loads_PPL = loads_PE.reshape(processes, processes, -1).sum(-1)
    return loads_PPL[here].tolist(), loads_PPL[:, here].tolist()


def balance_experts(model: nn.Module) -> None:
    """Give all experts of a sharded model the same load, independent of the routers."""
    for layer in switch_layers(model).values():
        if isinstance(layer.dispatcher, AllToAllDispatcher):
            layer.dispatcher = BalancedDispatcher(layer.dispatcher, layer.router)


class BalancedDispatcher(AllToAllDispatcher):
    """An AllToAllDispatcher with the numbers of rows of `balanced_loads`."""

    def __init__(self, like: AllToAllDispatcher, router: Router) -> None:
        super().__init__(like.experts, like.tensor)
        self._router = router
        self._assignments, self._capacity = 0, 0

    def dispatch(self, x_ND: Tensor, routing: Routing) -> Rows:
        """Return the rows of the local experts, sorted by expert; their number depends on shapes
        only, and which rows they are does not follow the routers.
        """
        groups = routing.fraction_GE.shape[0]
        capacity = self._router.capacity(math.ceil(x_ND.shape[0] / groups))
        self._assignments = routing.expert_A.numel()
        self._capacity = self._assignments if capacity is None else capacity * groups
        return super().dispatch(x_ND, routing)

    def exchange_counts(self, counts_E: Tensor) -> tuple[Tensor, list[int], list[int]]:
        """Return exchanged counts, whose values are not used, and the balanced loads."""
        counts_PL = self._exchange(counts_E)
        processes, here = 1, 0
        if self.experts is not None:
            processes, here = self.experts.size(), self.experts.get_local_rank()
        rows = all_to_all_sizes(
            self._assignments, counts_E.numel(), processes, here, self._capacity
        )
        return counts_PL, *rows


@contextmanager
def fake_model(
    config: ModelConfig,
    mesh_config: MeshConfig,
    num_processes: int,
    shard: Callable[[SwitchTransformer, Mesh], None],
) -> Iterator[tuple[SwitchTransformer, Mesh]]:
    """Become process 0 of a `fake_job`; yield its shards of a model, and its mesh.

    Tensors are fake in the body of the block, and every expert has the same load.

    shard: shards the model, which is on the meta device.
    """
    with fake_job(mesh_config, num_processes) as mesh:
        with torch.device("meta"):
            model = SwitchTransformer(config)
        shard(model, mesh)
        balance_experts(model)
        mesh.all_reduce_sum(torch.zeros(1))  # creates its group, impossible with fake tensors
        with _torch.FakeTensorMode(allow_non_fake_inputs=True):
            model.to_empty(device="cpu")
            yield model, mesh


@dataclass(frozen=True, kw_only=True)
class Simulation:
    """A simulated step.

    parameters: of the full model.
    rows: of the batch, in each micro-batch of a process.
    peak: bytes in memory at the peak.
    collectives: of the step, in order.
    seconds: that the simulation took.
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
        rows = rows_per_process(config.data.batch_size, mesh.data_size)
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
    """Run one training step, real or fake; return its peak memory and its collectives in order."""
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
            mesh=mesh,
        )
    return memory.peak, tuple(recorder.collectives)


def rows_per_process(batch_size: int, num_processes: int) -> int:
    """Return the rows of a batch per process; raises ConfigError if they do not divide evenly."""
    if batch_size % num_processes:
        raise ConfigError(
            f"data.batch_size {batch_size} cannot be shared out evenly among {num_processes} "
            "processes (mesh.replicas x data x expert); use a multiple."
        )
    return batch_size // num_processes


def row_lengths(config: DataConfig) -> tuple[int, int, bool]:
    """Return the lengths of inputs and targets, and whether rows have segments.

    The default target length of packed rows is that of one long example.
    """
    noise = Noise(density=config.noise_density, mean_span=config.mean_span)
    raw_length = noise.raw_length(config.input_length)
    exact = int(noise.corrupted_lengths(np.array([raw_length]))[1][0])
    targets = config.target_length if config.pack else None
    return config.input_length, targets or exact, config.pack


def blank_batch(config: DataConfig, rows: int) -> Batch:
    """Return a batch of zeros in the shape that the data section gives."""
    inputs, targets, segments = row_lengths(config)
    return Batch(
        inputs_BS=torch.zeros(rows, inputs, dtype=torch.int64),
        targets_BT=torch.zeros(rows, targets, dtype=torch.int64),
        input_segments_BS=torch.ones(rows, inputs, dtype=torch.int32) if segments else None,
        target_segments_BT=torch.ones(rows, targets, dtype=torch.int32) if segments else None,
        source_B=torch.zeros(rows, dtype=torch.int32),
    )
