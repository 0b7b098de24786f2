"""Simulated steps against real ones: the same recorders on fake tensors and real processes."""

import dataclasses
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from tests.parallel.processes import run_in_processes
from tests.planning.measured import measure

from switchlm.errors import ConfigError
from switchlm.parallel.mesh import MeshConfig
from switchlm.planning.estimate import estimate_step
from switchlm.planning.recorder import Collective, MemoryRecorder
from switchlm.planning.simulate import all_to_all_sizes, balanced_loads, fake_job, simulate
from switchlm.recipes.config import RunConfig, run_config

SMALL_BATCH = ("data.batch_size=8", "data.input_length=128")
ON_TWO = [
    ("mesh.expert=2", "training.precision=selective"),
    ("mesh.data=2", "training.accumulate=2"),
    ("mesh.tensor=2", "model.gated=true", "model.activation=gelu"),
]
ON_FOUR = [
    ("mesh.expert=4", "training.precision=selective"),
    ("mesh.expert=2", "training.activation_checkpointing=true", "data.pack=true"),
    ("mesh.data=2", "mesh.tensor=2"),
    ("mesh.replicas=2", "mesh.data=2", "router.capacity_factor=0.5"),
]


def nano(*overrides: str) -> RunConfig:
    return run_config(preset="nano", overrides=[*SMALL_BATCH, *overrides])


@pytest.mark.parametrize(("ranks", "settings"), [(2, ON_TWO), (4, ON_FOUR)])
def test_plan_and_simulation_send_what_real_processes_send(
    ranks: int, settings: list[tuple[str, ...]], tmp_path: Path
) -> None:
    configs = [nano(*overrides) for overrides in settings]
    run_in_processes(ranks, tmp_path, measure, configs, str(tmp_path))
    measured = json.loads((tmp_path / "0.json").read_text())
    for config, real in zip(configs, measured, strict=True):
        sent = [_collective(values) for values in real["collectives"]]
        peak = sum(real["peak"].values())
        simulated = simulate(config, ranks)
        assert list(simulated.collectives) == sent
        assert simulated.peak.total == pytest.approx(peak, rel=0.1)
        assert simulated.peak.weights == real["peak"]["weights"]
        assert simulated.peak.optimizer == real["peak"]["optimizer"]
        data = config.mesh.shape(ranks)[1]
        planned = estimate_step(config, dataclasses.replace(config.mesh, data=data))
        assert planned.traffic == Counter(sent)
        assert planned.peak.total == pytest.approx(peak, rel=0.1)


def _collective(values: list[Any]) -> Collective:
    kind, axes, size, dtype, payload = values
    dtype = getattr(torch, dtype.removeprefix("torch."))
    return Collective(kind=kind, axes=axes, size=size, dtype=dtype, payload=payload)


def test_a_step_of_switch_c_is_simulated_in_one_process() -> None:
    config = run_config(
        preset="switch-c-2048",
        overrides=[
            "data.batch_size=2048",
            "mesh.expert=2048",
            "training.precision=selective",
            "model.num_encoder_layers=2",
            "model.num_decoder_layers=2",
        ],
    )
    found = simulate(config, 2048)
    assert found.parameters > 2e11
    # One expert of each layer is here, in float32, and 1/2048 of everything else.
    assert found.peak.weights == pytest.approx(4 * 2 * 2080 * 6144 * 4, rel=0.01)
    exchanged = [c for c in found.collectives if c.kind == "all_to_all"]
    assert {c.size for c in exchanged} == {2048}
    tokens = {c.payload for c in exchanged if c.dtype == torch.bfloat16}
    assert 512 * 2080 * 2 in tokens  # every token of a row is sent once in each direction


@pytest.mark.parametrize(
    ("overrides", "ranks", "message"),
    [
        (("mesh.expert=3",), 3, "experts"),
        (("mesh.expert=4",), 6, "cannot be 6 processes"),
        (("data.batch_size=6",), 4, "cannot be shared out evenly"),
        ((), 0, "ranks must lie"),
    ],
)
def test_impossible_meshes_are_errors(overrides: tuple[str, ...], ranks: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        simulate(nano("data.batch_size=12", *overrides), ranks)


def test_a_simulation_leaves_no_job_behind() -> None:
    busy = pytest.raises(ConfigError, match="part of a real job")
    with fake_job(MeshConfig(), 4), busy, fake_job(MeshConfig(), 4):
        pass
    with fake_job(MeshConfig(expert=2), 2) as mesh:
        assert mesh.size("expert") == 2


def test_balanced_loads_share_out_the_remainder_over_processes() -> None:
    loads_PE = numpy.stack([balanced_loads(6, 4, process, capacity=9) for process in range(4)])
    assert (loads_PE.sum(1) == 6).all()
    assert (loads_PE.sum(0) == 6).all()
    assert balanced_loads(12, 4, 0, capacity=2).tolist() == [2, 2, 2, 2]
    sent, received = all_to_all_sizes(6, 4, 2, 0, 9)
    assert (sent, received) == ([4, 2], [4, 4 - 2])


def test_memory_is_recorded_to_the_byte_until_it_is_freed() -> None:
    layer = torch.nn.Linear(8, 4, bias=False)
    with MemoryRecorder(layer) as memory:
        x = torch.ones(16, 8)
        layer(x).sum().backward()
        assert memory.now.weights == 8 * 4 * 4
        assert memory.now.gradients == 8 * 4 * 4
        assert memory.now.activations == 16 * 8 * 4
        del x
        assert memory.now.activations == 0
        with torch.no_grad():
            big = torch.zeros(1000)
            big.untyped_storage().resize_(0)
    assert memory.peak.activations == 4000
    assert memory.now.total == 2 * 8 * 4 * 4
