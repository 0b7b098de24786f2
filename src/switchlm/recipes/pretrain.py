"""Pre-train a model on text with span corruption."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from switchlm.checkpoint.huggingface import save
from switchlm.checkpoint.run_folder import RunFolder
from switchlm.config import write_yaml
from switchlm.data.loader import open_data
from switchlm.errors import ConfigError
from switchlm.model.transformer import SwitchTransformer
from switchlm.recipes.config import RunConfig, to_sections, with_vocabulary
from switchlm.report.write import ReportRun, write_report
from switchlm.training.loop import train
from switchlm.training.monitor import read_metrics


def build_model(config: RunConfig) -> SwitchTransformer:
    """Return a new model, its parameters a pure function of the configuration and the seed."""
    torch.manual_seed(config.training.seed)
    return SwitchTransformer(config.model)


def pretrain(
    config: RunConfig,
    out: Path,
    *,
    resume: bool = False,
    should_stop: Callable[[], bool] = lambda: False,
) -> Iterator[dict[str, Any]]:
    """Train as configured; yield `{"phase": text}` and every line of metrics.jsonl.

    Writes the run folder OUT. With `resume`, goes on from the newest valid checkpoint in it.
    """
    folder = RunFolder(out)
    if folder.exists() and not resume:
        raise ConfigError(
            f"There is a run in {str(out)!r} already. Go on with it by --resume, or choose another "
            "--out."
        )
    yield {"phase": "reading text"}
    loader = open_data(config.data, seed=config.training.seed)
    config = with_vocabulary(config, loader.tokenizer.vocabulary_size)
    folder.create()
    write_yaml(folder.config, to_sections(config))
    model = build_model(config)
    yield {"phase": "training"}
    yield from train(
        model, loader, config.training, run=folder, resume=resume, should_stop=should_stop
    )
    yield {"phase": "saving the model"}
    save(model, loader.tokenizer, folder.model)
    metrics = read_metrics(folder.metrics)
    evaluations = [line for line in metrics if "evaluation_loss" in line]
    last = evaluations[-1]["evaluation_loss"] if evaluations else None
    write_report(
        folder.report,
        title=f"Pre-training: {out.name}",
        headline="" if last is None else f"Held-out loss {last:.3f} nats a target token.",
        runs=[ReportRun(name=out.name, metrics=metrics)],
        configuration=to_sections(config),
    )
