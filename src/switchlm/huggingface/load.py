"""Models in the Hugging Face format: load those of transformers, save what it loads.

model, tokenizer = switchlm.load("google/switch-base-8")
switchlm.save(model, tokenizer, "my-model")
"""

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from switchlm.checkpoint.collective import Ranks
from switchlm.checkpoint.layout import full_region, part_of, region_of, slices, volume
from switchlm.errors import CheckpointError
from switchlm.files import Report
from switchlm.huggingface.config import read_config
from switchlm.huggingface.match import Match, infer_architecture, match
from switchlm.huggingface.names import Entry, Family
from switchlm.huggingface.quantised import (
    Quantisation,
    assemble,
    expert_extents,
    read_quantisation,
    read_quantised_config,
)
from switchlm.huggingface.save import write_model
from switchlm.huggingface.weights import (
    CONFIG,
    Extent,
    Weights,
    find_extents,
    find_model,
    inside,
    open_weights,
    put_tensor,
    read_json,
)
from switchlm.kernels.cpu import memory
from switchlm.model.config import ModelConfig
from switchlm.model.transformer import SwitchTransformer

if TYPE_CHECKING:
    from switchlm.data.text.tokenizer import Tokenizer

TOKENIZER = "tokenizer.json"
OTHER_TOKENIZERS = ("spiece.model", "vocab.json")


def load(
    name: str | Path,
    *,
    revision: str | None = None,
    local_files_only: bool = False,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    report: Report | None = None,
) -> "tuple[SwitchTransformer, Tokenizer | None]":
    """Load a model and its tokenizer, None where the folder has none; the model is in eval mode.

    name: a run, a model folder, or a name on the hub (at `revision`).
    dtype: None keeps that of the files.
    report: told of repairs and oddities; without it they are warnings.

    Tensors are read one by one into their place, experts stacked, so that memory holds the model
    and one tensor. Raises CheckpointError where anything is missing, extra, misshapen or damaged.
    """
    tell = report or _warn
    saved = _open(name, tell, revision, local_files_only)
    config, family, weights = saved.config, saved.family, saved.weights
    if saved.quantisation is not None:
        model = assemble(config, family, saved.quantisation, weights.read, dtype, device)
        return model, _tokenizer(saved.folder, tell)
    if weights.pickled:
        tell(
            f"The weights of {str(name)!r} are pickles (.bin). Only tensors are read from them and "
            "nothing in them is run, but safetensors are the better format."
        )
    model = _build(config, match(config, family, weights, tell), weights, dtype, device)
    return model, _tokenizer(saved.folder, tell)


def load_without_experts(
    name: str | Path,
    *,
    revision: str | None = None,
    local_files_only: bool = False,
    dtype: torch.dtype | None = None,
    report: Report | None = None,
) -> "tuple[SwitchTransformer, Tokenizer | None, dict[str, list[Extent]]]":
    """Load all of a model but its experts, and tell where in the files those are.

    Arguments are those of `load`. The parameters of experts stay on the meta device. The third
    result has, by the name of each stacked parameter, what the files hold of every expert: a matrix
    [out, in], transposed against ours; or codes, and by NAME.scale their scales.

    Raises CheckpointError as `load` does, and for pickled weights, which have no fixed places.
    """
    tell = report or _warn
    saved = _open(name, tell, revision, local_files_only)
    config, family, weights = saved.config, saved.family, saved.weights
    if saved.quantisation is not None:
        model = assemble(config, family, saved.quantisation, weights.read, dtype, experts=False)
        codes = expert_extents(config, family, saved.quantisation, weights)
        return model, _tokenizer(saved.folder, tell), codes
    if weights.pickled:
        raise CheckpointError(
            f"The weights of {str(name)!r} are pickles (.bin), which cannot be read in parts, so "
            "experts cannot stay on the disk. Write it once as safetensors: switchlm convert."
        )
    matched = match(config, family, weights, tell)
    dense = [entry for entry in matched.entries if entry.expert is None]
    model = _build(config, Match(dense, matched.sources), weights, dtype)
    extents = find_extents(weights.tensors)
    experts: dict[str, list[Extent]] = {}
    for entry in matched.entries:  # those of a parameter come in the order of the experts
        if entry.expert is not None:
            experts.setdefault(entry.ours, []).append(extents[matched.sources[entry.theirs]])
    return model, _tokenizer(saved.folder, tell), experts


def load_config(
    name: str | Path,
    *,
    revision: str | None = None,
    local_files_only: bool = False,
    report: Report | None = None,
    to_train: bool = False,
) -> ModelConfig:
    """Return the configuration of a saved model as `load` understands it, without its weights.

    to_train: refuse one that is quantised, for it cannot be trained.
    """
    purpose = "training it" if to_train else None
    return _open(name, report or _warn, revision, local_files_only, purpose).config


def load_quantisation(name: str | Path) -> Quantisation | None:
    """Return how the weights of a saved model are quantised; None if they are not."""
    folder = find_model(name)
    return read_quantisation(read_json(folder, CONFIG))


def open_floats(
    name: str | Path, *, report: Report | None = None
) -> tuple[ModelConfig, Family, Weights]:
    """Return what a saved model is, and its weights, of which nothing is read yet.

    Raises CheckpointError for one that is quantised.
    """
    saved = _open(name, report or _warn, purpose="compressing it")
    return saved.config, saved.family, saved.weights


def load_tokenizer(name: str | Path, *, report: Report | None = None) -> "Tokenizer | None":
    """Return the tokenizer of a saved model, None where its folder has none."""
    folder = find_model(name)
    return _tokenizer(folder, report or _warn)


