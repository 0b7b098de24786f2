"""Load and save models in the Hugging Face format.

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
from switchlm.huggingface.metadata import Metadata, read_metadata, unused_settings
from switchlm.huggingface.names import Entry, Family
from switchlm.huggingface.quantised import (
    Quantisation,
    assemble,
    expert_offsets,
    read_quantisation,
    read_quantised_config,
)
from switchlm.huggingface.save import write_model
from switchlm.huggingface.weights import (
    CONFIG,
    TensorOffset,
    Weights,
    empty,
    find_model,
    find_tensor_offsets,
    inside,
    open_weights,
    read_json,
    set_tensor,
)
from switchlm.model.config import ModelConfig
from switchlm.model.transformer import SwitchTransformer

if TYPE_CHECKING:
    from switchlm.data.text.tokenizer import Tokenizer

DOWN = ".feedforward.down.weight"  # of dense layers
OTHER_TOKENIZERS = ("vocab.json", "vocab.txt")


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
    dtype: None keeps the dtype of the files; where they mix several, that of config.json. A T5 in
        float16 keeps the second matrix of feed-forward layers in float32, as in transformers.
    report: called with a message for every repair; without it, they are warnings.

    Tensors are read one by one into their parameter, so that memory holds the model and one tensor.
    Raises CheckpointError for tensors that are missing, unexpected, of a wrong shape or damaged,
    DataError for a tokenizer with ids beyond the vocabulary.
    """
    report = report or _warn
    saved = _open_model(name, report, revision, local_files_only)
    config, family, weights = saved.config, saved.family, saved.weights
    tokenizer = _tokenizer(saved, report)
    if saved.quantisation is not None:
        model = assemble(config, family, saved.quantisation, weights.read, dtype, device)
        return _with_metadata(model, saved, report), tokenizer
    if weights.pickled:
        report(
            f"The weights of {str(name)!r} are pickles (.bin). Only tensors are read from them and "
            "nothing in them is run, but safetensors is the safer format."
        )
    matched = match(config, family, weights, report)
    model = _build(saved, matched, dtype, device)
    return _with_metadata(model, saved, report), tokenizer


def load_without_experts(
    name: str | Path,
    *,
    revision: str | None = None,
    local_files_only: bool = False,
    dtype: torch.dtype | None = None,
    report: Report | None = None,
) -> "tuple[SwitchTransformer, Tokenizer | None, dict[str, list[TensorOffset]]]":
    """Load a model without its experts; return also the offsets of the experts in the files.

    Arguments are those of `load`. The parameters of experts stay on the meta device. The third
    result maps the name of each stacked parameter to the offset of every expert: of a matrix
    [out, in], the transpose of the parameter; or of codes, with those of scales at NAME.scale.

    Raises CheckpointError as `load` does, and for pickled weights, which have no fixed offsets.
    """
    report = report or _warn
    saved = _open_model(name, report, revision, local_files_only)
    config, family, weights = saved.config, saved.family, saved.weights
    tokenizer = _tokenizer(saved, report)
    if saved.quantisation is not None:
        model = assemble(config, family, saved.quantisation, weights.read, dtype, experts=False)
        experts = expert_offsets(config, family, saved.quantisation, weights)
        return _with_metadata(model, saved, report), tokenizer, experts
    if weights.pickled:
        raise CheckpointError(
            f"The weights of {str(name)!r} are pickles (.bin), which cannot be read in parts, so "
            "experts cannot stay on the disk. Convert it to safetensors: switchlm convert."
        )
    matched = match(config, family, weights, report)
    dense = [entry for entry in matched.entries if entry.expert is None]
    model = _build(saved, Match(dense, matched.sources), dtype)
    offsets = find_tensor_offsets(weights.tensors)
    experts = {}
    for entry in matched.entries:  # in the order of the experts
        if entry.expert is not None:
            experts.setdefault(entry.name, []).append(offsets[matched.sources[entry.hf_name]])
    return _with_metadata(model, saved, report), tokenizer, experts


def load_config(
    name: str | Path,
    *,
    revision: str | None = None,
    local_files_only: bool = False,
    report: Report | None = None,
    to_train: bool = False,
) -> ModelConfig:
    """Return the configuration of a saved model as `load` reads it, without its weights.

    to_train: raise CheckpointError for a quantised model, which cannot be trained.
    """
    purpose = "training it" if to_train else None
    return _open_model(name, report or _warn, revision, local_files_only, purpose).config


