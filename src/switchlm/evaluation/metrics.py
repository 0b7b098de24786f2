"""The metrics of tasks, in per cent, each with a bootstrap interval.

A metric is two functions: the statistics of every example, and the value computed from their sums.
`Task.metrics` and `--metric` have its name. An undefined value, such as the correlation with a
constant, is 0. Intervals are percentile intervals of the bootstrap (Efron 1979) over groups of
examples: since every value is a function of sums, a resample needs the sums of its groups only.

Shapes: N examples, K statistics, L labels, G groups, R resamples.
"""

import math
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any

import numpy as np
from numpy.typing import NDArray

from switchlm.data.tasks.task import Example
from switchlm.errors import ConfigError, DataError, MissingExtraError, nearest
from switchlm.evaluation.words import answer_words, is_unspaced, normalise, normalise_answer, words

Floats = NDArray[np.float64]
Combine = Callable[[Floats], Floats]  # sums [..., K] to values [...]

RESAMPLES = 1000
_CHUNK = 2**22  # numbers drawn at a time


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A value and its confidence interval."""

    value: float
    low: float
    high: float


def bootstrap(
    statistics_NK: Floats,
    combine: Combine,
    groups_N: Sequence[Hashable] | None = None,
    *,
    resamples: int = RESAMPLES,
    confidence: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Return combine(sum over examples) and its interval of the given confidence.

    groups_N: the group of each example, drawn together, such as all questions about a text; None:
        every example is a group.
    """
    sums_GK = _group_sums(np.asarray(statistics_NK, dtype=np.float64), groups_N)
    value = float(combine(sums_GK.sum(0)))
    num_groups = len(sums_GK)
    generator = np.random.default_rng(seed)
    values: list[Floats] = []
    chunk = max(_CHUNK // num_groups, 1)
    for start in range(0, resamples, chunk):
        rows = min(chunk, resamples - start)
        drawn_RG = generator.multinomial(num_groups, np.full(num_groups, 1 / num_groups), size=rows)
        values.append(combine(drawn_RG @ sums_GK))
    tail = (1 - confidence) / 2
    low, high = np.quantile(np.concatenate(values), [tail, 1 - tail]).tolist()
    return Interval(value=value, low=low, high=high)


def ratio(sums: Floats) -> Floats:
    """Return the first sum over the second; undefined values are 0."""
    return divide(sums[..., 0], sums[..., 1])


def divide(above: Floats, below: Floats) -> Floats:
    """Return the quotients, 0 where the divisor is not positive."""
    defined = below > 0
    return np.where(defined, above / np.where(defined, below, 1.0), 0.0)


def _group_sums(statistics_NK: Floats, groups_N: Sequence[Hashable] | None) -> Floats:
    if groups_N is None:
        return statistics_NK
    numbers: dict[Hashable, int] = {}
    group_N = [numbers.setdefault(group, len(numbers)) for group in groups_N]
    sums_GK = np.zeros((len(numbers), statistics_NK.shape[1]))
    np.add.at(sums_GK, group_N, statistics_NK)
    return sums_GK


Labels = Sequence[str] | None
NO_NUMBER = -1.0  # the value of a prediction that is not a number, as in T5


@dataclass(frozen=True, kw_only=True)
class Metric:
    """statistics: of predictions, examples and labels, float64 [N, K].
    combine: from their sums to a value from 0 to 1.
    labelled: whether it needs two labels, of which the second is the positive one.
    """

    statistics: Callable[[Sequence[str], Sequence[Example], Labels], Floats]
    combine: Combine
    labelled: bool = False


def measure(
    names: Sequence[str],
    predictions: Sequence[str],
    examples: Sequence[Example],
    labels: Labels = None,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> dict[str, Interval]:
    """Return each metric of the predictions in per cent, with its 95% interval.

    Examples of equal identity are resampled together. Raises ConfigError for an unknown metric, or
    one that needs two labels if the task has not two, DataError if there are no examples.
    """
    if not examples:
        raise DataError("There are no examples to score.")
    groups = [example.identity for example in examples]
    found = {}
    for name in names:
        metric = find_metric(name)
        if metric.labelled and len(labels or ()) != 2:
            raise ConfigError(
                f"The metric {name!r} needs a task with two labels, the second positive; "
                f"this one has {len(labels) if labels else 'none'}. Use macro_f1 or accuracy."
            )
        interval = bootstrap(
            metric.statistics(predictions, examples, labels),
            metric.combine,
            groups,
            resamples=resamples,
            seed=seed,
        )
        found[name] = Interval(**{key: 100 * value for key, value in vars(interval).items()})
    return found


def find_metric(name: str) -> Metric:
    """Return the metric of that name. Raises ConfigError with the nearest name."""
    if name not in METRICS:
        raise ConfigError(f"There is no metric {name!r}.{nearest(name, METRICS)}")
    return METRICS[name]


def _each(
    score: Callable[[str, Sequence[str]], float],
    predictions: Sequence[str],
    examples: Sequence[Example],
    labels: Labels,
) -> Floats:
    values = [
        score(prediction, example.references)
        for prediction, example in zip(predictions, examples, strict=True)
    ]
    return np.stack([np.array(values, dtype=np.float64), np.ones(len(values))], axis=1)


def _is_one(prediction: str, references: Sequence[str]) -> float:
    return float(prediction.strip() in references)


def _group_accuracy(
    predictions: Sequence[str], examples: Sequence[Example], labels: Labels
) -> Floats:
    """Whether all predictions of an identity are right, at its first example; else zeros."""
    first: dict[str, int] = {}
    statistics_N2 = np.zeros((len(examples), 2))
    for place, (prediction, example) in enumerate(zip(predictions, examples, strict=True)):
        at = first.setdefault(example.identity, place)
        if at == place:
            statistics_N2[at] = 1.0
        statistics_N2[at, 0] *= _is_one(prediction, example.references)
    return statistics_N2


def _counts(predictions: Sequence[str], examples: Sequence[Example], labels: Labels) -> Floats:
    """For every label: whether it is right, whether it is predicted, and both."""
    right = [example.target for example in examples]
    number = {label: place for place, label in enumerate(labels or sorted(set(right)))}
    true_NL = np.zeros((len(right), len(number)))
    predicted_NL = np.zeros_like(true_NL)
    for place, (prediction, label) in enumerate(zip(predictions, right, strict=True)):
        true_NL[place, number[label]] = 1.0
        predicted = number.get(prediction.strip())  # any other prediction is wrong
        if predicted is not None:
            predicted_NL[place, predicted] = 1.0
    return np.concatenate([true_NL, predicted_NL, true_NL * predicted_NL], axis=1)


def _f1_of_labels(sums: Floats) -> Floats:
    true_L, predicted_L, both_L = np.split(sums, 3, axis=-1)
    return divide(2 * both_L, true_L + predicted_L)


def _binary_f1(sums: Floats) -> Floats:
    return _f1_of_labels(sums)[..., 1]


def _macro_f1(sums: Floats) -> Floats:
    return _f1_of_labels(sums).mean(-1)


def _matthews(sums: Floats) -> Floats:
    """The correlation of Matthews 1975, for any number of labels (Gorodkin 2004)."""
    true_L, predicted_L, both_L = np.split(sums, 3, axis=-1)
    total = true_L.sum(-1)
    other = total - predicted_L.sum(-1)  # predictions that are not a label
    above = both_L.sum(-1) * total - (true_L * predicted_L).sum(-1)
    predicted = total**2 - (predicted_L**2).sum(-1) - other**2
    true = total**2 - (true_L**2).sum(-1)
    return divide(above, np.sqrt(np.maximum(predicted * true, 0.0)))


def _to_number(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        return NO_NUMBER
    return number if math.isfinite(number) else NO_NUMBER


def _moments(
    predictions: Sequence[str], examples: Sequence[Example], labels: Labels, *, ranked: bool = False
) -> Floats:
    """The moments of a correlation; values are centred for the precision of the sums of squares.

    Ranks are those among all examples, in resamples too.
    """
    x_N = np.array([_to_number(text) for text in predictions])
    y_N = np.array([_to_number(example.target) for example in examples])
    if ranked:
        x_N, y_N = _ranks(x_N), _ranks(y_N)
    x_N, y_N = x_N - x_N.mean(), y_N - y_N.mean()
    return np.stack([np.ones_like(x_N), x_N, y_N, x_N * x_N, y_N * y_N, x_N * y_N], axis=1)


def _ranks(values_N: Floats) -> Floats:
    """Return ranks from 1, the mean rank for equal values."""
    _, place_N, count = np.unique(values_N, return_inverse=True, return_counts=True)
    last = np.cumsum(count)
    return (last - (count - 1) / 2)[place_N]


def _correlation(sums: Floats) -> Floats:
    n, x, y, xx, yy, xy = np.moveaxis(sums, -1, 0)
    variance = np.maximum(n * xx - x * x, 0.0) * np.maximum(n * yy - y * y, 0.0)
    # Below this, the variance is a rounding error: all values are equal.
    variance = np.where(variance > 1e-12 * np.maximum(n * xx * n * yy, 1e-300), variance, 0.0)
    return divide(n * xy - x * y, np.sqrt(variance))


def _exact_match(prediction: str, references: Sequence[str]) -> float:
    return float(normalise_answer(prediction) in map(normalise_answer, references))


def _answer_f1(prediction: str, references: Sequence[str]) -> float:
    """Return the best harmonic mean of precision and recall of words, after normalising."""
    predicted = answer_words(prediction)
    return max(_f1_of_words(predicted, answer_words(text)) for text in references)


def _f1_of_words(predicted: list[str], reference: list[str]) -> float:
    if not predicted or not reference:
        return float(predicted == reference)
    common = (Counter(predicted) & Counter(reference)).total()
    return 2 * common / (len(predicted) + len(reference))


class RougeWords:
    """The tokenizer of ROUGE: words of any script, of which those of ASCII may be stemmed."""

    def __init__(self, stemmed: bool) -> None:
        self._stem: Callable[[str], str] | None = None
        if stemmed:
            self._stem = _from_extra("nltk.stem.porter", "ROUGE").PorterStemmer().stem

    def tokenize(self, text: str) -> list[str]:
        """Return the words; only those of more than three letters are stemmed, as rouge-score."""
        found = words(text)
        if self._stem is None:
            return found
        return [self._stem(word) if word.isascii() and len(word) > 3 else word for word in found]


def _rouge(
    kind: str,
    stemmed: bool,
    predictions: Sequence[str],
    examples: Sequence[Example],
    labels: Labels,
) -> Floats:
    """The F1 of each example with its best reference (Lin 2004), from rouge-score."""
    scorers = _from_extra("rouge_score.rouge_scorer", "ROUGE")
    scorer = scorers.RougeScorer([kind], tokenizer=RougeWords(stemmed))

    def best(prediction: str, references: Sequence[str]) -> float:
        return float(scorer.score_multi(list(references), prediction)[kind].fmeasure)

    return _each(best, predictions, examples, labels)


def bleu_tokenizer(texts: Iterable[str]) -> str:
    """Return sacrebleu's tokenizer for references in the script of most of their letters.

    `13a` (sacrebleu's default) for words between spaces, `zh` for Chinese, and `char` for Japanese,
    Thai and other scripts without spaces.
    """
    letters = [c for text in texts for c in normalise(text) if c.isalpha()]
    unspaced = [c for c in letters if is_unspaced(c)]
    if 2 * len(unspaced) <= len(letters):
        return "13a"
    chinese = sum("\u3400" <= c <= "\u9fff" or c >= "\U00020000" for c in unspaced)
    return "zh" if chinese > 0.95 * len(unspaced) else "char"


def _bleu_counts(
    tokenizer: str | None,
    predictions: Sequence[str],
    examples: Sequence[Example],
    labels: Labels,
) -> Floats:
    """From sacrebleu: matches and totals of n-grams of 1 to 4 words, and both lengths."""
    if tokenizer is None:
        tokenizer = bleu_tokenizer(text for example in examples for text in example.references)
    metrics = _from_extra("sacrebleu.metrics", "BLEU")
    bleu = metrics.BLEU(effective_order=True, tokenize=tokenizer)
    rows = []
    for prediction, example in zip(predictions, examples, strict=True):
        score = bleu.sentence_score(prediction, list(example.references))
        rows.append([*score.counts, *score.totals, score.sys_len, score.ref_len])
    return np.array(rows, dtype=np.float64)


def _bleu(sums: Floats) -> Floats:
    compute = _from_extra("sacrebleu.metrics", "BLEU").BLEU.compute_bleu
    rows = sums.reshape(-1, sums.shape[-1]).astype(int).tolist()
    scores = [
        compute(row[:4], row[4:8], row[8], row[9], smooth_method="exp").score / 100 for row in rows
    ]
    return np.array(scores).reshape(sums.shape[:-1])


def _from_extra(module: str, what: str) -> Any:
    """Import a package of the extra `evaluation`."""
    try:
        return import_module(module)
    except ImportError:
        raise MissingExtraError(module.split(".")[0], "evaluation", what) from None


METRICS: Mapping[str, Metric] = {
    "accuracy": Metric(statistics=partial(_each, _is_one), combine=ratio),
    "group_accuracy": Metric(statistics=_group_accuracy, combine=ratio),
    "binary_f1": Metric(statistics=_counts, combine=_binary_f1, labelled=True),
    "macro_f1": Metric(statistics=_counts, combine=_macro_f1),
    "matthews": Metric(statistics=_counts, combine=_matthews),
    "pearson": Metric(statistics=_moments, combine=_correlation),
    "spearman": Metric(statistics=partial(_moments, ranked=True), combine=_correlation),
    "exact_match": Metric(statistics=partial(_each, _exact_match), combine=ratio),
    "f1": Metric(statistics=partial(_each, _answer_f1), combine=ratio),
    "bleu": Metric(statistics=partial(_bleu_counts, None), combine=_bleu),
    **{
        f"bleu_{tokenizer}": Metric(statistics=partial(_bleu_counts, tokenizer), combine=_bleu)
        for tokenizer in ("13a", "intl", "zh", "char")
    },
    **{
        f"{kind}{'_stemmed' * stemmed}": Metric(
            statistics=partial(_rouge, kind, stemmed), combine=ratio
        )
        for kind in ("rouge1", "rouge2", "rougeL")
        for stemmed in (False, True)
    },
}