def save(
    model: SwitchTransformer,
    tokenizer: "Tokenizer | None",
    directory: str | Path,
    *,
    max_shard_bytes: int = 5_000_000_000,
    report: Report | None = None,
    group: ProcessGroup | None = None,
) -> None:
    """Save a model as transformers loads it, with tokenizer and model card.

    The folder appears whole or not at all; an older model in its place is replaced. What
    transformers cannot represent is saved in the same scheme and said in the card and to `report`
    (without it, as a warning).

    group: the gloo group of all processes that hold a part of the model, each of which then calls
        this and writes its share of the files; no more than one matrix of an expert, or one dense
        parameter, is whole anywhere. Nothing else may use the group meanwhile.
    """
    write_model(model, tokenizer, Path(directory), max_shard_bytes, report or _warn, Ranks(group))


def fill(
    model: SwitchTransformer,
    name: str | Path,
    *,
    revision: str | None = None,
    local_files_only: bool = False,
    report: Report | None = None,
    group: ProcessGroup | None = None,
) -> None:
    """Copy the weights of a saved model into `model`, in its own dtype, wherever its parts are.

    model: built from `load_config(name)`; plain, or sharded over processes, each of which calls
        this and reads no more than its own parts.
    name, revision: as in `load`.
    group: as in `save`; if reading fails on one process, all of them raise CheckpointError.
    """
    tell = report or _warn
    ranks = Ranks(group)

    def work() -> None:
        saved = _open(name, tell, revision, local_files_only, "training it")
        matched = match(model.config, saved.family, saved.weights, tell)
        places = model.state_dict()
        if any(place.is_meta for place in places.values()):
            raise CheckpointError(
                "Cannot fill a model that has no memory yet; call model.to_empty(device=...) first."
            )
        _copy(places, matched, saved.weights)

    ranks.on_all_ranks(work)


def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=3)


def _tokenizer(folder: Path, report: Report) -> "Tokenizer | None":
    if not (folder / TOKENIZER).exists():
        for other in OTHER_TOKENIZERS:
            if (folder / other).exists():
                report(f"{other} is no tokenizer this can read ({TOKENIZER} is); loading without.")
        return None
    from switchlm.data.text.tokenizer import Tokenizer

    return Tokenizer.load(inside(folder, TOKENIZER))


class _Saved(NamedTuple):
    """A saved model, of whose weights nothing is read yet; quantisation: None for floats."""

    folder: Path
    quantisation: Quantisation | None
    config: ModelConfig
    family: Family
    weights: Weights


def _open(
    name: str | Path,
    report: Report,
    revision: str | None = None,
    local_files_only: bool = False,
    purpose: str | None = None,
) -> _Saved:
    """Find a model, and understand its config.json, mended where its weights say better.

    purpose: what floating-point weights are needed for; a quantised model is refused then.
    """
    folder = find_model(name, revision, local_files_only)
    values = read_json(folder, CONFIG)
    quantisation = read_quantisation(values)
    if quantisation is not None:
        if purpose is not None:
            raise CheckpointError(
                f"The model is quantised to {quantisation.bits} bits, and {purpose} needs "
                "floating-point weights. Take the model that it was made from."
            )
        return _Saved(folder, quantisation, *read_quantised_config(folder, values, quantisation))
    weights = open_weights(folder)
    found = infer_architecture(weights.tensors)

    def head_differs() -> bool:
        assert found.head_key is not None
        embedding = "shared.weight"
        return embedding in weights.tensors and not weights.equal(found.head_key, embedding)

    return _Saved(folder, None, *read_config(values, found, head_differs, report), weights)


@torch.no_grad()
def _build(
    config: ModelConfig,
    matched: Match,
    weights: Weights,
    dtype: torch.dtype | None,
    device: torch.device | str = "cpu",
) -> SwitchTransformer:
    """Return the model with what matched; all else of it stays on the meta device."""
    with torch.device("meta"):
        model = SwitchTransformer(config)
    dtypes: dict[str, torch.dtype] = {}
    for entry in matched.entries:
        own = dtype or weights.tensors[matched.sources[entry.theirs]].dtype
        dtypes[entry.ours] = torch.promote_types(dtypes.get(entry.ours, own), own)
    places: dict[str, Tensor] = {}
    for name, meta in model.state_dict(keep_vars=True).items():
        if name not in dtypes:
            continue
        if torch.device(device).type == "cpu":
            places[name] = memory.empty_on_large_pages(meta.shape, dtypes[name])
        else:
            places[name] = torch.empty(meta.shape, dtype=dtypes[name], device=device)
        put_tensor(model, name, places[name])
    _copy(places, matched, weights)
    return model.eval()


@torch.no_grad()
def _copy(places: dict[str, Tensor], matched: Match, weights: Weights) -> None:
    """Copy what is here of every parameter, an expert at a time."""
    boxes = {name: region_of(place) for name, place in places.items()}

    def here(entry: Entry) -> bool:
        box = boxes[entry.ours]
        held = entry.expert is None or box[0][0] <= entry.expert < box[0][1]
        return held and volume(box) > 0

    for entry, tensor in matched.read(weights, here):
        box, part = boxes[entry.ours], part_of(places[entry.ours])
        if entry.expert is not None:
            part = part[entry.expert - box[0][0]]
            box, tensor = box[1:], tensor.t()
        part.copy_(tensor[slices(box, full_region(tuple(tensor.shape)))])
