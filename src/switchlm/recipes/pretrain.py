"""Pre-train a model on text with span corruption, from random weights or those of another model.

At its end a run records the expert assignment of held-out text in RUN/routing.json.
"""

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from switchlm.data.batch import BatchSource
from switchlm.data.pretraining.loader import open_data
from switchlm.data.text.tokenizer import Tokenizer
from switchlm.errors import DataError
from switchlm.evaluation.evaluator import perplexity
from switchlm.evaluation.routing import routing_statistics
from switchlm.files import Report, replace_file, to_json
from switchlm.huggingface.init_from import check_fit, init_from
from switchlm.huggingface.load import save
from switchlm.model.transformer import SwitchTransformer
from switchlm.parallel.apply import apply, materialise
from switchlm.parallel.mesh import ALONE, Mesh, find_device, joined
from switchlm.recipes.config import (
    RunConfig,
    check_stated,
    from_sections,
    load_with_tokenizer,
    sections_of_run,
    to_sections,
    vocabulary_of,
    wire_dtype,
    with_vocabulary,
)
from switchlm.recipes.start import open_run
from switchlm.recipes.trained_with import metadata_of
from switchlm.report.write import ReportRun, write_report
from switchlm.training.loop import train
from switchlm.training.monitor import read_metrics
from switchlm.training.run_folder import RunFolder

MOST_TOKENS = 2**18  # of inputs; seconds of work at most
MOST_BATCHES = 64


def record_routing(
    model: SwitchTransformer,
    loader: BatchSource,
    tokenizer: Tokenizer,
    folder: RunFolder,
    mesh: Mesh = ALONE,
) -> list[dict[str, Any]]:
    """Write RUN/routing.json, one record per Switch layer, and return the records.

    There are none for a dense model or without held-out text. All processes of a mesh call this;
    the main one writes.
    """
    if not model.config.num_experts:
        return []
    try:
        first = loader.held_out(1)[0]
    except DataError:  # nothing is held out, which is allowed
        return []
    tokens = first.inputs_BS.numel() * mesh.data_size
    batches = loader.held_out(min(max(MOST_TOKENS // tokens, 1), MOST_BATCHES))
    layers = routing_statistics(model, batches, tokenizer, loader.sources, mesh=mesh)
    records = [dataclasses.asdict(layer) for layer in layers]
    if mesh.is_main:
        replace_file(folder.routing, to_json(records).encode())
    return records


def build_model(config: RunConfig, mesh: Mesh = ALONE) -> SwitchTransformer:
    """Return a new model on the run's device, sharded over the mesh.

    Its parameters depend on the configuration and the seed only, not on the mesh.
    """
    with torch.device("meta"):
        model = SwitchTransformer(config.model)
    if mesh.is_distributed:
        apply(model, mesh, wire_dtype=wire_dtype(config))
    materialise(model, find_device(config.training.device), config.training.seed)
    return model


def pretrain(
    config: RunConfig,
    out: Path,
    *,
    resume: bool = False,
    should_stop: Callable[[], bool] = lambda: False,
    report: Report = lambda line: None,
) -> Iterator[dict[str, Any]]:
    """Train as configured; yield `{"phase": text}` and every line of metrics.jsonl.

    A resumed run that has ended, and would take another course now, yields `{"ended": text}` alone.

    Writes the run folder OUT. With `resume`, and after torchrun restarted a failed job, it
    continues from the newest valid checkpoint, with the run's own tokenizer.

    report: called with lines of progress while text is prepared.

    Started by torchrun, each process calls this and trains its part of the mesh (docs/guides/
    parallel.md); OUT is on a file system that all of them see.
    """
    with joined(config.mesh, config.training.device) as mesh, ExitStack() as opened:
        resume = resume or mesh.restarted
        run = opened.enter_context(open_run(out, resume, mesh))
        folder, tokenizer = run.folder, None
        before = {} if run.is_new else sections_of_run(out)
        if "model" in before:
            config = with_vocabulary(config, from_sections(before).model)
            tokenizer = run.tokenizer(vocabulary_of(config.model))
        ended = run.check({folder.config.name: to_sections(config)}, report)
        if ended is not None:
            yield {"ended": ended}
            return
        start: SwitchTransformer | None = None
        if config.init_from is not None and not folder.has_checkpoint():
            yield {"phase": f"loading {config.init_from}"}
            start, theirs = load_with_tokenizer(config.init_from, "model to start from", report)
            if tokenizer is None and config.data.tokenizer != "bytes":
                check_stated(config.data.tokenizer, theirs, config.init_from)
            tokenizer = tokenizer or theirs
        yield {"phase": "reading text"}
        with mesh.local_rank_zero_first("text"):
            loader = open_data(
                config.data, seed=config.training.seed, tokenizer=tokenizer, report=report
            )
        share = loader.share(mesh.data_rank, mesh.data_size)
        config = with_vocabulary(config, loader.tokenizer if start is None else start.config)
        if start is not None:
            check_fit(start.config, config.model)
        if config.training.evaluate_every is not None:
            share.held_out(1)  # raises an error if there is no held-out text
        model = build_model(config, mesh)
        if start is not None:
            init_from(start, model)
        settings = {folder.config.name: to_sections(config)}
        run.begin(settings, loader.tokenizer, text=loader.text_hash)
        yield {"phase": "training"}
        yield from train(
            model,
            share,
            config.training,
            run=folder,
            resume=resume,
            should_stop=should_stop,
            mesh=mesh,
            kernels=config.kernels,
        )
        yield {"phase": "saving the model"}
        about = metadata_of(model, config.data)
        save(model, loader.tokenizer, folder.model, group=mesh.storage, metadata=about)
        routing = record_routing(model, share, loader.tokenizer, folder, mesh)
        if not mesh.is_main:
            return
        metrics = read_metrics(folder.metrics)
        evaluations = [line for line in metrics if "evaluation_loss" in line]
        last = evaluations[-1]["evaluation_loss"] if evaluations else None
        bits = evaluations[-1].get("evaluation_bits_per_byte") if evaluations else None
        write_report(
            folder.report,
            title=f"Pre-training: {out.name}",
            headline=""
            if last is None
            else f"Held-out loss {last:.3f} nats per target token, perplexity "
            f"{perplexity(last):.2f}{'' if bits is None else f', {bits:.3f} bits per byte'}.",
            runs=[ReportRun(name=out.name, metrics=metrics, routing=routing)],
            configuration=to_sections(config),
        )
