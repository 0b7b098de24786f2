"""Models as transformers knows them: its generate, PEFT and Trainer on top of ours.

from switchlm.transformers import SwitchTransformersForConditionalGeneration

instead of `from transformers import ...` is the one line that changes. Needs the extra
`transformers`.
"""

from importlib.util import find_spec

from switchlm.errors import MissingExtraError

if find_spec("transformers") is None:
    raise MissingExtraError("transformers", "transformers", "switchlm.transformers")

from switchlm.transformers.model import SwitchTransformersForConditionalGeneration

__all__ = ["SwitchTransformersForConditionalGeneration"]
