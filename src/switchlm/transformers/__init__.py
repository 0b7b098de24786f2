"""Models for code that uses transformers: its generate and Trainer, and PEFT.

Replace `from transformers import SwitchTransformersForConditionalGeneration` by

from switchlm.transformers import SwitchTransformersForConditionalGeneration

Needs the extra `transformers`.
"""

from importlib.metadata import version
from importlib.util import find_spec

from switchlm.errors import ConfigError, MissingExtraError

if find_spec("transformers") is None:
    raise MissingExtraError("transformers", "transformers", "switchlm.transformers")

if tuple(map(int, version("transformers").split(".")[:2])) < (5, 18):
    raise ConfigError(
        f"switchlm.transformers needs transformers 5.18 or newer, and {version('transformers')} is "
        "installed: update it with pip install -U 'switchlm[transformers]'."
    )

from switchlm.transformers.adapters import convert_adapter
from switchlm.transformers.model import SwitchTransformersForConditionalGeneration

__all__ = ["SwitchTransformersForConditionalGeneration", "convert_adapter"]
