"""switchlm: train, fine-tune, distil, compress and serve Switch Transformers.

Names are imported on first use, so that `import switchlm` and `switchlm --help` are quick.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from switchlm.checkpoint.huggingface import load, save
    from switchlm.model.config import ModelConfig, RouterConfig
    from switchlm.model.presets import preset
    from switchlm.model.switch import SwitchFeedForward
    from switchlm.model.transformer import SwitchTransformer

__version__ = "0.1.0"

_HOMES = {
    "ModelConfig": "switchlm.model.config",
    "RouterConfig": "switchlm.model.config",
    "SwitchFeedForward": "switchlm.model.switch",
    "SwitchTransformer": "switchlm.model.transformer",
    "load": "switchlm.checkpoint.huggingface",
    "preset": "switchlm.model.presets",
    "save": "switchlm.checkpoint.huggingface",
}

__all__ = [
    "ModelConfig",
    "RouterConfig",
    "SwitchFeedForward",
    "SwitchTransformer",
    "load",
    "preset",
    "save",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'switchlm' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
