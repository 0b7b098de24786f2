"""The held-out split: which documents are never trained on."""

from collections.abc import Sequence

import numpy as np

from switchlm.data.order import Int64, UInt64


def choose_held_out(hashes_D: UInt64, lengths_D: Int64, share: float, least: int) -> np.ndarray:
    """Return bool [D]: which documents are held out.

    A document's own hash decides, so adding others moves none. Where those are fewer than `least`
    tokens, the documents next in the order of hashes join, as long as as many stay for training.
    """
    if share == 0:
        return np.zeros(len(hashes_D), dtype=bool)
    chosen_D = hashes_D < np.uint64(share * 2.0**64)
    if lengths_D[chosen_D].sum() < least:
        limit = max(share, 0.5) * lengths_D.sum()
        for value in np.unique(hashes_D):
            with_next_D = hashes_D <= value
            if lengths_D[with_next_D].sum() > limit:
                break
            chosen_D = with_next_D
            if lengths_D[chosen_D].sum() >= least:
                break
    return chosen_D


def choose_alike(
    hashes_SD: Sequence[UInt64], lengths_SD: Sequence[Int64], share: float, least: int
) -> list[np.ndarray]:
    """Return for each source which documents are held out, the same groups in all of them.

    hashes_SD, lengths_SD: one array a source. As `choose_held_out`, but a group that joins in one
    source, because that has too little text, joins in all: else translations of a held-out text
    would be trained on.
    """
    chosen_SD = [
        choose_held_out(hashes_D, lengths_D, share, least)
        for hashes_D, lengths_D in zip(hashes_SD, lengths_SD, strict=True)
    ]
    # A document is chosen because its hash is small, so the largest chosen one bounds all.
    held_out = [hashes_D[chosen_D] for hashes_D, chosen_D in zip(hashes_SD, chosen_SD, strict=True)]
    largest = np.concatenate(held_out).max(initial=0)
    return [(hashes_D <= largest) & (share > 0) for hashes_D in hashes_SD]
