"""On a GPU a training step never makes the host wait for the device.

The default tests run the real step on fake tensors, whose values cannot be read, with the kernels
of a GPU; on a GPU, PyTorch's sync debug mode checks the real step.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from switchlm.data.batch import Batch
from switchlm.kernels import select
from switchlm.model.config import ModelConfig, RouterConfig
from switchlm.model.transformer import SwitchTransformer
from switchlm.training.config import TrainingConfig
from switchlm.training.optimizer import build_optimizer
from switchlm.training.step import prepare_for_training, training_step

ROUTERS = {
    "paper": RouterConfig(),
    "t5x": RouterConfig(mode="t5x"),
    "hf": RouterConfig(mode="hf"),
    "dropless": RouterConfig(capacity_factor=None, evaluation_capacity_factor=None),
    "top 2": RouterConfig(experts_per_token=2),
    "expert choice": RouterConfig(selection="expert_choice"),
    "sample": RouterConfig(exploration="sample"),
    "bias": RouterConfig(balance="bias"),
}


class NothingSent(TorchDispatchMode):
    """Refuses what waits on a GPU though fake tensors allow it.

    Python numbers made into tensors are copied from memory that the GPU cannot read by itself;
    multinomial asks whether the probabilities are valid.
    """

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        waits = func.overloadpacket.__name__ in ("lift_fresh", "multinomial")
        assert not waits, f"{func} makes the host wait"
        return func(*args, **(kwargs or {}))


def config_of(router: RouterConfig) -> ModelConfig:
    return ModelConfig(
        vocabulary_size=24,
        d_model=16,
        d_ff=16,
        d_kv=8,
        num_heads=2,
        num_encoder_layers=2,
        num_decoder_layers=2,
        num_experts=4,
        router=router,
    )


def replace_tensors(model: nn.Module, device: str) -> None:
    """Give a model from the meta device tensors of the current mode."""
    for module in model.modules():
        for owned in (module._parameters, module._buffers):
            for name, tensor in owned.items():
                if tensor is not None:
                    made: Tensor = torch.empty(tensor.shape, device=device)
                    owned[name] = nn.Parameter(made) if owned is module._parameters else made


@contextmanager
def fake_model(router: RouterConfig, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Yield a model of fake tensors that takes the kernels of a GPU."""
    gpu = select.Choice("torch_grouped", "as on a GPU")
    monkeypatch.setattr(select, "explain", lambda *_: gpu)
    with torch.device("meta"):
        model = SwitchTransformer(config_of(router))
    with FakeTensorMode(allow_non_fake_inputs=True):
        replace_tensors(model, "cpu")
        yield model


def make_batch(segments: bool, device: str) -> Batch:
    def ones(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.ones(*shape, dtype=dtype, device=device)

    return Batch(
        inputs_BS=ones(4, 12, dtype=torch.int64),
        targets_BT=ones(4, 6, dtype=torch.int64),
        input_segments_BS=ones(4, 12) if segments else None,
        target_segments_BT=ones(4, 6) if segments else None,
        source_B=ones(4),
    )


def step(model: SwitchTransformer, config: TrainingConfig, batch: Batch) -> None:
    optimizer = build_optimizer(model, config)
    prepare_for_training(model, config.precision)
    with NothingSent():
        training_step(
            model,
            optimizer,
            [batch, batch],
            gradient_clip=1.0,
        )


@pytest.mark.parametrize("router", ROUTERS.values(), ids=ROUTERS)
def test_a_step_reads_no_value_on_the_host(
    router: RouterConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = TrainingConfig(precision="selective")
    with fake_model(router, monkeypatch) as model:
        step(model, config, make_batch(True, "cpu"))


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
def test_neither_does_an_optimizer_or_a_full_batch(
    optimizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = TrainingConfig(precision="selective", optimizer=optimizer)
    with fake_model(RouterConfig(), monkeypatch) as model:
        step(model, config, make_batch(False, "cpu"))


def test_synchronisation_is_detected() -> None:
    for mistake in (lambda: torch.tensor(3.0), lambda: torch.multinomial(torch.ones(2, 3), 1)):
        with NothingSent(), pytest.raises(AssertionError, match="makes the host wait"):
            mistake()


def test_no_token_left_behind_does_read_a_value(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once per round: whether any assignment lacks capacity. So the tests above can fail."""
    router = RouterConfig(reroute_overflow=True)
    with (
        fake_model(router, monkeypatch) as model,
        pytest.raises(DataDependentOutputException, match="_local_scalar_dense"),
    ):
        step(model, TrainingConfig(precision="selective"), make_batch(True, "cpu"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
@pytest.mark.parametrize("router", ROUTERS.values(), ids=ROUTERS)
@pytest.mark.parametrize("way", select.SWITCHES)
def test_a_step_on_a_gpu_never_waits(
    way: str, router: RouterConfig, optimizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    choice = select.Choice(way, "a test")
    monkeypatch.setattr(select, "explain_switch", lambda *_: choice)
    model = SwitchTransformer(config_of(router)).cuda()
    config = TrainingConfig(precision="selective", optimizer=optimizer)
    prepare_for_training(model, config.precision)
    made = build_optimizer(model, config)
    batch = make_batch(True, "cuda")

    def train() -> None:
        training_step(model, made, [batch], gradient_clip=1.0)

    train()  # compiles and tunes
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        train()
    finally:
        torch.cuda.set_sync_debug_mode("default")
