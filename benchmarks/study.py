"""What the paper does with a model, on real text: pre-train, fine-tune, distil; sparse and dense.

    python benchmarks/study.py [--data FOLDER] [--scale laptop|laptop-long|gpu|paper]
        [--seeds 0 1 2] [--only pretrain finetune distill] [--out FOLDER]
    python benchmarks/study.py --write

FOLDER holds english_novels, one .txt a book, and the tasks as study/SCALE.yaml names them. A sparse
model and its dense twin of equal FLOPs a token read the same batches, each at its own learning
rate, whole books held out. Both are fine-tuned on tasks; the sparse one is distilled into the
dense (the rows of Table 6). `laptop-long` leaves the tasks out and trains longer. Every part ends
in a JSON file below --out and is skipped once that is there, so a study that was stopped goes on.
At the end, and by --write at any time, what is finished goes into results/study.json and .md and
docs/results.md.

The paper's scale reads C4 and the tasks from the hub. It needs a cluster:

    torchrun --nnodes 8 --nproc-per-node 8 benchmarks/study.py --scale paper --only pretrain distill
    python benchmarks/study.py --scale paper --only finetune

Neither it nor `gpu` was measured.
"""

import argparse
import multiprocessing
import signal
import sys
import time
from collections.abc import Sequence
from multiprocessing.pool import AsyncResult
from pathlib import Path

import torch

import study_page
from study_parts import Part, Study, in_order, is_main_process
from switchlm.config import read_yaml

ROOT = Path(__file__).parents[1]
DATA = ROOT.parent / "shared" / "data"
SCALES = Path(__file__).parent / "study"
KINDS = ("pretrain", "finetune", "distill")


def main() -> None:
    """Run the parts that are not finished, and write what is known."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--scale", default="laptop", help="a file of benchmarks/study/")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "study")
    parser.add_argument("--write", action="store_true", help="run nothing")
    parser.add_argument("--draft", action="store_true", help="only print; write no results")
    arguments = parser.parse_args()
    scale = read_yaml(SCALES / f"{arguments.scale}.yaml")
    from_hub = "sources" in scale["pretrain"]
    if not (arguments.data.is_dir() or from_hub or arguments.write):
        print(f"No text in {arguments.data}: nothing is measured. Give some with --data.")
        return
    root = arguments.out / arguments.scale
    parts = [
        part
        for part in in_order(
            [
                Study(scale=scale, data=arguments.data, out=root / f"seed-{seed}", seed=seed)
                for seed in arguments.seeds
            ]
        )
        if part.name.split("-")[0] in arguments.only
    ]
    if not arguments.write:
        run_all([part for part in parts if not part.result.exists()], scale["workers"])
    if is_main_process():
        study_page.write(arguments.scale, scale, root, draft=arguments.draft)


def run_all(parts: Sequence[Part], workers: int) -> None:
    """Run all parts, so many at once, each in a process of one thread; one alone runs in this one.

    Of those that are ready the first go first. The processes end when this one does.
    """
    if workers == 1:
        # Of a job of many processes the main one alone writes results: the others do not look.
        ran: set[Path] = set()
        for part in parts:
            if not all(path in ran or path.exists() for path in part.needed):
                raise SystemExit(f"{part.name} needs {' and '.join(part.needs)}: run those first.")
            print("finished:", part.run(), flush=True)
            ran.add(part.result)
        return
    waiting = list(parts)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    running: list[AsyncResult[str]] = []
    spawn = multiprocessing.get_context("spawn")
    with spawn.Pool(workers, torch.set_num_threads, (1,)) as pool:
        while waiting or running:
            ready = [one for one in waiting if all(path.exists() for path in one.needed)]
            for part in ready[: workers - len(running)]:
                waiting.remove(part)
                running.append(pool.apply_async(part.run))
            if not running:
                needs = {need for part in waiting for need in part.needs}
                raise SystemExit(f"Not run, for lack of {', '.join(sorted(needs))}.")
            time.sleep(0.2)
            for done in [one for one in running if one.ready()]:
                running.remove(done)
                print("finished:", done.get(), flush=True)


if __name__ == "__main__":
    main()
