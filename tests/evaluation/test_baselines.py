import pytest

from switchlm.data.tasks.task import Example, Task
from switchlm.errors import ConfigError
from switchlm.evaluation.baselines import baselines, guessed_labels, labels_to_rank


def examples(*targets):
    return [
        Example(input=f"{n}", target=text, references=(text,), identity=f"{n}")
        for n, text in enumerate(targets)
    ]


def task(*metrics, labels=None):
    return Task(name="mine", input="{x}", metrics=metrics or ("accuracy",), labels=labels)


def test_a_constant_answer_and_a_guess_are_scored_as_scikit_learn_scores_them():
    reference = pytest.importorskip("sklearn.dummy")
    scores = pytest.importorskip("sklearn.metrics")
    right = ["yes"] * 66 + ["no"] * 34
    found = baselines(
        task("accuracy", "macro_f1", "matthews", "binary_f1", labels=("no", "yes")),
        examples(*right),
    )
    inputs = [[0]] * len(right)
    constant = reference.DummyClassifier(strategy="most_frequent").fit(inputs, right)
    predicted = constant.predict(inputs)
    assert found.answer == "yes"
    assert found.majority == pytest.approx(
        {
            "accuracy": 66.0,
            "macro_f1": 100 * scores.f1_score(right, predicted, average="macro"),
            "matthews": 0.0,
            "binary_f1": 100 * scores.f1_score(right, predicted, pos_label="yes"),
        }
    )
    many = right * 500
    guess = reference.DummyClassifier(strategy="uniform", random_state=0)
    predicted = guess.fit([[0]] * len(many), many).predict([[0]] * len(many))
    assert found.chance["accuracy"] == pytest.approx(50)
    assert found.chance["matthews"] == pytest.approx(0, abs=1e-9)
    for name, expected in (
        ("macro_f1", scores.f1_score(many, predicted, average="macro")),
        ("binary_f1", scores.f1_score(many, predicted, pos_label="yes")),
    ):
        assert found.chance[name] == pytest.approx(100 * expected, abs=0.5)
    assert found.best("accuracy") == pytest.approx(66)


def test_of_free_text_there_is_no_guess():
    found = baselines(task("exact_match", "f1"), examples("x b", "x c", "d", "x b"))
    assert found.answer == "x b"
    assert found.majority == pytest.approx({"exact_match": 50, "f1": 62.5})
    assert found.chance is None


def test_labels_of_a_users_file_are_its_targets_if_they_are_few():
    assert guessed_labels(task(labels=("x", "y")), examples("x")) == ("x", "y")
    assert guessed_labels(task(), examples("b", "a", "b", "a")) == ("a", "b")
    assert guessed_labels(task(), examples("b", "a", "c")) is None
    assert labels_to_rank(task(), examples("b", "a", "c")) == ("a", "b", "c")
    with pytest.raises(ConfigError, match="no labels to rank: its 60 examples have 60 different"):
        labels_to_rank(task(), examples(*map(str, range(60))))
