"""Write folders of models with random weights, in the layout and shards of trained ones.

Tensors are written one by one from one block of random numbers, so that the disk is the limit for a
model much larger than memory. Every tensor is another piece of the block, scaled so that
activations neither vanish nor explode.
"""

import json
import math
from collections.abc import Iterator
from pathlib import Path

import torch

from switchlm.huggingface.config import write_config
from switchlm.huggingface.names import Entry, entries
from switchlm.huggingface.quantised import Quantisation, save_quantised
from switchlm.model.config import ModelConfig

BLOCK = 2**26 + 1  # numbers
SHARD_BYTES = 5_000_000_000
Shard = list[tuple[Entry, int]]


class Numbers:
    """Pieces of a block of random numbers."""

    def __init__(self, seed: int, largest: int, dtype: torch.dtype = torch.bfloat16) -> None:
        generator = torch.Generator().manual_seed(seed)
        self._block = torch.randn(BLOCK + largest, generator=generator).to(dtype)
        self._start = 0

    def tensor(self, entry: Entry) -> torch.Tensor:
        """Return the weights of an entry: norms of ones, matrices that preserve the scale."""
        if len(entry.shape) == 1:
            return torch.ones(entry.shape, dtype=self._block.dtype)
        size = math.prod(entry.shape)
        self._start = (self._start + 15_485_863) % BLOCK
        piece = self._block[self._start : self._start + size].view(entry.shape)
        scale = 1.0 if entry.name == "embedding.weight" else entry.shape[1] ** -0.5
        return piece * scale


def write_floats(config: ModelConfig, folder: Path, seed: int = 0) -> int:
    """Write a model in bfloat16 in the Hugging Face format; return the bytes."""
    folder.mkdir(parents=True)
    numbers = Numbers(seed, _largest(config))
    shards: list[Shard] = [[]]
    room = SHARD_BYTES
    for entry in entries(config, "switch"):
        size = 2 * math.prod(entry.shape)
        if size > room and shards[-1]:
            shards.append([])
            room = SHARD_BYTES
        shards[-1].append((entry, size))
        room -= size
    places, total = {}, 0
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        _write_shard(folder / name, shard, numbers)
        places |= {entry.hf_name: name for entry, _ in shard}
        total += sum(size for _, size in shard)
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(write_config(config, "bfloat16")))
    return total


def write_int4(config: ModelConfig, folder: Path, seed: int = 0) -> int:
    """Write a model whose experts have 4 bits, as random codes; return the bytes."""
    numbers = Numbers(seed, _largest(config))
    quantisation = Quantisation(bits=4)
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 256, (BLOCK,), dtype=torch.uint8, generator=generator)
    start = 0

    def source() -> Iterator[tuple[Entry, torch.Tensor]]:
        for entry in entries(config, "switch"):
            yield entry, numbers.tensor(entry) if entry.expert is None else torch.empty(0)

    def quantise(entry: Entry, _: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        nonlocal start
        outputs, inputs = entry.shape
        blocks = math.ceil(outputs / 64)
        size = blocks * inputs * 32
        start = (start + 15_485_863) % (BLOCK - size)
        scale_GN2 = torch.zeros(inputs // group_size(inputs), blocks * 64, 2, dtype=torch.bfloat16)
        scale_GN2[..., 0] = inputs**-0.5 / 4.6  # codes are uniform: their deviation is 4.6
        return codes[start : start + size].view(blocks, inputs, 32), scale_GN2

    save_quantised(source(), config, None, folder, quantisation, quantise)
    return sum(file.stat().st_size for file in folder.iterdir())


def group_size(inputs: int) -> int:
    """Return the group size for a number of inputs, with the default of 64."""
    return next(size for size in (64, 32) if inputs % size == 0)


def _largest(config: ModelConfig) -> int:
    return max(math.prod(entry.shape) for entry in entries(config, "switch") if not entry.expert)


def _write_shard(path: Path, shard: Shard, numbers: Numbers) -> None:
    header, start = {}, 0
    for entry, size in shard:
        offsets = [start, start + size]
        header[entry.hf_name] = {
            "dtype": "BF16",
            "shape": list(entry.shape),
            "data_offsets": offsets,
        }
        start += size
    text = json.dumps({"__metadata__": {"format": "pt"}} | header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for entry, _ in shard:
            file.write(numbers.tensor(entry).view(torch.uint8).numpy())
