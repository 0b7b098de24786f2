"""At the end of a run: who goes to which expert, on held-out text."""

import dataclasses
import json
from typing import Any

from switchlm.checkpoint.files import replace_file
from switchlm.checkpoint.run_folder import RunFolder
from switchlm.data.tokenizer import Tokenizer
from switchlm.errors import DataError
from switchlm.evaluation.routing import routing_statistics
from switchlm.model.transformer import SwitchTransformer
from switchlm.parallel.mesh import ALONE, AnyMesh
from switchlm.training.loop import BatchSource

MOST_TOKENS = 2**18  # of inputs; seconds of work at most
MOST_BATCHES = 64


def record_routing(
    model: SwitchTransformer,
    loader: BatchSource,
    tokenizer: Tokenizer,
    folder: RunFolder,
    mesh: AnyMesh = ALONE,
) -> list[dict[str, Any]]:
    """Write RUN/routing.json, a record for every Switch layer, and return them as plain values.

    There are none for a dense model, nor where no text is held out. All processes of a mesh call
    this; the main one writes.
    """
    if not model.config.num_experts:
        return []
    try:
        first = loader.held_out(1)[0]
    except DataError:  # nothing is held out: a run may want that
        return []
    tokens = first.inputs_BS.numel() * mesh.num_shares
    batches = loader.held_out(min(max(MOST_TOKENS // tokens, 1), MOST_BATCHES))
    layers = routing_statistics(model, batches, tokenizer, loader.sources, mesh=mesh)
    records = [dataclasses.asdict(layer) for layer in layers]
    if mesh.is_main:
        replace_file(folder.routing, json.dumps(records).encode())
    return records


def read_routing(folder: RunFolder) -> list[dict[str, Any]]:
    """Return what `record_routing` wrote; nothing for a dense model."""
    if not folder.routing.exists():
        return []
    records: list[dict[str, Any]] = json.loads(folder.routing.read_text(encoding="utf-8"))
    return records
