"""Plans against the real `apply` and against simulated steps."""

import dataclasses
import re
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch.distributed.tensor import DTensor

from switchlm.errors import ConfigError
from switchlm.model.presets import preset
from switchlm.model.transformer import SwitchTransformer
from switchlm.parallel.apply import apply
from switchlm.parallel.mesh import MeshConfig, layouts
from switchlm.planning.cluster import GPUS, Cluster, find_gpu
from switchlm.planning.estimate import estimate_step
from switchlm.planning.layouts import Plan, design, plan
from switchlm.planning.profile import parameter_shards
from switchlm.planning.recorder import Collective
from switchlm.planning.simulate import fake_job, simulate
from switchlm.recipes.config import RunConfig, run_config

SMALL_BATCH = ("data.batch_size=16", "data.input_length=64")


def config_of(name: str, *overrides: str) -> RunConfig:
    return run_config(preset=name, overrides=[*SMALL_BATCH, *overrides])


@pytest.mark.parametrize(
    ("name", "ranks"), [("nano", 8), pytest.param("switch-base-8", 4, marks=pytest.mark.slow)]
)
def test_parameter_shards_equal_those_of_apply_in_every_layout(name: str, ranks: int) -> None:
    config, compared = preset(name), 0
    for layout in layouts(ranks):
        with fake_job(layout, ranks) as mesh, torch.device("meta"):
            model = SwitchTransformer(config)
            try:
                apply(model, mesh, wire_dtype=torch.bfloat16)
            except ConfigError:
                with pytest.raises(ConfigError):
                    list(parameter_shards(config, layout, separate_exact=True))
                continue
        numel = {
            name: (tensor.to_local() if isinstance(tensor, DTensor) else tensor).numel()
            for name, tensor in model.named_parameters()
        }
        assert {
            s.name: s.numel for s in parameter_shards(config, layout, separate_exact=True)
        } == numel
        compared += 1
    assert compared >= 9


def assert_agrees(config: RunConfig, ranks: int, within: float) -> None:
    """Assert that plan and simulation agree on every collective, and on memory."""
    data = config.mesh.shape(ranks)[1]
    planned = estimate_step(config, dataclasses.replace(config.mesh, data=data))
    step = simulate(config, ranks)
    assert planned.traffic == Counter(step.collectives)
    assert planned.peak.weights == step.peak.weights
    assert planned.peak.optimizer == step.peak.optimizer
    assert planned.peak.total == pytest.approx(step.peak.total, rel=within)


def test_a_plan_agrees_with_every_layout_simulated() -> None:
    compared = 0
    for layout in layouts(4):
        config = dataclasses.replace(config_of("nano"), mesh=layout)
        try:
            assert_agrees(config, 4, within=0.05)
        except ConfigError:
            continue
        compared += 1
    assert compared == 9


def test_one_expert_per_process_is_split_over_the_tensor_and_data_axes() -> None:
    assert_agrees(
        config_of("nano", "mesh.expert=4", "mesh.tensor=2", "mesh.data=2"), 16, within=0.05
    )


def slow(*overrides: str) -> object:
    return pytest.param(overrides, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    "overrides",
    [
        ("mesh.expert=2", "training.precision=selective"),
        slow("mesh.replicas=2", "mesh.expert=2", "training.precision=selective"),
        slow("mesh.expert=4", "training.accumulate=2", "training.precision=selective"),
        ("mesh.expert=2", "training.activation_checkpointing=true", "data.pack=true"),
        slow("mesh.tensor=2", "model.gated=true", "model.activation=gelu", "model.tied_head=false"),
        slow("mesh.expert=8", "mesh.data=1", "router.capacity_factor=null"),
    ],
)
def test_a_plan_agrees_where_weights_exceed_activations(overrides: tuple[str, ...]) -> None:
    few = ("model.num_encoder_layers=4", "model.num_decoder_layers=4", "training.optimizer=adamw")
    assert_agrees(config_of("small", *few, *overrides), 8, within=0.05)


@pytest.mark.slow
def test_adafactor_takes_the_memory_that_is_planned() -> None:
    config = config_of("small", "mesh.expert=4", "training.optimizer=adafactor")
    step = simulate(config, 4)
    planned = estimate_step(config, dataclasses.replace(config.mesh, data=1))
    assert planned.peak.optimizer == step.peak.optimizer
    assert planned.peak.total == pytest.approx(step.peak.total, rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "ranks", "overrides"),
    [
        ("switch-c-2048", 2048, ("data.batch_size=2048", "mesh.expert=2048")),
        ("switch-xxl-128", 128, ("data.batch_size=256", "mesh.expert=128")),
        ("switch-xxl-128", 256, ("data.batch_size=256", "mesh.expert=64", "mesh.tensor=2")),
    ],
)
def test_the_largest_models_agree_at_full_size(
    name: str, ranks: int, overrides: tuple[str, ...]
) -> None:
    selective = "training.precision=selective"
    assert_agrees(run_config(preset=name, overrides=[*overrides, selective]), ranks, within=0.05)


