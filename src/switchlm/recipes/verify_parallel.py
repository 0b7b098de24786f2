"""Compare every layout of a number of processes with one process: losses, gradients, evaluation.

The model is the user's own, without noise and dropout; every `router.group_rows` rows share
capacity and a balance loss, so that a step depends on the layout by rounding only.
"""

import dataclasses
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from multiprocessing.queues import SimpleQueue
from typing import cast

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, multiprocessing
from torch.distributed.tensor import DTensor
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException

from switchlm.data.batch import Batch
from switchlm.errors import ConfigError, WorkerError
from switchlm.evaluation.evaluator import held_out_loss
from switchlm.model.precision import Precision
from switchlm.model.transformer import SwitchTransformer
from switchlm.parallel.mesh import ALONE, Mesh, MeshConfig, layouts
from switchlm.recipes.config import RunConfig
from switchlm.recipes.pretrain import build_model
from switchlm.training.optimizer import build_optimizer, set_learning_rate
from switchlm.training.step import prepare_for_training, training_step

Tensors = dict[str, Tensor]
# Allowed relative differences, by rounding, of losses and of each gradient as a vector; of a
# gradient that rounding changes more in one process already, twice that (`measure_rounding`).
TOLERANCES = {"float32": (1e-5, 1e-4), "selective": (1e-3, 0.05), "bfloat16": (1e-3, 0.05)}


@dataclass(frozen=True, kw_only=True)
class LayoutResult:
    """How one layout compares with one process.

    loss: the largest relative difference of the losses of a step.
    evaluation: the relative difference of the loss of another batch, evaluated after the steps.
    gradient: the relative difference of a gradient, as a vector, in the first step: of that which
        comes closest to what is allowed, or exceeds it most.
    parameter: the parameter with that gradient.
    does_not_fit: why the layout is impossible for this model, else None.
    equal: whether all differences are within rounding.
    """

    mesh: MeshConfig
    loss: float = 0.0
    evaluation: float = 0.0
    gradient: float = 0.0
    parameter: str = ""
    seconds: float = 0.0
    does_not_fit: str | None = None
    equal: bool = False


def verify_parallel(
    config: RunConfig, num_processes: int, *, steps: int = 3, tokens: int = 48
) -> Iterator[LayoutResult]:
    """Train and evaluate in one process, then in every layout, and yield the comparisons.

    Batches are random, with 2 rows (or one group of rows) per process of up to `tokens` inputs. The
    processes run on GPUs if there are enough, else on CPUs over gloo.
    """
    config = _deterministic(config)
    enough = torch.cuda.device_count() >= num_processes and config.training.device != "cpu"
    device_type = "cuda" if enough else "cpu"
    rows = max(config.model.router.group_rows or 1, 2) * num_processes
    with tempfile.TemporaryDirectory(prefix="switchlm-verify-") as folder:
        device = torch.device(device_type, 0) if device_type == "cuda" else torch.device("cpu")
        train = partial(_train, config, steps, rows, tokens)
        reference = train(ALONE, device)
        rounding = measure_rounding(reference, config, steps, rows, tokens, device)
        save_file(reference, f"{folder}/reference.safetensors")
        del reference
        context = multiprocessing.get_context("spawn")
        results: SimpleQueue[LayoutResult] = context.SimpleQueue()
        workers = torch.multiprocessing.spawn(
            _worker,
            (num_processes, device_type, folder, train, rounding, config, results),
            nprocs=num_processes,
            join=False,
        )
        try:
            finished = False
            while not finished:
                finished = workers.join(timeout=0.05)
                while not results.empty():
                    yield results.get()
        except (ProcessRaisedException, ProcessExitedException) as error:
            raise WorkerError(f"A process of the check failed: {error}") from None
        finally:
            for process in workers.processes:
                process.kill()


def _deterministic(config: RunConfig) -> RunConfig:
    """Return the configuration without noise, with groups that do not depend on the layout."""
    router = dataclasses.replace(
        config.model.router,
        exploration="argmax",
        group_rows=config.model.router.group_rows or 1,
    )
    model = dataclasses.replace(config.model, router=router, dropout=0.0, expert_dropout=0.0)
    return dataclasses.replace(config, model=model)


def _worker(
    rank: int,
    num_processes: int,
    device_type: str,
    folder: str,
    train: Callable[[Mesh, torch.device], Tensors],
    rounding: Mapping[str, float],
    config: RunConfig,
    results: "SimpleQueue[LayoutResult]",
) -> None:
    """Train in every layout, in one of the processes; the first one sends the results."""
    torch.set_num_threads(max(torch.get_num_threads() // num_processes, 1))
    if device_type == "cuda":
        torch.cuda.set_device(rank)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device_type == "cuda" else "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=num_processes,
    )
    reference = load_file(f"{folder}/reference.safetensors")
    compare_to = partial(
        compare, reference=reference, rounding=rounding, precision=config.training.precision
    )
    for result in _every_layout(num_processes, device_type, train, compare_to):
        if rank == 0:
            results.put(result)
    dist.barrier()
    dist.destroy_process_group()


def _every_layout(
    num_processes: int,
    device_type: str,
    train: Callable[[Mesh, torch.device], Tensors],
    compare_to: Callable[[MeshConfig, Tensors], LayoutResult],
) -> Iterator[LayoutResult]:
    """Train in every layout of the processes that are connected, and yield how each compares."""
    device = torch.device("cpu")
    if device_type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())
    for layout in layouts(num_processes):
        started = time.perf_counter()
        try:
            found = train(Mesh.of(layout, device_type), device)
        except ConfigError as error:
            result = LayoutResult(mesh=layout, does_not_fit=str(error))
        else:
            result = compare_to(layout, found)
            result = dataclasses.replace(result, seconds=time.perf_counter() - started)
        yield result


