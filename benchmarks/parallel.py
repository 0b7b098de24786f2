"""The cost of parallelism on CPUs of one machine: the expert-parallel path, and gloo.

    python benchmarks/parallel.py [--repeats 9]

1. The layer (D 256, F 1024, E 64, 4,096 tokens, forward and backward) on one process of two
   threads: the local dispatcher; that of expert parallelism, with nothing to send
   (mesh.expert=1); and the same with an all-to-all over one process.
2. A training step (d_model 256, 4 + 4 layers, E 64, 16 rows of 256 inputs and 64 targets) on one
   process of two threads against two processes of one thread each, in three layouts.
3. A profile of the two processes: time, and communication overlapped with computation.
"""

import argparse
import tempfile
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import harness
from switchlm.data.batch import Batch
from switchlm.model.config import ModelConfig, RouterConfig
from switchlm.model.switch import SwitchFeedForward
from switchlm.model.transformer import SwitchTransformer
from switchlm.parallel.apply import apply, materialise
from switchlm.parallel.expert import AllToAllDispatcher
from switchlm.parallel.mesh import ALONE, Mesh, MeshConfig
from switchlm.training.config import TrainingConfig
from switchlm.training.optimizer import build_optimizer, set_learning_rate
from switchlm.training.step import training_step

ROUTER = RouterConfig(capacity_factor=None, evaluation_capacity_factor=None)
MODEL = ModelConfig(
    vocabulary_size=4096,
    d_model=256,
    d_ff=1024,
    d_kv=32,
    num_heads=8,
    num_encoder_layers=4,
    num_decoder_layers=4,
    num_experts=64,
    router=ROUTER,
)
ROWS, INPUTS, TARGETS = 16, 256, 64
LAYOUTS = {
    "data=2": MeshConfig(data=2),
    "expert=2": MeshConfig(expert=2),
    "tensor=2": MeshConfig(tensor=2),
}


def layer_cases() -> dict[str, Callable[[], None]]:
    """Return a forward and backward pass of the layer by each path."""
    layer = SwitchFeedForward(256, 1024, 64, router=ROUTER)
    x_ND = torch.randn(4096, 256, requires_grad=True)
    local = layer.dispatcher
    one = dist.device_mesh.init_device_mesh("cpu", (1,))

    def run(dispatcher: object) -> Callable[[], None]:
        def step() -> None:
            layer.dispatcher = dispatcher
            layer.zero_grad(set_to_none=True)
            y_ND, _ = layer(x_ND)
            y_ND.square().mean().backward()

        return step

    return {
        "local": run(local),
        "mesh.expert=1": run(AllToAllDispatcher(None, None)),
        "an all-to-all over one process": run(AllToAllDispatcher(one, None)),
    }


def training(mesh: Mesh) -> Callable[[], None]:
    """Return a training step of this process's share."""
    with torch.device("meta"):
        model = SwitchTransformer(MODEL)
    if mesh.is_distributed:
        apply(model, mesh)
    materialise(model, torch.device("cpu"), seed=0)
    model.train()
    optimizer = build_optimizer(model, TrainingConfig())
    set_learning_rate(optimizer, 1e-4)
    rows = ROWS // mesh.data_size
    noise = torch.Generator().manual_seed(mesh.data_rank)

    def draw(length: int) -> Tensor:
        return torch.randint(2, MODEL.vocabulary_size, (rows, length), generator=noise)

    batch = Batch(
        inputs_BS=draw(INPUTS),
        targets_BT=draw(TARGETS),
        input_segments_BS=None,
        target_segments_BT=None,
        source_B=torch.zeros(rows, dtype=torch.int32),
    )

    def step() -> None:
        training_step(model, optimizer, [batch], gradient_clip=1.0, mesh=mesh)

    return step


