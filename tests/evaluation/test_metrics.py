"""Every metric against its reference implementation."""

import random
import re
import string
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from switchlm.data.tasks.registry import TASKS
from switchlm.data.tasks.task import Example
from switchlm.errors import ConfigError, DataError, MissingExtraError
from switchlm.evaluation.metrics import METRICS, RougeWords, find_metric, measure

TEXT = "the cats were running quickly to a small house, which stood (alone) in 3 fields, all"
WORDS = TEXT.split()


def value(name, predictions, references, labels=None, identities=None):
    """Return the value of one metric, from 0 to 1; references: texts, or tuples of several."""
    several = [(r,) if isinstance(r, str) else r for r in references]
    identities = identities or list(map(str, range(len(several))))
    examples = [
        Example(input="x", target=texts[0], references=texts, identity=identity)
        for texts, identity in zip(several, identities, strict=True)
    ]
    return measure([name], predictions, examples, labels, resamples=2)[name].value / 100


def sentences(count, seed, longest=14):
    generator = random.Random(seed)
    return [
        " ".join(generator.choice(WORDS) for _ in range(generator.randrange(1, longest)))
        for _ in range(count)
    ]


def predicted_labels(names, count=200, seed=0, extra=("",)):
    """Return predictions (some are not labels) and the right labels."""
    generator = random.Random(seed)
    right = [generator.choice(names) for _ in range(count)]
    predicted = [
        r if generator.random() < 0.5 else generator.choice([*names, *extra]) for r in right
    ]
    return predicted, right


@pytest.mark.parametrize("names", [("no", "yes"), ("e", "n", "c")])
def test_classification_is_scikit_learns(names):
    reference = pytest.importorskip("sklearn.metrics")
    predicted, right = predicted_labels(names)
    assert value("accuracy", predicted, right, names) == pytest.approx(
        reference.accuracy_score(right, predicted)
    )
    assert value("macro_f1", predicted, right, names) == pytest.approx(
        reference.f1_score(right, predicted, labels=names, average="macro", zero_division=0)
    )
    assert value("matthews", predicted, right, names) == pytest.approx(
        reference.matthews_corrcoef(right, predicted)
    )


def test_binary_f1_counts_the_second_label():
    reference = pytest.importorskip("sklearn.metrics")
    predicted, right = predicted_labels(("no", "yes"))
    expected = reference.f1_score([r == "yes" for r in right], [s == "yes" for s in predicted])
    assert value("binary_f1", predicted, right, ("no", "yes")) == pytest.approx(expected)


def test_correlations_are_scipys():
    reference = pytest.importorskip("scipy.stats")
    generator = random.Random(0)
    right = [round(generator.uniform(0, 5), 1) for _ in range(150)]
    predicted = [round(r + generator.gauss(0, 1), 0) for r in right]  # with many ties
    texts = list(map(str, predicted)), list(map(str, right))
    assert value("pearson", *texts) == pytest.approx(reference.pearsonr(predicted, right)[0])
    assert value("spearman", *texts) == pytest.approx(reference.spearmanr(predicted, right)[0])


@pytest.mark.parametrize("predicted", [["3.2"] * 3, ["much"] * 3, ["nan", "inf", "-inf"]])
def test_constant_predictions_have_correlation_0(predicted):
    assert value("pearson", predicted, ["1.0", "2.0", "4.0"]) == 0
    assert value("spearman", predicted, ["1.0", "2.0", "4.0"]) == 0


