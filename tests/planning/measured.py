"""Measured steps of real processes, with which plan and simulate are compared."""

import dataclasses
import json
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor

from switchlm.data.batch import Batch
from switchlm.model import selection
from switchlm.model.transformer import SwitchTransformer
from switchlm.parallel.apply import apply, materialise
from switchlm.parallel.mesh import Mesh
from switchlm.planning.simulate import blank_batch, measure_step
from switchlm.recipes.config import RunConfig, wire_dtype


def measure(rank: int, configs: list[RunConfig], out: str) -> None:
    """Write the peak memory and collectives of one step of each configuration in this process.

    Tokens are assigned to the experts in turn, so that loads are balanced; all else is real.
    """
    figures = []
    for config in configs:
        mesh = Mesh.of(config.mesh, "cpu")

        def in_turn(
            probability_NE: Tensor, num_choices: int, bias_E: object = None, mesh: Mesh = mesh
        ) -> Tensor:
            num_tokens, num_experts = probability_NE.shape
            first = mesh.rank("expert") * num_tokens
            return ((first + torch.arange(num_tokens)) % num_experts)[:, None]

        with torch.device("meta"):
            model = SwitchTransformer(config.model)
        apply(model, mesh, wire_dtype=wire_dtype(config))
        materialise(model, torch.device("cpu"), seed=0)
        rows = config.data.batch_size // mesh.data_size
        batch = random_batch(config, rows)
        # Patched only here: this process runs other tests later.
        with mock.patch.object(selection, "choose", in_turn):
            peak, sent = measure_step(model, [batch] * config.training.accumulate, config, mesh)
        collectives = [[c.kind, c.axes, c.size, str(c.dtype), c.payload] for c in sent]
        figures.append({"peak": dataclasses.asdict(peak), "collectives": collectives})
    Path(out, f"{rank}.json").write_text(json.dumps(figures))


def random_batch(config: RunConfig, rows: int) -> Batch:
    batch = blank_batch(config.data, rows)
    return dataclasses.replace(
        batch,
        inputs_BS=torch.randint_like(batch.inputs_BS, 2, config.model.vocabulary_size),
        targets_BT=torch.randint_like(batch.targets_BT, 2, config.model.vocabulary_size),
    )
