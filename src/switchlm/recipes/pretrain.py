"""Pre-train a model on text with span corruption, from random weights or those of another model."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from switchlm.checkpoint.huggingface import save
from switchlm.checkpoint.run_folder import RunFolder
from switchlm.checkpoint.transplant import check_fit, transplant
from switchlm.config import write_yaml
from switchlm.data.loader import open_data
from switchlm.data.tokenizer import Tokenizer
from switchlm.errors import ConfigError
from switchlm.model.transformer import SwitchTransformer
from switchlm.parallel.apply import apply, materialise
from switchlm.parallel.mesh import ALONE, AnyMesh, Mesh, joined
from switchlm.recipes.config import RunConfig, to_sections, with_vocabulary
from switchlm.recipes.routing import record_routing
from switchlm.recipes.start import check_stated, open_whole
from switchlm.report.write import ReportRun, write_report
from switchlm.training.loop import train
from switchlm.training.monitor import read_metrics


def default_device() -> torch.device:
    """Return the accelerator of this process if there is one, else the CPU."""
    # PyTorch built for CUDA names CUDA where there is no GPU, unless it is asked to look.
    kind = torch.accelerator.current_accelerator(check_available=True)
    if kind is None:
        return torch.device("cpu")
    return torch.device(kind.type, torch.accelerator.current_device_index())


def build_model(config: RunConfig, mesh: AnyMesh = ALONE) -> SwitchTransformer:
    """Return a new model on the default device, sharded over the mesh.

    Its parameters are a pure function of the configuration and the seed, whatever the mesh.
    """
    with torch.device("meta"):
        model = SwitchTransformer(config.model)
    if isinstance(mesh, Mesh):
        exact = config.training.precision == "float32"
        apply(model, mesh, wire_dtype=None if exact else torch.bfloat16)
    materialise(model, default_device(), config.training.seed)
    return model


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
    the run's own tokenizer; so it does when a job was started anew after it failed. report: called
    with a line now and then while text is prepared.

    Started by torchrun, each process calls this and trains its part of the mesh (docs/guides/
    parallel.md); OUT is on a file system that all of them see.
    """
    with joined(config.mesh) as mesh:
        yield from _pretrain(config, out, mesh, resume or mesh.restarted, should_stop, report)


def _pretrain(
    config: RunConfig,
    out: Path,
    mesh: AnyMesh,
    resume: bool,
    should_stop: Callable[[], bool],
    report: Callable[[str], None],
) -> Iterator[dict[str, Any]]:
    folder = open_folder(out, resume)
    tokenizer = Tokenizer.load(folder.tokenizer) if folder.tokenizer.exists() else None
    start: SwitchTransformer | None = None
    if config.init_from is not None and not folder.has_checkpoint():
        yield {"phase": f"loading {config.init_from}"}
        start, theirs = open_whole(config.init_from, "model to start from", report)
        if tokenizer is None and config.data.tokenizer != "bytes":
            check_stated(config.data.tokenizer, theirs, config.init_from)
        tokenizer = tokenizer or theirs
    yield {"phase": "reading text"}
    with mesh.first_on_node("text"):
        loader = open_data(
            config.data, seed=config.training.seed, tokenizer=tokenizer, report=report
        )
    share = loader.share(mesh.share, mesh.num_shares)
    config = with_vocabulary(config, loader.tokenizer)
    if start is not None:
        check_fit(start.config, config.model)
    begin(folder, config, loader.tokenizer, mesh)
    model = build_model(config, mesh)
    if start is not None:
        transplant(start, model)
    yield {"phase": "training"}
    yield from train(
        model,
        share,
        config.training,
        run=folder,
        resume=resume,
        should_stop=should_stop,
        mesh=mesh,
    )
    yield {"phase": "saving the model"}
    save(model, loader.tokenizer, folder.model, group=mesh.storage)
    routing = record_routing(model, share, loader.tokenizer, folder, mesh)
    if not mesh.is_main:
        return
    metrics = read_metrics(folder.metrics)
    evaluations = [line for line in metrics if "evaluation_loss" in line]
    last = evaluations[-1]["evaluation_loss"] if evaluations else None
    write_report(
        folder.report,
        title=f"Pre-training: {out.name}",
        headline="" if last is None else f"Held-out loss {last:.3f} nats a target token.",
        runs=[ReportRun(name=out.name, metrics=metrics, routing=routing)],
        configuration=to_sections(config),
    )


def open_folder(out: Path, resume: bool) -> RunFolder:
    """Return the folder of a run; ConfigError if one is there that is not to be resumed."""
    folder = RunFolder(out)
    if folder.exists() and not resume:
        raise ConfigError(
            f"There is a run in {str(out)!r} already. Go on with it by --resume, or choose another "
            "--out."
        )
    return folder


def begin(folder: RunFolder, config: RunConfig, tokenizer: Tokenizer, mesh: AnyMesh) -> None:
    """Let the main process make the folder and write what a run is resumed with."""
    mesh.wait()
    if mesh.is_main:
        folder.create()
        tokenizer.save(folder.tokenizer)
        write_yaml(folder.config, to_sections(config))
    mesh.wait()
