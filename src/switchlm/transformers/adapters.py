"""LoRA adapters that PEFT trained on the classes of transformers, for our class.

from switchlm.transformers import convert_adapter
convert_adapter("adapter", "ours", model.model.config)
adapted = peft.PeftModel.from_pretrained(model, "ours")
"""

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save

from switchlm.errors import CheckpointError
from switchlm.files import make_folder, replace_file
from switchlm.huggingface.config import family_of
from switchlm.huggingface.names import entries
from switchlm.huggingface.weights import read_json
from switchlm.model.config import ModelConfig

ABOUT, TENSORS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
# Settings that name modules in ways of their own.
UNSUPPORTED = ("modules_to_save", "rank_pattern", "alpha_pattern", "target_parameters")


def convert_adapter(folder: str | Path, out: str | Path, config: ModelConfig) -> None:
    """Write an adapter of the class of transformers for the class here, with our names.

    folder, out: as PEFT's save_pretrained writes them.
    config: of the model that it is for, `model.model.config`.

    Raises CheckpointError for another kind of adapter, and for one on a matrix that is no
    nn.Linear here, as those of experts, which are stacked.
    """
    folder, out = Path(folder), Path(out)
    if not (folder / ABOUT).is_file() or not (folder / TENSORS).is_file():
        raise CheckpointError(
            f"There is no adapter of PEFT in {str(folder)!r}: it has {ABOUT} and {TENSORS}."
        )
    about: dict[str, Any] = read_json(folder, ABOUT)
    used = [name for name in UNSUPPORTED if about.get(name)]
    if about.get("peft_type") != "LORA" or used:
        what = f"with {used[0]}" if used else f"of type {about.get('peft_type')!r}"
        raise CheckpointError(f"An adapter {what} cannot be converted: only plain LoRA can.")
    names = {
        entry.hf_name.removesuffix(".weight"): None if entry.expert is not None else entry.name
        for entry in entries(config, family_of(config))
    }
    tensors, modules = {}, set()
    for key, tensor in load_file(folder / TENSORS).items():
        module, separator, rest = key.removeprefix(PREFIX).partition(".lora_")
        if not separator or module not in names:
            raise CheckpointError(
                f"{key[:200]!r} in {TENSORS} is of no matrix of this model: the adapter is for "
                "another one, or has our names already."
            )
        name = names[module]
        if name is None:
            raise CheckpointError(
                f"The adapter changes {module!r}, but experts are stacked here: merge it into the "
                "model in transformers (merge_and_unload), and load the merged folder."
            )
        module = f"model.{name.removesuffix('.weight')}"
        modules.add(module)
        tensors[f"{PREFIX}{module}.lora_{rest}"] = tensor
    about |= {
        "target_modules": sorted(modules),
        "layers_to_transform": None,
        "layers_pattern": None,
        "exclude_modules": None,
    }
    make_folder(out)
    replace_file(out / TENSORS, save(tensors, {"format": "pt"}))
    replace_file(out / ABOUT, json.dumps(about, indent=2).encode())
