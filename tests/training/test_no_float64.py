"""Nothing that runs on a device uses float64, which Apple's GPUs lack and others compute slowly.

On a CPU: what a module's parameters, or a batch that was moved, lead to counts as on the device,
until it is copied to main memory by `cpu`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from switchlm import _torch
from switchlm.compression.prune import importance
from switchlm.data.batch import Batch
from switchlm.generation.beam import Beams, beam_search
from switchlm.generation.decode import generate
from switchlm.generation.sampling import Sampling
from switchlm.model.config import RouterConfig
from switchlm.training.config import TrainingConfig
from switchlm.training.distillation import Distillation, Teacher, TeacherLoader
from switchlm.training.loop import train


class Device(_torch.TorchDispatchMode):
    """Raises AssertionError where an operator makes float64 from a tensor of the device.

    A tensor is of the device if its storage is; storages are kept, so that none is used again.
    """

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, Any] = {}
        self.copies = False  # to main memory

    def take(self, tensor: Tensor) -> None:
        self.storages[tensor.untyped_storage()._cdata] = tensor.untyped_storage()

    def has(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self.storages

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        inputs = [x for x in _torch.tree_iter((args, kwargs)) if isinstance(x, Tensor)]
        if any(map(self.has, inputs)) and not self.copies:
            for tensor in _torch.tree_iter(out):
                if isinstance(tensor, Tensor):
                    assert tensor.dtype != torch.float64, f"{func} makes float64 on the device"
                    self.take(tensor)
        return out


@contextmanager
def device() -> Iterator[Device]:
    """Let modules and batches be on the device in the block."""
    mode = Device()

    def place(module: torch.nn.Module, inputs: Any) -> None:
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            mode.take(tensor)

    def to(batch: Batch, where: Any) -> Batch:
        for tensor in vars(batch).values():
            if isinstance(tensor, Tensor):
                mode.take(tensor)
        return batch

    def cpu(tensor: Tensor) -> Tensor:
        mode.copies = True
        try:
            return tensor.detach().clone()
        finally:
            mode.copies = False

    hook = torch.nn.modules.module.register_module_forward_pre_hook(place)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Batch, "to", to)
        patch.setattr(Tensor, "cpu", cpu)
        try:
            with mode:
                yield mode
        finally:
            hook.remove()


ROUTERS = {
    "plain": RouterConfig(),
    "biases, two experts": RouterConfig(balance="bias", experts_per_token=2),
    "experts choose": RouterConfig(selection="expert_choice"),
}


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
@pytest.mark.parametrize("router", ROUTERS.values(), ids=ROUTERS)
def test_training_and_evaluation(build, loader, router, optimizer):
    config = TrainingConfig(
        steps=2,
        log_every=1,
        evaluate_every=2,
        evaluate_batches=1,
        accumulate=2,
        optimizer=optimizer,
    )
    with device() as mode:
        lines = list(train(build(router=router), loader, config))
    assert len(lines) == 3
    assert len(mode.storages) > 1000


def test_distillation(build, loader):
    teacher = Teacher(build(), top_k=4)
    source = TeacherLoader(loader, lambda _, batch: teacher(batch))
    config = TrainingConfig(steps=1, evaluate_every=None)
    with device():
        assert len(list(train(build(), source, config, objective=Distillation()))) == 1


def test_generation_and_the_importance_of_experts(build, loader):
    model, batch = build(), loader.batch(0)
    with device():
        for by in ("load", "gradient"):
            assert importance(model, [batch], by)
        inputs_BS = batch.inputs_BS[:2]
        generate(model, inputs_BS, max_new_tokens=3, sampling=Sampling(temperature=1.0, top_p=0.9))
        beam_search(model, inputs_BS, max_new_tokens=3, beams=Beams(width=2))


def test_float64_is_seen(build, loader):
    mistakes = (
        lambda x: x.double(),
        lambda x: x.sum(dtype=torch.float64),
        lambda x: torch.zeros(3, dtype=torch.float64) + x.sum(),
    )
    model = build()
    with device():
        logits = model(loader.batch(0).inputs_BS, loader.batch(0).targets_BT).logits_BTV
        for mistake in mistakes:
            with pytest.raises(AssertionError, match="float64 on the device"):
                mistake(logits)
        assert logits.cpu().double().sum().dtype == torch.float64
