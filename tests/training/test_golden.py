"""The loss curve of the preset `nano` must stay what it is, on any machine and version of torch.

A change that is meant to alter it updates the file, and its commit says so:

    python tests/training/test_golden.py
"""

import json
import random
import tempfile
from pathlib import Path

import pytest
import torch

from switchlm.data.config import DataConfig
from switchlm.data.pretraining.loader import open_data
from switchlm.model.presets import preset
from switchlm.model.transformer import SwitchTransformer
from switchlm.training.config import TrainingConfig
from switchlm.training.loop import train

GOLDEN = Path(__file__).parents[1] / "golden" / "nano.json"
# Changes of 1e-6 in every weight move the losses by 2e-7, and the rest by 2e-5.
TOLERANCE = 2e-4
TRAINING = TrainingConfig(
    steps=40,
    learning_rate=5e-3,
    warmup_steps=10,
    log_every=5,
    evaluate_every=20,
    evaluate_batches=2,
    checkpoint_every=None,
)


def write_text(folder: Path) -> None:
    """Sentences of invented words, the same everywhere."""
    words = random.Random(0)
    lexicon = [
        "".join(words.choice("bdgklmnprst") + words.choice("aeiou") for _ in range(length))
        for length in (1, 2, 3)
        for _ in range(12)
    ]
    for document in range(12):
        sentences = [" ".join(words.choices(lexicon, k=6)) + "." for _ in range(40)]
        (folder / f"{document:02}.txt").write_text(" ".join(sentences), encoding="utf-8")


def curve(folder: Path) -> dict[str, list[float]]:
    """Return training and held-out losses, the norms of the gradients, and the loads."""
    text = folder / "text"
    text.mkdir()
    write_text(text)
    data = DataConfig(
        sources=(str(text),), input_length=64, batch_size=8, held_out_share=0.2, tokenizer="bytes"
    )
    loader = open_data(data, seed=0, cache_dir=folder / "cache")
    config = preset("nano")
    assert config.vocabulary_size == loader.tokenizer.vocabulary_size
    torch.manual_seed(0)
    lines = list(train(SwitchTransformer(config), loader, TRAINING))
    training = [line for line in lines if "loss" in line]
    return {
        "loss": [line["loss"] for line in training],
        "gradient_norm": [line["gradient_norm"] for line in training],
        "balance_loss": [line["balance_loss"] for line in training],
        "evaluation_loss": [line["evaluation_loss"] for line in lines if "evaluation_loss" in line],
    }


def test_nano_learns_as_it_always_did(tmp_path):
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))
    found = curve(tmp_path)
    assert found["loss"] == pytest.approx(golden["loss"], rel=TOLERANCE)
    assert found["evaluation_loss"] == pytest.approx(golden["evaluation_loss"], rel=TOLERANCE)
    assert found["balance_loss"] == pytest.approx(golden["balance_loss"], rel=10 * TOLERANCE)
    assert found["gradient_norm"] == pytest.approx(golden["gradient_norm"], rel=10 * TOLERANCE)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        GOLDEN.parent.mkdir(exist_ok=True)
        GOLDEN.write_text(json.dumps(curve(Path(name)), indent=2) + "\n", encoding="utf-8")
