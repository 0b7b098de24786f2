"""The loop minimises the given objective, whose inputs are fields of the batch."""

import dataclasses
from collections.abc import Generator

import torch

from switchlm.data.batch import Batch
from switchlm.training.config import TrainingConfig
from switchlm.training.loop import train
from switchlm.training.step import target_cross_entropy


@dataclasses.dataclass(frozen=True, kw_only=True)
class WeightedBatch(Batch):
    weight: torch.Tensor


class Weighted:
    """Every batch with a weight of its own."""

    def __init__(self, loader):
        self.loader, self.sources, self.tokenizer = loader, loader.sources, None

    def iterate(self, start_step: int) -> Generator[tuple[int, Batch], None, None]:
        for step, batch in self.loader.iterate(start_step):
            yield step, WeightedBatch(**vars(batch), weight=torch.tensor(1.0 + step))

    def held_out(self, num_batches: int) -> list[Batch]:
        return self.loader.held_out(num_batches)


def weighted(output, batch):
    return batch.weight * target_cross_entropy(output, batch)


def test_the_loop_minimises_the_objective_of_each_batch(build, loader):
    config = TrainingConfig(steps=3, learning_rate=1e-9, warmup_steps=0, log_every=1, accumulate=2)
    plain = [line["loss"] for line in train(build(), loader, config) if "loss" in line]
    source = Weighted(loader)
    lines = list(train(build(), source, config, objective=weighted))
    found = [line["loss"] for line in lines if "loss" in line]
    # Rows are alike, so that the losses of a step's two batches are within a tenth of their mean.
    for step, (loss, whole) in enumerate(zip(found, plain, strict=True)):
        mean = (2 * step + 1 + 2 * step + 2) / 2
        assert abs(loss / whole - mean) < 0.1 * mean


def test_evaluation_stays_cross_entropy(build, loader):
    config = TrainingConfig(steps=2, learning_rate=1e-9, warmup_steps=0, evaluate_every=2)
    losses = [
        [line for line in train(build(), source, config, **how) if "evaluation_loss" in line]
        for source, how in ((loader, {}), (Weighted(loader), {"objective": weighted}))
    ]
    first, second = (lines[0]["evaluation_loss"] for lines in losses)
    assert abs(first - second) < 1e-6


def test_a_batch_that_moves_keeps_its_fields(loader):
    batch = WeightedBatch(**vars(loader.batch(0)), weight=torch.ones(2))
    moved = batch.to("meta")
    assert isinstance(moved, WeightedBatch)
    assert moved.weight.device.type == "meta"
