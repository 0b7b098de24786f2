"""Infer a model's architecture from the names of its tensors, and match them to its parameters.

A config.json can be wrong (that of the released Switch-C is); the names in the weight index cannot.
Time and memory are proportional to the index, whatever numbers the names contain.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from torch import Tensor

from switchlm.errors import CheckpointError
from switchlm.files import Report
from switchlm.huggingface.names import ALIASES, IGNORED, STACKS, Entry, Family, entries, parse_key
from switchlm.huggingface.weights import Weights
from switchlm.model.config import ModelConfig


@dataclass(frozen=True, kw_only=True)
class StackArchitecture:
    """The layers of one stack, and those known to be sparse and to be dense.

    A layer in neither set has no feed-forward tensor: one is missing.
    """

    layers: set[int] = field(default_factory=set)
    sparse: set[int] = field(default_factory=set)
    dense: set[int] = field(default_factory=set)


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """All stacks, and what they share; gated: None if no first matrix of an FFN was found."""

    stacks: Mapping[str, StackArchitecture]
    num_experts: int
    gated: bool | None
    family: Family | None
    head_key: str | None


def infer_architecture(tensors: Mapping[str, Any]) -> Architecture:
    """Infer the architecture from names of the Hugging Face format, or of quantised folders.

    tensors: by name; the shapes are read of tensors that stack all experts.

    Raises CheckpointError for gaps in the numbers of layers or experts.
    """
    stacks = {stack: StackArchitecture() for stack in STACKS}
    experts: set[int] = set()
    num_stacked = 0
    families: set[Family] = set()
    needs: set[str] = set()
    for key, tensor in tensors.items():
        parsed = parse_key(key)
        if parsed is None or parsed.stack is None or parsed.layer is None:
            continue
        stack = stacks[parsed.stack]
        stack.layers.add(parsed.layer)
        if "sparse" in parsed.row.needs:
            stack.sparse.add(parsed.layer)
        if "dense" in parsed.row.needs:
            stack.dense.add(parsed.layer)
        if parsed.family is not None:
            families.add(parsed.family)
        if parsed.expert is not None:
            experts.add(parsed.expert)
        elif parsed.row.is_expert and tensor.shape:
            num_stacked = max(num_stacked, tensor.shape[0])
        needs |= parsed.row.needs
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
            f"The weights lack {what}: they have {name}{max(found)}, but not number "
            f"{first}. The files are incomplete."
        )


_SHOWN = 3  # keys in a message


@dataclass(frozen=True)
class Match:
    """entries: in the model's order; sources: the key in the files, by each entry's name there."""

    entries: list[Entry]
    sources: dict[str, str]

    def read(
        self, weights: Weights, keep: Callable[[Entry], bool] = lambda entry: True
    ) -> Iterator[tuple[Entry, Tensor]]:
        """Yield the entries that `keep` selects and their tensors, file by file."""
        entries_of: dict[str, list[Entry]] = {}
        for entry in filter(keep, self.entries):
            entries_of.setdefault(self.sources[entry.hf_name], []).append(entry)
        for key, tensor in weights.read(entries_of.keys()):
            for entry in entries_of[key]:
                yield entry, tensor


def match(config: ModelConfig, family: Family, weights: Weights, report: Report) -> Match:
    """Match every tensor of the model to one in the files, and every one in the files to the model.

    Nothing of the model's size is allocated; the work is bounded by the files, whatever the
    configuration says. Raises CheckpointError that names missing, unexpected and misshapen tensors.
    """
    keys = weights.tensors
    sources: dict[str, str] = {}
    found: list[Entry] = []

    def missing(entry: Entry) -> bool:
        source = _source(entry, config, family, weights)
        if source is not None:
            sources[entry.hf_name] = source
            found.append(entry)
        return source is None

    absent = list(islice(filter(missing, entries(config, family)), _SHOWN + 1))
    if absent:
        raise mismatch(f"missing {_names([entry.hf_name for entry in absent])}.")
    for entry in found:
        shape = keys[sources[entry.hf_name]].shape
        if shape != entry.shape:
            raise mismatch(
                f"{sources[entry.hf_name]!r} has the shape {list(shape)}, but the configuration "
                f"needs {list(entry.shape)}."
            )
    extra = keys.keys() - set(sources.values())
    for key in sorted(extra.intersection(IGNORED)):
        report(f"{key} is not used by T5 models; it is ignored.")
        extra.discard(key)
    for key, original in _duplicates(config, sources).items():
        if key in extra:
            if not weights.equal(key, original):
                raise CheckpointError(
                    f"{key!r} differs from {original!r}; models here share one embedding."
                )
            extra.discard(key)
    if extra:
        raise mismatch(f"unexpected {_names(sorted(extra)[: _SHOWN + 1])}.")
    return Match(found, sources)


def mismatch(message: str) -> CheckpointError:
    """Return the error for weights that do not match the configuration."""
    return CheckpointError(f"The weights do not fit config.json: {message}")


def _source(entry: Entry, config: ModelConfig, family: Family, weights: Weights) -> str | None:
    """Return the key of the entry in the files: its own, or an alias."""
    names = [entry.hf_name, *ALIASES.get(entry.hf_name, ())]
    if entry.hf_name == "shared.weight" and config.tied_head:
        names.append("lm_head.weight")
    if entry.hf_name == "lm_head.weight" and family == "t5":
        names.append("shared.weight")
    return next((name for name in names if name in weights.tensors), None)


def _duplicates(config: ModelConfig, sources: dict[str, str]) -> dict[str, str]:
    """Return the other names that a tensor may also have in the files, and the key that is used."""
    names: dict[str, str] = {}
    for original, others in ALIASES.items():
        holder = original if original in sources else "shared.weight"
        names |= dict.fromkeys((original, *others), sources[holder])
    return {name: source for name, source in names.items() if name != source}


def _names(keys: list[str]) -> str:
    shown = ", ".join(repr(key[:200]) for key in keys[:_SHOWN])
    return f"{shown} and more" if len(keys) > _SHOWN else shown
