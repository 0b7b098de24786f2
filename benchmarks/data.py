"""Tokens per second of the data pipeline, compared with those of training.

    python benchmarks/data.py [--preset tiny] [--repeats 7] [--threads 2]

Each case makes batches of 64 rows of 192 inputs from the standard library of Python, tokens already
in the cache, on one thread; training takes whole steps on such batches with all threads. Tokenizing
(done once for a corpus) is measured beside it.
"""

import argparse
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import harness
from switchlm.data.config import Columns, DataConfig
from switchlm.data.pretraining.loader import Loader, open_data
from switchlm.data.text import sources
from switchlm.data.text.tokenizer import Tokenizer
from switchlm.model.presets import preset
from switchlm.model.transformer import SwitchTransformer
from switchlm.training.config import TrainingConfig
from switchlm.training.optimizer import build_optimizer
from switchlm.training.step import training_step

BATCHES = 20
SHAPE: dict[str, Any] = {"input_length": 192, "batch_size": 64, "mean_span": 6.0}
SETTINGS: dict[str, dict[str, Any]] = {
    "running text": {"sources": ("python:stdlib",)},
    "running text of two sources": {
        "sources": ("a=python:stdlib:0.7", "b=python:site-packages:0.3"),
    },
    "packed documents": {"sources": ("python:stdlib",), "pack": True},
}
TRAINING = "training step"


def make_batches(loader: Loader) -> Callable[[], None]:
    """Return a function that makes the next BATCHES batches."""
    step = 0

    def run() -> None:
        nonlocal step
        for _ in range(BATCHES):
            loader.batch(step)
            step += 1

    return run


def train(name: str, loader: Loader) -> Callable[[], object]:
    """Return one training step of a preset."""
    model = SwitchTransformer(preset(name))
    optimizer = build_optimizer(model, TrainingConfig())
    batch = loader.batch(0)
    return lambda: training_step(model, optimizer, [batch])


def tokenizing(repeats: int) -> dict[str, float]:
    """Return characters per second of the byte tokenizer, median over the standard library."""
    source = sources.parse("python:stdlib")
    documents = sources.read(source, columns=Columns(), max_documents=None, skipped=Counter[str]())
    texts = [document.text for document in documents]
    tokenizer = Tokenizer.bytes()
    seconds = harness.measure({"bytes": lambda: tokenizer.encode_plain(texts)}, repeats)["bytes"]
    return {"characters_a_second": sum(map(len, texts)) / harness.summary(seconds)["median"]}


def figures(tokens: int, seconds: list[float], batches: int) -> dict[str, float]:
    """Return the tokens per second of a case."""
    times = harness.summary(seconds)
    return {
        "tokens_a_second_median": batches * tokens / times["median"],
        "tokens_a_second_best": batches * tokens / times["minimum"],
        "milliseconds_a_batch": 1e3 * times["median"] / batches,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    with tempfile.TemporaryDirectory() as folder:
        loaders = {
            name: open_data(
                DataConfig(**SHAPE, **settings), seed=options.seed, cache_dir=Path(folder)
            )
            for name, settings in SETTINGS.items()
        }
        cases: dict[str, Callable[[], object]] = {
            name: make_batches(loader) for name, loader in loaders.items()
        }
        cases[TRAINING] = train(options.preset, loaders["running text"])
        seconds = harness.measure(cases, options.repeats)
        tokens = {name: loader.batch(0).num_tokens for name, loader in loaders.items()}
    found = {name: figures(tokens[name], seconds[name], BATCHES) for name in loaders}
    found[TRAINING] = figures(tokens["running text"], seconds[TRAINING], 1)
    for values in found.values():
        for which in ("median", "best"):
            values[f"times_training_{which}"] = (
                values[f"tokens_a_second_{which}"] / found[TRAINING][f"tokens_a_second_{which}"]
            )
    rows = [
        [
            f"{name}, {options.preset}" if name == TRAINING else name,
            *(
                f"{values[f'tokens_a_second_{which}'] / 1e6:.3f}, "
                f"{values[f'times_training_{which}']:.0f} x"
                for which in ("median", "best")
            ),
        ]
        for name, values in found.items()
    ]
    headers = ["million tokens per second, times training's", "median", "best repeat"]
    speed = tokenizing(options.repeats)
    harness.write(
        "data",
        "The data pipeline against training",
        {
            "environment": harness.environment(options.seed),
            "repeats": options.repeats,
            "cases": found,
            "tokenizing": speed,
            "seconds": seconds,
        },
        [
            harness.table(headers, rows),
            f"Tokenizing bytes: {speed['characters_a_second'] / 1e6:.0f} million characters a "
            "second on one thread.",
        ],
    )


if __name__ == "__main__":
    main()
