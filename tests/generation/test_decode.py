import pytest
import torch

from switchlm.errors import CheckpointError, ConfigError, DataError
from switchlm.generation.decode import dropless, evaluation_mode, generate, pad_prompts, steps
from switchlm.generation.sampling import GREEDY, Sampling
from switchlm.model.transformer import shift_right

SAMPLED = Sampling(temperature=1.0, top_k=50, top_p=0.95)
ROUTERS = {
    "paper": {"evaluation_capacity_factor": 0.5, "min_capacity": 1},
    "t5x": {"mode": "t5x", "evaluation_capacity_factor": 0.5, "min_capacity": 1},
    "hf": {"mode": "hf", "expert_capacity": 2},
    "expert choice": {"selection": "expert_choice", "min_capacity": 1},
    "top 2": {"experts_per_token": 2},
}


@pytest.mark.parametrize("encoder_capacity", [False, True])
@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("router", ROUTERS.values(), ids=ROUTERS.keys())
def test_a_prompt_alone_in_a_batch_and_padded_has_the_same_output(
    build, prompts, router, sampling, encoder_capacity
):
    model = build(router=router)
    options = {
        "max_new_tokens": 8,
        "sampling": sampling,
        "encoder_capacity": encoder_capacity,
    }
    inputs_BS, segments_BS = pad_prompts(prompts, 0)
    together = generate(model, inputs_BS, segments_BS, seeds=[11, 12, 13, 14], **options)
    order = [2, 0, 3, 1]
    shuffled = generate(
        model, inputs_BS[order], segments_BS[order], seeds=[13, 11, 14, 12], **options
    )
    wide = [torch.nn.functional.pad(ids, (0, 5)) for ids in (inputs_BS, segments_BS)]
    padded = generate(model, *wide, seeds=[11, 12, 13, 14], **options)
    for row, prompt in enumerate(prompts):
        alone = generate(model, torch.tensor([prompt]), seeds=11 + row, **options).rows([1])[0]
        assert alone == together.rows([1])[row]
        assert alone == shuffled.rows([1])[order.index(row)]
        assert alone == padded.rows([1])[row]
    assert len(set(together.tokens_BT.flatten().tolist())) > 5, "a test on dull outputs is none"


def test_greedy_takes_the_argmax_of_the_uncached_model(build, prompts):
    model = build(router={"evaluation_capacity_factor": None, "capacity_factor": None})
    inputs_BS, segments_BS = pad_prompts(prompts, 0)
    tokens_BT = generate(model, inputs_BS, segments_BS, max_new_tokens=8).tokens_BT
    with torch.no_grad():
        logits = model(inputs_BS, shift_right(tokens_BT, None, 0), segments_BS).logits_BTV
    before_end = (tokens_BT == 1).cumsum(1) - (tokens_BT == 1).long() == 0
    assert torch.equal(logits.argmax(-1)[before_end], tokens_BT[before_end])


def ending(model, at):
    """Make the model generate the end token after `at` tokens."""
    original = model.decode
    calls = []

    def decode(token_B1, encoded_BSD, **options):
        output = original(token_B1, encoded_BSD, **options)
        logits = torch.zeros_like(output.logits_BTV)
        for row, end in enumerate(at):
            logits[row, -1, 1 if len(calls) == end else 50 + row] = 1.0
        calls.append(1)
        output.logits_BTV.copy_(logits)
        return output

    model.decode = decode
    return calls


def test_rows_stop_at_their_end_token_and_the_batch_after_the_last(build, prompts):
    model = build()
    calls = ending(model, at=[2, 0, 4, 1])
    generated = generate(model, *pad_prompts(prompts, 0), max_new_tokens=30)
    assert len(calls) == 5
    assert generated.finished_B.all()
    assert generated.tokens_BT.tolist() == [
        [50, 50, 1, 0, 0],
        [1, 0, 0, 0, 0],
        [52, 52, 52, 52, 1],
        [53, 1, 0, 0, 0],
    ]
    assert generated.rows([1]) == [[50, 50], [], [52] * 4, [53]]


def test_the_limit_ends_outputs_that_are_then_unfinished(build, prompts):
    model = build()
    ending(model, at=[2, 9, 9, 9])
    generated = generate(model, *pad_prompts(prompts, 0), max_new_tokens=4)
    assert generated.tokens_BT.shape == (4, 4)
    assert generated.finished_B.tolist() == [True, False, False, False]


def test_every_row_has_its_own_limit(build, prompts):
    model = build()
    ending(model, at=[2, 9, 9, 9])
    generated = generate(model, *pad_prompts(prompts, 0), max_new_tokens=[5, 1, 3, 2])
    assert generated.tokens_BT.tolist() == [[50, 50, 1], [51, 0, 0], [52] * 3, [53, 53, 0]]
    assert generated.finished_B.tolist() == [True, False, False, False]


