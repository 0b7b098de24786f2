"""Save LoRA adapters in a separate folder, so that many tasks share one base model.

FOLDER/adapters.safetensors   the low-rank matrices by name (model/lora.py)
FOLDER/adapters.json          rank, alpha and the name of the base model
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import save

from switchlm.config import from_mapping
from switchlm.errors import CheckpointError, ConfigError
from switchlm.files import check_replaceable, new_folder
from switchlm.huggingface.weights import Weights, read_json
from switchlm.model import lora
from switchlm.model.transformer import SwitchTransformer

TENSORS, ABOUT = "adapters.safetensors", "adapters.json"
KIND = "set of adapters"  # in the manifest of its folder


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """rank, alpha: see lora.apply.
    base: the name or path of the base model.
    """

    rank: int
    alpha: float
    base: str = ""

    def __post_init__(self) -> None:
        if not (1 <= self.rank < 2**16 and self.alpha > 0):
            raise ConfigError(
                "Adapters have a rank of at least 1 and a positive alpha, got "
                f"{self.rank} and {self.alpha}."
            )


def save_adapters(model: SwitchTransformer, config: AdapterConfig, folder: Path) -> None:
    """Write the folder of a model's adapters, in one step; older adapters in it are replaced.

    Raises CheckpointError for a folder with other files.
    """
    check_adapters(folder)
    pairs = {name: pair.detach().cpu() for name, pair in lora.adapters(model).items()}
    with new_folder(folder, KIND) as partial:
        (partial / TENSORS).write_bytes(save(pairs, {"format": "pt"}))
        (partial / ABOUT).write_text(json.dumps(asdict(config), indent=2), encoding="utf-8")


def check_adapters(folder: Path) -> None:
    """Raise CheckpointError for a folder that holds anything but adapters that we wrote."""
    check_replaceable(folder, KIND, _is_earlier)


def _is_earlier(folder: Path) -> bool:
    """Return whether a folder without a manifest has the adapters of an earlier version."""
    return {path.name for path in folder.iterdir()} == {TENSORS, ABOUT}


@torch.no_grad()
def load_adapters(model: SwitchTransformer, folder: str | Path) -> AdapterConfig:
    """Add the saved adapters to their base model, in place; `lora.merged` merges them.

    Raises CheckpointError for missing or damaged files, and for adapters of a model of another
    shape; the model is then unchanged.
    """
    folder = Path(folder)
    if not (folder / ABOUT).is_file():
        if (folder / "adapter_config.json").is_file():
            raise CheckpointError(
                f"{str(folder)!r} holds an adapter of PEFT: load it with PEFT's PeftModel into the "
                "class of switchlm.transformers (one trained in the class of transformers after "
                "switchlm.transformers.convert_adapter), and merge it there."
            )
        raise CheckpointError(
            f"There are no adapters in {str(folder)!r}: {ABOUT} is missing. A fine-tuning run with "
            "adapters keeps them in RUN/adapters."
        )
    try:
        config = from_mapping(AdapterConfig, read_json(folder, ABOUT))
    except ConfigError as error:
        raise CheckpointError(f"{ABOUT} is damaged: {error}") from None
    weights = Weights(folder, {TENSORS: None})
    with torch.device("meta"):
        base = SwitchTransformer(model.config)
    lora.apply(base, config.rank, config.alpha)
    expected = {name: tuple(pair.shape) for name, pair in lora.adapters(base).items()}
    found = {name: described.shape for name, described in weights.tensors.items()}
    if found != expected:
        name, *_ = sorted({name for name, _ in found.items() ^ expected.items()})
        raise CheckpointError(
            f"The adapters in {str(folder)!r} are not for this model: {name[:200]!r} is "
            f"{found.get(name, 'missing')} there, {expected.get(name, 'missing')} here. They were "
            f"made for {config.base!r}."
        )
    lora.apply(model, config.rank, config.alpha)
    pairs = lora.adapters(model)
    for name, tensor in weights.read(pairs.keys()):
        pairs[name].copy_(tensor)
    return config
