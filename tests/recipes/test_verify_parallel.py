"""Every layout on two and four processes computes what one process does (T15)."""

import dataclasses
import json
from functools import partial

import pytest
import torch
from tests.parallel.processes import run_in_processes

from switchlm.parallel.mesh import ALONE, MeshConfig
from switchlm.recipes import verify_parallel as verify
from switchlm.recipes.config import run_config
from switchlm.recipes.verify_parallel import LayoutResult, compare, verify_parallel

FEATURES = {
    "plain": (),
    "v1.1": ("model.gated=true", "model.activation=gelu", "model.tied_head=false"),
    "capacity and z-loss": (
        "router.capacity_factor=0.6",
        "router.z_weight=0.1",
        "training.optimizer=adafactor",
        "training.accumulate=2",
    ),
    "experts choose": ("router.selection=expert_choice", "router.group_rows=3"),
    "two experts, biases": (
        "router.experts_per_token=2",
        "router.balance=bias",
        "model.sparse_step=1",
        "training.activation_checkpointing=true",
    ),
    "selective": ("training.precision=selective",),
    "dense": ("model.num_experts=0",),
}


def test_the_check_itself():
    """In processes of its own, which the others spare themselves."""
    results = list(verify_parallel(run_config(preset="nano"), 2, steps=2, tokens=24))
    assert len(results) == 4
    assert all(result.equal for result in results), results


def check(folder, overrides, num_processes):
    """Do what `verify_parallel` does, in processes that live on."""
    run_in_processes(num_processes, folder, train_every_layout, num_processes, overrides, folder)
    found = json.loads((folder / "results").read_text())
    results = [LayoutResult(**{**one, "mesh": MeshConfig(**one["mesh"])}) for one in found]
    fitting = [result for result in results if result.does_not_fit is None]
    assert all(result.equal for result in fitting), [r for r in fitting if not r.equal]
    return results


def train_every_layout(rank, num_processes, overrides, folder):
    config = verify._deterministic(run_config(preset="nano", overrides=overrides))
    rows = max(config.model.router.group_rows or 1, 2) * num_processes
    train = partial(verify._train, config, 2, rows, 24)
    reference = train(ALONE, torch.device("cpu"))
    rounding = verify.measure_rounding(reference, config, 2, rows, 24, torch.device("cpu"))
    compare_to = partial(
        compare, reference=reference, rounding=rounding, precision=config.training.precision
    )
    results = verify._every_layout(num_processes, "cpu", train, compare_to)
    found = [dataclasses.asdict(result) for result in results]
    if rank == 0:
        (folder / "results").write_text(json.dumps(found))


@pytest.mark.parametrize("name", [name for name in FEATURES if name != "plain"])  # above
def test_two_processes(tmp_path, name):
    results = check(tmp_path, FEATURES[name], 2)
    assert len(results) == 4
    assert all(result.does_not_fit is None for result in results)


def test_four_processes(tmp_path):
    results = check(tmp_path, ("training.accumulate=2",), 4)
    assert len(results) == 10
    [unfit] = [result for result in results if result.does_not_fit is not None]
    assert unfit.mesh == MeshConfig(replicas=1, data=1, expert=1, tensor=4)
    assert "num_heads 2 cannot be split evenly over mesh.tensor 4" in unfit.does_not_fit


@pytest.mark.slow
@pytest.mark.parametrize("name", [*FEATURES])
def test_four_processes_with(tmp_path, name):
    check(tmp_path, FEATURES[name], 4)


REFERENCE = {
    "losses": torch.ones(2, 3),
    "evaluation": torch.tensor(2.0),
    "a": torch.ones(4),
    "b": torch.arange(4.0),
}


@pytest.mark.parametrize(
    "changed",
    [
        {"losses": torch.ones(2, 3) + torch.eye(2, 3)},
        {"evaluation": torch.tensor(2.01)},
        {"b": torch.arange(4.0) * 1.001},
        {"b": torch.tensor([0.0, 1.0, 2.0, float("nan")])},
    ],
)
def test_a_difference_is_seen(changed):
    assert compare(MeshConfig(), REFERENCE, REFERENCE, "float32", {}).equal
    result = compare(MeshConfig(), REFERENCE | changed, REFERENCE, "float32", {})
    assert not result.equal
    assert result.parameter == "b" or "b" not in changed


def test_a_missing_gradient_is_seen():
    part = {name: tensor for name, tensor in REFERENCE.items() if name != "a"}
    assert not compare(MeshConfig(), part, REFERENCE, "float32", {}).equal


def test_rounding_explains_twice_what_it_does_in_one_process():
    found = {name: REFERENCE | {"b": REFERENCE["b"] * (1 + size)} for name, size in
             {"near": 0.15, "far": 0.17}.items()}  # fmt: skip
    results = {
        name: compare(MeshConfig(), tensors, REFERENCE, "selective", {"a": 1.0, "b": 0.08})
        for name, tensors in found.items()
    }
    assert results["near"].equal
    assert not results["far"].equal
    assert {result.parameter for result in results.values()} == {"b"}
