"""Logits, losses and gradients equal those of transformers on the same weights."""

from collections.abc import Sequence
from random import Random
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from switchlm.huggingface.load import load
from switchlm.huggingface.names import entries
from switchlm.model.config import Initialisation, RouterConfig
from switchlm.model.losses import cross_entropy, routing_losses
from switchlm.model.switch import SwitchFeedForward, switch_layers

# The same models each time: where a router's gradient is a small difference of large numbers, or a
# ReLU's input within rounding of zero, float32 itself is off by more. One model in hundreds is.
models = pytest.mark.parametrize("seed", range(12))


def quiet(message: str) -> None:
    """Ignore reports."""


def batch(seed: int, rows: int = 3, source: int = 11, target: int = 7) -> dict[str, torch.Tensor]:
    """Return inputs and targets with padding on the right in some rows and on the left in one."""
    random = torch.Generator().manual_seed(seed)
    inputs = torch.randint(2, 48, (rows, source), generator=random)
    targets = torch.randint(2, 48, (rows, target), generator=random)
    mask = torch.ones(rows, source, dtype=torch.long)
    mask[0, 6:] = 0
    mask[1, :2] = 0
    target_mask = torch.ones(rows, target, dtype=torch.long)
    target_mask[0, 4:] = 0
    return {
        "inputs": inputs * mask,
        "mask": mask,
        "targets": targets,
        "target_mask": target_mask,
        "decoder_inputs": torch.nn.functional.pad(targets, (1, 0))[:, :-1] * target_mask,
    }


def compare(theirs: Any, ours: Any, data: dict[str, torch.Tensor], check: Any, **options: Any):
    """Compare logits, loss and every gradient; options go to transformers' forward."""
    output = theirs(
        input_ids=data["inputs"],
        attention_mask=data["mask"],
        decoder_input_ids=data["decoder_inputs"],
        decoder_attention_mask=data["target_mask"],
        labels=data["targets"].masked_fill(data["target_mask"] == 0, -100),
        **options,
    )
    real = data["target_mask"].bool()
    mine = ours(data["inputs"], data["decoder_inputs"], data["mask"], data["target_mask"])
    total, count = cross_entropy(mine.logits_BTV, data["targets"], real)
    balance, z_loss = routing_losses(mine, ours.config)
    loss = total / count
    if options:
        loss = loss + balance + z_loss
    check(mine.logits_BTV[real], output.logits[real], "logits")
    check(loss, output.loss, "loss")
    output.loss.backward()
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    family = "t5" if theirs.config.model_type == "t5" else "switch"
    for entry in entries(ours.config, family):
        gradient = ours.get_parameter(entry.name).grad
        if entry.expert is not None:
            gradient = gradient[entry.expert].t()
        expected = gradients.pop(entry.hf_name)
        check(gradient, torch.zeros_like(gradient) if expected is None else expected, entry.hf_name)
    assert not gradients


SPARSE = {
    "num_experts": range(1, 6),
    "num_layers": range(1, 6),
    "num_decoder_layers": range(1, 6),
    "encoder_sparse_step": range(5),
    "decoder_sparse_step": range(5),
    "num_heads": (1, 2, 4),
    "d_kv": (4, 8),
    "tie_word_embeddings": (False, True),
    "expert_capacity": (1, 2, 3, 64),
    "relative_attention_num_buckets": (4, 8, 32),
}
DENSE = {
    "num_layers": range(1, 4),
    "num_decoder_layers": range(1, 4),
    "feed_forward_proj": ("relu", "gated-gelu", "gated-relu", "gelu_new"),
    "tie_word_embeddings": (False, True),
    "num_heads": (1, 3),
}


def drawn(fields: dict[str, Sequence[Any]], seed: int) -> dict[str, Any]:
    random = Random(seed)
    return {name: random.choice(values) for name, values in fields.items()}


def has_router_losses(fields: dict[str, Any]) -> bool:
    """Return whether transformers can compute them: it fails for a stack without routers."""
    return all(
        step == 1 or (step > 1 and fields[layers] > 1)
        for step, layers in (
            (fields["encoder_sparse_step"], "num_layers"),
            (fields["decoder_sparse_step"], "num_decoder_layers"),
        )
    )


@models
def test_sparse_models_agree(seed, their_switch, theirs_on_disk, assert_close):
    fields = drawn(SPARSE, seed)
    torch.manual_seed(seed)
    theirs = their_switch(relative_attention_max_distance=20, **fields)
    ours, _ = load(theirs_on_disk(theirs), report=quiet)
    options = {"output_router_logits": True} if has_router_losses(fields) else {}
    compare(theirs, ours, batch(seed), assert_close, **options)


@pytest.mark.parametrize("capacity", [2, 64])
@pytest.mark.parametrize("step", [1, 2])
def test_router_losses_agree(capacity, step, their_switch, theirs_on_disk, assert_close):
    theirs = their_switch(
        num_layers=4,
        num_decoder_layers=4,
        encoder_sparse_step=step,
        decoder_sparse_step=2,
        expert_capacity=capacity,
        router_aux_loss_coef=0.3,
        router_z_loss_coef=0.2,
    )
    ours, _ = load(theirs_on_disk(theirs), report=quiet)
    data = batch(1)
    dropped = sum(
        (~routing.kept_A).sum().item() for routing in ours.encode(data["inputs"], data["mask"])[1]
    )
    assert (dropped > 0) == (capacity == 2)
    compare(theirs, ours, data, assert_close, output_router_logits=True)


