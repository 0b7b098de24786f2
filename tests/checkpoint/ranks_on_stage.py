"""Plays scenes with many processes, for the drivers of tests about sharded checkpoints.

It forks, so that torch is imported once for all of them; gloo connects them through a file.
"""

import dataclasses
import json
import os
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from switchlm.checkpoint.store import CheckpointStore
from switchlm.errors import CheckpointError
from switchlm.model.config import ModelConfig
from switchlm.model.presets import preset
from switchlm.model.transformer import SwitchTransformer
from switchlm.parallel.apply import apply, materialise
from switchlm.parallel.mesh import AXES, Mesh, MeshConfig
from switchlm.training.config import TrainingConfig
from switchlm.training.optimizer import build_optimizer, optimizer_state

# 6 experts over 4 processes leave uneven and empty parts.
CONFIG = dataclasses.replace(preset("nano"), num_experts=6, gated=True)
# Wide enough for Adafactor to factor.
CONFIGS = {"adamw": CONFIG, "adafactor": dataclasses.replace(CONFIG, d_model=128, d_ff=128)}
ONE = [MeshConfig()]
TWO = [MeshConfig(data=2), MeshConfig(expert=2), MeshConfig(tensor=2), MeshConfig(replicas=2)]
FOUR = [
    MeshConfig(data=4),
    MeshConfig(data=2, expert=2),
    MeshConfig(expert=2, tensor=2),
    MeshConfig(data=2, tensor=2),
    MeshConfig(replicas=2, data=2),
    MeshConfig(replicas=2, expert=2),
]


def name_of(mesh: MeshConfig | None) -> str:
    if mesh is None:
        return "plain"
    return "-".join(f"{axis}{getattr(mesh, axis) or 1}" for axis in AXES)


def play(
    folder: Path, size: int, scene: Callable[[], Any], all_live: bool = True, quiet: bool = False
) -> list[Any]:
    """Let `size` processes play a scene; return what each returns, None if it did not end well.

    all_live: whether all must end well. quiet: whether they may complain.
    """
    meeting = folder / f"meeting-{time.monotonic_ns()}"
    pids = []
    for rank in range(size):
        pid = os.fork()
        if pid == 0:
            if quiet:
                os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            _act(meeting, rank, size, scene)
        pids.append(pid)
    ended = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    if all_live:
        assert not any(ended), f"the processes ended with {ended}"
    return [
        json.loads(result.read_text()) if (result := _result(meeting, rank)).exists() else None
        for rank in range(size)
    ]


def _result(meeting: Path, rank: int) -> Path:
    return meeting.with_suffix(f".{rank}.json")


def _act(meeting: Path, rank: int, size: int, scene: Callable[[], Any]) -> None:
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{meeting}",
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=30),
        )
        _result(meeting, rank).write_text(json.dumps(scene()))
        dist.barrier()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


class Run:
    """A small model with its optimizer on a mesh (None: no mesh), and a store."""

    def __init__(
        self,
        mesh: MeshConfig | None,
        seed: int,
        optimizer: Any = "adamw",
        config: ModelConfig | None = None,
    ) -> None:
        config = config or CONFIGS[optimizer]
        if mesh is None:
            torch.manual_seed(seed)
            self.model = SwitchTransformer(config)
        else:
            with torch.device("meta"):
                self.model = SwitchTransformer(config)
            apply(self.model, Mesh.of(mesh, "cpu"))
            materialise(self.model, torch.device("cpu"), seed)
        self.optimizer = build_optimizer(self.model, TrainingConfig(optimizer=optimizer))
        self.mesh = mesh

    def step(self) -> None:
        """Take a step whose gradients every layout has the same."""
        for parameter in self.model.parameters():
            parameter.grad = parameter.detach() * 0.5
        self.optimizer.step()

    def tensors(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "optimizer": optimizer_state(self.model, self.optimizer),
        }

    def full(self) -> dict[str, Tensor]:
        """Every tensor of the state, gathered by DTensor itself."""
        state = self.tensors()
        flat = {f"model/{name}": tensor for name, tensor in state["model"].items()}
        for name, own in state["optimizer"].items():
            flat |= {f"optimizer/{name}/{key}": tensor for key, tensor in own.items()}
        return {
            name: (t.full_tensor() if isinstance(t, DTensor) else t).detach().clone()
            for name, t in flat.items()
        }

    def save(self, folder: Path, step: int) -> None:
        with open_store(folder) as store:
            store.save(step, {**self.tensors(), "progress": {"step": step}}, wait=True)

    def load(self, folder: Path, step: int | None = None) -> None:
        with open_store(folder) as store:
            state = store.load(step, self.tensors())
            assert step is None or state["progress"]["step"] == step


def open_store(folder: Path, **options: Any) -> CheckpointStore:
    group = dist.new_group(backend="gloo") if dist.is_initialized() else None
    return CheckpointStore(folder, group=group, **options)


def message_of(work: Callable[[], Any]) -> str:
    """Return what the project's own error says, or a disk's."""
    try:
        work()
    except (CheckpointError, OSError) as error:
        return str(error)
    return "no error"


def only_on(rank: int, error: Exception) -> Callable[..., Any]:
    """Return a sync that fails on one rank."""
    fsync = os.fsync

    def step(descriptor: int) -> None:
        if dist.get_rank() == rank:
            raise error
        fsync(descriptor)

    return step


def differences(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    return [
        name
        for name in sorted(one.keys() | other.keys())
        if name not in one or name not in other or not torch.equal(one[name], other[name])
    ]
