"""Match the tensors of a file with those of a model: every key on either side is accounted for."""

from dataclasses import dataclass
from itertools import islice

from switchlm.errors import CheckpointError
from switchlm.files import Report
from switchlm.huggingface.names import ALIASES, IGNORED, Entry, Family, entries
from switchlm.huggingface.weights import Weights
from switchlm.model.config import ModelConfig

SHOWN = 3


@dataclass(frozen=True)
class Match:
    """sources: the key in the files of each entry, by the entry; entries: in the model's order."""

    entries: list[Entry]
    sources: dict[str, str]


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

    absent = list(islice(filter(missing, entries(config, family)), SHOWN + 1))
    if absent:
        raise CheckpointError(
            f"The weights do not fit config.json: missing {_names([e.theirs for e in absent])}."
        )
    for entry in found:
        shape = keys[sources[entry.theirs]].shape
        if shape != entry.shape:
            raise CheckpointError(
                f"The weights do not fit config.json: {sources[entry.theirs]!r} has the shape "
                f"{list(shape)}, but the configuration asks for {list(entry.shape)}."
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
        raise CheckpointError(
            f"The weights do not fit config.json: nothing there asks for "
            f"{_names(sorted(extra)[: SHOWN + 1])}."
        )
    return Match(found, sources)


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
    shown = ", ".join(repr(key[:200]) for key in keys[:SHOWN])
    return f"{shown} and more" if len(keys) > SHOWN else shown
