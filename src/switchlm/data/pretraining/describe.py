"""What is said of pre-training text before training: sizes, shares, and what is not as it was set.

Shapes: S sources.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from switchlm.data.config import DataConfig
from switchlm.data.pretraining.span_corruption import Noise
from switchlm.data.text import sources
from switchlm.data.text.sources import Source

MAX_LINES = 16  # sources that are reported one by one
MAX_WARNINGS = 3
FAR = 3.0  # times more or less held out than wanted, which is said


class Sized(Protocol):
    """The rows of a source."""

    @property
    def num_tokens(self) -> int:
        """Tokens of all rows."""
        ...


def remarks(
    config: DataConfig,
    noise: Noise,
    raw_length: int,
    names: Sequence[str],
    train: Sequence[Sized],
    held_out: Sequence[Sized],
) -> list[str]:
    """Return lines on what is not as set: the share held out, and the length of spans."""
    lines = []
    wanted = config.held_out_share
    for name, part, kept in zip(names, train, held_out, strict=True):
        share = kept.num_tokens / max(part.num_tokens + kept.num_tokens, 1)
        if wanted and not wanted / FAR <= share <= wanted * FAR:
            reason = "documents are few and large" if share else "there is too little text"
            if kept.num_tokens <= 2 * raw_length and share > wanted:
                reason = f"a row of {raw_length} tokens is the least"
            lines.append(
                f"Warning: {share:.1%} of the tokens of {name!r} are held out, not {wanted:.1%} "
                f"(data.held_out_share): {reason}"
            )
    if len(lines) > MAX_WARNINGS:
        lines[MAX_WARNINGS:] = [f"Warning: so it is with {len(lines) - MAX_WARNINGS} more sources"]
    masked, spans = (int(one[0]) for one in noise.counts(np.array([raw_length])))
    if spans == noise.most_spans and masked / spans > 1.01 * noise.mean_span:
        lines.append(
            f"Spans are {masked / spans:.1f} tokens long on average, not {config.mean_span:g} "
            f"(data.mean_span): rows of {config.input_length} have no more than {spans} sentinels"
        )
    return lines


def describe_mixture(
    parsed: Sequence[Source],
    train: Sequence[Sized],
    held_out: Sequence[Sized],
    shares_S: np.ndarray,
) -> list[str]:
    """Return a line for each source, or one line if there are more than MAX_LINES."""

    def line(who: str, places: Sequence[int], share: str) -> str:
        read, kept = (sum(part[place].num_tokens for place in places) for part in (train, held_out))
        return (
            f"{who}: {read:,} tokens to train on, {kept:,} held out "
            f"({kept / max(read + kept, 1):.1%}), {share} of the rows"
        )

    every = range(len(parsed))
    if len(parsed) <= MAX_LINES:
        return [
            line(f"{one.name} ({sources.describe(one)})", [place], f"{shares_S[place]:.1%}")
            for place, one in enumerate(parsed)
        ]
    names = [one.name for one in parsed]
    least, most = int(shares_S.argmin()), int(shares_S.argmax())
    shares = f"{shares_S[least]:.2%} ({names[least]}) to {shares_S[most]:.2%} ({names[most]}) each"
    return [line(f"{len(parsed)} sources", every, shares)]
