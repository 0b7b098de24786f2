"""Write the folder of a quantised model, a matrix at a time: whole, or not at all."""

import math
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import torch
from torch import Tensor

from switchlm.checkpoint.card import quantised_card
from switchlm.checkpoint.matching import match
from switchlm.checkpoint.names import Entry, Family, entries
from switchlm.checkpoint.quantised import KEY, SCALE, Part, Quantisation, first_entries, parts
from switchlm.checkpoint.saving import index_of, new_folder, write_json, write_tokens
from switchlm.checkpoint.shards import shard_name
from switchlm.checkpoint.tensors import header, raw
from switchlm.checkpoint.weights import QUANTISED, Weights
from switchlm.checkpoint.write_config import family_of, write_config
from switchlm.config import to_mapping
from switchlm.errors import CheckpointError
from switchlm.model.config import ModelConfig
from switchlm.model.transformer import SwitchTransformer

if TYPE_CHECKING:
    from switchlm.data.tokenizer import Tokenizer

Source = Iterator[tuple[Entry, Tensor]]
Quantiser = Callable[[Entry, Tensor], tuple[Tensor, Tensor]]


def weights_of_model(model: SwitchTransformer) -> Source:
    """Yield every weight of a model in memory, [outputs, inputs], an expert at a time."""
    state = model.state_dict()
    for entry in entries(model.config, family_of(model.config)):
        tensor = state[entry.ours].detach().cpu()
        yield entry, tensor if entry.expert is None else tensor[entry.expert].t()


def weights_of_files(config: ModelConfig, family: Family, weights: Weights) -> Source:
    """Yield every weight of a model folder, [outputs, inputs]; one is in memory at a time."""
    matched = match(config, family, weights, lambda _message: None)
    wanted: dict[str, list[Entry]] = {}
    for entry in matched.entries:
        wanted.setdefault(matched.sources[entry.theirs], []).append(entry)
    for key, tensor in weights.read(wanted.keys()):
        for entry in wanted[key]:
            yield entry, tensor


@torch.no_grad()
def save_quantised(
    source: Source,
    config: ModelConfig,
    tokenizer: "Tokenizer | None",
    folder: Path,
    quantisation: Quantisation,
    quantise: Quantiser,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Write a folder that `load` reads as the quantised model.

    source: all weights, in any order. quantise: gives codes and scales of one matrix as they are
    stored. What is not quantised is stored in float32. A model in the folder's place is replaced.
    Raises ConfigError for widths that cannot be cut into groups, CheckpointError for a folder that
    holds other things, OSError.
    """
    kinds = {entry.ours: entry for entry in first_entries(config, family_of(config))}
    stored = {name: parts(kind, config.num_experts, quantisation) for name, kind in kinds.items()}
    with new_folder(folder) as partial, ExitStack() as opened:
        files = _Files(partial, _share(stored, max_shard_bytes), opened)
        for entry, tensor in source:
            if quantisation.holds(entry):
                codes, scale = quantise(entry, tensor)
                files.write(entry.ours, entry.expert, codes)
                files.write(entry.ours + SCALE, entry.expert, scale)
            else:
                files.write(entry.ours, None, tensor.float())
        files.finish()
        values = write_config(config, "float32") | {KEY: to_mapping(quantisation)}
        write_json(partial / "config.json", values)
        write_tokens(config, partial)
        card = quantised_card(config, quantisation.bits, quantisation.what)
        (partial / "README.md").write_text(card, encoding="utf-8")
        if tokenizer is not None:
            tokenizer.save(partial)


@dataclass(frozen=True)
class _Place:
    stream: BinaryIO
    start: int
    shape: tuple[int, ...]
    dtype: torch.dtype


class _Files:
    """The weight files, their headers written; tensors go to their places in any order."""

    def __init__(self, folder: Path, shards: list[list[Part]], opened: ExitStack) -> None:
        self._places: dict[str, _Place] = {}
        self._left: dict[str, int] = {}
        self._streams: list[BinaryIO] = []
        names = [shard_name(number, len(shards), QUANTISED) for number in range(len(shards))]
        for name, shard in zip(names, shards, strict=True):
            stream = opened.enter_context((folder / name).open("wb"))
            self._streams.append(stream)
            # The format wants no gaps: with larger dtypes first all tensors are aligned.
            ordered = sorted(shard, key=lambda part: -_dtype(part).itemsize)
            head = header({part.key: (_dtype(part), part.shape) for part in ordered}, {})
            stream.write(head)
            start = len(head)
            for part in ordered:
                self._places[part.key] = _Place(stream, start, part.shape, _dtype(part))
                self._left[part.key] = _bytes(part)
                start += _bytes(part)
        if len(shards) > 1:
            held = {
                name: ([part.key for part in shard], sum(map(_bytes, shard)))
                for name, shard in zip(names, shards, strict=True)
            }
            write_json(folder / f"{QUANTISED}.index.json", index_of(held))

    def write(self, key: str, expert: int | None, tensor: Tensor) -> None:
        """Write a tensor, or one expert's of it."""
        place = self._places[key]
        shape = place.shape if expert is None else place.shape[1:]
        assert tuple(tensor.shape) == shape, (key, tensor.shape, shape)
        tensor = tensor.to(place.dtype).contiguous()
        place.stream.seek(place.start + (expert or 0) * tensor.nbytes)
        place.stream.write(raw(tensor))
        self._left[key] -= tensor.nbytes

    def finish(self) -> None:
        """Flush; every byte must have been written."""
        missing = [key for key, left in self._left.items() if left]
        if missing:
            raise CheckpointError(f"The weights of the model are incomplete: {missing[0]!r}.")
        for stream in self._streams:
            stream.flush()
            os.fsync(stream.fileno())


def _dtype(part: Part) -> torch.dtype:
    return part.dtype or torch.float32


def _bytes(part: Part) -> int:
    return math.prod(part.shape) * _dtype(part).itemsize


def _share(stored: dict[str, list[Part]], max_shard_bytes: int) -> list[list[Part]]:
    """Share the parts out among files, a parameter's codes and scales in the same one."""
    shards: list[list[Part]] = [[]]
    size = 0
    for both in stored.values():
        needed = sum(map(_bytes, both))
        if shards[-1] and size + needed > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1] += both
        size += needed
    return shards