def _train(
    config: RunConfig, steps: int, rows: int, tokens: int, mesh: Mesh, device: torch.device
) -> Tensors:
    """Return `losses` [steps, 3], `evaluation`, and all gradients of the first step, on the CPU."""
    training = config.training
    model = build_model(config, mesh).to(device)
    prepare_for_training(model, training.precision, training.activation_checkpointing)
    optimizer = build_optimizer(model, training)
    set_learning_rate(optimizer, training.learning_rate)
    losses, gradients = [], {}

    def share(number: int) -> Batch:
        """Return this process's rows of a batch."""
        return _local_rows(_batch(config, number, rows, tokens), mesh).to(device)

    for step in range(steps):
        batches = [
            share(number)
            for number in range(step * training.accumulate, (step + 1) * training.accumulate)
        ]
        record = training_step(
            model,
            optimizer,
            batches,
            gradient_clip=training.gradient_clip,
            mesh=mesh,
        )
        losses.append(record.metrics[:3].cpu())
        if step == 0:
            gradients = _full_gradients(model)
    unseen = share(steps * training.accumulate)
    loss = held_out_loss(model, [unseen], ["random"], mesh)["loss"]
    return {"losses": torch.stack(losses), "evaluation": torch.tensor(loss), **gradients}


def _batch(config: RunConfig, number: int, rows: int, tokens: int) -> Batch:
    """Return random rows, some of them padded."""
    noise = torch.Generator().manual_seed(number)

    def draw(length: int) -> tuple[Tensor, Tensor]:
        ids = torch.randint(2, config.model.vocabulary_size, (rows, length), generator=noise)
        lengths = torch.randint(length // 2, length + 1, (rows, 1), generator=noise)
        real = torch.arange(length)[None] < lengths
        return torch.where(real, ids, config.model.pad_id), real.int()

    inputs_BS, input_segments_BS = draw(tokens)
    targets_BT, target_segments_BT = draw(max(tokens // 3, 2))
    return Batch(
        inputs_BS=inputs_BS,
        targets_BT=targets_BT,
        input_segments_BS=input_segments_BS,
        target_segments_BT=target_segments_BT,
        source_B=torch.zeros(rows, dtype=torch.int32),
    )


def _local_rows(batch: Batch, mesh: Mesh) -> Batch:
    """Return this process's rows of a batch."""
    parts = {
        name: None if value is None else value.chunk(mesh.data_size)[mesh.data_rank]
        for name, value in vars(batch).items()
    }
    return Batch(**cast(dict[str, Tensor], parts))


def _full_gradients(model: SwitchTransformer) -> Tensors:
    gradients = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            gradient = parameter.grad
            full = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
            gradients[name] = full.float().cpu().contiguous().clone()
    return gradients


def measure_rounding(
    reference: Tensors,
    config: RunConfig,
    steps: int,
    rows: int,
    tokens: int,
    device: torch.device,
) -> dict[str, float]:
    """Return how much the precision of a run changes each gradient in one process.

    The relative difference from float32, as a vector; nothing for a run in float32. Units of ReLU
    close to 0 make it large: rounded otherwise, they are on the other side.
    """
    if config.training.precision == "float32":
        return {}
    training = dataclasses.replace(config.training, precision="float32")
    exact = _train(
        dataclasses.replace(config, training=training), steps, rows, tokens, ALONE, device
    )
    return {name: _difference(reference[name], tensor) for name, tensor in exact.items()}


def compare(
    layout: MeshConfig,
    found: Tensors,
    reference: Tensors,
    precision: Precision,
    rounding: Mapping[str, float],
) -> LayoutResult:
    """Compare the result of `_train` in a layout with that of one process."""
    loss_tolerance, gradient_tolerance = TOLERANCES[precision]
    allowed = {name: max(gradient_tolerance, 2 * rounding.get(name, 0.0)) for name in reference}
    differences = {name: _difference(tensor, reference[name]) for name, tensor in found.items()}
    loss = max(map(_difference, found["losses"].sum(1), reference["losses"].sum(1)))
    evaluation = differences.pop("evaluation")
    del differences["losses"]
    parameter = max(differences, key=lambda name: differences[name] / allowed[name])
    gradient = differences[parameter]
    same_names = found.keys() == reference.keys()
    return LayoutResult(
        mesh=layout,
        loss=loss,
        evaluation=evaluation,
        gradient=gradient,
        parameter=parameter,
        equal=same_names
        and max(loss, evaluation) <= loss_tolerance
        and gradient <= allowed[parameter],
    )


def _difference(found: Tensor, expected: Tensor) -> float:
    size = float(expected.double().norm())
    difference = float((found.double() - expected.double()).norm()) / max(size, 1e-30)
    return difference if math.isfinite(difference) else math.inf
