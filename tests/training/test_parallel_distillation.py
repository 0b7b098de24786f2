"""Distillation and init_from on two processes equal one process: experts or vocabulary split."""

import torch
from tests.parallel.processes import run_in_processes
from torch import Tensor
from torch.distributed.tensor import DTensor

from switchlm.data.batch import Batch
from switchlm.huggingface.init_from import init_from
from switchlm.model.presets import preset
from switchlm.model.transformer import SwitchTransformer
from switchlm.parallel.apply import apply, materialise
from switchlm.parallel.mesh import ALONE, Mesh, MeshConfig
from switchlm.training.config import TrainingConfig
from switchlm.training.distillation import Distillation, Teacher
from switchlm.training.optimizer import build_optimizer, set_learning_rate
from switchlm.training.step import training_step

SPARSE, DENSE = preset("nano"), preset("dense-nano")


def test_two_processes_do_what_one_does(tmp_path):
    run_in_processes(2, tmp_path, compare)


def compare(rank: int) -> None:
    alone = distil(ALONE)
    for layout in (MeshConfig(tensor=2), MeshConfig(expert=2)):
        found = distil(Mesh.of(layout, "cpu"))
        torch.testing.assert_close(found["metrics"], alone["metrics"], rtol=1e-4, atol=1e-5)
        for name, weight in alone.items():
            torch.testing.assert_close(found[name], weight, rtol=1e-3, atol=1e-5, msg=name)


def built(config: object, mesh: Mesh, seed: int) -> SwitchTransformer:
    with torch.device("meta"):
        model = SwitchTransformer(config)
    if mesh.is_distributed:
        apply(model, mesh)
    materialise(model, torch.device("cpu"), seed=seed)
    return model


def distil(mesh: Mesh) -> dict[str, Tensor]:
    """Return a dense student after a step with a teacher, and an upcycled model, on the mesh."""
    teacher, student = built(SPARSE, ALONE, 0), built(DENSE, mesh, 1)
    init_from(teacher, student, feedforward="mean")
    grown = built(SPARSE, mesh, 2)
    init_from(built(DENSE, ALONE, 3), grown)
    optimizer = build_optimizer(student, TrainingConfig(optimizer="adafactor"))
    set_learning_rate(optimizer, 1e-3)
    batch = Teacher(teacher, top_k=9)(rows(mesh))
    objective = Distillation(hard_weight=0.6, soft_weight=0.4)
    record = training_step(
        student, optimizer, [batch], gradient_clip=1.0, mesh=mesh, objective=objective
    )
    tensors = {f"student.{name}": part for name, part in student.state_dict().items()}
    tensors |= {f"grown.{name}": part for name, part in grown.state_dict().items()}
    tensors["metrics"] = record.metrics
    return {name: part.full_tensor() if isinstance(part, DTensor) else part.detach().clone()
            for name, part in tensors.items()}  # fmt: skip


def rows(mesh: Mesh) -> Batch:
    noise = torch.Generator().manual_seed(7)
    inputs_BS = torch.randint(2, 384, (4, 16), generator=noise)
    targets_BT = torch.randint(2, 384, (4, 8), generator=noise)
    share = 4 // mesh.data_size
    mine = slice(mesh.data_rank * share, (mesh.data_rank + 1) * share)
    return Batch(
        inputs_BS=inputs_BS[mine],
        targets_BT=targets_BT[mine],
        input_segments_BS=None,
        target_segments_BT=None,
        source_B=torch.zeros(share, dtype=torch.int32),
    )
