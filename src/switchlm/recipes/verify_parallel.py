"""Every layout of so many processes against one process: the same losses, the same gradients.

The model is the user's own; noise and dropout are off, and every `router.group_rows` rows share
capacity and a balance loss, so that what a step computes does not depend on the layout, only its
rounding does.
"""

import dataclasses
import math
import tempfile
import time
from collections.abc import Callable, Iterator
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
from switchlm.model.transformer import SwitchTransformer
from switchlm.parallel.mesh import ALONE, Mesh, MeshConfig, layouts
from switchlm.recipes.config import RunConfig
from switchlm.recipes.pretrain import build_model
from switchlm.training.config import Precision
from switchlm.training.optimizer import build_optimizer, set_learning_rate
from switchlm.training.step import prepare_for_training, training_step

Tensors = dict[str, Tensor]
# What rounding may do: relative differences of the loss and of each gradient, as vectors.
TOLERANCES = {"float32": (1e-5, 1e-4), "selective": (1e-3, 0.05), "bfloat16": (1e-3, 0.05)}


@dataclass(frozen=True, kw_only=True)
class LayoutResult:
    """How one layout compares with one process.

    loss: the largest relative difference of any step's losses.
    gradient: of any parameter's gradient in the first step, as vectors, and that parameter's name.
    does_not_fit: why the layout is impossible for this model, else None.
    equal: whether both are within rounding.
    """

    mesh: MeshConfig
    loss: float = 0.0
    gradient: float = 0.0
    parameter: str = ""
    seconds: float = 0.0
    does_not_fit: str | None = None
    equal: bool = False


def verify_parallel(
    config: RunConfig, num_processes: int, *, steps: int = 3, tokens: int = 48
) -> Iterator[LayoutResult]:
    """Train a few steps in one process, then in every layout, and yield how each compares.

    Batches are random: 2 rows per process, or a group of them, of up to `tokens` inputs. The
    processes run on GPUs if there is one for each, else on CPUs over gloo.
    """
    config = _comparable(config)
    device_type = "cuda" if torch.cuda.device_count() >= num_processes else "cpu"
    rows = max(config.model.router.group_rows or 1, 2) * num_processes
    with tempfile.TemporaryDirectory(prefix="switchlm-verify-") as folder:
        device = torch.device(device_type, 0) if device_type == "cuda" else torch.device("cpu")
        train = partial(_train, config, steps, rows, tokens)
        whole = train(ALONE, device)
        save_file(whole, f"{folder}/whole.safetensors")
        del whole
        context = multiprocessing.get_context("spawn")
        results: SimpleQueue[LayoutResult] = context.SimpleQueue()
        workers = torch.multiprocessing.spawn(
            _work,
            (num_processes, device_type, folder, train, config.training.precision, results),
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


def _comparable(config: RunConfig) -> RunConfig:
    """Return the configuration without noise, its groups independent of the layout."""
    router = dataclasses.replace(
        config.model.router,
        exploration="argmax",
        group_rows=config.model.router.group_rows or 1,
    )
    model = dataclasses.replace(config.model, router=router, dropout=0.0, expert_dropout=0.0)
    return dataclasses.replace(config, model=model)


def _work(
    rank: int,
    num_processes: int,
    device_type: str,
    folder: str,
    train: Callable[[Mesh, torch.device], Tensors],
    precision: Precision,
    results: "SimpleQueue[LayoutResult]",
) -> None:
    """Be one of the processes: train in every layout; the first one tells."""
    torch.set_num_threads(max(torch.get_num_threads() // num_processes, 1))
    device = torch.device("cpu")
    if device_type == "cuda":
        device = torch.device("cuda", rank)
        torch.cuda.set_device(device)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device_type == "cuda" else "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=num_processes,
    )
    whole = load_file(f"{folder}/whole.safetensors")
    for layout in layouts(num_processes):
        started = time.perf_counter()
        try:
            found = train(Mesh.of(layout, device_type), device)
        except ConfigError as error:
            result = LayoutResult(mesh=layout, does_not_fit=str(error))
        else:
            result = compare(layout, found, whole, precision)
            result = dataclasses.replace(result, seconds=time.perf_counter() - started)
        if rank == 0:
            results.put(result)
    dist.barrier()
    dist.destroy_process_group()


def _train(
    config: RunConfig, steps: int, rows: int, tokens: int, mesh: Mesh, device: torch.device
) -> Tensors:
    """Return `losses` [steps, 3] and the gradients of the first step by name, whole, on the CPU."""
    training = config.training
    model = build_model(config, mesh).to(device)
    prepare_for_training(model, training.precision, training.activation_checkpointing)
    optimizer = build_optimizer(model, training)
    set_learning_rate(optimizer, training.learning_rate)
    losses, gradients = [], {}
    for step in range(steps):
        batches = [
            _share(_batch(config, step * training.accumulate + part, rows, tokens), mesh).to(device)
            for part in range(training.accumulate)
        ]
        record = training_step(
            model,
            optimizer,
            batches,
            gradient_clip=training.gradient_clip,
            precision=training.precision,
            mesh=mesh,
        )
        losses.append(record.metrics[:3].cpu())
        if step == 0:
            gradients = _whole_gradients(model)
    return {"losses": torch.stack(losses), **gradients}


def _batch(config: RunConfig, number: int, rows: int, tokens: int) -> Batch:
    """Return random rows; some are shorter, so that padding is there too."""
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


def _share(batch: Batch, mesh: Mesh) -> Batch:
    """Return the rows of a batch that fall to this process."""
    parts = {
        name: None if value is None else value.chunk(mesh.data_size)[mesh.data_rank]
        for name, value in vars(batch).items()
    }
    return Batch(**cast(dict[str, Tensor], parts))


def _whole_gradients(model: SwitchTransformer) -> Tensors:
    gradients = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            gradient = parameter.grad
            whole = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
            gradients[name] = whole.float().cpu().contiguous().clone()
    return gradients


def compare(layout: MeshConfig, found: Tensors, whole: Tensors, precision: str) -> LayoutResult:
    """Compare what `_train` gave in a layout with what it gave in one process."""
    differences = {name: _difference(tensor, whole[name]) for name, tensor in found.items()}
    loss = max(map(_difference, found["losses"].sum(1), whole["losses"].sum(1)))
    del differences["losses"]
    parameter = max(differences, key=lambda name: differences[name])
    gradient = differences[parameter]
    same_names = found.keys() == whole.keys()
    loss_tolerance, gradient_tolerance = TOLERANCES[precision]
    return LayoutResult(
        mesh=layout,
        loss=loss,
        gradient=gradient,
        parameter=parameter,
        equal=same_names and loss <= loss_tolerance and gradient <= gradient_tolerance,
    )


def _difference(found: Tensor, expected: Tensor) -> float:
    size = float(expected.double().norm())
    difference = float((found.double() - expected.double()).norm()) / max(size, 1e-30)
    return difference if math.isfinite(difference) else math.inf
