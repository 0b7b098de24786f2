"""Every metric against the implementation that others report with."""

import random
import sys

import numpy as np
import pytest

from switchlm.data.tasks.registry import TASKS
from switchlm.data.tasks.task import Example
from switchlm.errors import ConfigError, DataError, MissingExtraError
from switchlm.evaluation.metrics import METRICS, find_metric, measure

TEXT = "the cats were running quickly to a small house, which stood (alone) in 3 fields, all"
WORDS = TEXT.split()


def value(name, predictions, references, labels=None, identities=None):
    """Return the one figure, as a share; references are texts, or tuples of several."""
    several = [(r,) if isinstance(r, str) else r for r in references]
    identities = identities or list(map(str, range(len(several))))
    examples = [
        Example(input="x", target=texts[0], references=texts, identity=identity)
        for texts, identity in zip(several, identities, strict=True)
    ]
    return measure([name], predictions, examples, labels, resamples=2)[name].value / 100


def sentences(count, seed, longest=14):
    chance = random.Random(seed)
    return [
        " ".join(chance.choice(WORDS) for _ in range(chance.randrange(1, longest)))
        for _ in range(count)
    ]


def labels_said(names, count=200, seed=0, extra=("",)):
    """Return predictions (some of them no label) and the right labels."""
    chance = random.Random(seed)
    right = [chance.choice(names) for _ in range(count)]
    said = [r if chance.random() < 0.5 else chance.choice([*names, *extra]) for r in right]
    return said, right


@pytest.mark.parametrize("names", [("no", "yes"), ("e", "n", "c")])
def test_classification_is_scikit_learns(names):
    reference = pytest.importorskip("sklearn.metrics")
    said, right = labels_said(names)
    assert value("accuracy", said, right, names) == pytest.approx(
        reference.accuracy_score(right, said)
    )
    assert value("macro_f1", said, right, names) == pytest.approx(
        reference.f1_score(right, said, labels=names, average="macro", zero_division=0)
    )
    assert value("matthews", said, right, names) == pytest.approx(
        reference.matthews_corrcoef(right, said)
    )


def test_binary_f1_counts_the_second_label():
    reference = pytest.importorskip("sklearn.metrics")
    said, right = labels_said(("no", "yes"))
    expected = reference.f1_score([r == "yes" for r in right], [s == "yes" for s in said])
    assert value("binary_f1", said, right, ("no", "yes")) == pytest.approx(expected)


def test_correlations_are_scipys():
    reference = pytest.importorskip("scipy.stats")
    chance = random.Random(0)
    right = [round(chance.uniform(0, 5), 1) for _ in range(150)]
    said = [round(r + chance.gauss(0, 1), 0) for r in right]  # with many ties
    texts = list(map(str, said)), list(map(str, right))
    assert value("pearson", *texts) == pytest.approx(reference.pearsonr(said, right)[0])
    assert value("spearman", *texts) == pytest.approx(reference.spearmanr(said, right)[0])


@pytest.mark.parametrize("said", [["3.2"] * 3, ["much"] * 3, ["nan", "inf", "-inf"]])
def test_predictions_that_say_nothing_correlate_with_nothing(said):
    assert value("pearson", said, ["1.0", "2.0", "4.0"]) == 0
    assert value("spearman", said, ["1.0", "2.0", "4.0"]) == 0


@pytest.mark.parametrize("stemmed", [False, True])
def test_rouge_is_rouge_scores(stemmed):
    reference = pytest.importorskip("rouge_score.rouge_scorer")
    said = ["", "...", *sentences(60, 1)]
    right = [tuple(sentences(1 + n % 3, 100 + n)) for n in range(len(said))]
    kinds = ["rouge1", "rouge2", "rougeL"]
    scorer = reference.RougeScorer(kinds, use_stemmer=stemmed)
    for kind in kinds:
        expected = np.mean(
            [
                max(scorer.score(one, s)[kind].fmeasure for one in r)
                for s, r in zip(said, right, strict=True)
            ]
        )
        assert value(kind + "_stemmed" * stemmed, said, right) == pytest.approx(expected)


def test_bleu_is_sacrebleus():
    reference = pytest.importorskip("sacrebleu")
    said, right = sentences(40, 1), [sentences(40, 2), sentences(40, 3)]
    said[:20] = right[0][:20]
    expected = reference.corpus_bleu(said, right).score / 100
    assert value("bleu", said, list(zip(*right, strict=True))) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("said", "references", "match", "f1"),
    [
        ("The  Cat!", ("a cat",), 1.0, 1.0),
        ("Paris", ("London", "paris."), 1.0, 1.0),
        ("the black cat", ("cat", "dog"), 0.0, 2 / 3),
        ("cat cat dog", ("cat dog bird",), 0.0, 2 / 3),
        ("", ("cat",), 0.0, 0.0),
        ("the", ("an",), 1.0, 1.0),
        ("thecat", ("cat",), 0.0, 0.0),
        ("U.S.A", ("usa",), 1.0, 1.0),
    ],
)
def test_answers_are_compared_as_squad_does(said, references, match, f1):
    assert value("exact_match", [said], [references]) == match
    assert value("f1", [said], [references]) == pytest.approx(f1)


def test_a_question_is_right_when_all_its_answers_are():
    said, right = ["T", "F", "T", "T", "F"], ["T", "F", "F", "T", "F"]
    assert value("group_accuracy", said, right, identities=list("ababc")) == pytest.approx(2 / 3)


def test_every_task_has_metrics_that_exist():
    assert {name for task in TASKS.values() for name in task.metrics} <= set(METRICS)


def test_intervals_hold_the_value_and_shrink_with_examples():
    said, right = labels_said(("no", "yes"), count=800)
    examples = [
        Example(input="x", target=r, references=(r,), identity=str(n)) for n, r in enumerate(right)
    ]
    widths = []
    for count in (50, 800):
        found = measure(["matthews", "accuracy"], said[:count], examples[:count], ("no", "yes"))
        assert all(i.low < i.value < i.high for i in found.values())
        widths.append(found["accuracy"].high - found["accuracy"].low)
    assert widths[1] == pytest.approx(widths[0] / 4, rel=0.25), "16 times the examples"
    again = measure(["accuracy"], said, examples, ("no", "yes"))
    assert again["accuracy"] == found["accuracy"], "the same seed draws the same"


def test_mistakes_are_told():
    with pytest.raises(ConfigError, match=r"no metric 'acuracy'. Did you mean 'accuracy'"):
        find_metric("acuracy")
    with pytest.raises(ConfigError, match=r"'binary_f1' needs a task with two labels.*has none"):
        value("binary_f1", ["a"], ["a"])
    with pytest.raises(DataError, match="no examples to score"):
        measure(["accuracy"], [], [])


@pytest.mark.parametrize(
    ("metric", "module"),
    [("bleu", "sacrebleu.metrics"), ("rouge1_stemmed", "rouge_score.rouge_scorer")],
)
def test_a_missing_extra_is_named(monkeypatch, metric, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtraError, match=r"switchlm\[evaluation\]"):
        value(metric, ["a"], ["a"])
