"""Checkpoints of many processes: test_sharded_store.py and test_sharded_model.py run it.

A program of its own, because it forks: torch is imported once for all the processes. Each scene is
played by so many ranks, connected by gloo through a file. Prints one JSON object.

    sharded_driver.py FOLDER SCENE ...
"""

import dataclasses
import gc
import json
import os
import sys
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
from switchlm.model.presets import preset
from switchlm.model.transformer import SwitchTransformer
from switchlm.parallel.apply import apply, materialise
from switchlm.parallel.mesh import AXES, Mesh, MeshConfig
from switchlm.training.config import TrainingConfig
from switchlm.training.optimizer import build_optimizer, optimizer_state

# 6 experts over 4 processes leave uneven and empty parts.
CONFIG = dataclasses.replace(preset("nano"), num_experts=6, gated=True)
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


def name_of(mesh: MeshConfig) -> str:
    return "-".join(f"{axis}{getattr(mesh, axis) or 1}" for axis in AXES)


def play(folder: Path, size: int, scene: Callable[[], Any], survivors: int | None = None) -> Any:
    """Let `size` processes play a scene; return what rank 0 returns, None if it did not end well.

    survivors: how many must end well, all by default.
    """
    meeting = folder / f"meeting-{time.monotonic_ns()}"
    pids = []
    for rank in range(size):
        pid = os.fork()
        if pid == 0:
            _act(meeting, rank, size, scene)
        pids.append(pid)
    ended = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    assert ended.count(0) == (size if survivors is None else survivors), ended
    result = meeting.with_suffix(".json")
    return json.loads(result.read_text()) if result.exists() else None


def _act(meeting: Path, rank: int, size: int, scene: Callable[[], Any]) -> None:
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{meeting}",
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=30),
        )
        result = scene()
        if rank == 0:
            meeting.with_suffix(".json").write_text(json.dumps(result))
        dist.barrier()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


class Run:
    """A small model with its optimizer on a mesh (None: no mesh), and a store."""

    def __init__(self, mesh: MeshConfig | None, seed: int, optimizer: Any = "adamw") -> None:
        if mesh is None:
            torch.manual_seed(seed)
            self.model = SwitchTransformer(CONFIG)
        else:
            with torch.device("meta"):
                self.model = SwitchTransformer(CONFIG)
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


def differences(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    return [
        name
        for name in sorted(one.keys() | other.keys())
        if name not in one or name not in other or not torch.equal(one[name], other[name])
    ]


# --- saved on any, loaded on any -----------------------------------------------------------------


def save_all(folder: Path, meshes: list[MeshConfig | None], optimizer: str) -> None:
    """Save a state on every mesh, and what it is, as DTensor itself sees it."""
    for seed, mesh in enumerate(meshes):
        run = Run(mesh, seed, optimizer)
        run.step()
        run.step()
        name = "plain" if mesh is None else name_of(mesh)
        place = folder / optimizer / name
        run.save(place, 2)
        full = run.full()
        if not dist.is_initialized() or dist.get_rank() == 0:
            torch.save(full, folder / optimizer / f"{name}.pt")


def load_all(folder: Path, meshes: list[MeshConfig | None], optimizer: str) -> list[Any]:
    """Load every state onto every mesh; return where they differ."""
    found = []
    for mesh in meshes:
        run = Run(mesh, 99, optimizer)
        for saved in sorted((folder / optimizer).glob("*.pt")):
            run.load(saved.with_suffix(""), 2)
            full = run.full()
            wrong = differences(full, torch.load(saved, weights_only=True))
            if wrong:
                found.append([saved.stem, "plain" if mesh is None else name_of(mesh), wrong[:3]])
    return found


def layouts(folder: Path) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for optimizer in ("adamw", "adafactor"):
        (folder / optimizer).mkdir()
        save_all(folder, [None], optimizer)
        play(folder, 4, lambda o=optimizer: save_all(folder, FOUR, o))
        play(folder, 2, lambda o=optimizer: save_all(folder, TWO, o))
        wrong = load_all(folder, [None], optimizer)
        wrong += play(folder, 4, lambda o=optimizer: load_all(folder, FOUR, o))
        wrong += play(folder, 2, lambda o=optimizer: load_all(folder, TWO, o))
        wrong += play(folder, 1, lambda o=optimizer: load_all(folder, ONE, o))
        result[optimizer] = {
            "states": len(list((folder / optimizer).glob("*.pt"))),
            "wrong": wrong,
        }
    return result


SCENES: dict[str, Callable[[Path], dict[str, Any]]] = {"layouts": layouts}


def main() -> None:
    torch.set_num_threads(1)
    gc.freeze()
    folder, scene = sys.argv[1:]
    print(json.dumps(SCENES[scene](Path(folder))))


if __name__ == "__main__":
    main()
