"""Every parameter of the target is copied, derived or random, as documented."""

import dataclasses

import pytest
import torch
from torch import Tensor

from switchlm.errors import CheckpointError
from switchlm.huggingface.init_from import init_from
from switchlm.model.config import Initialisation, ModelConfig, RouterConfig
from switchlm.model.presets import preset
from switchlm.model.transformer import SwitchTransformer

SPARSE = dataclasses.replace(preset("nano"), initialisation=Initialisation())
DENSE = preset("dense-nano")
DROPLESS = RouterConfig(capacity_factor=None, evaluation_capacity_factor=None, exploration="argmax")
LAYERS = ("encoder.blocks.1.feedforward", "decoder.blocks.1.feedforward")


def build(config: ModelConfig, seed: int = 0) -> SwitchTransformer:
    torch.manual_seed(seed)
    return SwitchTransformer(config).eval()


def state(model: SwitchTransformer) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def loads(*busiest: int) -> dict[str, Tensor]:
    """Return loads of four experts; `busiest` are the experts of highest load, in order."""
    load_E = torch.zeros(4, dtype=torch.int64)
    for place, expert in enumerate(busiest):
        load_E[expert] = 100 - place
    return dict.fromkeys(LAYERS, load_E)


def check_complete(result, target: SwitchTransformer) -> None:
    named = result.copied + result.derived + result.random
    assert sorted(named) == sorted(target.state_dict())


def test_a_dense_student_copies_all_but_the_experts():
    teacher, student = build(SPARSE, 0), build(DENSE, 1)
    drawn = state(student)
    result = init_from(teacher, student, feedforward="random")
    check_complete(result, student)
    theirs, mine = teacher.state_dict(), student.state_dict()
    for name in result.copied:
        assert torch.equal(mine[name], theirs[name]), name
    places = [f"{layer}.{part}.weight" for layer in LAYERS for part in ("up", "down")]
    assert sorted(result.random) == sorted(places)
    assert all(torch.equal(mine[name], drawn[name]) for name in result.random)
    assert not result.derived
    # The dense layers of the teacher are copied too.
    assert "encoder.blocks.0.feedforward.up.weight" in result.copied


@pytest.mark.parametrize("gated", [False, True])
def test_mean_and_most_used_experts(gated):
    shape = {"gated": gated, "activation": "gelu" if gated else "relu"}
    teacher = build(dataclasses.replace(SPARSE, **shape))
    x_ND = torch.randn(7, SPARSE.d_model)
    for choice in ("mean", "most_used"):
        student = build(dataclasses.replace(DENSE, **shape), 1)
        result = init_from(teacher, student, feedforward=choice, load=loads(2, 0))
        check_complete(result, student)
        assert len(result.derived) == 2 * (3 if gated else 2)
        for layer in LAYERS:
            experts = teacher.get_submodule(f"{layer}.experts")
            network = student.get_submodule(layer)
            if choice == "mean":
                torch.testing.assert_close(network.up.weight, experts.up.mean(0).t())
                torch.testing.assert_close(network.down.weight, experts.down.mean(0).t())
            else:
                counts_E = torch.tensor([0, 0, 7, 0])
                torch.testing.assert_close(network(x_ND), experts(x_ND, counts_E))


def test_each_upcycled_expert_is_the_dense_network():
    """The layer's output is gate x FFN(x) for every token that is kept, whatever its expert."""
    dense = build(DENSE)
    sparse = build(dataclasses.replace(SPARSE, router=DROPLESS), 1)
    drawn = state(sparse)
    result = init_from(dense, sparse)
    check_complete(result, sparse)
    assert len(result.derived) == 4
    assert sorted(result.random) == sorted(f"{layer}.router.weight" for layer in LAYERS)
    x_ND = torch.randn(40, SPARSE.d_model)
    for layer in LAYERS:
        assert torch.equal(sparse.state_dict()[f"{layer}.router.weight"],
                           drawn[f"{layer}.router.weight"])  # fmt: skip
        y_ND, routing = sparse.get_submodule(layer)(x_ND)
        assert len(routing.expert_A.unique()) > 1
        gate_N1 = routing.gate_A[:, None]
        assert (gate_N1 < 0.9).all()
        torch.testing.assert_close(y_ND, gate_N1 * dense.get_submodule(layer)(x_ND))


