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
"""What a weight file holds: the dtype and the shape of every tensor by its key."""


class TensorFile:
    """A safetensors file; its header is written at once, tensors go to their places in any order.

    stream: the file, which whoever opened it closes.
    """

    def __init__(self, stream: BinaryIO, contents: Contents) -> None:
        # The format wants no gaps: with larger dtypes first all tensors are aligned.
        ordered = dict(sorted(contents.items(), key=lambda item: -item[1][0].itemsize))
        head = header(ordered, {})
        stream.write(head)
        self._stream, self._contents = stream, ordered
        self._starts: dict[str, int] = {}
        self._left = {key: _num_bytes(*ordered[key]) for key in ordered}
        start = len(head)
        for key, size in self._left.items():
            self._starts[key] = start
            start += size

    def write(self, key: str, tensor: Tensor, expert: int | None = None) -> None:
        """Write a tensor, or one expert's of it."""
        dtype, shape = self._contents[key]
        shape = shape if expert is None else shape[1:]
        assert tuple(tensor.shape) == shape, (key, tensor.shape, shape)
        tensor = tensor.to(dtype).contiguous()
        self._stream.seek(self._starts[key] + (expert or 0) * tensor.nbytes)
        self._stream.write(raw(tensor))
        self._left[key] -= tensor.nbytes

    def finish(self) -> None:
        """Sync the file. Raises CheckpointError where not every byte has been written."""
        missing = [key for key, left in self._left.items() if left]
        if missing:
            raise CheckpointError(f"The weights of the model are incomplete: {missing[0]!r}.")
        self._stream.flush()
        os.fsync(self._stream.fileno())


