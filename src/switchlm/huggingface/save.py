"""Write a model folder of the Hugging Face format, in one step.

All ranks write weight files, and none gathers the full model: tensor by tensor, in the same order
on all ranks, those that hold a part send it to the rank that writes the file.
"""

import dataclasses
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar

import torch
from torch import Tensor

from switchlm import files
from switchlm.checkpoint.collective import Ranks
from switchlm.checkpoint.layout import (
    Planner,
    StoredRegion,
    full_region,
    header,
    overlap,
    part_of,
    raw,
    region_of,
    slices,
)
from switchlm.errors import CheckpointError
from switchlm.files import Report
from switchlm.huggingface.config import (
    ARCHITECTURES,
    family_of,
    transformers_step,
    write_config,
)
from switchlm.huggingface.metadata import (
    GENERATION_CONFIG,
    Metadata,
    generation_values,
    kept_values,
)
from switchlm.huggingface.names import ALIASES, STACKS, Entry, entries
from switchlm.huggingface.weights import SAFETENSORS
from switchlm.model import count
from switchlm.model.config import ModelConfig
from switchlm.model.quantised import quantised_modules
from switchlm.model.transformer import SwitchTransformer

if TYPE_CHECKING:
    from switchlm.data.text.tokenizer import Tokenizer

T = TypeVar("T")


Contents = dict[str, tuple[torch.dtype, tuple[int, ...]]]
"""The dtype and the shape of every tensor of a weight file, by key."""


class TensorFile:
    """A safetensors file; the header is written first, then tensors in any order.

    stream: the open file; the caller closes it.
    """

    def __init__(self, stream: BinaryIO, contents: Contents) -> None:
        # The format allows no gaps: with larger dtypes first all tensors are aligned.
        ordered = dict(sorted(contents.items(), key=lambda item: -item[1][0].itemsize))
        head = header(ordered, {})
        stream.write(head)
        self._stream, self._contents = stream, ordered
        self._starts: dict[str, int] = {}
        self._remaining = {key: _num_bytes(*ordered[key]) for key in ordered}
        start = len(head)
        for key, size in self._remaining.items():
            self._starts[key] = start
            start += size

    def write(self, key: str, tensor: Tensor, expert: int | None = None) -> None:
        """Write a tensor, or that of one expert."""
        dtype, shape = self._contents[key]
        shape = shape if expert is None else shape[1:]
        assert tuple(tensor.shape) == shape, (key, tensor.shape, shape)
        tensor = tensor.to(dtype).contiguous()
        self._stream.seek(self._starts[key] + (expert or 0) * tensor.nbytes)
        self._stream.write(raw(tensor))
        self._remaining[key] -= tensor.nbytes

    def finish(self) -> None:
        """Sync the file. Raises CheckpointError if bytes are missing."""
        missing = [key for key, remaining in self._remaining.items() if remaining]
        if missing:
            raise CheckpointError(f"The weights of the model are incomplete: {missing[0]!r}.")
        self._stream.flush()
        os.fsync(self._stream.fileno())


