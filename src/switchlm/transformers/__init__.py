"""Models for code that uses transformers: its generate and Trainer, and PEFT.

Replace `from transformers import SwitchTransformersForConditionalGeneration` by

from switchlm.transformers import SwitchTransformersForConditionalGeneration

Needs the extra `transformers`.
"""

from importlib.util import find_spec

from switchlm.errors import MissingExtraError

if find_spec("transformers") is None:
    raise MissingExtraError("transformers", "transformers", "switchlm.transformers")

from switchlm.transformers.model import SwitchTransformersForConditionalGeneration

__all__ = ["SwitchTransformersForConditionalGeneration"]
