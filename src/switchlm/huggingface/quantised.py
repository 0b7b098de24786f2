"""Read folders of quantised models, and write them one matrix at a time.

config.json has a `quantization_config` of the method `switchlm`. Tensors have the names of this
package. A quantised parameter is stored as codes, under its name, and scales, under NAME.scale:
experts first, then outputs, then inputs. docs/guides/compress.md describes the layout.

Shapes: E experts, N outputs, K inputs, B blocks of 64 outputs, G groups of inputs.
"""

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from switchlm.config import check_choices, from_mapping, to_mapping
from switchlm.errors import CheckpointError, ConfigError
from switchlm.huggingface.config import family_of, read_config, write_config
from switchlm.huggingface.match import infer_architecture, mismatch
from switchlm.huggingface.metadata import Metadata
from switchlm.huggingface.names import Entry, Family, entries
from switchlm.huggingface.save import (
    Contents,
    TensorFile,
    new_folder,
    quantised_card,
    shard_names,
    split_into_shards,
    write_index,
    write_metadata,
)
from switchlm.huggingface.weights import (
    QUANTISED,
    Description,
    TensorOffset,
    Weights,
    empty,
    find_tensor_offsets,
    open_weights,
    set_tensor,
)
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

    bits: 8, with a scale per output; or 4, with a scale and an offset per group of inputs.
    group_size: of 4 bits, inputs per group; a matrix whose inputs it does not divide has the next
        smaller size.
    what: `experts`, or `all`: also attention, dense feed-forward layers and the vocabulary.
    """

    bits: Literal[8, 4]
    group_size: int = 64
    what: Literal["experts", "all"] = "experts"
    quant_method: Literal["switchlm"] = "switchlm"

    def __post_init__(self) -> None:
        check_choices(self, "quantisation")
        if self.group_size not in GROUP_SIZES:
            raise ConfigError(
                f"The group size is {self.group_size}; it must be one of "
                f"{', '.join(map(str, sorted(GROUP_SIZES)))}."
            )

    def includes(self, entry: Entry) -> bool:
        """Return whether a parameter is quantised."""
        if entry.expert is not None:
            return True
        excluded = ".router." in entry.name or "relative_bias" in entry.name
        return self.what == "all" and len(entry.shape) == 2 and not excluded


@dataclass(frozen=True)
class Part:
    """A tensor in the files; dtype: None for any floating-point one."""

    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype | None


def read_quantisation(values: Mapping[str, Any]) -> Quantisation | None:
    """Return how the model of that config.json is quantised; None: it is not.

    Raises CheckpointError for another quantisation method, and for invalid values.
    """
    section = values.get(KEY)
    if section is None:
        return None
    method = section.get("quant_method") if isinstance(section, Mapping) else section
    if method != METHOD:
        raise CheckpointError(
            f"The model is quantised with the method {str(method)[:80]!r}, which is not "
            "supported. Use the original model, and quantise it with `switchlm compress`."
        )
    try:
        return from_mapping(Quantisation, section, f"config.json.{KEY}")
    except ConfigError as error:
        raise CheckpointError(f"Cannot use this config.json: {error}") from None


def parts(entry: Entry, num_experts: int, quantisation: Quantisation) -> list[Part]:
    """Return the tensors that a parameter is stored as.

    entry: for a stacked parameter, that of any expert.

    Raises ConfigError for a number of inputs that no group size divides.
    """
    stack = () if entry.expert is None else (num_experts,)
    if not quantisation.includes(entry):
        return [Part(entry.name, stack + entry.shape, None)]
    outputs, inputs = entry.shape
    if quantisation.bits == 8:
        return [
            Part(entry.name, (*stack, outputs, inputs), torch.int8),
            Part(entry.name + SCALE, (*stack, outputs), torch.float32),
        ]
    group_size = group_size_of(inputs, quantisation.group_size)
    if group_size is None:
        raise ConfigError(
            f"{entry.name} has {inputs} inputs, which 32, the smallest group of 4 bits, does not "
            "divide. Use 8 bits."
        )
    blocks = math.ceil(outputs / BLOCK)
    return [
        Part(entry.name, (*stack, blocks, inputs, BLOCK // 2), torch.uint8),
        Part(entry.name + SCALE, (*stack, inputs // group_size, blocks * BLOCK, 2), torch.bfloat16),
    ]


def first_entries(config: ModelConfig, family: Family) -> Iterator[Entry]:
    """Yield one entry per parameter: of stacked ones, that of the first expert."""
    return (entry for entry in entries(config, family) if not entry.expert)


def read_quantised_config(
    folder: Path, values: Mapping[str, Any], metadata: Metadata, quantisation: Quantisation
) -> tuple[ModelConfig, Family, Weights]:
    """Return configuration, family and weights of a quantised folder, checked to match.

    The work is bounded by the files, whatever config.json says; nothing is allocated.
    """
    weights = open_weights(folder, codes=True)
    found = infer_architecture(weights.tensors)
    config, family = read_config(values, found, lambda: True, _refuse, metadata.generation)
    expected: set[str] = set()
    for entry in first_entries(config, family):
        try:
            expected_parts = parts(entry, config.num_experts, quantisation)
        except ConfigError as error:
            raise CheckpointError(f"Cannot use this config.json: {error}") from None
        for part in expected_parts:
            _check(part, weights.tensors.get(part.key))
            expected.add(part.key)
    extra = weights.tensors.keys() - expected
    if extra:
        raise mismatch(f"unexpected {min(extra)[:200]!r}.")
    return config, family, weights


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
    """Return a quantised model, its weights as they are stored.

    read: yields (key, tensor) of the given keys.
    dtype: of parameters that are not quantised; None keeps that of the files.
    experts: false keeps experts on the meta device, see `expert_offsets`.
    """
    with torch.device("meta"):
        model = SwitchTransformer(config)
    by_name = {
        entry.name: entry
        for entry in first_entries(config, family)
        if experts or entry.expert is None
    }
    quantised = {name for name, entry in by_name.items() if quantisation.includes(entry)}
    scales = dict(read({name + SCALE for name in quantised}))
    matrices: dict[str, list[Matrix]] = {}
    for key, tensor in read(by_name.keys()):
        if key in quantised:
            matrices[key] = _matrices(by_name[key], tensor, scales.pop(key + SCALE), device)
        else:
            set_tensor(model, key, tensor.to(device, dtype or tensor.dtype, copy=True))
    put_in(model, matrices)
    return model.requires_grad_(False).eval()


def expert_offsets(
    config: ModelConfig, family: Family, quantisation: Quantisation, weights: Weights
) -> dict[str, list[TensorOffset]]:
    """Return the offset of each expert's codes and scales, by their keys in the files."""
    offsets = find_tensor_offsets(weights.tensors)
    return {
        part.key: [offsets[part.key].slice(expert) for expert in range(config.num_experts)]
        for entry in first_entries(config, family)
        if entry.expert is not None
        for part in parts(entry, config.num_experts, quantisation)
    }


