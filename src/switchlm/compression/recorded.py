"""Stand-ins that note which rows reach a matrix, for as long as a text runs through the model.

Shapes: R rows in the order of their experts, D width, E experts.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from switchlm.data.batch import Batch
from switchlm.generation.inference import evaluation_mode
from switchlm.model.experts import FeedForwardExperts, ProjectionExperts
from switchlm.model.transformer import SwitchTransformer, shift_right


class RecordedExperts(nn.Module):
    """Experts (see the `Experts` protocol) that keep the rows of each."""

    def __init__(self, base: FeedForwardExperts | ProjectionExperts) -> None:
        super().__init__()
        self.base = base
        self.num_experts = base.num_experts
        self._rows: list[list[Tensor]] = [[] for _ in range(base.num_experts)]

    def forward(self, x_RD: Tensor, counts_E: Tensor) -> Tensor:
        start = 0
        for kept, count in zip(self._rows, counts_E.tolist(), strict=True):
            if count:
                kept.append(x_RD[start : start + count].detach().float().cpu())
            start += count
        y_RD: Tensor = self.base(x_RD, counts_E)
        return y_RD

    def rows(self, expert: int) -> Tensor:
        """Return what reached that expert, [R, D] float32."""
        found = self._rows[expert]
        return torch.cat(found) if found else torch.empty(0, next(self.base.parameters()).shape[1])


class RecordedLinear(nn.Module):
    """A projection that keeps the Gram matrix of its rows, and how many they were."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.gram_DD = torch.zeros(base.in_features, base.in_features)
        self.num_rows = 0

    def forward(self, x: Tensor) -> Tensor:
        rows_RD = x.detach().reshape(-1, x.shape[-1]).float().cpu()
        self.gram_DD.addmm_(rows_RD.t(), rows_RD)
        self.num_rows += rows_RD.shape[0]
        y: Tensor = self.base(x)
        return y


Recorded = RecordedExperts | RecordedLinear


@contextmanager
def recording(model: nn.Module, names: Iterable[str]) -> Iterator[dict[str, Recorded]]:
    """Put stand-ins in the place of the modules of those names, and give them by name."""
    stand_ins: dict[str, Recorded] = {}
    for name in names:
        module = model.get_submodule(name)
        if isinstance(module, nn.Linear):
            stand_ins[name] = RecordedLinear(module)
        elif isinstance(module, FeedForwardExperts | ProjectionExperts):
            stand_ins[name] = RecordedExperts(module)
    try:
        for name, stand_in in stand_ins.items():
            _put(model, name, stand_in)
        yield stand_ins
    finally:
        for name, stand_in in stand_ins.items():
            _put(model, name, stand_in.base)


def run_text(model: SwitchTransformer, batches: Iterable[Batch]) -> None:
    """Run text through the model as in evaluation, for what it leaves in stand-ins."""
    device = next(model.parameters()).device
    with evaluation_mode(model):
        for batch in batches:
            here = batch.to(device)
            targets, segments = here.targets_BT, here.target_segments_BT
            decoder_inputs_BT = shift_right(targets, segments, model.config.pad_id)
            model(here.inputs_BS, decoder_inputs_BT, here.input_segments_BS, segments)


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    owner, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(owner), attribute, module)