def test_the_best_comes_first_and_the_reason_names_it() -> None:
    found = plan(config_of("nano"), Cluster(gpu=GPUS["h200"], gpus_per_node=4))
    steps = [layout.times.step for layout in found.layouts]
    assert steps == sorted(steps)
    assert len(found.layouts) == 9
    assert found.impossible == 1  # two heads are not split over four
    assert "is bound by" in found.reason
    best = found.layouts[0]
    assert best.tokens_per_second == pytest.approx(16 * (64 + 14) / steps[0])
    assert sum(best.times.parts.values()) == pytest.approx(best.times.step)


def test_layouts_that_do_not_fit_are_counted_and_the_nearest_is_named() -> None:
    small = dataclasses.replace(GPUS["h200"], memory=1e9)
    config = config_of("small", "training.optimizer=adamw")
    found = plan(config, Cluster(gpu=small, gpus_per_node=4))
    assert not found.layouts
    missing = [(not misfit.state_fits, misfit.missing) for misfit in found.misfits]
    assert missing == sorted(missing)
    assert found.misfits[0].missing > 0
    assert "Nothing fits" in found.reason
    assert "training.optimizer=adafactor" in found.reason
    assert all(misfit.state_fits for misfit in found.misfits) is False


def test_a_batch_that_fits_is_named_and_twice_of_it_does_not_fit() -> None:
    little = dataclasses.replace(GPUS["rtx-4090"], memory=20e6)
    cluster = Cluster(gpu=little, gpus_per_node=2)

    def planned(rows: int) -> Plan:
        data = dataclasses.replace(config_of("nano").data, batch_size=rows)
        return plan(dataclasses.replace(config_of("nano"), data=data), cluster)

    found = planned(1024)
    named = re.search(r"A batch of ([\d,]+) rows \(--batch-tokens (\d+)\) fits", found.reason)
    assert named, found.reason
    rows = int(named[1].replace(",", ""))
    assert int(named[2]) == rows * config_of("nano").data.input_length
    assert planned(rows).layouts
    assert not planned(2 * rows).layouts


def test_no_batch_is_named_where_the_weights_do_not_fit() -> None:
    cluster = Cluster(gpu=dataclasses.replace(GPUS["h200"], memory=1e5))
    assert "Weights and optimizer alone do not fit" in plan(config_of("nano"), cluster).reason


def test_a_batch_that_no_mesh_divides_is_reported() -> None:
    config = dataclasses.replace(
        config_of("nano"), data=dataclasses.replace(config_of("nano").data, batch_size=1)
    )
    found = plan(config, Cluster(gpu=GPUS["h200"], gpus_per_node=3))
    assert not found.layouts
    assert not found.misfits
    assert "data.batch_size 1" in found.reason


def test_a_design_chooses_one_number_of_experts() -> None:
    choices = design(config_of("nano"), Cluster(gpu=GPUS["h200"], gpus_per_node=2), experts=(2, 4))
    assert [choice.num_experts for choice in choices] == [2, 4]
    assert sum(choice.chosen for choice in choices) == 1
    assert choices[0].parameters < choices[1].parameters


def test_an_unknown_gpu_is_an_error_with_a_suggestion() -> None:
    assert find_gpu("h200").memory == 141e9
    with pytest.raises(ConfigError, match="Did you mean 'h200'"):
        find_gpu("h20")


@pytest.mark.parametrize(
    ("values", "message"),
    [({"nodes": 0}, "nodes"), ({"network": 0.0}, "network"), ({"usable": 1.5}, "usable")],
)
def test_a_cluster_is_checked(values: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Cluster(gpu=GPUS["h200"], **values)  # type: ignore[arg-type]


def test_a_collective_is_slower_between_nodes_and_free_alone() -> None:
    cluster = Cluster(gpu=GPUS["h200"], nodes=2, gpus_per_node=8)

    def seconds(kind: str, axes: str, size: int, mesh: MeshConfig) -> float:
        one = Collective(kind=kind, axes=axes, size=size, dtype=torch.bfloat16, payload=10**9)
        return cluster.seconds(one, mesh)

    inside = MeshConfig(data=2, expert=8)
    across = MeshConfig(data=8, expert=2)
    assert seconds("all_to_all", "expert", 8, inside) < 0.01
    # Each sends 8/15 of its bytes to the other node, at 50 GB/s.
    spread = seconds("all_to_all", "expert", 16, MeshConfig(data=1, expert=16))
    assert spread == pytest.approx(1e9 * (15 / 16) * (8 / 15) / 50e9, rel=0.05)
    # A ring over both nodes goes through as many ports as it has members in a node.
    few = seconds("all_gather", "data", 2, inside)
    many = seconds("all_gather", "data", 8, across)
    assert few == pytest.approx(1e9 / 2 / 50e9, rel=0.05)
    assert many == pytest.approx(1e9 * 7 / 8 / 200e9, rel=0.05)
    assert seconds("all_gather", "data", 1, inside) == 0.0


def test_the_guide_lists_the_memory_of_every_gpu() -> None:
    guide = Path(__file__).parents[2] / "docs" / "guides" / "plan.md"
    for name, gpu in GPUS.items():
        assert f"| {name} | {gpu.memory / 1e9:.0f} |" in guide.read_text("utf-8")