def load_quantisation(name: str | Path) -> Quantisation | None:
    """Return how the weights of a saved model are quantised; None: they are not."""
    folder = find_model(name)
    return read_quantisation(read_json(folder, CONFIG))


def open_unquantised(
    name: str | Path, *, report: Report | None = None
) -> tuple[ModelConfig, Metadata, Family, Weights]:
    """Return (configuration, metadata, family, weights) of a saved model; no tensor is read yet.

    Raises CheckpointError for a quantised model.
    """
    saved = _open_model(name, report or _warn, purpose="compressing it")
    return saved.config, saved.metadata, saved.family, saved.weights


def load_metadata(name: str | Path) -> Metadata:
    """Return what the folder of a saved model holds beside the model."""
    folder = find_model(name)
    return read_metadata(folder, read_json(folder, CONFIG))


def load_tokenizer(name: str | Path, *, report: Report | None = None) -> "Tokenizer | None":
    """Return the tokenizer of a saved model, None where its folder has none."""
    saved = _open_model(name, lambda line: None)
    return _tokenizer(saved, report or _warn)


def save(
    model: SwitchTransformer,
    tokenizer: "Tokenizer | None",
    directory: str | Path,
    *,
    max_shard_bytes: int = 5_000_000_000,
    report: Report | None = None,
    group: ProcessGroup | None = None,
    metadata: Metadata | None = None,
) -> None:
    """Save a model as transformers loads it, with tokenizer and model card.

    directory: replaced in one step, if it exists and holds a model.
    report: called with a message for each feature that transformers does not support; without it,
        they are warnings. The model card lists them too.
    group: the gloo group of all processes that hold a part of the model; each calls this and writes
        its share of the files. A process gathers at most one matrix of an expert, or one dense
        parameter, at a time. Nothing else may use the group meanwhile.
    metadata: what the folder holds beside the model; None: that of the folder it was loaded from.
    """
    write_model(
        model,
        tokenizer,
        Path(directory),
        max_shard_bytes,
        report or _warn,
        Ranks(group),
        metadata or model.metadata,
    )


def load_weights(
    model: SwitchTransformer,
    name: str | Path,
    *,
    revision: str | None = None,
    local_files_only: bool = False,
    report: Report | None = None,
    group: ProcessGroup | None = None,
) -> None:
    """Copy the weights of a saved model into `model`, in the dtype of `model`.

    model: built from `load_config(name)`; if it is sharded, each process calls this and reads its
        own parts only.
    name, revision: as in `load`.
    group: as in `save`; if reading fails on one process, all raise CheckpointError.
    """
    report = report or _warn
    ranks = Ranks(group)

    def work() -> None:
        saved = _open_model(name, report, revision, local_files_only, "training it")
        matched = match(model.config, saved.family, saved.weights, report)
        places = model.state_dict()
        if any(place.is_meta for place in places.values()):
            raise CheckpointError(
                "Cannot load weights into a model on the meta device; call "
                "model.to_empty(device=...) first."
            )
        _copy(places, matched, saved.weights)

    ranks.on_all_ranks(work)


def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=3)


def _tokenizer(saved: "_SavedModel", report: Report) -> "Tokenizer | None":
    """Return the tokenizer of a folder, with the vocabulary and special tokens of its model."""
    from switchlm.data.text.tokenizer import Tokenizer, Vocabulary
    from switchlm.data.text.tokenizer_files import FILES, has_tokenizer

    folder, config = saved.folder, saved.config
    for name in FILES:
        if (folder / name).exists():
            inside(folder, name)
    if has_tokenizer(folder):
        ids = Vocabulary(size=config.vocabulary_size, pad_id=config.pad_id, end_id=config.end_id)
        # None are added, so that a text has the ids that it has in transformers.
        return Tokenizer.load(folder, ids, num_sentinels=0)
    for other in OTHER_TOKENIZERS:
        if (folder / other).exists():
            report(
                f"{other} is not supported, only tokenizer.json and spiece.model; loading without "
                "tokenizer."
            )
    return None


class _SavedModel(NamedTuple):
    """A saved model, no tensor of which is read yet; quantisation: None if it is not quantised."""

    folder: Path
    metadata: Metadata
    quantisation: Quantisation | None
    config: ModelConfig
    family: Family
    weights: Weights