@pytest.mark.parametrize("stemmed", [False, True])
def test_rouge_is_rouge_scores(stemmed):
    reference = pytest.importorskip("rouge_score.rouge_scorer")
    predicted = ["", "...", *sentences(60, 1)]
    right = [tuple(sentences(1 + n % 3, 100 + n)) for n in range(len(predicted))]
    kinds = ["rouge1", "rouge2", "rougeL"]
    scorer = reference.RougeScorer(kinds, use_stemmer=stemmed)
    for kind in kinds:
        expected = np.mean(
            [
                max(scorer.score(one, s)[kind].fmeasure for one in r)
                for s, r in zip(predicted, right, strict=True)
            ]
        )
        assert value(kind + "_stemmed" * stemmed, predicted, right) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("predicted", "right"),
    [
        (["the cat is here now", "a b q d e"], ["the cat was here then", "a b c d f"]),
        (["", "a b c x y z"], ["a", "a b c d f g"]),
        (["cat", ""], ["cat", "dog"]),
        (sentences(20, 1, longest=5), sentences(20, 2, longest=5)),
        (sentences(40, 1)[20:] + sentences(40, 2)[20:], sentences(40, 2)),
    ],
    ids=["no four in a row", "few", "one word", "short", "long"],
)
def test_bleu_is_sacrebleus(predicted, right):
    """With its smoothing, where no n-gram of four words is right."""
    reference = pytest.importorskip("sacrebleu")
    expected = reference.corpus_bleu(predicted, [right]).score / 100
    assert value("bleu", predicted, right) == pytest.approx(expected)
    others = sentences(len(right), 3)
    expected = reference.corpus_bleu(predicted, [right, others]).score / 100
    assert value("bleu", predicted, list(zip(right, others, strict=True))) == pytest.approx(
        expected
    )


@pytest.mark.parametrize(
    ("predicted", "right", "tokenizer"),
    [
        ("我们明天去公园", "我们后天去公园玩 (3 次)", "zh"),
        ("わたしは公園に行きます", "わたしはあした公園に行きます", "char"),
        ("ฉันไปสวนสาธารณะ", "ฉันจะไปสวนสาธารณะพรุ่งนี้", "char"),
        ("Мы завтра идём в парк", "Мы идём в парк", "13a"),
        ("우리는 내일 같이 공원에 간다", "우리는 내일 같이 집에 간다", "13a"),
    ],
)
def test_bleu_takes_the_tokenizer_of_the_references(predicted, right, tokenizer):
    reference = pytest.importorskip("sacrebleu")
    expected = reference.corpus_bleu([predicted], [[right]], tokenize=tokenizer).score / 100
    assert value("bleu", [predicted], [right]) == pytest.approx(expected)
    assert expected > 0
    for name in ("13a", "intl", "zh", "char"):
        expected = reference.corpus_bleu([predicted], [[right]], tokenize=name).score / 100
        assert value(f"bleu_{name}", [predicted], [right]) == pytest.approx(expected)


