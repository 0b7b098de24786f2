"""The tensors of files and those of a model: what files say about it, and which is which.

A configuration can be wrong (that of the released Switch-C is); the names in the weight index
cannot. Reading them costs time and memory in proportion to the index, whatever the names claim.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from torch import Tensor

from switchlm.errors import CheckpointError
from switchlm.files import Report
from switchlm.huggingface.names import ALIASES, IGNORED, STACKS, Entry, Family, entries, locate
from switchlm.huggingface.weights import Weights
from switchlm.model.config import ModelConfig


@dataclass(frozen=True, kw_only=True)
class StackArchitecture:
    """The layers of one stack, and which are sparse, and which are dense, for certain.

    A layer in neither set has no feed-forward tensor at all: one is missing.
    """

    layers: set[int] = field(default_factory=set)
    sparse: set[int] = field(default_factory=set)
    dense: set[int] = field(default_factory=set)


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """All stacks, and what they share. gated is None where no first matrix of an FFN was found."""

    stacks: Mapping[str, StackArchitecture]
    num_experts: int
    gated: bool | None
    family: Family | None
    head_key: str | None


def infer_architecture(tensors: Mapping[str, Any]) -> Architecture:
    """Read the names, those of the format or our own, which quantised folders have.

    tensors: of our names that stand for all experts, their shapes are read too.

    Raises CheckpointError where whole layers or experts are missing in between.
    """
    stacks = {stack: StackArchitecture() for stack in STACKS}
    experts: set[int] = set()
    num_stacked = 0
    families: set[Family] = set()
    needs: set[str] = set()
    for key, tensor in tensors.items():
        place = locate(key)
        if place is None or place.stack is None or place.layer is None:
            continue
        stack = stacks[place.stack]
        stack.layers.add(place.layer)
        if "sparse" in place.row.needs:
            stack.sparse.add(place.layer)
        if "dense" in place.row.needs:
            stack.dense.add(place.layer)
        if place.family is not None:
            families.add(place.family)
        if place.expert is not None:
            experts.add(place.expert)
        elif place.row.is_expert and tensor.shape:
            num_stacked = max(num_stacked, tensor.shape[0])
        needs |= place.row.needs
    for name, stack in stacks.items():
        _check_complete("layers", f"{name}.block.", stack.layers)
    _check_complete("experts", "expert_", experts)
    if len(families) > 1:
        raise CheckpointError(
            "The weights mix the names of T5 (DenseReluDense) and of Switch Transformers (mlp); "
            "they do not belong to one model."
        )
    if {"plain", "gated"} <= needs:
        raise CheckpointError(
            "Some feed-forward layers have wi and others wi_0 and wi_1; a model is either gated or "
            "not. The files do not belong to one model."
        )
    heads = ("lm_head.weight", *ALIASES["lm_head.weight"], "head.weight")
    return Architecture(
        stacks=stacks,
        num_experts=max(len(experts), num_stacked),
        gated=("gated" in needs) if {"plain", "gated"} & needs else None,
        family=families.pop() if families else None,
        head_key=next((key for key in heads if key in tensors), None),
    )


def _check_complete(what: str, name: str, found: set[int]) -> None:
    if found and max(found) + 1 != len(found):
        first = next(number for number in range(len(found)) if number not in found)
        raise CheckpointError(
            f"The weights lack {what}: they have {name}{max(found)}, but nothing of number "
            f"{first}. The files are incomplete."
        )


_SHOWN = 3  # keys in a message


@dataclass(frozen=True)
class Match:
    """sources: the key in the files of each entry, by the entry; entries: in the model's order."""

    entries: list[Entry]
    sources: dict[str, str]

    def read(
        self, weights: Weights, keep: Callable[[Entry], bool] = lambda entry: True
    ) -> Iterator[tuple[Entry, Tensor]]:
        """Yield the entries to keep and their tensors, file by file."""
        wanted: dict[str, list[Entry]] = {}
        for entry in filter(keep, self.entries):
            wanted.setdefault(self.sources[entry.theirs], []).append(entry)
        for key, tensor in weights.read(wanted.keys()):
            for entry in wanted[key]:
                yield entry, tensor


def match(config: ModelConfig, family: Family, weights: Weights, report: Report) -> Match:
    """Find every tensor of the model in the files, and leave none of the files' over.

    Nothing of the model's size is allocated, and the work is bounded by the files, whatever the
    configuration claims. Raises CheckpointError that names what is missing, extra or misshapen.
    """
    keys = weights.tensors
    sources: dict[str, str] = {}
    found: list[Entry] = []

    def missing(entry: Entry) -> bool:
        source = _source(entry, config, family, weights)
        if source is not None:
            sources[entry.theirs] = source
            found.append(entry)
        return source is None

    absent = list(islice(filter(missing, entries(config, family)), _SHOWN + 1))
    if absent:
        raise misfit(f"missing {_names([entry.theirs for entry in absent])}.")
    for entry in found:
        shape = keys[sources[entry.theirs]].shape
        if shape != entry.shape:
            raise misfit(
                f"{sources[entry.theirs]!r} has the shape {list(shape)}, but the configuration "
                f"asks for {list(entry.shape)}."
            )
    extra = keys.keys() - set(sources.values())
    for key in sorted(extra.intersection(IGNORED)):
        report(f"{key} is not used by any T5; it is left out.")
        extra.discard(key)
    for key, original in _duplicates(config, sources).items():
        if key in extra:
            if not weights.equal(key, original):
                raise CheckpointError(
                    f"{key!r} differs from {original!r}; models here share one embedding."
                )
            extra.discard(key)
    if extra:
        raise misfit(f"nothing there asks for {_names(sorted(extra)[: _SHOWN + 1])}.")
    return Match(found, sources)


def misfit(message: str) -> CheckpointError:
    """Return the error of weights that are not those of the configuration."""
    return CheckpointError(f"The weights do not fit config.json: {message}")


def _source(entry: Entry, config: ModelConfig, family: Family, weights: Weights) -> str | None:
    """Return the key that holds the entry: its own, or another name of the same thing."""
    names = [entry.theirs, *ALIASES.get(entry.theirs, ())]
    if entry.theirs == "shared.weight" and config.tied_head:
        names.append("lm_head.weight")
    if entry.theirs == "lm_head.weight" and family == "t5":
        names.append("shared.weight")
    return next((name for name in names if name in weights.tensors), None)


def _duplicates(config: ModelConfig, sources: dict[str, str]) -> dict[str, str]:
    """Return the other names that files hold a tensor under, and the key it was found under."""
    names: dict[str, str] = {}
    for original, others in ALIASES.items():
        holder = original if original in sources else "shared.weight"
        names |= dict.fromkeys((original, *others), sources[holder])
    return {name: source for name, source in names.items() if name != source}


def _names(keys: list[str]) -> str:
    shown = ", ".join(repr(key[:200]) for key in keys[:_SHOWN])
    return f"{shown} and more" if len(keys) > _SHOWN else shown