def _num_bytes(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    return math.prod(shape) * dtype.itemsize


def shard_names(number: int, whole: str) -> list[str]:
    """Return the names of so many weight files; `whole` is that of the only one."""
    if number == 1:
        return [whole]
    stem = whole.removesuffix(".safetensors")
    return [f"{stem}-{place:05}-of-{number:05}.safetensors" for place in range(1, number + 1)]


def write_index(folder: Path, shards: list[Contents], whole: str) -> None:
    """Write which file each tensor is in, and the bytes of all; a single file needs no index."""
    if len(shards) == 1:
        return
    names = shard_names(len(shards), whole)
    size = sum(_num_bytes(*described) for shard in shards for described in shard.values())
    weight_map = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    _write_json(folder / f"{whole}.index.json", index)


def share_out(items: Iterable[T], contents: Callable[[T], Contents], most: int) -> list[list[T]]:
    """Share items out among files of at most `most` bytes, in their order.

    contents: gives the tensors of an item, which stay together.
    """
    shards: list[list[T]] = [[]]
    size = 0
    for item in items:
        needed = sum(_num_bytes(*described) for described in contents(item).values())
        if shards[-1] and size + needed > most:
            shards.append([])
            size = 0
        shards[-1].append(item)
        size += needed
    return shards


@torch.no_grad()
def write_shards(
    folder: Path, tensors: Mapping[str, Tensor], shards: list[list[Entry]], ranks: Ranks
) -> list[Contents]:
    """Write a file a shard into `folder`, each rank its own; return what they hold.

    tensors: of the model by our names, plain or DTensors. An error of one rank is raised on all.
    """
    layout = Planner(ranks).layout(tensors)
    names = shard_names(len(shards), SAFETENSORS)
    contents = [_contents(shard, tensors) for shard in shards]
    problems: list[OSError] = []

    @contextmanager
    def kept() -> Iterator[None]:
        """Keep an error for later: the other ranks must be rid of their parts whatever happens."""
        try:
            yield
        except OSError as error:
            problems.append(error)

    for first in range(0, len(shards), ranks.size):
        now = shards[first : first + ranks.size]  # one a rank, written at the same time
        with kept(), ExitStack() as opened:
            output = None
            if ranks.rank < len(now):
                own = first + ranks.rank
                with kept():
                    stream = opened.enter_context((folder / names[own]).open("wb"))
                    output = TensorFile(stream, contents[own])
            for turn in zip_longest(*now):
                for writer, entry in enumerate(turn):
                    if entry is None:
                        continue
                    found = _fetch(tensors[entry.ours], entry, layout[entry.ours], writer, ranks)
                    if output is not None and found is not None and not problems:
                        with kept():
                            output.write(entry.theirs, found)
            if output is not None and not problems:
                output.finish()

    def report() -> None:
        if problems:
            raise problems[0]

    ranks.on_all_ranks(report)
    return contents


def _contents(shard: Iterable[Entry], tensors: Mapping[str, Tensor]) -> Contents:
    return {entry.theirs: (tensors[entry.ours].dtype, entry.shape) for entry in shard}


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
        common = overlap(held.region, wanted)
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
    config, tensors = model.config, model.state_dict()
    _check_names(model, tensors)

    def begin() -> str:
        _check_replaceable(folder)
        for limit in limits(config):
            report(limit)
        return files.hidden_folder(folder).name

    def finish() -> None:
        write_index(partial, written, SAFETENSORS)
        dtype = str(model.embedding.weight.dtype).removeprefix("torch.")
        card = model_card(config, dtype)
        write_texts(partial, config, write_config(config, dtype), card, tokenizer)
        files.replace_folder(partial, folder)

    most = max_shard_bytes
    if ranks.size > 1:  # each has one to write
        most = min(most, math.ceil(sum(tensor.nbytes for tensor in tensors.values()) / ranks.size))
    partial = folder.parent / ranks.on_rank_zero(begin)
    try:
        shards = share_out(_saved(config), lambda entry: _contents([entry], tensors), most)
        written = write_shards(partial, tensors, shards, ranks)
        ranks.on_rank_zero(finish)
    finally:
        if ranks.is_first:
            files.remove_folder(partial)


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yield a hidden folder to write a model into; it takes its place if nothing goes wrong."""
    _check_replaceable(folder)
    with files.new_folder(folder) as partial:
        yield partial


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


def write_texts(
    folder: Path,
    config: ModelConfig,
    values: dict[str, Any],
    card: str,
    tokenizer: "Tokenizer | None",
) -> None:
    """Write all of a model folder but its weights.

    values: of config.json.
    card: the text of README.md.
    """
    _write_json(folder / "config.json", values)
    tokens = {
        "decoder_start_token_id": config.pad_id,
        "eos_token_id": config.end_id,
        "pad_token_id": config.pad_id,
    }
    _write_json(folder / "generation_config.json", tokens)
    (folder / "README.md").write_text(card, encoding="utf-8")
    if tokenizer is not None:
        tokenizer.save(folder)


def _write_json(path: Path, values: dict[str, Any]) -> None:
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


def _saved(config: ModelConfig) -> Iterator[Entry]:
    """Yield all entries; where the head is untied, transformers wants the embedding thrice."""
    family = family_of(config)
    for entry in entries(config, family):
        yield entry
        if entry.theirs == "shared.weight" and family == "switch" and not config.tied_head:
            for key in ALIASES["shared.weight"]:
                yield dataclasses.replace(entry, theirs=key)


def model_card(config: ModelConfig, dtype: str) -> str:
    """Return Markdown: what the model is, how to load it, what transformers does differently."""
    architecture = ARCHITECTURES[family_of(config)]
    differences = limits(config) + remarks(config)
    notes = ""
    if differences:
        notes = "\n## In transformers\n\n" + "\n".join(f"- {line}" for line in differences) + "\n"
    loadable = not any("cannot load" in line for line in differences)
    theirs = ""
    if loadable:
        theirs = (
            f"\nor with transformers:\n\n```python\nfrom transformers import {architecture}\n\n"
            f'model = {architecture}.from_pretrained("DIR")\n```\n'
        )
    return _card(config, dtype) + theirs + notes


def quantised_card(config: ModelConfig, bits: int, what: str) -> str:
    """Return the card of a model whose weights are codes of so many bits."""
    held = "all matrices" if what == "all" else "experts"
    return _card(config, f"{held} of {bits} bits") + (
        "\n## In transformers\n\n- transformers cannot load this model: only switchlm knows the "
        "layout of its codes.\n"
    )


def _card(config: ModelConfig, weights: str) -> str:
    experts = config.num_experts
    kind = f"sparse model with {experts} experts a Switch layer" if experts else "dense model"
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
        f"# A T5-style encoder-decoder\n\nA {kind}, written by switchlm.\n\n"
        f"| | |\n|---|---|\n{table}\n\n## Loading\n\n"
        '```python\nimport switchlm\n\nmodel, tokenizer = switchlm.load("DIR")\n```\n'
    )


def limits(config: ModelConfig) -> list[str]:
    """Return a sentence for everything that transformers does differently, or cannot load."""
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
            f"transformers sends a token to one expert; here it goes to "
            f"{router.experts_per_token}, so outputs differ."
        )
    if router.selection == "expert_choice":
        found.append(
            "transformers lets tokens choose experts; here the encoder's experts choose "
            "tokens, so outputs differ."
        )
    if router.balance == "bias":
        found.append("transformers ignores the routers' selection bias, so outputs differ.")
    return found


def remarks(config: ModelConfig) -> list[str]:
    """Return what differs only in training or where capacity binds."""
    router = config.router
    if not config.num_experts or router.dropless or router.mode == "hf":
        return []
    return [
        "transformers knows absolute capacities only: config.json tells it never to drop a token. "
        f"Here the capacity factor is {router.capacity_factor} in training and "
        f"{router.evaluation_capacity_factor} in evaluation."
    ]