def squad_words(text):
    """Of an answer, as the script of SQuAD does: lower case, no punctuation, no articles."""
    bare = "".join(one for one in text.lower() if one not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", bare).split()


def squad_f1(predicted, right):
    """The harmonic mean of precision and recall; answers without words agree with each other."""
    predicted, right = squad_words(predicted), squad_words(right)
    if not predicted or not right:
        return float(predicted == right)
    common = sum(min(predicted.count(word), right.count(word)) for word in set(right))
    precision, recall = common / len(predicted), common / len(right)
    return 2 * precision * recall / (precision + recall) if common else 0.0


# A text, another that shares some words with it, and the words of each as ASCII.
LANGUAGES = {
    "Arabic": ("اللغة العربية جميلة، جدا", "اللغة جميلة", "e b c d", "e c"),
    "Chinese": ("我去公园。", "我明天去", "g b c d", "g e f b"),
    "German": ("Die Straße ist schön", "die straße war schön!", "g b c d", "g b e d"),
    "Greek": ("η Αθήνα είναι ωραία", "Αθήνα: ωραία", "g b c d", "b d"),
    "Hindi": ("मैं हिन्दी में लिखता हूँ।", "मैं हिन्दी पढ़ता हूँ", "g b c d e", "g b f e"),
    "Japanese": ("京都へ行く。", "京都に行く", "g b c d e", "g b f d e"),
    "Korean": ("나는 서울에 산다", "나는 부산에 산다", "e b c", "e d c"),
    "Persian": ("او می‌رود خانه", "او خانه رفت", "e b c", "e c d"),
    "Russian": ("Мама мыла раму.", "мама мыла пол", "e b c", "e b d"),
    "Thai": ("ที่นี่ดี", "ที่ดี", "b c d", "b d"),
}


@pytest.mark.parametrize("language", LANGUAGES)
def test_words_of_every_script_count(language):
    reference = pytest.importorskip("rouge_score.rouge_scorer")
    text, other, as_ascii, other_as_ascii = LANGUAGES[language]
    for kind in ("rouge1", "rouge2", "rougeL"):
        scorer = reference.RougeScorer([kind])
        expected = scorer.score(as_ascii, other_as_ascii)[kind].fmeasure
        assert value(kind, [other], [text]) == pytest.approx(expected)
        assert value(f"{kind}_stemmed", [other], [text]) == pytest.approx(expected)
        assert value(kind, [text], [text]) == 1
    assert value("f1", [other], [text]) == pytest.approx(squad_f1(as_ascii, other_as_ascii))
    assert value("exact_match", [f"«{text}» !"], [text]) == 1
    assert value("exact_match", [other], [text]) == 0


@pytest.mark.parametrize(
    ("one", "same"),
    [
        ("２０２０年の café", "2020年の cafe\u0301"),  # full width; an accent of its own
        ("ﬁn", "fin"),
        ("می\u200cرود", "میرود"),  # the joiner only formats
        ("co\u00adoperate", "cooperate"),
    ],
)
def test_forms_of_the_same_characters_are_equal(one, same):
    for name in ("rouge1", "f1", "exact_match"):
        assert value(name, [one], [same]) == 1


@given(st.lists(st.text(st.characters(max_codepoint=127), max_size=30), min_size=2, max_size=2))
def test_of_ascii_the_words_are_rouge_scores_and_squads(texts):
    tokenizers = pytest.importorskip("rouge_score.tokenizers")
    for stemmed in (False, True):
        for text in texts:
            expected = tokenizers.DefaultTokenizer(stemmed).tokenize(text)
            assert RougeWords(stemmed).tokenize(text) == expected
    one, other = texts
    assert value("exact_match", [one], [other]) == (squad_words(one) == squad_words(other))
    assert value("f1", [one], [other]) == pytest.approx(squad_f1(one, other))


@pytest.mark.parametrize(
    ("predicted", "references", "match", "f1"),
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
def test_answers_are_compared_as_squad_does(predicted, references, match, f1):
    assert value("exact_match", [predicted], [references]) == match
    assert value("f1", [predicted], [references]) == pytest.approx(f1)


def test_a_question_is_right_when_all_its_answers_are():
    predicted, right = ["T", "F", "T", "T", "F"], ["T", "F", "F", "T", "F"]
    assert value("group_accuracy", predicted, right, identities=list("ababc")) == pytest.approx(
        2 / 3
    )


def test_every_task_has_metrics_that_exist():
    assert {name for task in TASKS.values() for name in task.metrics} <= set(METRICS)


def test_intervals_contain_the_value_and_shrink_with_examples():
    predicted, right = predicted_labels(("no", "yes"), count=800)
    examples = [
        Example(input="x", target=r, references=(r,), identity=str(n)) for n, r in enumerate(right)
    ]
    widths = []
    for count in (50, 800):
        found = measure(
            ["matthews", "accuracy"], predicted[:count], examples[:count], ("no", "yes")
        )
        assert all(i.low < i.value < i.high for i in found.values())
        widths.append(found["accuracy"].high - found["accuracy"].low)
    assert widths[1] == pytest.approx(widths[0] / 4, rel=0.25), "16 times the examples"
    again = measure(["accuracy"], predicted, examples, ("no", "yes"))
    assert again["accuracy"] == found["accuracy"], "the same seed draws the same"


def test_errors():
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