def test_the_caller_may_end_a_row(build, prompts):
    model, seen = build(), []
    ending(model, at=[9, 1, 9, 9])

    def ends(row, token):
        seen.append((row, token))
        return row == 2 or len(seen) > 6

    generated = generate(model, *pad_prompts(prompts, 0), max_new_tokens=5, ends=ends)
    assert generated.tokens_BT.tolist() == [[50, 50, 50], [51, 1, 0], [52, 0, 0], [53, 53, 0]]
    assert generated.finished_B.all()
    assert seen == [(0, 50), (1, 51), (2, 52), (3, 53), (0, 50), (1, 1), (3, 53), (0, 50)]


def test_gradients_are_restored_between_steps_and_the_mode_by_closing(build):
    model = build().train()
    iterator = steps(model, torch.tensor([[3]]), max_new_tokens=5)
    next(iterator)
    assert torch.is_grad_enabled()
    assert not model.training
    iterator.close()
    assert torch.is_grad_enabled()
    assert model.training


def test_samples_depend_on_seeds(build, prompts):
    model = build(scale=1.0)
    inputs_BS = torch.tensor([prompts[0]] * 3)
    options = {"max_new_tokens": 12, "sampling": Sampling(temperature=1.0)}
    rows = generate(model, inputs_BS, seeds=[1, 2, 1], **options).tokens_BT
    assert torch.equal(rows[0], rows[2])
    assert not torch.equal(rows[0], rows[1])
    short = generate(model, inputs_BS, seeds=1, **{**options, "max_new_tokens": 5}).tokens_BT
    assert torch.equal(short[:2], rows[:2, :5])
    drawn = [generate(model, inputs_BS, **options).tokens_BT.tolist() for _ in range(2)]
    assert len({tuple(row) for rows in drawn for row in rows}) == 6


def test_generation_does_not_change_the_model(build, prompts):
    model = build().train()
    before = [m.config for m in model.modules() if hasattr(m, "experts_choose")]
    generated = generate(model, *pad_prompts(prompts, 0), max_new_tokens=2)
    assert model.training
    assert [m.config for m in model.modules() if hasattr(m, "experts_choose")] == before
    model(generated.tokens_BT, generated.tokens_BT).logits_BTV.sum().backward()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"max_new_tokens": 0}, ConfigError, "At least 1 new token"),
        ({"max_new_tokens": [2, 0]}, ConfigError, "At least 1 new token"),
        ({"max_new_tokens": [2]}, ConfigError, "1 limits for 2 prompts"),
        ({"max_new_tokens": 2, "seeds": [1]}, ConfigError, "1 seeds for 2 prompts"),
    ],
)
def test_bad_options_are_refused(build, options, error, message):
    with pytest.raises(error, match=message):
        generate(build(), torch.tensor([[3], [4]]), **options)


@pytest.mark.parametrize("prompts", [[[]], [[5], []]])
def test_empty_prompts_are_refused(build, prompts):
    with pytest.raises(DataError, match="prompt is empty"):
        generate(build(), *pad_prompts(prompts, 0), max_new_tokens=2)


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED])
def test_damaged_weights_are_an_error(build, sampling):
    model = build()
    model.head.weight.data[7] = float("nan")
    with pytest.raises(CheckpointError, match="not finite"):
        generate(model, torch.tensor([[3]]), max_new_tokens=2, sampling=sampling)


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED])
def test_an_overflow_is_an_error_at_every_step_of_rows_that_are_not_over(
    build, overflowing, sampling
):
    inputs = torch.tensor([[3], [4]])
    model = overflowing(build(), row=1, step=3)
    with pytest.raises(CheckpointError, match="--dtype bfloat16"):
        generate(model, inputs, max_new_tokens=5, sampling=sampling)
    model = overflowing(build(), row=1, step=3)
    generated = generate(model, inputs, max_new_tokens=[5, 3], sampling=sampling)
    assert generated.tokens_BT.shape == (2, 5)


def test_the_mode_of_every_module_is_restored(build):
    model = build().train()
    model.decoder.eval()
    with evaluation_mode(model):
        assert not any(module.training for module in model.modules())
        assert not torch.is_grad_enabled()
    assert model.training
    assert model.encoder.training
    assert not model.decoder.training
    assert torch.is_grad_enabled()


@pytest.mark.parametrize(
    "router",
    [
        {"evaluation_capacity_factor": 0.1, "min_capacity": 1},
        {"evaluation_capacity_factor": 0.1, "min_capacity": 1, "reroute_overflow": True},
        {"mode": "hf", "expert_capacity": 1},
    ],
    ids=["factor", "rerouting", "absolute"],
)
def test_dropless_drops_nothing_and_restores_the_capacity(build, router):
    model = build(router=router)
    inputs_BS = torch.randint(3, 300, (2, 40), generator=torch.Generator().manual_seed(1))
    configured = [m.config for m in model.modules() if hasattr(m, "experts_choose")]
    with dropless(model):
        _, routing = model.encode(inputs_BS)
        assert all(layer.kept_A.all() for layer in routing)
        assert all(layer.balance_loss == 0 for layer in routing)
    assert [m.config for m in model.modules() if hasattr(m, "experts_choose")] == configured
    _, routing = model.encode(inputs_BS)
    assert not all(layer.kept_A.all() for layer in routing)
    assert all(layer.balance_loss > 0 for layer in routing)