def test_training_with_jitter_agrees(their_switch, theirs_on_disk, assert_close):
    """The experts see the jitter too; both draw the same numbers from the same seed."""
    theirs = their_switch(router_jitter_noise=0.3, expert_capacity=4).train()
    ours, _ = load(theirs_on_disk(theirs), report=quiet)
    for layer in switch_layers(ours).values():
        layer.router.trains_on_padding = True  # as theirs do
    data = batch(2)
    outputs = []
    for run in (
        lambda: (
            theirs(
                input_ids=data["inputs"],
                attention_mask=data["mask"],
                decoder_input_ids=data["decoder_inputs"],
            ).logits
        ),
        lambda: ours.train()(data["inputs"], data["decoder_inputs"], data["mask"]).logits_BTV,
    ):
        torch.manual_seed(5)
        outputs.append(run())
    assert_close(outputs[1], outputs[0], "logits")
    ours.eval()
    still = ours(data["inputs"], data["decoder_inputs"], data["mask"]).logits_BTV
    assert not torch.allclose(still, outputs[0], rtol=1e-2)


def test_labels_alone_agree(their_switch, theirs_on_disk, assert_close):
    """Without masks transformers routes padding, and attends to it, as to any token."""
    theirs = their_switch(expert_capacity=3)
    ours, _ = load(theirs_on_disk(theirs), report=quiet)
    data = batch(3)
    labels = data["targets"].masked_fill(data["target_mask"] == 0, -100)
    output = theirs(input_ids=data["inputs"], labels=labels, output_router_logits=True)
    decoder_inputs = theirs._shift_right(labels)
    mine = ours(data["inputs"], decoder_inputs)
    total, count = cross_entropy(mine.logits_BTV, data["targets"], data["target_mask"].bool())
    loss = total / count + sum(routing_losses(mine, ours.config))
    assert_close(mine.logits_BTV, output.logits, "logits")
    assert_close(loss, output.loss, "loss")


@models
def test_dense_models_agree(seed, their_t5, theirs_on_disk, assert_close):
    fields = drawn(DENSE, seed)
    torch.manual_seed(seed)
    theirs = their_t5(**fields)
    ours, _ = load(theirs_on_disk(theirs), report=quiet)
    compare(theirs, ours, batch(seed), assert_close)


class GatedFeedForward(torch.nn.Module):
    """What Switch-XXL has and transformers lacks: GEGLU, in experts and dense layers."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.wi_0 = torch.nn.Linear(config.d_model, config.d_ff, bias=False)
        self.wi_1 = torch.nn.Linear(config.d_model, config.d_ff, bias=False)
        self.wo = torch.nn.Linear(config.d_ff, config.d_model, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate = torch.nn.functional.gelu(self.wi_0(x), approximate="tanh")
        return self.wo(gate * self.wi_1(x))


def test_switch_xxl_agrees(their_switch, theirs_on_disk, assert_close, monkeypatch):
    """transformers, given the gated layers it lacks, against the layout of the released files."""
    modeling = pytest.importorskip(
        "transformers.models.switch_transformers.modeling_switch_transformers"
    )
    monkeypatch.setattr(modeling, "SwitchTransformersDenseActDense", GatedFeedForward)
    monkeypatch.setattr(
        modeling.SwitchTransformersPreTrainedModel, "_init_weights", lambda *_: None
    )
    theirs = their_switch(num_layers=4, num_sparse_encoder_layers=2, tie_word_embeddings=False)
    folder = theirs_on_disk(theirs)
    tensors = load_file(folder / "model.safetensors")
    tensors["decoder.lm_head.weight"] = tensors.pop("lm_head.weight")
    save_file(tensors, folder / "model.safetensors")
    said: list[str] = []
    ours, _ = load(folder, report=said.append)
    assert ours.config.gated
    assert not ours.config.tied_head
    assert "GEGLU" in "".join(said)
    compare(theirs, ours, batch(4), assert_close, output_router_logits=True)


@pytest.mark.parametrize("capacity", [1, 2, 4])
def test_capacity_counts_row_by_row(capacity):
    """The layer against a loop over rows and tokens, for any version of transformers."""
    torch.manual_seed(1)
    router = RouterConfig(mode="hf", expert_capacity=capacity)
    layer = SwitchFeedForward(
        8, 12, 3, router=router, initialisation=Initialisation(scale=4.0)
    ).eval()
    x_BSD = torch.randn(4, 9, 8)
    y_BSD, routing = layer(x_BSD)
    probability_BSE = (x_BSD @ layer.router.weight.t()).softmax(-1)
    expected_BSD = torch.zeros_like(x_BSD)
    for row in range(4):
        taken = [0, 0, 0]
        for place in range(9):
            gate, expert = probability_BSE[row, place].max(-1)
            taken[expert] += 1
            if taken[expert] > capacity:
                continue
            hidden = torch.relu(x_BSD[row, place] @ layer.experts.up[expert])
            expected_BSD[row, place] = gate * (hidden @ layer.experts.down[expert])
    assert not routing.kept_A.all()
    torch.testing.assert_close(y_BSD, expected_BSD, rtol=1e-5, atol=1e-6)
