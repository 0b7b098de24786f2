"""switchlm: train, fine-tune, distil, compress and serve Switch Transformers.

Names are imported on first use, so that `import switchlm` and `switchlm --help` are quick.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from switchlm.data.config import DataConfig
    from switchlm.data.pretraining.loader import open_data
    from switchlm.generation.answer import fill
    from switchlm.huggingface.adapters import load_adapters
    from switchlm.huggingface.load import load, save
    from switchlm.model.config import ModelConfig, RouterConfig
    from switchlm.model.losses import cross_entropy, routing_losses
    from switchlm.model.presets import preset
    from switchlm.model.switch import SwitchFeedForward
    from switchlm.model.transformer import SwitchTransformer, shift_right
    from switchlm.recipes.config import RunConfig, run_config
    from switchlm.recipes.finetune import finetune
    from switchlm.recipes.finetune_config import finetune_run
    from switchlm.recipes.pretrain import pretrain

__version__ = "0.1.0"

_HOMES = {
    "DataConfig": "switchlm.data.config",
    "ModelConfig": "switchlm.model.config",
    "RouterConfig": "switchlm.model.config",
    "RunConfig": "switchlm.recipes.config",
    "SwitchFeedForward": "switchlm.model.switch",
    "SwitchTransformer": "switchlm.model.transformer",
    "cross_entropy": "switchlm.model.losses",
    "fill": "switchlm.generation.answer",
    "finetune": "switchlm.recipes.finetune",
    "finetune_run": "switchlm.recipes.finetune_config",
    "load": "switchlm.huggingface.load",
    "load_adapters": "switchlm.huggingface.adapters",
    "open_data": "switchlm.data.pretraining.loader",
    "preset": "switchlm.model.presets",
    "pretrain": "switchlm.recipes.pretrain",
    "routing_losses": "switchlm.model.losses",
    "run_config": "switchlm.recipes.config",
    "save": "switchlm.huggingface.load",
    "shift_right": "switchlm.model.transformer",
}

__all__ = [
    "DataConfig",
    "ModelConfig",
    "RouterConfig",
    "RunConfig",
    "SwitchFeedForward",
    "SwitchTransformer",
    "cross_entropy",
    "fill",
    "finetune",
    "finetune_run",
    "load",
    "load_adapters",
    "open_data",
    "preset",
    "pretrain",
    "routing_losses",
    "run_config",
    "save",
    "shift_right",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'switchlm' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
