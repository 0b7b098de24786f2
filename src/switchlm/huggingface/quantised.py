"""Folders of quantised models: how they are read, and written a matrix at a time.

Beside the fields of any model, config.json has a `quantization_config` of the method `switchlm`.
Tensors have our own names. A parameter that is quantised is stored as its codes, under its name,
and their scales, under its name with `.scale`: outputs before inputs, experts first.
docs/guides/compress.md has the layout in full. A folder is written whole, or not at all.

Shapes: E experts, N outputs, K inputs, B blocks of 64 outputs, G groups of inputs.
"""

import math
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal

import torch
from torch import Tensor

from switchlm.checkpoint.layout import header, raw
from switchlm.config import from_mapping, to_mapping
from switchlm.errors import CheckpointError, ConfigError
from switchlm.huggingface.config import family_of, read_config, write_config
from switchlm.huggingface.infer_config import infer_quantised
from switchlm.huggingface.match import match
from switchlm.huggingface.model_card import quantised_card
from switchlm.huggingface.names import Entry, Family, entries
from switchlm.huggingface.save import (
    index_of,
    new_folder,
    shard_name,
    share_out,
    write_json,
    write_tokens,
)
from switchlm.huggingface.weights import (
    QUANTISED,
    Description,
    Extent,
    Weights,
    find_extents,
    open_weights,
    put_tensor,
)
from switchlm.kernels.cpu import memory
from switchlm.kernels.cpu.quantised import BLOCK, GROUP_SIZES, Matrix, group_size_of, matrix
from switchlm.model.config import ModelConfig
from switchlm.model.quantised import put_in
from switchlm.model.transformer import SwitchTransformer

if TYPE_CHECKING:
    from switchlm.data.text.tokenizer import Tokenizer

KEY = "quantization_config"
METHOD = "switchlm"
SCALE = ".scale"


@dataclass(frozen=True, kw_only=True)
class Quantisation:
    """How weights are stored.

    bits: 8, with a scale an output; or 4, with a scale and an offset a group of inputs.
    group_size: of 4 bits, inputs per group; a matrix whose inputs it does not divide has the next
        smaller size.
    what: `experts`, or `all`: attention, dense feed-forward layers and the vocabulary too.
    """

    bits: Literal[8, 4]
    group_size: int = 64
    what: Literal["experts", "all"] = "experts"
    quant_method: Literal["switchlm"] = "switchlm"

    def __post_init__(self) -> None:
        if self.group_size not in GROUP_SIZES:
            raise ConfigError(
                f"The group size is {self.group_size}; it must be one of "
                f"{', '.join(map(str, sorted(GROUP_SIZES)))}."
            )

    def holds(self, entry: Entry) -> bool:
        """Whether that parameter is quantised."""
        if entry.expert is not None:
            return True
        kept = ".router." in entry.ours or "relative_bias" in entry.ours
        return self.what == "all" and len(entry.shape) == 2 and not kept


@dataclass(frozen=True)
class Part:
    """A tensor in the files: its key, shape and dtype, None for any floating one."""

    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype | None


def read_quantisation(values: Mapping[str, Any]) -> Quantisation | None:
    """Return how the model of that config.json is quantised; None if it is not.

    Raises CheckpointError for the method of another program, and for what makes no sense.
    """
    section = values.get(KEY)
    if section is None:
        return None
    method = section.get("quant_method") if isinstance(section, Mapping) else section
    if method != METHOD:
        raise CheckpointError(
            f"The model is quantised by {str(method)[:80]!r}, whose codes this package cannot "
            "read. Use the original model, and quantise it with `switchlm compress`."
        )
    try:
        return from_mapping(Quantisation, section, f"config.json.{KEY}")
    except ConfigError as error:
        raise CheckpointError(f"Cannot use this config.json: {error}") from None


def refuse_quantised(values: Mapping[str, Any], purpose: str) -> None:
    """Raise CheckpointError where config.json says that the model is quantised."""
    found = read_quantisation(values)
    if found is not None:
        raise CheckpointError(
            f"The model is quantised to {found.bits} bits, and {purpose} needs floating-point "
            "weights. Take the model that it was made from."
        )


