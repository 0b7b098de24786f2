"""Write a model folder of the Hugging Face format: whole, or not at all.

All ranks write the weight files together, and none ever holds the whole model. Tensors are handled
one by one, in one order on all ranks: those that hold a part of a tensor send it to the rank that
writes the file, which keeps only what it is writing.
"""

import dataclasses
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
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
from switchlm.huggingface.config import family_of, write_config
from switchlm.huggingface.model_card import limits, model_card
from switchlm.huggingface.names import ALIASES, Entry, entries
from switchlm.huggingface.weights import SAFETENSORS
from switchlm.model.config import ModelConfig
from switchlm.model.quantised import quantised_modules
from switchlm.model.transformer import SwitchTransformer

if TYPE_CHECKING:
    from switchlm.data.text.tokenizer import Tokenizer

T = TypeVar("T")


@dataclass(frozen=True)
class Shard:
    """A weight file: its name, the keys in it, and the bytes of their tensors."""

    file: str
    keys: list[str]
    num_bytes: int


@torch.no_grad()
def write_shards(
    folder: Path, tensors: Mapping[str, Tensor], shards: list[list[Entry]], ranks: Ranks
) -> list[Shard]:
    """Write a file a shard into `folder`, each rank its own; return what they hold.

    tensors: of the model by our names, plain or DTensors. An error of one rank is raised on all.
    """
    layout = Planner(ranks).layout(tensors)
    # The format wants no gaps: with larger dtypes first all tensors are aligned.
    shards = [sorted(s, key=lambda entry: -tensors[entry.ours].element_size()) for s in shards]
    names = [shard_name(number, len(shards)) for number in range(len(shards))]
    problem: OSError | None = None
    for first in range(0, len(shards), ranks.size):
        now = shards[first : first + ranks.size]  # one a rank, written at the same time
        output = None
        if ranks.rank < len(now):
            head = _header(now[ranks.rank], tensors)
            output = _Output(folder / names[first + ranks.rank], head)
        for turn in zip_longest(*now):
            for writer, entry in enumerate(turn):
                if entry is None:
                    continue
                found = _fetch(tensors[entry.ours], entry, layout[entry.ours], writer, ranks)
                if output is not None and found is not None:
                    output.write(raw(found))
        if output is not None:
            output.close()
            problem = problem or output.problem

    def report() -> None:
        if problem is not None:
            raise problem

    ranks.on_all_ranks(report)
    return [
        Shard(file, [entry.theirs for entry in shard], sum(_size(e, tensors) for e in shard))
        for file, shard in zip(names, shards, strict=True)
    ]


class _Output:
    """A file that keeps its first error for later.

    The other ranks still wait to be rid of their parts, which must be taken whatever happens here.
    """

    def __init__(self, path: Path, head: bytes) -> None:
        self.problem: OSError | None = None
        self._stream: BinaryIO | None = None
        try:
            self._stream = path.open("wb")
        except OSError as error:
            self.problem = error
        self.write(head)

    def write(self, content: bytes | memoryview) -> None:
        """Append bytes, unless something went wrong before."""
        if self._stream is not None and self.problem is None:
            try:
                self._stream.write(content)
            except OSError as error:
                self.problem = error

    def close(self) -> None:
        """Sync and close."""
        if self._stream is not None:
            try:
                with self._stream:
                    self._stream.flush()
                    os.fsync(self._stream.fileno())
            except OSError as error:
                self.problem = self.problem or error


def shard_name(number: int, count: int, whole: str = SAFETENSORS) -> str:
    """Return the name of a weight file, of so many; `whole` is that of the only one."""
    if count == 1:
        return whole
    return f"{whole.removesuffix('.safetensors')}-{number + 1:05}-of-{count:05}.safetensors"


def _header(shard: list[Entry], tensors: Mapping[str, Tensor]) -> bytes:
    return header({entry.theirs: (tensors[entry.ours].dtype, entry.shape) for entry in shard}, {})


def _size(entry: Entry, tensors: Mapping[str, Tensor]) -> int:
    return math.prod(entry.shape) * tensors[entry.ours].element_size()


def _fetch(
    tensor: Tensor, entry: Entry, holders: list[StoredRegion], writer: int, ranks: Ranks
) -> Tensor | None:
    """Return their tensor on the rank that writes it; the others send what they hold of it."""
    wanted = full_region(tuple(tensor.shape))
    if entry.expert is not None:
        wanted = ((entry.expert, entry.expert + 1), *wanted[1:])
    target = None
    if ranks.rank == writer:
        target = torch.empty([stop - start for start, stop in wanted], dtype=tensor.dtype)
    for held in holders:
        common = overlap(held.box, wanted)
        if common is None:
            continue
        if ranks.rank == held.rank:
            part = part_of(tensor)[slices(common, region_of(tensor))]
            if target is not None:
                target[slices(common, wanted)].copy_(part)
            else:
                ranks.send(part.cpu().contiguous(), writer)
        elif target is not None:
            part = torch.empty([stop - start for start, stop in common], dtype=tensor.dtype)
            ranks.receive(part, held.rank)
            target[slices(common, wanted)].copy_(part)
    if target is None:
        return None
    return target if entry.expert is None else target[0].t().contiguous()


_OURS = (
    "config.json",
    "generation_config.json",
    "README.md",
    "model*.safetensors",
    "model.safetensors.index.json",
    "quantised*.safetensors",
    "quantised.safetensors.index.json",
    "tokenizer*.json",
    "special_tokens_map.json",
)


