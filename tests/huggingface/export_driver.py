"""Sharded models to and from the Hugging Face format: test_sharded_model.py runs it.

export_driver.py FOLDER    prints one JSON object
"""

import dataclasses
import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tests.checkpoint.ranks_on_stage import (
    CONFIG,
    FOUR,
    Run,
    differences,
    message_of,
    name_of,
    only_on,
    play,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from switchlm.huggingface.load import load_weights, save

# transformers has no gated experts.
PLAIN = dataclasses.replace(CONFIG, gated=False)


class Allocations(TorchDispatchMode):
    """Record the largest tensor allocated, in float32 numbers; views are not counted."""

    largest = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            known = {t.untyped_storage().data_ptr() for t in args if type(t) is Tensor}
            own = type(result) is Tensor and result.untyped_storage().data_ptr() not in known
            if own:
                self.largest = max(self.largest, result.nbytes // 4)
        return result


def export(folder: Path) -> dict[str, Any]:
    plain = Run(None, 0, config=PLAIN)
    plain.step()
    save(plain.model, None, folder / "single")
    weights = {name: tensor.detach() for name, tensor in plain.model.state_dict().items()}
    os.mkdir(folder / "twisted")
    (folder / "twisted" / "config.json").write_text("{}")

    def scene() -> dict[str, Any]:
        group = dist.new_group(backend="gloo")
        found: dict[str, Any] = {"wrong": {}, "loading": [], "saving": []}
        for mesh in FOUR[1:3]:
            run = Run(mesh, 99, config=PLAIN)
            with Allocations() as loading:
                load_weights(run.model, folder / "single", group=group)
            full = {
                name.removeprefix("model/"): tensor
                for name, tensor in run.full().items()
                if name.startswith("model/")
            }
            found["wrong"][name_of(mesh)] = differences(full, weights)
            with Allocations() as saving:
                save(run.model, None, folder / name_of(mesh), group=group)
            found["loading"].append(loading.largest)
            found["saving"].append(saving.largest)
        fsync = os.fsync
        os.fsync = only_on(1, OSError(5, "Input/output error"))
        found["disk"] = message_of(lambda: save(run.model, None, folder / "bad", group=group))
        os.fsync = fsync
        found["elsewhere"] = message_of(
            lambda: load_weights(run.model, folder / "twisted", group=group)
        )
        return found

    ranks = play(folder, 4, scene)
    stacks = [t.numel() for name, t in weights.items() if ".experts." in name]
    dense = [t.numel() for name, t in weights.items() if ".experts." not in name]
    largest = max(*dense, max(stacks) // PLAIN.num_experts)
    return {"ranks": ranks, "largest_matrix": largest, "left": sorted(os.listdir(folder))}


def main() -> None:
    torch.set_num_threads(1)
    gc.freeze()
    print(json.dumps(export(Path(sys.argv[1]))))


if __name__ == "__main__":
    main()
