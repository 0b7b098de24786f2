"""Quantise a model so that it changes least on a text: GPTQ, block after block.

Each block sees what the quantised blocks before it make of the text. An expert learns from the rows
that are routed to it alone: while a text runs through the model, stand-ins for the matrices capture
the rows that reach them.

Shapes: N outputs, K inputs, R rows in the order of their experts, D width, E experts.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from switchlm.compression.gptq import gptq
from switchlm.compression.quantise import Codes, group_size, quantise_all, round_to_nearest
from switchlm.data.batch import Batch
from switchlm.generation.inference import evaluation_mode
from switchlm.huggingface.config import family_of
from switchlm.huggingface.names import Entry, entries
from switchlm.huggingface.quantised import Quantisation
from switchlm.kernels.cpu.quantised import matrix
from switchlm.kernels.reference import ACTIVATIONS
from switchlm.model.block import Block
from switchlm.model.experts import FeedForwardExperts, ProjectionExperts
from switchlm.model.transformer import SwitchTransformer, forward_batch


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
            model.set_submodule(name, stand_in)
        yield stand_ins
    finally:
        for name, stand_in in stand_ins.items():
            model.set_submodule(name, stand_in.base)


def run_text(model: SwitchTransformer, batches: Iterable[Batch]) -> None:
    """Run text through the model as in evaluation, for what it leaves in stand-ins."""
    device = next(model.parameters()).device
    with evaluation_mode(model):
        for batch in batches:
            forward_batch(model, batch.to(device))


LEAST_ROWS = 64  # an expert that saw fewer is rounded to nearest


@dataclass
class Calibrated:
    """The codes; how many matrices were calibrated; and the experts that saw too few rows."""

    codes: Codes
    num_matrices: int = 0
    too_few: list[str] = field(default_factory=list)


@torch.no_grad()
def calibrate(
    model: SwitchTransformer, batches: Sequence[Batch], quantisation: Quantisation
) -> Calibrated:
    """Return the codes of the model; its weights become what the codes stand for.

    The vocabulary is rounded to nearest: its rows are looked up, not only multiplied with. Raises
    CheckpointError for weights that are not finite.
    """
    found = Calibrated(quantise_all(model, quantisation, round_to_nearest(quantisation)))
    work = _Work(model, quantisation, found)
    for name, block in model.named_modules():
        if not isinstance(block, Block):
            continue
        places = work.places(name, block)
        if not places:
            continue
        with recording(model, places) as stand_ins:
            run_text(model, batches)
        for place, stand_in in stand_ins.items():
            if isinstance(stand_in, RecordedLinear):
                work.linear(place, stand_in)
            else:
                work.experts(place, stand_in)
    return found


class _Work:
    def __init__(
        self, model: SwitchTransformer, quantisation: Quantisation, found: Calibrated
    ) -> None:
        self._quantisation = quantisation
        self._found = found
        self._entries = {
            (entry.ours, entry.expert): entry
            for entry in entries(model.config, family_of(model.config))
            if quantisation.holds(entry)
        }

    def places(self, name: str, block: Block) -> list[str]:
        """Return the modules of a block that are quantised."""
        found = []
        for inner, module in block.named_modules():
            place = f"{name}.{inner}"
            experts = isinstance(module, FeedForwardExperts | ProjectionExperts)
            linear = isinstance(module, nn.Linear) and (f"{place}.weight", None) in self._entries
            if experts or linear:
                found.append(place)
        return found

    def linear(self, place: str, stand_in: RecordedLinear) -> None:
        weight = stand_in.base.weight
        entry = self._entries[f"{place}.weight", None]
        weight.copy_(self._matrix(entry, weight, stand_in.gram_DD, stand_in.num_rows))

    def experts(self, place: str, stand_in: RecordedExperts) -> None:
        base = stand_in.base
        for expert in range(base.num_experts):
            rows_RD = stand_in.rows(expert)
            if rows_RD.shape[0] < LEAST_ROWS:
                self._found.too_few.append(f"{place}.{expert}")
            gram_DD = rows_RD.t() @ rows_RD
            if isinstance(base, ProjectionExperts):
                self._expert(f"{place}.projection", base.projection, expert, gram_DD, rows_RD)
                continue
            self._expert(f"{place}.up", base.up, expert, gram_DD, rows_RD)
            activate = ACTIVATIONS[base.activation]
            hidden_RF = rows_RD @ base.up[expert].float().cpu()
            if base.gate is None:
                hidden_RF = activate(hidden_RF)
            else:
                self._expert(f"{place}.gate", base.gate, expert, gram_DD, rows_RD)
                hidden_RF = activate(rows_RD @ base.gate[expert].float().cpu()) * hidden_RF
            gram_FF = hidden_RF.t() @ hidden_RF
            self._expert(f"{place}.down", base.down, expert, gram_FF, hidden_RF)

    def _expert(
        self, name: str, stacked: Tensor, expert: int, gram_KK: Tensor, rows_RK: Tensor
    ) -> None:
        entry = self._entries[name, expert]
        weight_NK = stacked[expert].t()
        stacked[expert].copy_(self._matrix(entry, weight_NK, gram_KK, rows_RK.shape[0]).t())

    def _matrix(self, entry: Entry, weight_NK: Tensor, gram_KK: Tensor, num_rows: int) -> Tensor:
        """Quantise one matrix; return the weight that its codes stand for, [N, K]."""
        codes = self._found.codes
        if num_rows >= LEAST_ROWS:
            size = 0
            if self._quantisation.bits == 4:
                size = group_size(entry, self._quantisation)
            better = gptq(weight_NK.detach().cpu(), gram_KK, self._quantisation, size)
            if better is not None:
                codes.put(entry, *better)
                self._found.num_matrices += 1
        return matrix(*codes.get(entry), entry.shape[0]).dequantise()