def write_model(
    model: SwitchTransformer,
    tokenizer: "Tokenizer | None",
    folder: Path,
    max_shard_bytes: int,
    report: Report,
    ranks: Ranks,
) -> None:
    """Write into a hidden folder beside `folder`, then rename; see huggingface.save."""
    folder = folder.absolute()
    tensors = model.state_dict()
    _check_names(model, tensors)
    partial = folder.parent / ranks.on_rank_zero(lambda: _begin(model.config, folder, report))
    try:
        shards = _shards(model.config, tensors, _shard_bytes(tensors, max_shard_bytes, ranks))
        written = write_shards(partial, tensors, shards, ranks)
        ranks.on_rank_zero(lambda: _finish(model, tokenizer, partial, folder, written))
    finally:
        if ranks.is_first:
            files.remove_folder(partial)


def _begin(config: ModelConfig, folder: Path, report: Report) -> str:
    """Make the hidden folder, and return its name."""
    _check_replaceable(folder)
    for limit in limits(config):
        report(limit)
    return files.hidden_folder(folder).name


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yield a hidden folder to write a model into; it takes its place if nothing goes wrong."""
    _check_replaceable(folder)
    with files.new_folder(folder) as partial:
        yield partial


def _finish(
    model: SwitchTransformer,
    tokenizer: "Tokenizer | None",
    partial: Path,
    folder: Path,
    written: list[Shard],
) -> None:
    """Add what is no weight, and put the folder in its place."""
    if len(written) > 1:
        index = index_of({shard.file: (shard.keys, shard.num_bytes) for shard in written})
        write_json(partial / f"{SAFETENSORS}.index.json", index)
    _write_texts(model, partial)
    if tokenizer is not None:
        tokenizer.save(partial)
    files.replace_folder(partial, folder)


def index_of(written: Mapping[str, tuple[list[str], int]]) -> dict[str, Any]:
    """Return the index of weight files: of each the keys in it, and the bytes of its tensors."""
    return {
        "metadata": {"total_size": sum(size for _, size in written.values())},
        "weight_map": {key: file for file, (keys, _) in written.items() for key in keys},
    }


def _check_replaceable(folder: Path) -> None:
    """Only a model folder is ever replaced, so that no other files of a user's get lost."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise CheckpointError(f"{str(folder)!r} is a file; a model needs a folder.")
    for path in folder.iterdir():
        if path.is_dir() or not any(path.match(pattern) for pattern in _OURS):
            raise CheckpointError(
                f"Will not replace {str(folder)!r} with a model: it holds {path.name!r}, which is "
                "no part of a saved model. Choose another folder, or empty this one."
            )


def _write_texts(model: SwitchTransformer, folder: Path) -> None:
    config = model.config
    dtype = str(model.embedding.weight.dtype).removeprefix("torch.")
    write_json(folder / "config.json", write_config(config, dtype))
    write_tokens(config, folder)
    (folder / "README.md").write_text(model_card(config, dtype), encoding="utf-8")


def write_tokens(config: ModelConfig, folder: Path) -> None:
    """Write generation_config.json: the tokens that begin, end and fill up outputs."""
    tokens = {
        "decoder_start_token_id": config.pad_id,
        "eos_token_id": config.end_id,
        "pad_token_id": config.pad_id,
    }
    write_json(folder / "generation_config.json", tokens)


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write a JSON file of the folder."""
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _check_names(model: SwitchTransformer, tensors: dict[str, Tensor]) -> None:
    if any(True for _ in quantised_modules(model)):
        raise CheckpointError(
            "The model is quantised: it has no floating-point weights to save. Copy its folder, or "
            "take the model that it was made from."
        )
    config = model.config
    expected = {entry.ours for entry in entries(config, family_of(config))}
    if expected != tensors.keys():
        name = min(expected ^ tensors.keys())
        raise CheckpointError(
            f"This model cannot be saved in the Hugging Face format: its tensors and its "
            f"configuration differ at {name!r}. Were its layers replaced?"
        )


def _shard_bytes(tensors: dict[str, Tensor], largest: int, ranks: Ranks) -> int:
    """Return how large shards are: no larger than asked for, and one a rank at least."""
    total = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    return largest if ranks.size == 1 else min(largest, math.ceil(total / ranks.size))


def _shards(
    config: ModelConfig, tensors: dict[str, Tensor], max_shard_bytes: int
) -> list[list[Entry]]:
    return share_out(_saved(config), lambda entry: _size(entry, tensors), max_shard_bytes)


def share_out(items: Iterable[T], num_bytes: Callable[[T], int], most: int) -> list[list[T]]:
    """Share items out among files of at most `most` bytes, in their order."""
    shards: list[list[T]] = [[]]
    size = 0
    for item in items:
        needed = num_bytes(item)
        if shards[-1] and size + needed > most:
            shards.append([])
            size = 0
        shards[-1].append(item)
        size += needed
    return shards


def _saved(config: ModelConfig) -> Iterator[Entry]:
    """Yield all entries; where the head is untied, transformers wants the embedding thrice."""
    family = family_of(config)
    for entry in entries(config, family):
        yield entry
        if entry.theirs == "shared.weight" and family == "switch" and not config.tied_head:
            for key in ALIASES["shared.weight"]:
                yield dataclasses.replace(entry, theirs=key)
