"""Evaluation on a task that a tiny model was trained on in part."""

import numpy as np
import pytest
import torch

from switchlm.data.tasks.loader import PairLoader, encode_texts
from switchlm.data.tasks.task import Example, Task
from switchlm.data.text.tokenizer import Tokenizer
from switchlm.errors import ConfigError, DataError
from switchlm.evaluation import tasks
from switchlm.evaluation.tasks import label_losses, score_task
from switchlm.generation.decode import dropless, pad_prompts
from switchlm.model.losses import cross_entropy
from switchlm.model.presets import preset
from switchlm.model.transformer import SwitchTransformer, shift_right

BYTES = Tokenizer.bytes()
LABELS = ("bad", "good")
TASK = Task(
    name="mood", input="{text}", labels=LABELS, metrics=("accuracy", "binary_f1", "matthews")
)


def example(text, target):
    return Example(input=text, target=target, references=(target,), identity=text)


MOODS = [example("x" * n + "ab"[n % 2], LABELS[n % 2]) for n in range(1, 9)]


@pytest.fixture(scope="module")
def model():
    """A model trained on the mood of texts that end in a or b."""
    torch.manual_seed(0)
    model = SwitchTransformer(preset("nano"))
    data = PairLoader(
        {"mood": MOODS}, BYTES, input_length=12, target_length=6, batch_size=8, seed=0
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for step in range(150):
        batch = data.batch(step)
        segments = batch.target_segments_BT
        decoder_inputs_BT = shift_right(batch.targets_BT, segments, model.config.pad_id)
        output = model(batch.inputs_BS, decoder_inputs_BT, batch.input_segments_BS, segments)
        total, count = cross_entropy(output.logits_BTV, batch.targets_BT, batch.target_mask_BT)
        (total / count).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


@pytest.mark.parametrize("rank_labels", [False, True])
def test_only_trained_examples_are_right(model, rank_labels):
    wrong = [example(one.input, LABELS[one.target == "bad"]) for one in MOODS[:2]]
    found = score_task(model, BYTES, TASK, MOODS + wrong, batch_size=3, rank_labels=rank_labels)
    assert found.predictions == (*(one.target for one in MOODS), "good", "bad")
    assert found.value == found.metrics["accuracy"].value == pytest.approx(80.0)
    assert list(found.metrics) == list(TASK.metrics)
    assert found.metrics["accuracy"].low < 80 < found.metrics["accuracy"].high
    assert (found.unfinished, found.truncated_inputs) == (0, 0)


def test_scores_do_not_depend_on_batches(model):
    one = score_task(model, BYTES, TASK, MOODS, batch_size=1)
    assert one == score_task(model, BYTES, TASK, MOODS, batch_size=8)
    turned = score_task(model, BYTES, TASK, MOODS[::-1], batch_size=5)
    assert turned.predictions == one.predictions[::-1]


def test_label_losses_are_those_of_the_model(model):
    prompts, _ = encode_texts([one.input for one in MOODS], BYTES, 32)
    labels, _ = encode_texts(LABELS, BYTES, 32)
    inputs_BS, segments_BS = pad_prompts([prompt.tolist() for prompt in prompts], 0)
    losses = label_losses(model, inputs_BS, segments_BS, labels)
    model.eval()
    for row, prompt in enumerate(prompts):
        for column, label in enumerate(labels):
            target_1T = torch.from_numpy(label)[None]
            with torch.no_grad(), dropless(model):
                output = model(torch.from_numpy(prompt)[None], shift_right(target_1T, None, 0))
            total, _ = cross_entropy(output.logits_BTV, target_1T)
            assert losses[row, column].item() == pytest.approx(total.item(), abs=2e-4)


def test_truncated_inputs_and_answers_are_counted(model):
    found = score_task(model, BYTES, TASK, MOODS, input_length=6, max_new_tokens=2)
    assert found.truncated_inputs == 4, "of 2 to 9 bytes, those of more than 5"
    assert found.unfinished == len(MOODS)
    assert all(len(prediction) == 2 for prediction in found.predictions)


def test_the_targets_of_a_task_without_labels_are_ranked(model):
    own = Task(name="mine", input="{text}", target="{mood}", metrics=("accuracy",))
    found = score_task(model, BYTES, own, MOODS, rank_labels=True)
    assert found.predictions == tuple(one.target for one in MOODS)


def test_progress_is_reported(model):
    done = []
    score_task(model, BYTES, TASK, MOODS, batch_size=3, report=done.append)
    assert done == [3, 6, 8]


@pytest.mark.parametrize(
    ("target", "skip", "exact"),
    [
        ("<extra_id_0> dog<extra_id_1>", False, 100),
        ("<extra_id_0>  dog <extra_id_1> ", False, 100),
        ("dog", False, 0),
        ("dog", True, 100),
    ],
)
def test_metrics_see_sentinels_and_not_the_space_around_them(target, skip, exact, monkeypatch):
    task = Task(name="blanks", input="{text}", metrics=("exact_match",))
    answer = [BYTES.sentinel_ids[0], *BYTES.encode("dog"), BYTES.sentinel_ids[1]]
    output = type("Output", (), {"finished_B": torch.tensor([True])})()
    output.rows = lambda ends: [answer]
    monkeypatch.setattr(tasks, "generate", lambda *args, **options: output)
    found = score_task(
        SwitchTransformer(preset("nano")),
        BYTES,
        task,
        [example("a <extra_id_0>", target)],
        skip_special=skip,
    )
    assert found.metrics["exact_match"].value == exact
    assert found.predictions == ("dog" if skip else "<extra_id_0>dog<extra_id_1>",)


def test_errors(model):
    free = Task(name="talk", input="{text}", metrics=("f1",))
    with pytest.raises(ConfigError, match="'talk' has no labels to rank"):
        score_task(model, BYTES, free, [example("x", f"{n}") for n in range(51)], rank_labels=True)
    with pytest.raises(DataError, match="no examples to score"):
        score_task(model, BYTES, TASK, [])
    beyond = np.array([model.config.vocabulary_size])
    with pytest.raises(DataError, match="that of another model"):
        label_losses(model, torch.ones(1, 1, dtype=torch.int64), torch.ones(1, 1), [beyond])
