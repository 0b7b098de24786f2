"""What from_pretrained and save_pretrained of transformers accept, and tensors of saved folders.

Each option works, or is refused in one sentence.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from switchlm._torch import IncompatibleKeys
from switchlm.errors import CheckpointError, ConfigError, nearest
from switchlm.huggingface.config import EXTRA_KEY, family_of
from switchlm.huggingface.names import ALIASES, entries
from switchlm.model.transformer import SwitchTransformer
from switchlm.parallel.mesh import default_device

# Options whose effect is that of this class anyway, with the values that are accepted.
LOADING: dict[str, tuple[Any, ...]] = {
    "low_cpu_mem_usage": (True, False),  # tensors are always read one by one
    "use_safetensors": (True,),
    "weights_only": (True,),
    "trust_remote_code": (True, False),  # nothing is ever run
}
SAVING: dict[str, tuple[Any, ...]] = {
    "safe_serialization": (True,),
    "save_original_format": (True, False),
    "save_peft_format": (True, False),
    "save_function": (torch.save,),  # never called
}
# Fields of a configuration that do not describe the weights and may be set when loading.
RUNTIME = (
    "use_cache",
    "return_dict",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
)
ATTENTION = ("eager", "sdpa")
ONE_DEVICE = ("auto", "balanced", "balanced_low_0", "sequential")


def refuse_options(
    options: Mapping[str, Any], what: str, harmless: Mapping[str, tuple[Any, ...]] | None = None
) -> None:
    """Raise ConfigError for options that are not supported.

    harmless: values that are accepted.
    """
    for name, value in options.items():
        if any(value is accepted for accepted in (harmless or {}).get(name, ())):
            continue
        if value is not None and value is not False:
            raise ConfigError(
                f"{what} does not support {name}={str(value)[:80]!r} here; leave it out."
            )


def dtype_of(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """Return the dtype of a name such as `bfloat16`; None for `auto`."""
    if not isinstance(dtype, str):
        return dtype
    if dtype == "auto":
        return None
    named = getattr(torch, dtype.removeprefix("torch."), None)
    if not isinstance(named, torch.dtype):
        raise ConfigError(f"There is no dtype {dtype!r}; bfloat16 is one, for example.")
    return named


def device_of(device_map: Any) -> torch.device:
    """Return the one device of a device_map; the CPU for None."""
    if isinstance(device_map, Mapping):
        devices = {str(device) for device in device_map.values()}
        if len(devices) != 1:
            raise ConfigError(
                f"A device_map here names one device, got {', '.join(sorted(devices)) or 'none'}: "
                "models are spread by torchrun -m switchlm with the settings of mesh."
            )
        (device_map,) = device_map.values()
    if device_map is None:
        return torch.device("cpu")
    if device_map in ONE_DEVICE:
        return torch.device(default_device())
    try:
        device = torch.device(device_map)
        torch.empty(0, device=device)
    except (RuntimeError, TypeError, AssertionError):
        raise ConfigError(
            f"There is no device {device_map!r} here; `cpu`, `cuda` and `auto` are usual."
        ) from None
    if device.type in ("meta", "disk"):
        raise ConfigError(f"A model cannot be loaded on the device {device_map!r}.")
    return device


def check_attention(implementation: str | None) -> None:
    """Raise ConfigError for an attention that is not computed here."""
    if implementation is not None and implementation not in ATTENTION:
        raise ConfigError(
            f"There is no attn_implementation={str(implementation)[:80]!r} here, with its relative "
            f"position bias.{nearest(str(implementation), ATTENTION)}"
        )


def check_config(given: Any, own: PreTrainedConfig) -> None:
    """Raise ConfigError for a configuration of another model than the saved one.

    Only fields of the saved config.json that shape the computation are compared.
    """
    if not isinstance(given, PreTrainedConfig):
        raise ConfigError(
            f"config is a configuration of transformers, got {type(given).__name__}: the saved one "
            "is read if it is left out."
        )
    skipped = {*RUNTIME, EXTRA_KEY, "dtype", "architectures", "transformers_version"}
    for name, value in own.to_dict().items():
        if name in skipped or name.startswith("_") or not hasattr(given, name):
            continue
        other = getattr(given, name)
        if other != value:
            raise ConfigError(
                f"config.{name} is {other!r}, but the saved model has {value!r}: only "
                f"{', '.join(RUNTIME)} may differ."
            )


@torch.no_grad()
def load_saved(model: SwitchTransformer, tensors: Mapping[str, Tensor], strict: bool) -> Any:
    """Copy tensors with the names of a saved folder; return missing and unexpected names.

    Raises CheckpointError for a tensor of another shape and, if strict, for these names.
    """
    places = model.state_dict()
    missing: list[str] = []
    known = {alias for names in ALIASES.values() for alias in names}
    for entry in entries(model.config, family_of(model.config)):
        known.add(entry.hf_name)
        if entry.hf_name not in tensors:
            missing.append(entry.hf_name)
            continue
        tensor = tensors[entry.hf_name]
        place = places[entry.name] if entry.expert is None else places[entry.name][entry.expert].t()
        if place.shape != tensor.shape:
            raise CheckpointError(
                f"{entry.hf_name} is {list(tensor.shape)} there and {list(place.shape)} here: the "
                "weights are those of another model."
            )
        place.copy_(tensor)
    unexpected = sorted(set(tensors) - known)
    if strict and (missing or unexpected):
        raise CheckpointError(
            f"The weights are not those of this model: {len(missing)} tensors are missing and "
            f"{len(unexpected)} unknown, such as {(missing + unexpected)[0]!r}."
        )
    return IncompatibleKeys(missing, unexpected)