def _matrices(
    entry: Entry, codes: Tensor, scale: Tensor, device: torch.device | str
) -> list[Matrix]:
    """Return the matrices of a parameter, one per expert, copied from the file."""
    outputs = entry.shape[0]
    codes, scale = (
        empty(tensor.shape, tensor.dtype, device).copy_(tensor) for tensor in (codes, scale)
    )
    if entry.expert is None:
        return [matrix(codes, scale, outputs)]
    return [matrix(*expert, outputs) for expert in zip(codes, scale, strict=True)]


def _refuse(message: str) -> None:
    raise mismatch(message)


def _check(part: Part, found: Description | None) -> None:
    if found is None:
        raise mismatch(f"missing {part.key[:200]!r}.")
    right_kind = found.dtype == part.dtype or (part.dtype is None and found.dtype.is_floating_point)
    if found.shape != part.shape or not right_kind:
        needed = "numbers" if part.dtype is None else str(part.dtype).removeprefix("torch.")
        raise mismatch(
            f"{part.key!r} has the shape {list(found.shape)} of "
            f"{str(found.dtype).removeprefix('torch.')}, but the configuration needs "
            f"{list(part.shape)} of {needed}."
        )


Source = Iterator[tuple[Entry, Tensor]]
Quantiser = Callable[[Entry, Tensor], tuple[Tensor, Tensor]]


def weights_of_model(model: SwitchTransformer) -> Source:
    """Yield every weight of a model in memory, [outputs, inputs], one expert at a time."""
    state = model.state_dict()
    for entry in entries(model.config, family_of(model.config)):
        tensor = state[entry.name].detach().cpu()
        yield entry, tensor if entry.expert is None else tensor[entry.expert].t()


@torch.no_grad()
def save_quantised(
    source: Source,
    config: ModelConfig,
    tokenizer: "Tokenizer | None",
    folder: Path,
    quantisation: Quantisation,
    quantise: Quantiser,
    max_shard_bytes: int = 5_000_000_000,
    metadata: Metadata | None = None,
) -> None:
    """Write the folder of a quantised model, in one step; an older model in it is replaced.

    source: all weights, in any order.
    quantise: returns codes and scales of one matrix, as they are stored. Other parameters are
        stored in float32.
    metadata: of the model that it is made from.

    Raises ConfigError for a number of inputs that no group size divides, CheckpointError for a
    folder with other files, OSError.
    """
    stored = [
        parts(entry, config.num_experts, quantisation)
        for entry in first_entries(config, family_of(config))
    ]
    shards = [
        _contents(chain.from_iterable(shard))
        for shard in split_into_shards(stored, _contents, max_shard_bytes)
    ]
    with new_folder(folder) as partial, ExitStack() as opened:
        files: list[TensorFile] = []
        file_of: dict[str, TensorFile] = {}
        for name, contents in zip(shard_names(len(shards), QUANTISED), shards, strict=True):
            stream = opened.enter_context((partial / name).open("wb"))
            files.append(TensorFile(stream, contents))
            file_of |= dict.fromkeys(contents, files[-1])
        write_index(partial, shards, QUANTISED)
        for entry, tensor in source:
            key = entry.name
            if quantisation.includes(entry):
                codes, scale = quantise(entry, tensor)
                file_of[key].write(key, codes, entry.expert)
                file_of[key + SCALE].write(key + SCALE, scale, entry.expert)
            else:
                file_of[key].write(key, tensor.float())
        for file in files:
            file.finish()
        values = write_config(config, "float32") | {KEY: to_mapping(quantisation)}
        card = quantised_card(config, quantisation.bits, quantisation.what)
        write_metadata(partial, config, metadata, values, card, tokenizer)


def _contents(stored: Iterable[Part]) -> Contents:
    return {part.key: (part.dtype or torch.float32, part.shape) for part in stored}
