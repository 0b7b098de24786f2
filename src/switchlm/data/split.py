"""The held-out split: which documents are never trained on."""

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
