"""Pre-train a model on text with span corruption."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from switchlm.checkpoint.huggingface import save
from switchlm.checkpoint.run_folder import RunFolder
from switchlm.config import write_yaml
from switchlm.data.loader import open_data
from switchlm.data.tokenizer import Tokenizer
from switchlm.errors import ConfigError
from switchlm.model.transformer import SwitchTransformer
from switchlm.recipes.config import RunConfig, to_sections, with_vocabulary
from switchlm.report.write import ReportRun, write_report
from switchlm.training.loop import train
from switchlm.training.monitor import read_metrics


def default_device() -> torch.device:
    """Return the accelerator if there is one, else the CPU."""
    return torch.accelerator.current_accelerator() or torch.device("cpu")


def build_model(config: RunConfig) -> SwitchTransformer:
    """Return a new model on the default device.

    Its parameters are drawn on the CPU, a pure function of the configuration and the seed.
    """
    torch.manual_seed(config.training.seed)
    return SwitchTransformer(config.model).to(default_device())


def pretrain(
    config: RunConfig,
    out: Path,
    *,
    resume: bool = False,
    should_stop: Callable[[], bool] = lambda: False,
    report: Callable[[str], None] = lambda line: None,
) -> Iterator[dict[str, Any]]:
    """Train as configured; yield `{"phase": text}` and every line of metrics.jsonl.

    Writes the run folder OUT. With `resume`, goes on from the newest valid checkpoint in it, with
    the run's own tokenizer. report: called with a line now and then while text is prepared.
    """
    folder = RunFolder(out)
    if folder.exists() and not resume:
        raise ConfigError(
            f"There is a run in {str(out)!r} already. Go on with it by --resume, or choose another "
            "--out."
        )
    yield {"phase": "reading text"}
    tokenizer = Tokenizer.load(folder.tokenizer) if folder.tokenizer.exists() else None
    loader = open_data(config.data, seed=config.training.seed, tokenizer=tokenizer, report=report)
    config = with_vocabulary(config, loader.tokenizer)
    folder.create()
    loader.tokenizer.save(folder.tokenizer)
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