def parts(entry: Entry, num_experts: int, quantisation: Quantisation) -> list[Part]:
    """Return how a parameter is stored.

    entry: for a stacked parameter, that of any expert.

    Raises ConfigError for widths that cannot be cut into groups.
    """
    stack = () if entry.expert is None else (num_experts,)
    if not quantisation.holds(entry):
        return [Part(entry.ours, stack + entry.shape, None)]
    outputs, inputs = entry.shape
    if quantisation.bits == 8:
        return [
            Part(entry.ours, (*stack, outputs, inputs), torch.int8),
            Part(entry.ours + SCALE, (*stack, outputs), torch.float32),
        ]
    group_size = group_size_of(inputs, quantisation.group_size)
    if group_size is None:
        raise ConfigError(
            f"{entry.ours} has {inputs} inputs, which 32, the smallest group of 4 bits, does not "
            "divide. Take 8 bits."
        )
    blocks = math.ceil(outputs / BLOCK)
    return [
        Part(entry.ours, (*stack, blocks, inputs, BLOCK // 2), torch.uint8),
        Part(entry.ours + SCALE, (*stack, inputs // group_size, blocks * BLOCK, 2), torch.bfloat16),
    ]


def first_entries(config: ModelConfig, family: Family) -> Iterator[Entry]:
    """Yield one entry per parameter: for stacked ones that of the first expert."""
    return (entry for entry in entries(config, family) if not entry.expert)


def read_quantised_config(
    folder: Path, values: Mapping[str, Any], quantisation: Quantisation
) -> tuple[ModelConfig, Family, Weights]:
    """Return configuration, family and weights of a quantised folder, all checked to fit.

    The work is bounded by the files, whatever config.json claims; nothing is allocated.
    """
    weights = open_weights(folder, codes=True)
    config, family = read_config(values, infer_quantised(weights.tensors), lambda: True, _refuse)
    expected: set[str] = set()
    for entry in first_entries(config, family):
        try:
            wanted = parts(entry, config.num_experts, quantisation)
        except ConfigError as error:
            raise CheckpointError(f"Cannot use this config.json: {error}") from None
        for part in wanted:
            _check(part, weights.tensors.get(part.key))
            expected.add(part.key)
    extra = weights.tensors.keys() - expected
    if extra:
        raise CheckpointError(
            f"The weights do not fit config.json: nothing there asks for {min(extra)[:200]!r}."
        )
    return config, family, weights


@torch.no_grad()
def load_quantised(
    folder: Path,
    values: Mapping[str, Any],
    quantisation: Quantisation,
    dtype: torch.dtype | None,
    device: torch.device,
    experts: bool = True,
) -> SwitchTransformer:
    """Return the model of a quantised folder; no quantised parameter is ever a float one.

    dtype: of what is not quantised; None keeps that of the files.
    experts: false leaves those on the meta device, see `expert_extents`.
    """
    config, family, weights = read_quantised_config(folder, values, quantisation)
    return assemble(config, family, quantisation, weights.read, dtype, device, experts)


@torch.no_grad()
def assemble(
    config: ModelConfig,
    family: Family,
    quantisation: Quantisation,
    read: Callable[[Collection[str]], Iterable[tuple[str, Tensor]]],
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    experts: bool = True,
) -> SwitchTransformer:
    """Return a quantised model of its tensors, as they are stored.

    read: gives (key, tensor) of the keys asked for.
    dtype, experts: see load_quantised.
    """
    with torch.device("meta"):
        model = SwitchTransformer(config)
    kinds = {
        entry.ours: entry
        for entry in first_entries(config, family)
        if experts or entry.expert is None
    }
    held = {name for name, entry in kinds.items() if quantisation.holds(entry)}
    scales = dict(read({name + SCALE for name in held}))
    matrices: dict[str, list[Matrix]] = {}
    for key, tensor in read(kinds.keys()):
        if key in held:
            matrices[key] = _matrices(kinds[key], tensor, scales.pop(key + SCALE), device)
        else:
            put_tensor(model, key, tensor.to(device, dtype or tensor.dtype, copy=True))
    put_in(model, matrices)
    return model.requires_grad_(False).eval()


def expert_extents(
    folder: Path, values: Mapping[str, Any], quantisation: Quantisation
) -> dict[str, list[Extent]]:
    """Return where each expert's codes and scales lie, by their keys in the files."""
    config, family, weights = read_quantised_config(folder, values, quantisation)
    extents = find_extents(weights.tensors)
    return {
        part.key: [extents[part.key].slice(expert) for expert in range(config.num_experts)]
        for entry in first_entries(config, family)
        if entry.expert is not None
        for part in parts(entry, config.num_experts, quantisation)
    }


def _matrices(
    entry: Entry, codes: Tensor, scale: Tensor, device: torch.device | str
) -> list[Matrix]:
    """Return the matrices of a parameter, one an expert, in memory of their own."""
    outputs = entry.shape[0]
    codes, scale = _copy(codes, device), _copy(scale, device)
    if entry.expert is None:
        return [matrix(codes, scale, outputs)]
    return [matrix(one, its_scale, outputs) for one, its_scale in zip(codes, scale, strict=True)]


def _copy(tensor: Tensor, device: torch.device | str) -> Tensor:
    """Return the same numbers in memory of their own, as they stand in a mapped file."""
    if torch.device(device).type == "cpu":
        return memory.empty_on_large_pages(tensor.shape, tensor.dtype).copy_(tensor)
    return tensor.to(device, copy=True)


def _refuse(message: str) -> None:
    raise CheckpointError(f"The weights do not fit config.json: {message}")


def _check(part: Part, found: Description | None) -> None:
    if found is None:
        raise CheckpointError(f"The weights do not fit config.json: missing {part.key[:200]!r}.")
    right_kind = found.dtype == part.dtype or (part.dtype is None and found.dtype.is_floating_point)
    if found.shape != part.shape or not right_kind:
        asked = "numbers" if part.dtype is None else str(part.dtype).removeprefix("torch.")
        raise CheckpointError(
            f"The weights do not fit config.json: {part.key!r} has the shape {list(found.shape)} "
            f"of {str(found.dtype).removeprefix('torch.')}, but the configuration asks for "
            f"{list(part.shape)} of {asked}."
        )


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

    source: all weights, in any order.
    quantise: gives codes and scales of one matrix as they are stored. What is not quantised is
        stored in float32. A model in the folder's place is replaced.

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
    shards = share_out(stored.values(), lambda both: sum(map(_bytes, both)), max_shard_bytes)
    return [list(chain.from_iterable(shard)) for shard in shards]
