"""Fill the blanks of a text: what a model trained by span corruption does out of the box.

text      def <extra_id_0>(self): return <extra_id_1>
output    <extra_id_0>size<extra_id_1>self._size</s>
filled    def size(self): return self._size
"""

import re

from switchlm.data.tokenizer import Tokenizer
from switchlm.errors import DataError
from switchlm.generation.answer import answer
from switchlm.generation.sampling import GREEDY, Sampling
from switchlm.model.transformer import SwitchTransformer

BLANK = re.compile(r"<extra_id_(\d+)>")
TOKENS_A_BLANK = 32


def put_into_blanks(text: str, spans: dict[int, str]) -> str:
    """Return the text with each blank replaced by its span; one without a span stays."""
    return BLANK.sub(lambda match: spans.get(int(match[1]), match[0]), text)


def count_blanks(text: str, tokenizer: Tokenizer) -> int:
    """Return how many different blanks a text has.

    Raises DataError when there is none, or one that the tokenizer has no sentinel for.
    """
    numbers = {int(number) for number in BLANK.findall(text)}
    if not numbers:
        raise DataError(
            "The text has no blank to fill. Write <extra_id_0>, <extra_id_1>, ... where the model "
            "shall put something in."
        )
    if max(numbers) >= len(tokenizer.sentinel_ids):
        raise DataError(
            f"The text has the blank <extra_id_{max(numbers)}>, but this tokenizer knows only "
            f"<extra_id_0> to <extra_id_{len(tokenizer.sentinel_ids) - 1}>."
        )
    return len(numbers)


def fill(
    model: SwitchTransformer,
    tokenizer: Tokenizer,
    text: str,
    *,
    max_new_tokens: int | None = None,
    sampling: Sampling = GREEDY,
    seed: int = 0,
) -> str:
    """Return `text` with the model's spans in its blanks; a blank the model left out stays.

    max_new_tokens: 32 a blank where left out. Raises DataError for a text without blanks.
    """
    limit = max_new_tokens or TOKENS_A_BLANK * count_blanks(text, tokenizer)
    said = answer(model, tokenizer, text, max_new_tokens=limit, sampling=sampling, seed=seed)
    return put_into_blanks(text, said.spans)
