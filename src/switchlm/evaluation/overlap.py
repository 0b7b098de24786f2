"""How much two texts have in common: exact match and F1 as in SQuAD, ROUGE, BLEU.

All compare one prediction with several references and keep the best; shares lie in 0 to 1.
"""

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from switchlm.errors import MissingExtraError

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_WORD = re.compile(r"[^a-z0-9]+")

Stem = Callable[[str], str]
NO_STEMMING: Stem = str


def normalise_answer(text: str) -> str:
    """Return lower-case words without punctuation and articles (Rajpurkar et al. 2016)."""
    bare = text.lower().translate(_PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", bare).split())


def exact_match(prediction: str, references: Sequence[str]) -> float:
    """Return 1.0 where the normalised prediction is one of the normalised references."""
    return float(normalise_answer(prediction) in map(normalise_answer, references))


def answer_f1(prediction: str, references: Sequence[str]) -> float:
    """Return the best harmonic mean of precision and recall of words, after normalising."""
    said = normalise_answer(prediction).split()
    return max(_f1(said, normalise_answer(reference).split()) for reference in references)


def _f1(said: list[str], wanted: list[str]) -> float:
    if not said or not wanted:
        return float(said == wanted)
    return _harmonic(_common(Counter(said), Counter(wanted)), len(said), len(wanted))


def _common(first: Counter[Any], second: Counter[Any]) -> int:
    return sum((first & second).values())


def _harmonic(common: int, said: int, wanted: int) -> float:
    return 2 * common / (said + wanted) if common else 0.0


def rouge_words(text: str, stem: Stem = NO_STEMMING) -> list[str]:
    """Return the words that ROUGE compares: lower-case letters and digits, longer ones stemmed."""
    words = _NO_WORD.sub(" ", text.lower()).split()
    return [stem(word) if len(word) > 3 else word for word in words]


def rouge_n(said: Sequence[str], wanted: Sequence[str], size: int) -> float:
    """Return the F1 of the word sequences of `size` (Lin 2004)."""
    first, second = _sequences(said, size), _sequences(wanted, size)
    return _harmonic(_common(first, second), first.total(), second.total())


def _sequences(words: Sequence[str], size: int) -> Counter[tuple[str, ...]]:
    return Counter(zip(*(words[start:] for start in range(size)), strict=False))


def rouge_l(said: Sequence[str], wanted: Sequence[str]) -> float:
    """Return the F1 of the longest common subsequence of words (Lin 2004)."""
    return _harmonic(longest_common(said, wanted), len(said), len(wanted))


def longest_common(first: Sequence[str], second: Sequence[str]) -> int:
    """Return the length of the longest common subsequence, a row of the table in one integer.

    A zero bit marks where the row rises (Hyyrö 2004).
    """
    places: dict[str, int] = {}
    for place, word in enumerate(first):
        places[word] = places.get(word, 0) | 1 << place
    row = everywhere = (1 << len(first)) - 1
    for word in second:
        matched = row & places.get(word, 0)
        row = ((row + matched) | (row - matched)) & everywhere
    return len(first) - row.bit_count()


def porter_stem() -> Stem:
    """Return the stemmer that ROUGE is reported with where it is stemmed (extra `evaluation`)."""
    try:
        from nltk.stem.porter import PorterStemmer
    except ImportError:
        raise MissingExtraError("nltk", "evaluation", "ROUGE with stemming") from None
    stemmer: Stem = PorterStemmer().stem
    return stemmer


def open_bleu() -> Any:
    """Return sacrebleu's class of BLEU (extra `evaluation`)."""
    try:
        from sacrebleu.metrics import BLEU
    except ImportError:
        raise MissingExtraError("sacrebleu", "evaluation", "BLEU") from None
    return BLEU
