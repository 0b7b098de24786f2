"""The kernel of Switch layers is chosen once, the same in all processes, and written to the run."""

import json
from pathlib import Path

import pytest
import torch
from tests.parallel.processes import run_in_processes
from tests.training.conftest import CountingLoader, tiny_config

from switchlm.errors import ConfigError
from switchlm.kernels import autotune, select
from switchlm.kernels.cpu import native
from switchlm.kernels.select import Choice
from switchlm.model.config import RouterConfig
from switchlm.model.switch import SwitchFeedForward
from switchlm.model.transformer import SwitchTransformer
from switchlm.parallel.apply import apply, materialise
from switchlm.parallel.mesh import Mesh, MeshConfig
from switchlm.training.config import KernelsConfig, TrainingConfig
from switchlm.training.kernel_choice import choose_switch
from switchlm.training.loop import train
from switchlm.training.run_folder import RunFolder

CONFIG = TrainingConfig(steps=2, log_every=1, evaluate_every=None, checkpoint_every=None)
compiled = pytest.mark.skipif(native.native().library is None, reason=native.native().reason)


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The ways in which layers ran."""
    return record_ways(monkeypatch)


def record_ways(patch: pytest.MonkeyPatch) -> list[str]:
    taken: list[str] = []

    def recorded(name, way):
        return lambda *arguments: taken.append(name) or way(*arguments)

    for name, way in select.SWITCHES.items():
        patch.setitem(select.SWITCHES, name, recorded(name, way))
    return taken


def ways_of(model: SwitchTransformer) -> set[str]:
    return {
        part.experts.implementation
        for part in model.modules()
        if isinstance(part, SwitchFeedForward)
    }


@compiled
@pytest.mark.parametrize(
    ("switch", "name"), [("auto", "native"), ("separate", "separate"), ("fused", "native")]
)
def test_a_run_takes_the_configured_kernel(switch, name, build, loader, taken, tmp_path) -> None:
    run = RunFolder(tmp_path)
    lines = list(train(build(), loader, CONFIG, run=run, kernels=KernelsConfig(switch=switch)))
    assert len(lines) == 2
    assert set(taken) == {name}
    recorded = json.loads(run.kernels.read_text())["switch"]
    assert recorded["name"] == name
    assert recorded["reason"]


@pytest.mark.parametrize(
    ("changes", "config", "reason"),
    [
        ({"d_ff": 24}, CONFIG, "no fused kernel on cpu: experts of 16 x 24 are not small"),
        ({"expert_dropout": 0.1}, CONFIG, "it has expert dropout"),
        ({"activation": "gelu"}, CONFIG, "its experts are gated or not ReLU"),
        ({}, TrainingConfig(compile=True), "the model is compiled"),
    ],
)
def test_where_no_kernel_takes_the_layers_fused_is_refused_with_the_reason(
    changes, config, reason, build
) -> None:
    model = build(**changes)
    with pytest.raises(ConfigError, match=f"kernels.switch is 'fused', but .*{reason}.*=auto"):
        choose_switch(model.train(), config, 96, "fused")
    choice = choose_switch(model, config, 96)
    assert choice is not None
    assert choice.name == "separate"


def test_a_dense_model_has_nothing_to_choose(build, loader, tmp_path) -> None:
    assert choose_switch(build(num_experts=0), CONFIG, 96, "fused") is None


@compiled
def test_layers_without_a_choice_do_not_decide_for_the_others(build) -> None:
    router = RouterConfig(selection="expert_choice", capacity_factor=1.0)
    choice = choose_switch(build(router=router), CONFIG, 96, "fused")
    assert choice is not None
    assert choice.name == "native"  # the decoder's, which choose by token


def test_a_new_shape_is_timed_without_the_model(taken, monkeypatch: pytest.MonkeyPatch) -> None:
    known: list[Choice] = []

    def explain(*_: object) -> Choice:
        return known[0] if known else Choice("autotune", "a test")

    def tried(key, candidate, default, tensors) -> Choice:
        x_ND, weight_A, up_EDF, down_EFD, gate_EDF = tensors
        assert x_ND.shape == (40, 16)
        assert weight_A.shape == (80,)
        assert up_EDF.shape == gate_EDF.shape == (4, 16, 24)
        assert down_EFD.shape == (4, 24, 16)
        assert all(tensor.requires_grad for tensor in tensors)
        known.append(Choice(default[0], "timed here"))
        return known[0]

    monkeypatch.setattr(select, "explain_switch", explain)
    monkeypatch.setattr(autotune, "autotune", tried)
    x_ND = torch.randn(40, 16, requires_grad=True)
    choice = select.choose_switch(x_ND, 2, 4, 24, "gelu", True)
    assert choice == Choice("separate", "timed here")
    assert taken == ["separate"]


@compiled
def test_all_processes_take_the_choice_of_the_main_process(tmp_path: Path) -> None:
    run_in_processes(2, tmp_path, agree, str(tmp_path))


def agree(rank: int, home: str) -> None:
    mesh = Mesh.of(MeshConfig(data=2), "cpu")
    for number, (first, second, expected) in enumerate(
        [
            ("native", "native", "native"),
            ("separate", "native", "separate"),  # the first one found that they are slower
            ("native", "separate", "separate"),  # the second one has none
            ("native", "autotune", "native"),
        ]
    ):
        with pytest.MonkeyPatch.context() as patch:
            for function, name in {"choose_switch": first, "explain_switch": second}.items():
                patch.setattr(select, function, lambda *_, n=name: Choice(n, f"rank {rank}"))
            model = sharded(mesh)
            choice = choose_switch(model, CONFIG, 96, "auto", mesh)
            assert choice is not None
            assert choice.name == expected
            assert len(set(mesh.gather(choice))) == 1
            assert ways_of(model) == {"separate" if expected == "separate" else "fused"}
            if expected == "separate":
                with pytest.raises(ConfigError, match=r"kernels\.switch is 'fused'"):
                    choose_switch(model, CONFIG, 96, "fused", mesh)
        run_all(mesh, Path(home) / str(number), expected)


def run_all(mesh: Mesh, home: Path, expected: str) -> None:
    """Train on both processes: they run the same kernel, and rank 0 writes it."""
    switch = "separate" if expected == "separate" else "auto"
    with pytest.MonkeyPatch.context() as patch:
        taken = record_ways(patch)
        run = RunFolder(home)
        if mesh.is_main:
            run.create()
        mesh.barrier()
        kernels = KernelsConfig(switch=switch)
        loader = CountingLoader(rows=4)
        for _ in train(sharded(mesh), loader, CONFIG, run=run, mesh=mesh, kernels=kernels):
            pass
        assert set(taken) == {expected}
        mesh.barrier()
        assert json.loads(run.kernels.read_text())["switch"]["name"] == expected


def sharded(mesh: Mesh) -> SwitchTransformer:
    with torch.device("meta"):
        model = SwitchTransformer(tiny_config())
    apply(model, mesh)
    materialise(model, torch.device("cpu"), seed=0)
    return model.train()
