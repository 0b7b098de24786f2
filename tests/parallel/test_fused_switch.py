"""Fused kernels run on weights that FSDP gathers: a step equals that of separate kernels."""

import pytest
import torch
from tests.parallel.processes import run_in_processes
from torch import Tensor

from switchlm.data.batch import Batch
from switchlm.kernels import select
from switchlm.kernels.select import Choice
from switchlm.model.presets import preset
from switchlm.model.transformer import SwitchTransformer
from switchlm.parallel.apply import apply, materialise
from switchlm.parallel.mesh import Mesh, MeshConfig
from switchlm.training.config import TrainingConfig
from switchlm.training.optimizer import build_optimizer
from switchlm.training.step import training_step


def test_data_parallel_weights_are_gathered_for_fused_kernels(tmp_path) -> None:
    pytest.importorskip("triton", "3.7", reason="needs the extra `triton`")
    if torch.cuda.is_available():
        pytest.skip("for machines without a GPU: kernels are interpreted")
    run_in_processes(2, tmp_path, compare_ways)


def compare_ways(rank: int) -> None:
    mesh = Mesh.of(MeshConfig(data=2), "cpu")
    fused, separate = (metrics(mesh, way) for way in ("triton", "separate"))
    torch.testing.assert_close(fused, separate, rtol=1e-5, atol=1e-6)


def metrics(mesh: Mesh, way: str) -> Tensor:
    """Return loss, balance loss, z-loss and gradient norm of a step."""
    taken: list[str] = []

    def choose(*_: object) -> Choice:
        taken.append(way)
        return Choice(way, "a test")

    explain, select.explain_switch = select.explain_switch, choose
    with torch.device("meta"):
        model = SwitchTransformer(preset("nano"))
    apply(model, mesh)
    materialise(model, torch.device("cpu"), seed=0)
    optimizer = build_optimizer(model, TrainingConfig(learning_rate=1e-3))
    noise = torch.Generator().manual_seed(mesh.data_rank)
    batch = Batch(
        inputs_BS=torch.randint(2, 384, (2, 16), generator=noise),
        targets_BT=torch.randint(2, 384, (2, 8), generator=noise),
        input_segments_BS=None,
        target_segments_BT=None,
        source_B=torch.zeros(2, dtype=torch.int32),
    )
    torch.manual_seed(mesh.data_rank)
    try:
        record = training_step(model.train(), optimizer, [batch], mesh=mesh)
    finally:
        select.explain_switch = explain  # the process outlives this test
    assert taken, "a layer chose its kernel"
    return record.metrics
