"""Folders of quantised models: what is in them, and how they are read.

Beside the fields of any model, config.json has a `quantization_config` of the method `switchlm`.
Tensors have our own names. A parameter that is quantised is stored as its codes, under its name,
and their scales, under its name with `.scale`: outputs before inputs, experts first.
docs/guides/compress.md has the layout in full.

Shapes: E experts, N outputs, K inputs, B blocks of 64 outputs, G groups of inputs.
"""

import math
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from switchlm.checkpoint.extents import Extent, find_extents
from switchlm.checkpoint.names import STACKS, Entry, Family, entries
from switchlm.checkpoint.read_config import read_config
from switchlm.checkpoint.survey import StackSurvey, Survey
from switchlm.checkpoint.weights import Description, Weights, open_weights
from switchlm.config import from_mapping
from switchlm.errors import CheckpointError, ConfigError
from switchlm.kernels import pages
from switchlm.kernels.quantised import BLOCK, GROUP_SIZES, Matrix, group_size_of, matrix
from switchlm.model.config import ModelConfig
from switchlm.model.quantised import put_in
from switchlm.model.transformer import SwitchTransformer

KEY = "quantization_config"
METHOD = "switchlm"
SCALE = ".scale"
_BLOCK_NAME = re.compile(r"(encoder|decoder)\.blocks\.([0-9]{1,9})\.(.+)", re.ASCII)


@dataclass(frozen=True, kw_only=True)
class Quantisation:
    """How weights are stored.

    bits: 8, with a scale an output; or 4, with a scale and an offset a group of inputs. group_size:
    of 4 bits, inputs a group; a matrix whose inputs it does not divide has the next smaller size.
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

    entry: for a stacked parameter, that of any expert. Raises ConfigError for widths that cannot be
    cut into groups.
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
    """Yield one entry a parameter: for stacked ones that of the first expert."""
    return (entry for entry in entries(config, family) if not entry.expert)


def read_quantised_config(
    folder: Path, values: Mapping[str, Any], quantisation: Quantisation
) -> tuple[ModelConfig, Family, Weights]:
    """Return configuration, family and weights of a quantised folder, all checked to fit.

    The work is bounded by the files, whatever config.json claims; nothing is allocated.
    """
    weights = open_weights(folder, codes=True)
    config, family = read_config(values, _survey(weights.tensors), lambda: True, _refuse)
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

    dtype: of what is not quantised; None keeps that of the files. experts: false leaves those on
    the meta device, see `expert_extents`.
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

    read: gives (key, tensor) of the keys asked for. dtype, experts: see load_quantised.
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
            owner, _, attribute = key.rpartition(".")
            module = model.get_submodule(owner)
            place = tensor.to(device, dtype or tensor.dtype, copy=True)
            is_parameter = isinstance(getattr(module, attribute), nn.Parameter)
            setattr(module, attribute, nn.Parameter(place) if is_parameter else place)
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
        return pages.empty(tensor.shape, tensor.dtype).copy_(tensor)
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


def _survey(tensors: Mapping[str, Description]) -> Survey:
    """Read off the names what survey.survey reads off those of the Hugging Face format."""
    layers: dict[str, set[int]] = {stack: set() for stack in STACKS}
    sparse: dict[str, set[int]] = {stack: set() for stack in STACKS}
    num_experts = 0
    gated, switched = None, False
    for key, description in tensors.items():
        place = _BLOCK_NAME.fullmatch(key)
        if place is None:
            continue
        stack, layer, rest = place[1], int(place[2]), place[3]
        layers[stack].add(layer)
        if rest.startswith("feedforward."):
            gated = bool(gated) or ".gate" in rest
        if ".experts." in rest:
            num_experts = max(num_experts, description.shape[0] if description.shape else 0)
            switched = switched or rest.startswith("attention.")
            if rest.startswith("feedforward."):
                sparse[stack].add(layer)
    stacks: dict[str, StackSurvey] = {}
    for stack in STACKS:
        if layers[stack] and max(layers[stack]) + 1 != len(layers[stack]):
            raise CheckpointError(f"The weights lack layers of the {stack}: they are incomplete.")
        dense = frozenset(layers[stack] - sparse[stack])
        stacks[stack] = StackSurvey(
            num_layers=len(layers[stack]), sparse=frozenset(sparse[stack]), dense=dense
        )
    return Survey(
        stacks=stacks,
        num_experts=num_experts,
        gated=gated,
        family=None,
        head_key="head.weight" if "head.weight" in tensors else None,
        attention_experts=switched,
    )
