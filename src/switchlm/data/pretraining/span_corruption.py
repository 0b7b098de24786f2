"""Span corruption as in T5 (Raffel et al. 2020, section 3.1.4), for a whole batch at once.

    text     Thank you for inviting me to your party last week
    inputs   Thank you <extra_id_0> me to your party <extra_id_1> week </s>
    targets  <extra_id_0> for inviting <extra_id_1> last </s>

The masks follow `random_spans_noise_mask` of t5.data.preprocessors: every example begins with kept
tokens and ends with masked ones, spans are cut uniformly at random, and the numbers of masked
tokens and spans depend on the length alone, so equal lengths give rows of equal length.

Suffixes: N examples, L positions of the raw tokens, K spans of all examples.
"""

from dataclasses import dataclass

import numpy as np

from switchlm.data.order import Int64, UInt64, hash_grid
from switchlm.data.text.tokenizer import NUM_SENTINELS
from switchlm.errors import DataError


@dataclass(frozen=True, kw_only=True)
class Noise:
    """The share of tokens that are masked, and the mean length of a span.

    most_spans: in a text, as many as there are sentinels; longer texts have longer spans.
    """

    density: float
    mean_span: float
    most_spans: int = NUM_SENTINELS

    def counts(self, length_N: Int64) -> tuple[Int64, Int64]:
        """Return the numbers of masked tokens and of spans in texts of `length_N` >= 2 tokens."""
        noise_N = np.round(length_N * self.density).astype(np.int64)
        noise_N = np.clip(noise_N, 1, length_N - 1)
        spans_N = np.round(noise_N / self.mean_span).astype(np.int64)
        most_N = np.minimum(np.minimum(noise_N, length_N - noise_N), self.most_spans)
        return noise_N, np.clip(spans_N, 1, most_N)

    def corrupted_lengths(self, length_N: Int64) -> tuple[Int64, Int64]:
        """Return the lengths of inputs and targets, with sentinels and the end token."""
        noise_N, spans_N = self.counts(length_N)
        return length_N - noise_N + spans_N + 1, noise_N + spans_N + 1

    def raw_length(self, input_length: int) -> int:
        """Return the number of raw tokens that fill `input_length` (T5's `random_spans_helper`).

        Raises DataError if no number does: for rows of a few tokens, or if nearly every other token
        is a span.
        """
        length_L = np.arange(2, int((input_length + 1) / (1 - self.density)) + 3)
        inputs_L, _ = self.corrupted_lengths(length_L)
        exact = np.flatnonzero(inputs_L == input_length)
        if not exact.size:
            raise DataError(
                f"No text fills rows of input_length {input_length} exactly with noise_density "
                f"{self.density} and mean_span {self.mean_span}. Use longer rows or longer spans."
            )
        return int(length_L[exact[-1]])


@dataclass(frozen=True, kw_only=True)
class Corrupted:
    """Concatenated examples: `inputs` and `targets` int64, with the length of each example."""

    inputs: Int64
    input_length_N: Int64
    targets: Int64
    target_length_N: Int64


def noise_mask(length_N: Int64, noise: Noise, key_N: UInt64) -> np.ndarray:
    """Return bool [N, longest]: true where a token is masked; a pure function of length and key."""
    noise_N, spans_N = noise.counts(length_N)
    kept_N = length_N - noise_N
    example_K, kept_start_K = _random_segments(kept_N, spans_N, mix_in(key_N, 0))
    _, noise_start_K = _random_segments(noise_N, spans_N, mix_in(key_N, 1))
    # Kept segment k is followed by masked segment k; where it ends, the masked one begins.
    last_K = np.append(example_K[1:] != example_K[:-1], True)
    kept_end_K = np.where(last_K, kept_N[example_K], np.append(kept_start_K[1:], 0))
    turns_NL = np.zeros((len(length_N), int(length_N.max()) + 1), dtype=np.int8)
    turns_NL[example_K, kept_end_K + noise_start_K] = 1
    inner = kept_start_K > 0
    turns_NL[example_K[inner], (kept_start_K + noise_start_K)[inner]] = -1
    turns_NL[np.arange(len(length_N)), length_N] = -1
    return np.cumsum(turns_NL, axis=1, dtype=np.int8)[:, :-1] > 0


def mix_in(key_N: UInt64, purpose: int) -> UInt64:
    """Return a different key for each example and purpose."""
    return hash_grid(key_N, purpose + 1)[:, purpose]


def _random_segments(items_N: Int64, segments_N: Int64, key_N: UInt64) -> tuple[Int64, Int64]:
    """Cut range(items) into non-empty segments at uniformly random places.

    Returns the example and the first item of every segment, in order.
    """
    longest = int(items_N.max())
    keys_NL = hash_grid(key_N, longest)
    keys_NL[np.arange(longest)[None, :] >= items_N[:, None]] = np.iinfo(np.uint64).max
    # The first item always starts a segment; the cuts are the smallest keys of the others.
    keys_NL[:, 0] = 0
    last_cut_N = np.sort(keys_NL, axis=1)[np.arange(len(items_N)), segments_N - 1]
    example_K, start_K = np.nonzero(keys_NL <= last_cut_N[:, None])
    return example_K, start_K


def corrupt(
    tokens_NL: Int64, length_N: Int64, mask_NL: np.ndarray, sentinel_ids: Int64, end_id: int
) -> Corrupted:
    """Replace each masked span by a sentinel and collect the spans as targets.

    tokens_NL: int64, padded on the right with any value.
    mask_NL: bool, false past the length; with at most as many spans as sentinels.
    """
    num_examples, longest = tokens_NL.shape
    example_N = np.arange(num_examples)
    start_NL = mask_NL.copy()
    start_NL[:, 1:] &= ~mask_NL[:, :-1]
    span_NL = np.cumsum(start_NL, axis=1) - 1
    sentinel_NL = np.asarray(sentinel_ids, dtype=np.int64)[span_NL]

    values_NL = np.empty((num_examples, longest + 1), dtype=np.int64)
    values_NL[:, :-1] = np.where(start_NL, sentinel_NL, tokens_NL)
    values_NL[example_N, length_N] = end_id
    kept_NL = np.arange(longest + 1)[None, :] <= length_N[:, None]
    kept_NL[:, :-1] &= ~mask_NL | start_NL

    # A masked token is one target, the first of a span two: its sentinel comes before it.
    pairs_NL2 = np.empty((num_examples, longest + 1, 2), dtype=np.int64)
    pairs_NL2[:, :-1, 0] = sentinel_NL
    pairs_NL2[:, :-1, 1] = tokens_NL
    pairs_NL2[example_N, length_N, 1] = end_id
    wanted_NL2 = np.zeros((num_examples, longest + 1, 2), dtype=bool)
    wanted_NL2[:, :-1, 0] = start_NL
    wanted_NL2[:, :-1, 1] = mask_NL
    wanted_NL2[example_N, length_N, 1] = True
    return Corrupted(
        inputs=values_NL[kept_NL],
        input_length_N=kept_NL.sum(axis=1),
        targets=pairs_NL2[wanted_NL2],
        target_length_N=wanted_NL2.sum(axis=(1, 2)),
    )