def _open_model(
    name: str | Path,
    report: Report,
    revision: str | None = None,
    local_files_only: bool = False,
    purpose: str | None = None,
) -> _SavedModel:
    """Find a model and read its config.json, repaired by what the weights show.

    purpose: what floating-point weights are needed for; a quantised model is then an error.
    """
    folder = find_model(name, revision, local_files_only)
    values = read_json(folder, CONFIG)
    quantisation = read_quantisation(values)
    metadata = read_metadata(folder, values)
    if quantisation is not None:
        if purpose is not None:
            raise CheckpointError(
                f"The model is quantised to {quantisation.bits} bits, and {purpose} needs "
                "floating-point weights. Use the model that it was made from."
            )
        described = read_quantised_config(folder, values, metadata, quantisation)
        return _SavedModel(folder, metadata, quantisation, *described)
    weights = open_weights(folder)
    found = infer_architecture(weights.tensors)

    def head_differs() -> bool:
        assert found.head_key is not None
        embedding = "shared.weight"
        return embedding in weights.tensors and not weights.equal(found.head_key, embedding)

    config, family = read_config(values, found, head_differs, report, metadata.generation)
    return _SavedModel(folder, metadata, None, config, family, weights)


def _with_metadata(
    model: SwitchTransformer, saved: _SavedModel, report: Report
) -> SwitchTransformer:
    """Set the metadata of a loaded model, and report settings that have no effect."""
    model.metadata = saved.metadata
    unused = unused_settings(saved.metadata.generation)
    if unused is not None:
        report(unused)
    return model


@torch.no_grad()
def _build(
    saved: _SavedModel,
    matched: Match,
    dtype: torch.dtype | None,
    device: torch.device | str = "cpu",
) -> SwitchTransformer:
    """Return the model with the matched weights; other parameters stay on the meta device."""
    with torch.device("meta"):
        model = SwitchTransformer(saved.config)
    dtypes = _dtypes(saved, matched, dtype)
    places: dict[str, Tensor] = {}
    for name, meta in model.state_dict(keep_vars=True).items():
        if name not in dtypes:
            continue
        places[name] = empty(meta.shape, dtypes[name], device)
        set_tensor(model, name, places[name])
    _copy(places, matched, saved.weights)
    return model.eval()


def _dtypes(
    saved: _SavedModel, matched: Match, dtype: torch.dtype | None
) -> dict[str, torch.dtype]:
    """Return the dtype of each parameter: one for all that compute with each other.

    Routers compute in float32 and keep the dtype of the files.
    """
    tensors = saved.weights.tensors
    own = {entry.name: tensors[matched.sources[entry.hf_name]].dtype for entry in matched.entries}
    wide = [name for name in own if saved.family == "t5" and name.endswith(DOWN)]
    routers = [name for name in own if ".router." in name]
    mixed = {own[name] for name in own.keys() - {*wide, *routers}}
    if dtype is None and len(mixed) > 1:
        dtype = saved.metadata.dtype or own["embedding.weight"]
    computing = dtype or next(iter(mixed))
    found = dict.fromkeys(own, computing)
    if computing == torch.float16:
        found |= dict.fromkeys(wide, torch.float32)
    return found if dtype else found | {name: own[name] for name in routers}


@torch.no_grad()
def _copy(places: dict[str, Tensor], matched: Match, weights: Weights) -> None:
    """Copy the local part of every parameter, one expert at a time."""
    regions = {name: region_of(place) for name, place in places.items()}

    def is_local(entry: Entry) -> bool:
        region = regions[entry.name]
        local = entry.expert is None or region[0][0] <= entry.expert < region[0][1]
        return local and volume(region) > 0

    for entry, tensor in matched.read(weights, is_local):
        region, part = regions[entry.name], part_of(places[entry.name])
        if entry.expert is not None:
            part = part[entry.expert - region[0][0]]
            region, tensor = region[1:], tensor.t()
        part.copy_(tensor[slices(region, full_region(tuple(tensor.shape)))])
        if part.dtype == torch.float16 and tensor.dtype != torch.float16:
            _check_range(part, tensor, entry.hf_name)


def _check_range(part: Tensor, tensor: Tensor, name: str) -> None:
    """Raise CheckpointError if finite weights became infinite in float16."""
    if part.isinf().any() and tensor.isfinite().all():
        largest = float(tensor.abs().max())
        raise CheckpointError(
            f"The weights {name!r} do not fit into float16: the largest is {largest:.4g}, and "
            "float16 ends at 65504. Take bfloat16, which has the range of float32."
        )
