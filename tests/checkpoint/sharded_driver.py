"""Checkpoints of many processes: test_sharded_store.py runs it. Prints one JSON object.

sharded_driver.py layouts FOLDER        saved on some meshes, loaded on others
sharded_driver.py all_layouts FOLDER    on all
sharded_driver.py chain FOLDER          4 -> 2 -> 1 -> 4 processes
sharded_driver.py faults FOLDER         what one rank meets is raised on all
sharded_driver.py kills FOLDER          one of two ranks dies at some step of a save
sharded_driver.py all_kills FOLDER      at every step
"""

import gc
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from fallible_disk import Disk
from ranks_on_stage import (
    FOUR,
    ONE,
    TWO,
    Run,
    differences,
    message_of,
    name_of,
    only_on,
    open_store,
    play,
)
from torch import Tensor

from switchlm.checkpoint.store import CheckpointStore
from switchlm.parallel.mesh import MeshConfig

Meshes = list[MeshConfig | None]
PLAIN: Meshes = [None]


# --- saved on any, loaded on any -----------------------------------------------------------------


def save_all(folder: Path, meshes: Meshes, optimizer: str) -> None:
    """Save a state on every mesh, and what it is, as DTensor itself sees it."""
    for seed, mesh in enumerate(meshes):
        run = Run(mesh, seed, optimizer)
        run.step()
        run.step()
        name = name_of(mesh)
        run.save(folder / optimizer / name, 2)
        full = run.full()
        if not dist.is_initialized() or dist.get_rank() == 0:
            torch.save(full, folder / optimizer / f"{name}.pt")


def load_all(folder: Path, meshes: Meshes, optimizer: str) -> list[Any]:
    """Load every state onto every mesh; return where they differ."""
    found = []
    for mesh in meshes:
        run = Run(mesh, 99, optimizer)
        for saved in sorted((folder / optimizer).glob("*.pt")):
            run.load(saved.with_suffix(""), 2)
            wrong = differences(run.full(), torch.load(saved, weights_only=True))
            if wrong:
                found.append([saved.stem, name_of(mesh), wrong[:3]])
    return found


def layouts(
    folder: Path, optimizer: str, saving: dict[int, Meshes], loading: dict[int, Meshes]
) -> dict[str, Any]:
    (folder / optimizer).mkdir()
    save_all(folder, PLAIN, optimizer)
    for size, meshes in saving.items():
        play(folder, size, lambda m=meshes: save_all(folder, m, optimizer))
    wrong = load_all(folder, PLAIN, optimizer)
    for size, meshes in loading.items():
        for found in play(folder, size, lambda m=meshes: load_all(folder, m, optimizer)):
            wrong += found
    return {"states": len(list((folder / optimizer).glob("*.pt"))), "wrong": wrong}


def some_layouts(folder: Path) -> dict[str, Any]:
    return {
        "adamw": layouts(folder, "adamw", {4: FOUR[1:2], 2: TWO[2:3]}, {4: FOUR[3:4]}),
        "adafactor": layouts(folder, "adafactor", {2: TWO[2:3]}, {2: TWO[1:2]}),
    }


def all_layouts(folder: Path) -> dict[str, Any]:
    casts: dict[int, Meshes] = {4: [*FOUR], 2: [*TWO], 1: [*ONE]}
    return {name: layouts(folder, name, casts, casts) for name in ("adamw", "adafactor")}


def chain(folder: Path) -> dict[str, Any]:
    """Two steps on each of 4, 2, 1 and 4 processes, against eight on one."""
    place = folder / "run"

    def go_on(mesh: MeshConfig | None, done: int) -> None:
        run = Run(mesh, 99)
        run.load(place, done)
        run.step()
        run.step()
        run.save(place, done + 2)

    calm = Run(None, 0)
    calm.save(place, 0)
    play(folder, 4, lambda: go_on(FOUR[1], 0))
    play(folder, 2, lambda: go_on(TWO[0], 2))
    go_on(None, 4)
    play(folder, 4, lambda: go_on(FOUR[2], 6))
    for _ in range(8):
        calm.step()
    last = Run(None, 99)
    last.load(place, 8)
    steps = CheckpointStore(place).steps()
    return {"wrong": differences(last.full(), calm.full()), "steps": steps}


# --- what one rank meets is raised on all --------------------------------------------------------


