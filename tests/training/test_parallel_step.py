"""A non-finite number on one process skips the step on all, without any change (T12)."""

import copy

import pytest
import torch
from tests.parallel.processes import run_in_processes
from torch import Tensor
from torch.distributed.tensor import DTensor

from switchlm.data.batch import Batch
from switchlm.model.presets import preset
from switchlm.model.transformer import SwitchTransformer
from switchlm.parallel.apply import apply, materialise
from switchlm.parallel.mesh import Mesh, MeshConfig
from switchlm.training.config import TrainingConfig
from switchlm.training.optimizer import build_optimizer, optimizer_state, set_learning_rate
from switchlm.training.step import StepRecord, training_step

STEPS = 3
# What goes bad in the second step, on the last process alone.
FAULTS = ["one expert", "router", "embedding"]


@pytest.mark.parametrize(
    ("number", "mesh"),
    [(2, MeshConfig(expert=2)), (2, MeshConfig(tensor=2)), (2, MeshConfig(replicas=2))],
    ids=["expert", "tensor", "replicas"],
)
def test_one_bad_process_skips_the_step_on_all(tmp_path, number, mesh):
    run_in_processes(number, tmp_path, skip_together, mesh)


def skip_together(rank: int, layout: MeshConfig) -> None:
    mesh = Mesh.of(layout, "cpu")
    expected, _ = train(mesh, steps=[0, 2], fault=None)
    for fault in FAULTS:
        found, records = train(mesh, steps=[0, 1, 2], fault=fault)
        assert [float(record.metrics[4]) for record in records] == [0, 1, 0], fault
        for name, tensor in expected.items():
            assert torch.equal(found[name], tensor), (fault, name)


def train(
    mesh: Mesh, steps: list[int], fault: str | None
) -> tuple[dict[str, Tensor], list[StepRecord]]:
    """Train on the batches of these steps; return this process's part of the state."""
    with torch.device("meta"):
        model = SwitchTransformer(preset("nano"))
    apply(model, mesh)
    materialise(model, torch.device("cpu"), seed=0)
    optimizer = build_optimizer(model, TrainingConfig())
    set_learning_rate(optimizer, 1e-3)
    records = []
    for step in steps:
        torch.manual_seed(step)
        noise = torch.Generator().manual_seed(10 * step + mesh.data_rank)
        batch = Batch(
            inputs_BS=torch.randint(2, 384, (2, 16), generator=noise),
            targets_BT=torch.randint(2, 384, (2, 8), generator=noise),
            input_segments_BS=None,
            target_segments_BT=None,
            source_B=torch.zeros(2, dtype=torch.int32),
        )
        hooks = []
        if step == 1 and torch.distributed.get_rank() == 1 and fault is not None:
            hooks = [spoil(model, fault)]
        records.append(training_step(model, optimizer, [batch], gradient_clip=1.0, mesh=mesh))
        for hook in hooks:
            hook.remove()
    state = {f"model/{name}": value for name, value in model.named_parameters()}
    for name, values in optimizer_state(model, optimizer).items():
        state |= {f"{name}/{key}": value for key, value in values.items()}
    here = {name: v.to_local() if isinstance(v, DTensor) else v for name, v in state.items()}
    return copy.deepcopy({name: value.detach() for name, value in here.items()}), records


def spoil(model: SwitchTransformer, fault: str) -> object:
    """Make one number of what flows back infinite."""

    def bad(_module: object, _inputs: object, output: Tensor) -> Tensor:
        output = output.clone()
        output.register_hook(lambda gradient: gradient.index_fill(0, torch.tensor([0]), torch.inf))
        return output

    def bad_routing(_module: object, _inputs: object, routing: object) -> None:
        routing.gate_A.register_hook(lambda gradient: torch.full_like(gradient, torch.nan))

    layer = model.encoder.blocks[1].feedforward
    if fault == "one expert":
        return layer.experts.register_forward_hook(bad)
    if fault == "router":
        return layer.router.register_forward_hook(bad_routing)
    return model.embedding.register_forward_hook(bad)
