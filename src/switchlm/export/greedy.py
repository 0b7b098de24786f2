"""Greedy decoding with the two exported programs, in numpy alone.

Its source stands in the README.md of every exported folder, so it needs nothing of this package.
"""

from collections.abc import Callable, Sequence

import numpy as np

Program = Callable[..., Sequence[np.ndarray]]


def greedy(
    encode: Program,
    step: Program,
    tokens: list[int],
    about: dict[str, int],
    max_new_tokens: int,
) -> list[int]:
    """Return the tokens that follow from a prompt, without the end token.

    tokens: the prompt, which ends with the end token. about: what export.json says.
    """
    mask = np.ones((1, len(tokens)), dtype=bool)
    _, cross_keys, cross_values = encode(np.array([tokens]), mask)
    shape = (about["layers"], 1, about["heads"], max_new_tokens, about["width"])
    keys = values = np.zeros(shape, dtype=np.float32)
    token, output = about["pad_id"], []
    for position in range(max_new_tokens):
        logits, keys, values = step(
            np.array([[token]]), np.array(position), mask, cross_keys, cross_values, keys, values
        )
        token = int(logits[0].argmax())
        if token == about["end_id"]:
            break
        output.append(token)
    return output
