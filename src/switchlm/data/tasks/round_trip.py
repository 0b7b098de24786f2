"""What a tokenizer cannot write: texts that do not come back from encoding and decoding.

A vocabulary may lack characters, which become `<unk>`; T5's has no braces and no line ends. A model
trained on such targets learns what comes back, so it is said before training.
"""

from collections.abc import Sequence

import numpy as np

from switchlm.data.order import Int64
from switchlm.data.text.tokenizer import Tokenizer

_SHOWN = 60  # characters of an example


def comparable(text: str, tokenizer: Tokenizer) -> str:
    """Return a text with one space around each added token, and none at its ends.

    Tokenizers do not keep the white space around added tokens, such as sentinels.
    """
    parts = (part.strip() for part in tokenizer.added_names.split(text))
    return " ".join(part for part in parts if part)


def describe_losses(
    name: str,
    texts: Sequence[str],
    inputs: list[Int64],
    targets: list[Int64],
    tokenizer: Tokenizer,
    length: int,
) -> str | None:
    """Return a line on targets that do not come back and on unknown tokens; None for none.

    name: of the task.
    texts: the targets, whose ids are `targets`.
    length: targets of this many tokens may be truncated, and are not compared.
    """
    lines = []
    decoded = tokenizer.decode_all(targets)
    lost = [
        place
        for place, (text, back) in enumerate(zip(texts, decoded, strict=True))
        if len(targets[place]) < length
        and text != back
        and comparable(text, tokenizer) != comparable(back, tokenizer)
    ]
    if lost:
        text, back = texts[lost[0]][:_SHOWN], decoded[lost[0]][:_SHOWN]
        lines.append(
            f"{len(lost):,} of {len(texts):,} targets cannot be written by the tokenizer and are "
            f"learned as what comes back, such as {text!r} as {back!r}"
        )
    ended = sum(int((ids[:-1] == tokenizer.end_id).any()) for ids in targets)
    if ended:
        lines.append(f"{ended:,} targets hold the end token, where an output ends")
    unknown = [
        (side, _share(ids, tokenizer)) for side, ids in (("input", inputs), ("target", targets))
    ]
    if shares := [f"{share:.2%} of the {side} tokens" for side, share in unknown if share]:
        lines.append(f"{' and '.join(shares)} are unknown to its vocabulary")
    return f"{name}: {'; '.join(lines)}." if lines else None


def _share(ids: list[Int64], tokenizer: Tokenizer) -> float:
    every = np.concatenate(ids)
    return 0.0 if tokenizer.unknown_id is None else float((every == tokenizer.unknown_id).mean())
