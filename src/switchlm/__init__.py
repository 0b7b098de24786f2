"""switchlm: train, fine-tune, distil, compress and serve Switch Transformers.

Names are imported on first use, so that `import switchlm` and `switchlm --help` are quick.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from switchlm.data.config import DataConfig as DataConfig
    from switchlm.data.pretraining.loader import open_data as open_data
    from switchlm.generation.answer import fill as fill
    from switchlm.huggingface.adapters import load_adapters as load_adapters
    from switchlm.huggingface.load import load as load
    from switchlm.huggingface.load import save as save
    from switchlm.model.config import ModelConfig as ModelConfig
    from switchlm.model.config import RouterConfig as RouterConfig
    from switchlm.model.losses import cross_entropy as cross_entropy
    from switchlm.model.losses import routing_losses as routing_losses
    from switchlm.model.presets import preset as preset
    from switchlm.model.switch import SwitchFeedForward as SwitchFeedForward
    from switchlm.model.transformer import SwitchTransformer as SwitchTransformer
    from switchlm.model.transformer import shift_right as shift_right
    from switchlm.recipes.config import RunConfig as RunConfig
    from switchlm.recipes.config import run_config as run_config
    from switchlm.recipes.finetune import finetune as finetune
    from switchlm.recipes.finetune_config import finetune_run as finetune_run
    from switchlm.recipes.pretrain import pretrain as pretrain

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

__all__ = list(_HOMES)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'switchlm' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