def _num_bytes(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    return math.prod(shape) * dtype.itemsize


def shard_names(number: int, single: str) -> list[str]:
    """Return the names of a number of weight files; single: the name if there is one."""
    if number == 1:
        return [single]
    stem = single.removesuffix(".safetensors")
    return [f"{stem}-{place:05}-of-{number:05}.safetensors" for place in range(1, number + 1)]


def write_index(folder: Path, shards: list[Contents], single: str) -> None:
    """Write the index of several weight files."""
    if len(shards) == 1:
        return
    names = shard_names(len(shards), single)
    size = sum(_num_bytes(*described) for shard in shards for described in shard.values())
    weight_map = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    _write_json(folder / f"{single}.index.json", index)


def split_into_shards(
    items: Iterable[T], contents: Callable[[T], Contents], max_bytes: int
) -> list[list[T]]:
    """Split items into shards of at most `max_bytes`, in order; a larger item has its own.

    contents: returns the tensors of an item.
    """
    shards: list[list[T]] = [[]]
    size = 0
    for item in items:
        needed = sum(_num_bytes(*described) for described in contents(item).values())
        if shards[-1] and size + needed > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(item)
        size += needed
    return shards


@torch.no_grad()
def write_shards(
    folder: Path, tensors: Mapping[str, Tensor], shards: list[list[Entry]], ranks: Ranks
) -> list[Contents]:
    """Write one file per shard, shared out among the ranks; return the contents of all.

    tensors: of the model by name, plain or DTensors. An error of one rank is raised on all.
    """
    layout = Planner(ranks).layout(tensors)
    names = shard_names(len(shards), SAFETENSORS)
    contents = [_contents(shard, tensors) for shard in shards]
    errors: list[OSError] = []

    @contextmanager
    def deferred() -> Iterator[None]:
        """Record an error and go on: the other ranks still have to send their parts."""
        try:
            yield
        except OSError as error:
            errors.append(error)

    for first in range(0, len(shards), ranks.size):
        group = shards[first : first + ranks.size]  # one per rank, written at the same time
        with deferred(), ExitStack() as opened:
            output = None
            if ranks.rank < len(group):
                own = first + ranks.rank
                with deferred():
                    stream = opened.enter_context((folder / names[own]).open("wb"))
                    output = TensorFile(stream, contents[own])
            for entries_of_ranks in zip_longest(*group):
                for writer, entry in enumerate(entries_of_ranks):
                    if entry is None:
                        continue
                    found = _gather(tensors[entry.name], entry, layout[entry.name], writer, ranks)
                    if output is not None and found is not None and not errors:
                        with deferred():
                            output.write(entry.hf_name, found)
            if output is not None and not errors:
                output.finish()

    def report() -> None:
        if errors:
            raise errors[0]

    ranks.on_all_ranks(report)
    return contents


def _contents(shard: Iterable[Entry], tensors: Mapping[str, Tensor]) -> Contents:
    return {entry.hf_name: (tensors[entry.name].dtype, entry.shape) for entry in shard}


def _gather(
    tensor: Tensor, entry: Entry, holders: list[StoredRegion], writer: int, ranks: Ranks
) -> Tensor | None:
    """Gather a tensor, as it is stored, on the rank that writes it; the others send their part."""
    region = full_region(tuple(tensor.shape))
    if entry.expert is not None:
        region = ((entry.expert, entry.expert + 1), *region[1:])
    target = None
    if ranks.rank == writer:
        target = torch.empty([stop - start for start, stop in region], dtype=tensor.dtype)
    for held in holders:
        common = overlap(held.region, region)
        if common is None:
            continue
        if ranks.rank == held.rank:
            part = part_of(tensor)[slices(common, region_of(tensor))]
            if target is not None:
                target[slices(common, region)].copy_(part)
            else:
                ranks.send(part.cpu().contiguous(), writer)
        elif target is not None:
            part = torch.empty([stop - start for start, stop in common], dtype=tensor.dtype)
            ranks.receive(part, held.rank)
            target[slices(common, region)].copy_(part)
    if target is None:
        return None
    return target if entry.expert is None else target[0].t().contiguous()


KIND = "model"  # in the manifest of its folder
SIGNATURE = "written by switchlm."  # in the model card
_MODEL_FILES = (  # of earlier versions, which wrote no manifest
    "config.json", "generation_config.json", "README.md", "model*.safetensors",
    "model.safetensors.index.json", "quantised*.safetensors", "quantised.safetensors.index.json",
    "tokenizer*.json", "special_tokens_map.json",
)  # fmt: skip


def write_model(
    model: SwitchTransformer,
    tokenizer: "Tokenizer | None",
    folder: Path,
    max_shard_bytes: int,
    report: Report,
    ranks: Ranks,
    metadata: Metadata | None = None,
) -> None:
    """Write into a hidden folder beside `folder`, then rename it; see load.save."""
    config, tensors = model.config, model.state_dict()
    _check_names(model, tensors)

    def begin() -> str:
        check_replaceable(folder)
        for feature in unsupported_features(config):
            report(feature)
        return str(files.hidden_folder(folder))

    def finish() -> None:
        write_index(partial, written, SAFETENSORS)
        dtype = str(model.embedding.weight.dtype).removeprefix("torch.")
        card = model_card(config, dtype)
        values = write_config(config, dtype)
        write_metadata(partial, config, metadata, values, card, tokenizer)
        files.replace_folder(partial, folder, KIND)

    if ranks.size > 1:  # at least one file per rank
        max_shard_bytes = min(
            max_shard_bytes,
            math.ceil(sum(tensor.nbytes for tensor in tensors.values()) / ranks.size),
        )
    partial = Path(ranks.on_rank_zero(begin))
    try:
        shards = split_into_shards(
            _stored_entries(config), lambda entry: _contents([entry], tensors), max_shard_bytes
        )
        written = write_shards(partial, tensors, shards, ranks)
        ranks.on_rank_zero(finish)
    finally:
        if ranks.is_first:
            files.remove_folder(partial)


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yield a hidden folder to write a model into; without an error it then replaces `folder`."""
    check_replaceable(folder)
    with files.new_folder(folder, KIND) as partial:
        yield partial


def check_replaceable(folder: Path) -> None:
    """Raise CheckpointError for a folder that holds anything but a model that we wrote."""
    files.check_replaceable(folder, KIND, _is_earlier_model)


def _is_earlier_model(folder: Path) -> bool:
    """Return whether a folder without a manifest is a model that an earlier version wrote."""
    card = folder / "README.md"
    return (
        all(
            path.is_file() and any(path.match(pattern) for pattern in _MODEL_FILES)
            for path in folder.iterdir()
        )
        and (folder / "config.json").is_file()
        and card.is_file()
        and SIGNATURE in card.read_text(encoding="utf-8", errors="replace")
    )


def write_metadata(
    folder: Path,
    config: ModelConfig,
    metadata: Metadata | None,
    values: dict[str, Any],
    card: str,
    tokenizer: "Tokenizer | None",
) -> None:
    """Write all files of a model folder but the weights.

    values: of config.json.
    card: the text of README.md.
    """
    metadata = metadata or Metadata()
    _write_json(folder / "config.json", values | kept_values(config, metadata))
    _write_json(folder / GENERATION_CONFIG, generation_values(config, metadata.generation))
    (folder / "README.md").write_text(card, encoding="utf-8")
    if tokenizer is not None:
        tokenizer.save(folder)


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _check_names(model: SwitchTransformer, tensors: dict[str, Tensor]) -> None:
    if any(True for _ in quantised_modules(model)):
        raise CheckpointError(
            "The model is quantised: it has no floating-point weights to save. Copy its folder, or "
            "use the model that it was made from."
        )
    config = model.config
    expected = {entry.name for entry in entries(config, family_of(config))}
    if expected != tensors.keys():
        name = min(expected ^ tensors.keys())
        raise CheckpointError(
            f"This model cannot be saved in the Hugging Face format: its tensors and its "
            f"configuration differ at {name!r}. Were its layers replaced?"
        )


def _stored_entries(config: ModelConfig) -> Iterator[Entry]:
    """Yield all entries; with an untied head, transformers stores the embedding three times."""
    family = family_of(config)
    for entry in entries(config, family):
        yield entry
        if entry.hf_name == "shared.weight" and family == "switch" and not config.tied_head:
            for key in ALIASES["shared.weight"]:
                yield dataclasses.replace(entry, hf_name=key)


def model_card(config: ModelConfig, dtype: str) -> str:
    """Return the model card: what the model is, how to load it, how transformers differs."""
    architecture = ARCHITECTURES[family_of(config)]
    differences = unsupported_features(config) + capacity_differences(config)
    notes = ""
    if differences:
        notes = "\n## In transformers\n\n" + "\n".join(f"- {line}" for line in differences) + "\n"
    loadable = not any("cannot load" in line for line in differences)
    with_transformers = ""
    if loadable:
        with_transformers = (
            f"\nor with transformers:\n\n```python\nfrom transformers import {architecture}\n\n"
            f'model = {architecture}.from_pretrained("DIR")\n```\n'
        )
    return _card(config, dtype) + with_transformers + notes


def quantised_card(config: ModelConfig, bits: int, what: str) -> str:
    """Return the card of a quantised model."""
    quantised = "all matrices" if what == "all" else "experts"
    return _card(config, f"{quantised} of {bits} bits") + (
        "\n## In transformers\n\n- transformers cannot load this model: the layout of its "
        "codes is that of switchlm.\n"
    )


def _card(config: ModelConfig, weights: str) -> str:
    experts = config.num_experts
    kind = f"sparse model with {experts} experts per Switch layer" if experts else "dense model"
    rows = {
        "parameters": f"{count.parameters(config):,}",
        "used by one token": f"{count.active_parameters(config):,}",
        "layers (encoder, decoder)": f"{config.num_encoder_layers}, {config.num_decoder_layers}",
        "d_model, d_ff": f"{config.d_model}, {config.d_ff}",
        "heads": f"{config.num_heads} of {config.d_kv}",
        "vocabulary": f"{config.vocabulary_size:,}",
        "routing": f"{config.router.mode}" if experts else "none",
        "weights": weights,
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    return (
        "---\nlibrary_name: switchlm\ntags: [switch-transformers, mixture-of-experts, t5]\n---\n\n"
        f"# A T5-style encoder-decoder\n\nA {kind}, {SIGNATURE}\n\n"
        f"| | |\n|---|---|\n{table}\n\n## Loading\n\n"
        '```python\nimport switchlm\n\nmodel, tokenizer = switchlm.load("DIR")\n```\n'
    )


def unsupported_features(config: ModelConfig) -> list[str]:
    """Return a sentence per feature that transformers computes differently or cannot load."""
    if not config.num_experts:
        return []
    router = config.router
    found = []
    if config.gated:
        found.append(
            "transformers has no gated feed-forward layers in Switch Transformers and "
            "cannot load this model."
        )
    if config.attention_experts:
        found.append("transformers has no Switch layers in attention and cannot load this model.")
    for stack in STACKS:
        if transformers_step(config, stack) is None:
            found.append(
                f"transformers has no schedule for the sparse layers of the {stack} and "
                "cannot load this model."
            )
    if router.experts_per_token > 1:
        found.append(
            f"transformers sends a token to one expert, this model to "
            f"{router.experts_per_token}, so outputs differ."
        )
    if router.selection == "expert_choice":
        found.append(
            "transformers has token choice only; the encoder of this model has expert choice, "
            "so outputs differ."
        )
    if router.balance == "bias":
        found.append("transformers ignores the routers' selection bias, so outputs differ.")
    return found


def capacity_differences(config: ModelConfig) -> list[str]:
    """Return what differs in training, or where tokens are dropped."""
    router = config.router
    if not config.num_experts or router.dropless or router.mode == "hf":
        return []
    return [
        "transformers has absolute capacities only: with this config.json it never drops a token. "
        f"Here the capacity factor is {router.capacity_factor} in training and "
        f"{router.evaluation_capacity_factor} in evaluation."
    ]