def example(content: int) -> dict[str, Any]:
    """A state of plain tensors, of which rank 0 writes all, and of sharded ones."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    generator = torch.Generator().manual_seed(content)
    weight: Tensor = torch.randn(6, 5, generator=generator)
    if dist.is_initialized():
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        weight = distribute_tensor(weight, mesh, [Shard(0)])
    return {"model": {"w": weight, "b": torch.randn(3, generator=generator)}, "content": content}


def faults(folder: Path) -> dict[str, Any]:
    place = folder / "checkpoints"

    def scene() -> dict[str, Any]:
        reports: list[str] = []
        found: dict[str, Any] = {"reports": reports}
        fsync = os.fsync
        with open_store(place, report=reports.append) as store:
            store.save(1, example(1), wait=True)
            found["loaded"] = store.load()["content"]
            os.fsync = only_on(1, OSError(5, "Input/output error"))
            store.save(2, example(2))
            found["disk"] = message_of(lambda: store.save(3, example(3)))
            os.fsync = only_on(1, MemoryError("no memory"))
            found["memory"] = message_of(lambda: store.save(2, example(2), wait=True))
            os.fsync = only_on(0, OSError(28, "No space left on device"))
            found["first"] = message_of(lambda: store.save(2, example(2), wait=True))
            os.fsync = fsync
            dist.barrier()
            found["left"] = sorted(path.name for path in place.iterdir())
            found["steps"] = store.steps()
            dist.barrier()
            store.save(2, example(2))
            found["later"] = message_of(lambda: store.save(1, example(1)))
            mine = {"t": torch.zeros(2 + dist.get_rank())}
            found["shapes"] = message_of(lambda: store.save(3, mine))
            wanted = {"model": example(9)["model"]}
            if dist.get_rank() == 1:
                wanted["model"]["b"] = torch.zeros(4)
            found["fit"] = message_of(lambda: store.load(2, wanted))
            found["untouched"] = torch.equal(
                wanted["model"]["w"].to_local(), example(9)["model"]["w"].to_local()
            )
            if dist.get_rank() == 0:
                for path in (place / "step-00000002").glob("*.safetensors"):
                    content = bytearray(path.read_bytes())
                    content[-1] ^= 1
                    path.write_bytes(content)
            dist.barrier()
            found["step_2"] = message_of(lambda: store.load(2))
            state = store.load(None, {"model": example(9)["model"]})
            found["went_back_to"] = state["content"]
            found["equal"] = torch.equal(
                state["model"]["w"].full_tensor(), example(1)["model"]["w"].full_tensor()
            )
            dist.barrier()
            store.discard_after(1)
            found["after"] = store.steps()
        return found

    return {"ranks": play(folder, 2, scene)}


# --- a rank dies ---------------------------------------------------------------------------------


def kills(folder: Path, steps: list[tuple[int, int]]) -> dict[str, Any]:
    """Kill a rank before some steps of its disk; the other gives up, and the run goes on."""
    result: dict[str, Any] = {"kills": 0, "old": 0, "new": 0, "failures": []}
    place = folder / "run" / "checkpoints"
    for victim, stop_at in steps:
        shutil.rmtree(folder / "run", ignore_errors=True)
        with CheckpointStore(place) as store:
            store.save(1, example(1), wait=True)

        def scene(victim: int = victim, stop_at: int = stop_at) -> str:
            with open_store(place, keep=1) as store:
                if dist.get_rank() == victim:
                    Disk(folder / "run", stop_at).install()
                store.save(2, example(2), wait=True)
            return "lived"

        ended = play(folder, 2, scene, all_live=False, quiet=True)
        with CheckpointStore(place, keep=1) as store:
            newest = store.newest()
            state = store.load()
            good = newest is not None and not newest.damaged
            good &= torch.equal(state["model"]["w"], example(state["content"])["model"]["w"])
            store.save(3, example(3), wait=True)
            good &= [path.name for path in place.iterdir()] == ["step-00000003"]
        if not good:
            result["failures"].append([victim, stop_at])
        result["old" if state["content"] == 1 else "new"] += 1
        result["kills"] += ended[victim] is None
    return result


def some_kills(folder: Path) -> dict[str, Any]:
    return kills(folder, [(1, 0), (1, 2), (0, 3), (0, 12)])


def every_kill(folder: Path) -> dict[str, Any]:
    return kills(folder, [(victim, step) for victim in (0, 1) for step in range(24)])


SCENES: dict[str, Callable[[Path], dict[str, Any]]] = {
    "layouts": some_layouts,
    "all_layouts": all_layouts,
    "chain": chain,
    "faults": faults,
    "kills": some_kills,
    "all_kills": every_kill,
}


def main() -> None:
    torch.set_num_threads(1)
    gc.freeze()
    scene, folder = sys.argv[1:]
    print(json.dumps(SCENES[scene](Path(folder))))


if __name__ == "__main__":
    main()
