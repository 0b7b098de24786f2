import pytest
import torch

from switchlm.compression.prune import align, cluster, importance, merge, prune
from switchlm.errors import ConfigError
from switchlm.model.experts import FeedForwardExperts
from switchlm.model.switch import switch_layers
from switchlm.model.transformer import shift_right

LAYERS = ("encoder.blocks.1.feedforward", "decoder.blocks.1.feedforward")


def layers_of(model):
    return switch_layers(model).items()


def logits(model, batch):
    with torch.no_grad():
        return model(batch.inputs_BS, shift_right(batch.targets_BT, None, 0)).logits_BTV


@pytest.mark.parametrize("by", ["load", "gradient"])
def test_scores_are_shares_and_the_model_stays(made, batches, by):
    model = made()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    scores = importance(model, batches, by)
    assert tuple(scores) == LAYERS
    for score_E in scores.values():
        assert score_E.sum().item() == pytest.approx(1)
        assert (score_E >= 0).all()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(isinstance(model.get_submodule(f"{n}.experts"), FeedForwardExperts) for n in LAYERS)


def test_loads_are_those_of_the_routing(made, batches):
    model = made()
    scores = importance(model, batches[:1], "load")
    batch = batches[0]
    with torch.no_grad():
        output = model(batch.inputs_BS, shift_right(batch.targets_BT, None, 0))
    for score_E, routing in zip(scores.values(), output.routing, strict=True):
        load_E = routing.load_E.double()
        torch.testing.assert_close(score_E, load_E / load_E.sum())


def test_an_expert_without_effect_has_no_gradient_score(made, batches):
    model = made()
    experts = model.get_submodule(LAYERS[0]).experts
    experts.down.data[2] = 0
    score_E = importance(model, batches, "gradient")[LAYERS[0]]
    assert score_E[2] == 0
    assert (score_E[[0, 1, 3]] > 0).all()


@pytest.mark.parametrize("changes", [{}, {"gated": True}, {"attention_experts": True}])
def test_experts_that_score_highest_stay_with_their_rows_of_the_router(made, batches, changes):
    model = made(**changes)
    scores = {name: torch.tensor([0.5, 0.0, 0.0, 0.5]) for name, _ in layers_of(model)}
    small, kept = prune(model, scores, 2)
    assert set(map(tuple, kept.values())) == {(0, 3)}
    assert small.config.num_experts == 2
    for name, layer in layers_of(small):
        theirs = model.get_submodule(name)
        assert torch.equal(layer.router.weight, theirs.router.weight[[0, 3]])
        for mine, other in zip(
            layer.experts.parameters(), theirs.experts.parameters(), strict=True
        ):
            assert torch.equal(mine, other[[0, 3]])
    assert logits(small, batches[0]).isfinite().all()


def test_merging_twins_changes_nothing(made, batches):
    """Experts 1 and 3 are 0 and 2 with hidden units in another order: the merged ones are equal."""
    model = made()
    for _, layer in layers_of(model):
        weight = layer.router.weight.data
        weight[1], weight[3] = weight[0], weight[2]
        for expert in (0, 2):
            order = torch.randperm(64)
            layer.experts.up.data[expert + 1] = layer.experts.up.data[expert][:, order]
            layer.experts.down.data[expert + 1] = layer.experts.down.data[expert][order]
    scores = {name: torch.tensor([0.4, 0.1, 0.3, 0.2]) for name in LAYERS}
    small, groups = merge(model, scores, 2)
    assert set(map(str, groups.values())) == {"[[0, 1], [2, 3]]"}
    for name, layer in layers_of(small):
        theirs = model.get_submodule(name).experts
        torch.testing.assert_close(layer.experts.up, theirs.up[[0, 2]])
        torch.testing.assert_close(layer.experts.down, theirs.down[[0, 2]])


def test_units_are_matched_one_to_one(made):
    experts = made(gated=True).get_submodule(LAYERS[0]).experts
    order = align(experts, 0, 1)
    assert sorted(order.tolist()) == list(range(64))
    assert torch.equal(align(experts, 2, 2), torch.arange(64))


def test_the_mean_is_weighted_by_load(made):
    model = made()
    layer = model.get_submodule(LAYERS[0])
    scores = {name: torch.tensor([0.6, 0.2, 0.2, 0.0]) for name in LAYERS}
    small, groups = merge(model, scores, 1)
    assert groups[LAYERS[0]] == [[0, 1, 2, 3]]
    weight = layer.router.weight
    expected = 0.6 * weight[0] + 0.2 * weight[1] + 0.2 * weight[2]
    torch.testing.assert_close(small.get_submodule(LAYERS[0]).router.weight[0], expected)
    assert cluster(layer, torch.tensor([0.1, 0.2, 0.3, 0.4]), 4) == [[3], [2], [1], [0]]


def test_invalid_numbers_of_experts_are_refused(made):
    scores = {name: torch.ones(4) for name in LAYERS}
    for keep in (0, 4, 9):
        with pytest.raises(ConfigError, match=f"--keep-experts is {keep}"):
            prune(made(), scores, keep)
    with pytest.raises(ConfigError, match="--merge-experts is 4"):
        merge(made(), scores, 4)
    with pytest.raises(ConfigError, match="the model is dense"):
        prune(made(num_experts=0), {}, 2)