def work(rank: int, folder: str, repeats: int) -> None:
    """Run one of two processes of one thread; alternate with the single process, by files."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    steps = {name: training(Mesh.of(layout, "cpu")) for name, layout in LAYOUTS.items()}
    single = None
    times: dict[str, list[float]] = {name: [] for name in ("one process", *steps)}
    if rank == 0:
        torch.set_num_threads(2)
        single = training(ALONE)
        single()
        torch.set_num_threads(1)
    for repeat in range(-1, repeats):
        dist.barrier()
        if single is not None:
            torch.set_num_threads(2)
            seconds = timed(single)
            torch.set_num_threads(1)
            if repeat >= 0:
                times["one process"].append(seconds)
        for name, step in steps.items():
            sleep_until_all()
            seconds = timed(step)
            if repeat >= 0:
                times[name].append(seconds)
    shares = {name: profiled(step) for name, step in steps.items()}
    if rank == 0:
        found = {name: torch.tensor(value) for name, value in times.items()}
        found |= {f"share/{name}": value for name, value in shares.items()}
        save_file(found, f"{folder}/found.safetensors")
    dist.barrier()
    dist.destroy_process_group()


def sleep_until_all() -> None:
    """Wait for the other process without using a core."""
    handle = dist.barrier(async_op=True)
    while not handle.is_completed():
        time.sleep(0.001)


def timed(step: Callable[[], None]) -> float:
    """Return the seconds of a step."""
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def profiled(step: Callable[[], None]) -> Tensor:
    """Return seconds [3] of a step: all, communication under way, the main thread not computing.

    The main thread computes, or waits for communication. Communication while it computes is
    overlapped.
    """
    sleep_until_all()
    with profile(activities=[ProfilerActivity.CPU]) as trace:
        start, computing = time.perf_counter(), time.thread_time()
        step()
        seconds, computing = time.perf_counter() - start, time.thread_time() - computing
    under_way = [
        (event.time_range.start, event.time_range.end)
        for event in trace.events()
        if event.name.startswith("gloo:")
    ]
    return torch.tensor([seconds, union(under_way) / 1e6, seconds - computing])


def union(spans: list[tuple[float, float]]) -> float:
    """Return the length of the union of intervals."""
    total, end = 0.0, float("-inf")
    for first, last in sorted(spans):
        total += max(last - max(first, end), 0.0)
        end = max(end, last)
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(2)
    torch.manual_seed(options.seed)
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", init_method=f"file://{folder}/one", rank=0, world_size=1)
        layer = harness.measure(layer_cases(), 3 * options.repeats)
        dist.destroy_process_group()
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(work, (folder, options.repeats), nprocs=2)
        found = {k: v.tolist() for k, v in load_file(f"{folder}/found.safetensors").items()}
    steps = {name: found[name] for name in ("one process", *LAYOUTS)}
    shares = {name: found[f"share/{name}"] for name in LAYOUTS}
    overhead = {name: harness.ratio(seconds, layer["local"]) for name, seconds in layer.items()}
    slower = {name: harness.ratio(seconds, steps["one process"]) for name, seconds in steps.items()}
    record = {
        "environment": harness.environment(options.seed),
        "repeats": options.repeats,
        "clock": "wall",
        "layer_seconds": layer,
        "layer_over_local": overhead,
        "step_seconds": steps,
        "step_over_one_process": slower,
        "profile_seconds": shares,
    }

    def lines(seconds: dict[str, list[float]], ratios: dict[str, dict[str, float]]) -> list:
        return [
            [
                name,
                f"{1000 * harness.summary(times)['median']:.1f}",
                f"{ratios[name]['median']:.3f} ({ratios[name]['lower']:.3f} to "
                f"{ratios[name]['upper']:.3f})",
                f"{ratios[name]['of_minima']:.3f}",
            ]
            for name, times in seconds.items()
        ]

    heads = ["median ms", "ratio (quartiles)", "of minima"]
    profiles = [
        [
            name,
            f"{1000 * seconds:.0f}",
            f"{busy / seconds:.0%}",
            f"{waiting / seconds:.0%}",
            f"{1 - min(waiting / max(busy, 1e-9), 1):.0%}",
        ]
        for name, (seconds, busy, waiting) in shares.items()
    ]
    tables = [
        harness.table(["the layer, one process", *heads], lines(layer, overhead)),
        harness.table(
            ["a step: one process of two threads, then two of one", *heads], lines(steps, slower)
        ),
        harness.table(
            [
                "profile of one step",
                "ms",
                "communication under way",
                "main thread waits for it",
                "hidden behind computation",
            ],
            profiles,
        ),
    ]
    harness.write("parallel", "What parallelism costs on two CPU cores", record, tables)


if __name__ == "__main__":
    main()
