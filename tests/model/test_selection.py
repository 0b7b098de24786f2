import torch
from hypothesis import given
from hypothesis import strategies as st

from switchlm.model.selection import choose, expert_choice, reroute_overflow, sample

scenes = st.tuples(st.integers(1, 20), st.integers(1, 6), st.integers(1, 7), st.integers(0, 10**6))


def probabilities(tokens: int, experts: int, seed: int, sharpness: float = 2.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(tokens, experts, generator=generator) * sharpness).softmax(-1)


def test_choose_takes_the_most_probable_and_the_first_of_equals() -> None:
    probability_NE = torch.tensor([[0.2, 0.5, 0.3], [0.4, 0.4, 0.2]])
    assert choose(probability_NE, 1).tolist() == [[1], [0]]
    assert choose(probability_NE, 2).tolist()[0] == [1, 2]
    assert sorted(choose(probability_NE, 2).tolist()[1]) == [0, 1]


def test_a_selection_bias_changes_the_choice() -> None:
    probability_NE = torch.tensor([[0.2, 0.5, 0.3]])
    bias_E = torch.tensor([0.0, -0.4, 0.0])
    assert choose(probability_NE, 1, bias_E).tolist() == [[2]]


def test_sampling_follows_the_softmax() -> None:
    torch.manual_seed(0)
    probability_NE = torch.tensor([[0.1, 0.6, 0.3]]).expand(20_000, 3)
    share_E = torch.bincount(sample(probability_NE)[:, 0], minlength=3) / 20_000
    assert torch.allclose(share_E, probability_NE[0], atol=0.02)


@given(scenes, st.integers(1, 8))
def test_rerouting_drops_no_token_where_slots_suffice(
    scene: tuple[int, int, int, int], capacity: int
) -> None:
    tokens, experts, size, seed = scene
    probability_NE = probabilities(tokens, experts, seed)
    torch.manual_seed(seed)
    valid_N1 = torch.rand(tokens, 1) < 0.8
    group_N = torch.arange(tokens) // size
    first_N1 = choose(probability_NE, 1)
    num_groups = int(group_N.max()) + 1
    expert_N1, kept_N1 = reroute_overflow(
        probability_NE, first_N1, valid_N1, group_N, num_groups, capacity
    )
    expert_N, kept_N, valid_N = expert_N1[:, 0], kept_N1[:, 0], valid_N1[:, 0]
    assert not (kept_N & ~valid_N).any()
    for group in range(num_groups):
        members = group_N == group
        load_E = torch.bincount(expert_N[members & kept_N], minlength=experts)
        assert load_E.max() <= capacity
        seated, real = int((members & kept_N).sum()), int((members & valid_N).sum())
        assert seated == min(real, capacity * experts)
    # Whoever would have been kept without rerouting keeps it: rerouted tokens queue behind.
    for n in range(tokens):
        same = (group_N == group_N[n]) & valid_N & (first_N1[:, 0] == first_N1[n, 0])
        if valid_N[n] and int(same[:n].sum()) < capacity:
            assert kept_N[n]
            assert expert_N[n] == first_N1[n, 0]


def test_rerouting_goes_by_probability_after_the_first_choice() -> None:
    probability_NE = torch.tensor([[0.6, 0.3, 0.1], [0.5, 0.1, 0.4], [0.7, 0.2, 0.1]])
    first_N1 = choose(probability_NE, 1)
    everyone = torch.ones(3, 1, dtype=torch.bool)
    one_group = torch.zeros(3, dtype=torch.long)
    expert_N1, kept_N1 = reroute_overflow(probability_NE, first_N1, everyone, one_group, 1, 1)
    assert expert_N1[:, 0].tolist() == [0, 2, 1]
    assert kept_N1.all()
    # A sampled first choice is honoured too.
    sampled_N1 = torch.tensor([[2], [0], [1]])
    expert_N1, _ = reroute_overflow(probability_NE, sampled_N1, everyone, one_group, 1, 1)
    assert expert_N1.tolist() == sampled_N1.tolist()


@given(scenes, st.integers(1, 8))
def test_experts_choose_their_most_probable_real_tokens(
    scene: tuple[int, int, int, int], capacity: int
) -> None:
    groups, experts, size, seed = scene
    probability_GSE = probabilities(groups * size, experts, seed).view(groups, size, experts)
    torch.manual_seed(seed)
    valid_GS = torch.rand(groups, size) < 0.7
    token_GEC, kept_GEC = expert_choice(probability_GSE, valid_GS, capacity)
    assert token_GEC.shape == (groups, experts, min(capacity, size))
    for group in range(groups):
        real = int(valid_GS[group].sum())
        for expert in range(experts):
            kept = kept_GEC[group, expert]
            assert kept.sum() == min(capacity, real), "padding only for want of real tokens"
            picked = token_GEC[group, expert][kept]
            assert len(set(picked.tolist())) == len(picked)
            assert valid_GS[group, picked].all()
            score_S = probability_GSE[group, :, expert].masked_fill(~valid_GS[group], -1)
            left = [s for s in range(size) if valid_GS[group, s] and s not in picked.tolist()]
            if left and len(picked):
                assert score_S[left].max() <= score_S[picked].min()