def test_with_gates_that_add_up_to_one_the_upcycled_model_is_the_dense_model():
    """Two experts per token: their gates are renormalised to a sum of one."""
    dense = build(DENSE)
    router = dataclasses.replace(DROPLESS, experts_per_token=2)
    sparse = build(dataclasses.replace(SPARSE, router=router), 1)
    init_from(dense, sparse)
    tokens = torch.randint(3, 200, (2, 12))
    one, two = (model(tokens, tokens[:, :5]).logits_BTV for model in (dense, sparse))
    torch.testing.assert_close(two, one, rtol=1e-4, atol=1e-4)


def test_a_smaller_sparse_student_copies_the_busiest_experts_and_their_router_rows():
    teacher = build(SPARSE)
    student = build(dataclasses.replace(SPARSE, num_experts=2), 1)
    result = init_from(teacher, student, feedforward="most_used", load=loads(3, 1))
    check_complete(result, student)
    assert not result.random
    for layer in LAYERS:
        theirs, mine = teacher.get_submodule(layer), student.get_submodule(layer)
        assert torch.equal(mine.experts.up, theirs.experts.up[[3, 1]])
        assert torch.equal(mine.router.weight, theirs.router.weight[[3, 1]])


@pytest.mark.parametrize("choice", ["mean", "random"])
def test_other_choices_for_a_sparse_student_leave_its_routers_random(choice):
    teacher = build(SPARSE)
    student = build(dataclasses.replace(SPARSE, num_experts=6), 1)
    result = init_from(teacher, student, feedforward=choice)
    check_complete(result, student)
    assert {name for name in result.random if "router" in name}
    up = student.get_submodule(LAYERS[0]).experts.up
    mean = teacher.get_submodule(LAYERS[0]).experts.up.mean(0)
    assert torch.allclose(up, mean.expand_as(up)) == (choice == "mean")


def test_an_equal_architecture_is_copied():
    one, two = build(SPARSE, 0), build(SPARSE, 1)
    result = init_from(one, two)
    check_complete(result, two)
    assert not result.derived
    assert not result.random
    assert all(map(torch.equal, one.state_dict().values(), two.state_dict().values()))


def test_an_untied_head_computes_what_the_tied_one_did():
    tied, untied = build(DENSE), build(dataclasses.replace(DENSE, tied_head=False), 1)
    result = init_from(tied, untied)
    assert result.derived == ("head.weight",)
    tokens = torch.randint(3, 200, (2, 12))
    one, two = (model(tokens, tokens[:, :5]).logits_BTV for model in (tied, untied))
    torch.testing.assert_close(one, two)


def test_experts_in_attention_leave_the_dense_projections_random():
    teacher = build(dataclasses.replace(SPARSE, attention_experts=True))
    student = build(DENSE, 1)
    result = init_from(teacher, student, feedforward="mean")
    check_complete(result, student)
    assert "encoder.blocks.1.attention.query.weight" in result.random
    assert "encoder.blocks.1.attention.output.weight" in result.copied


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocabulary_size": 512}, r"vocabulary_size 512 \(not 384\)"),
        ({"d_model": 64, "num_heads": 4}, r"d_model 64 \(not 32\), num_heads 4 \(not 2\)"),
        ({"num_decoder_layers": 3}, "num_decoder_layers 3"),
        ({"activation": "gelu"}, r"activation gelu \(not relu\)"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(CheckpointError, match=message):
        init_from(build(SPARSE), build(dataclasses.replace(DENSE, **changes)), feedforward="mean")


@pytest.mark.parametrize("target", [DENSE, dataclasses.replace(SPARSE, num_experts=2)])
def test_other_experts_are_refused(target):
    with pytest.raises(CheckpointError, match=r"have 4 experts per Switch layer.*distil it"):
        init_from(build(SPARSE), build(target))
