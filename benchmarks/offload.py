"""Models with offloaded experts, compared with the rate of the disk and with main memory.

    python benchmarks/offload.py hot   --folder FOLDER     # switch-base-8, all experts fit
    python benchmarks/offload.py cold  --folder FOLDER     # switch-base-256, 29 GB in bfloat16
    python benchmarks/offload.py scale --folder FOLDER     # switch-c of 64 experts per layer, int4

Weights are random (random_weights.py) and written into FOLDER if missing, which is not timed. Each
part replaces its own section of results/offload.json. Before cold runs the files are dropped from
the page cache (posix_fadvise). `hot`: decoding and encoding by `switchlm.load` and by
`load_offloaded`, interleaved. `cold`: one process, from loading to the last token, with sampled
tokens.
"""

import argparse
import dataclasses
import itertools
import json
import multiprocessing
import os
import resource
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

import harness
import offload_plan
import random_weights
from switchlm.compression.offload import load_offloaded
from switchlm.generation.cache import GrowingCache
from switchlm.generation.decode import dropless, memories
from switchlm.huggingface.load import load
from switchlm.model.presets import preset
from switchlm.model.transformer import SwitchTransformer

CHUNK = 9 * 2**20  # bytes, about an expert of switch-base
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def drop_cache(folder: Path) -> None:
    """Drop the files of a folder from the page cache."""
    for path in folder.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def disk_rates(path: Path, size: int) -> dict[str, float]:
    """Return bytes per second of reading the file from its start, by method."""
    found = {}
    for name, flags, readers in (
        ("direct, 1 thread", os.O_DIRECT, 1),
        ("direct, 2 threads", os.O_DIRECT, 2),
        ("buffered, 1 thread", 0, 1),
        ("buffered, 2 threads", 0, 2),
        ("buffered, 4 threads", 0, 4),
    ):
        drop_cache(path.parent)
        descriptor = os.open(path, os.O_RDONLY | flags)
        offsets = iter(range(0, min(size, path.stat().st_size - CHUNK), CHUNK))
        lock, read = threading.Lock(), itertools.count()

        def work(
            descriptor: int = descriptor,
            offsets: Any = offsets,
            lock: threading.Lock = lock,
            read: Any = read,
        ) -> None:
            room = torch.empty(CHUNK + 4096, dtype=torch.uint8).numpy()
            room = room[-room.ctypes.data % 4096 :][:CHUNK]
            while True:
                with lock:
                    offset = next(offsets, None)
                if offset is None:
                    return
                os.preadv(descriptor, [memoryview(room)], offset)
                next(read)

        threads = [threading.Thread(target=work) for _ in range(readers)]
        start = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        found[name] = next(read) * CHUNK / (time.perf_counter() - start)
        os.close(descriptor)
    return found


def encode(model: SwitchTransformer, inputs_BS: torch.Tensor) -> torch.Tensor:
    with torch.no_grad(), dropless(model.encoder):
        return model.encode(inputs_BS)[0]


def decode(model: SwitchTransformer, encoded_BSD: torch.Tensor, steps: int, seed: int) -> int:
    """Sample tokens for every row; return the number of distinct ones."""
    generator = torch.Generator().manual_seed(seed)
    token_B1 = torch.zeros(encoded_BSD.shape[0], 1, dtype=torch.int64)
    seen = set()
    with torch.no_grad(), dropless(model.decoder):
        cache = GrowingCache(memories(model, encoded_BSD, None), steps)
        for _ in range(steps):
            logits_BV = model.decode(token_B1, encoded_BSD, cache=cache).logits_BTV[:, -1]
            token_B1 = logits_BV.float().softmax(-1).multinomial(1, generator=generator)
            seen.update(token_B1.flatten().tolist())
    return len(seen)


def prompts(batch: int, length: int, vocabulary: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, vocabulary, (batch, length), generator=generator)


def hot(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Time a model that fits in memory, loaded and with all experts in the budget."""
    name = "switch-base-8"
    home = folder / name
    if not home.exists():
        random_weights.write_floats(preset(name), home, options.seed)
    cases = []
    for dtype_name, dtype in DTYPES.items():
        inside, _ = load(home, dtype=dtype, report=lambda _: None)
        offloaded = load_offloaded(home, 8 * 10**9, dtype=dtype, report=lambda _: None)
        models = {"memory": inside, "offloaded": offloaded.model}
        for batch, length, steps in ((1, 64, 16), (16, 64, 8), (1, 512, 0)):
            inputs_BS = prompts(batch, length, inside.config.vocabulary_size, options.seed)

            encoded_BSD = encode(inside, inputs_BS)
            before = offloaded.memory.counters.bytes_read
            runs = {
                key: partial(decode, model, encoded_BSD, steps, 0)
                if steps
                else partial(encode, model, inputs_BS)
                for key, model in models.items()
            }
            seconds = harness.measure(runs, options.repeats)
            print(dtype_name, batch, length, steps, flush=True)
            cases.append(
                {
                    "dtype": dtype_name,
                    "batch": batch,
                    "input_tokens": length,
                    "steps": steps,
                    "seconds": seconds,
                    "summary": {key: harness.summary(value) for key, value in seconds.items()},
                    "speed": harness.ratio(seconds["memory"], seconds["offloaded"]),
                    "bytes_read_meanwhile": offloaded.memory.counters.bytes_read - before,
                }
            )
        offloaded.memory.close()
    return {"model": name, "cases": cases}


def cold(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Encode and generate with a model that is larger than memory, with nothing cached."""
    name = "switch-base-256"
    home = folder / name
    if not home.exists():
        random_weights.write_floats(preset(name), home, options.seed)
    shard = sorted(home.glob("*.safetensors"))[-1]
    disk = disk_rates(shard, 3 * 10**9)
    cases = [
        _from_nothing(home, options, dtype, length, steps)
        for dtype, length, steps in (
            ("bfloat16", 64, options.steps),
            ("bfloat16", 512, 0),
            ("float32", 64, options.steps),
        )
    ]
    size = sum(path.stat().st_size for path in home.glob("*.safetensors"))
    return {"model": name, "bytes": size, "disk_bytes_a_second": disk, "cases": cases}


def scale(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Run switch-c at 1/32 of its experts, and compare with the plan."""
    home = folder / "switch-c-64-int4"
    if not home.exists():
        offload_plan.write(home, options.seed)
    shard = sorted(home.glob("*.safetensors"))[-1]
    disk = disk_rates(shard, 3 * 10**9)
    cases = [_from_nothing(home, options, "float32", length, options.steps) for length in (16, 64)]
    planned = offload_plan.predictions(max(disk.values()), options, cases)
    return {"model": home.name, "disk_bytes_a_second": disk, "cases": cases} | planned


def _from_nothing(
    home: Path, options: argparse.Namespace, dtype: str, length: int, steps: int
) -> dict[str, Any]:
    """Load, encode and decode in a separate process, to measure its memory."""
    drop_cache(home)
    receiving, sending = multiprocessing.get_context("spawn").Pipe(duplex=False)
    process = multiprocessing.get_context("spawn").Process(
        target=_watch, args=(sending, home, vars(options), dtype, length, steps)
    )
    process.start()
    sending.close()
    found: dict[str, Any] = receiving.recv()
    process.join()
    return found


def _watch(
    sending: Any, home: Path, options: dict[str, Any], dtype: str, length: int, steps: int
) -> None:
    torch.set_num_threads(options["threads"])
    cached = _page_cache()
    start = time.perf_counter()
    loaded = load_offloaded(home, options["budget"], dtype=DTYPES[dtype], report=lambda _: None)
    model, counters = loaded.model, loaded.memory.counters
    marks = [("load", time.perf_counter() - start, dataclasses.asdict(counters))]
    inputs_BS = prompts(1, length, model.config.vocabulary_size, options["seed"])
    start = time.perf_counter()
    encoded_BSD = encode(model, inputs_BS)
    marks.append(("encode", time.perf_counter() - start, dataclasses.asdict(counters)))
    different = 0
    if steps:
        start = time.perf_counter()
        different = decode(model, encoded_BSD, steps, options["seed"])
        marks.append(("decode", time.perf_counter() - start, dataclasses.asdict(counters)))
    phases, before = {}, dict.fromkeys(marks[0][2], 0)
    for phase, seconds, after in marks:
        phases[phase] = {"seconds": seconds} | {key: after[key] - before[key] for key in after}
        before = after
    sending.send(
        {
            "dtype": dtype,
            "input_tokens": length,
            "steps": steps,
            "different_tokens": different,
            "budget": options["budget"],
            "phases": phases,
            "most_expert_bytes": counters.most_bytes_held,
            "peak_resident_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            "page_cache_grew_by": _page_cache() - cached,
        }
    )


def _page_cache() -> int:
    """Return the bytes of the page cache."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("Cached:")).split()[1])


def sections(record: dict[str, Any]) -> list[str]:
    """Return the tables of the record."""
    found = []
    if "hot" in record:
        rows = [
            [
                f"{case['dtype']}, "
                + (f"{case['steps']} tokens" if case["steps"] else "encoding 512 tokens")
                + f", batch {case['batch']}",
                f"{case['summary']['memory']['median'] * 1e3:.0f}",
                f"{case['summary']['offloaded']['median'] * 1e3:.0f}",
                f"{case['speed']['median']:.2f} ({case['speed']['lower']:.2f} to "
                f"{case['speed']['upper']:.2f})",
            ]
            for case in record["hot"]["cases"]
        ]
        headers = [record["hot"]["model"], "in memory, ms", "offloaded, ms", "speed (quartiles)"]
        found.append("All experts in their budget:\n\n" + harness.table(headers, rows))
    if "cold" in record:
        found += _cold_tables(record["cold"])
    if "scale" in record:
        found += offload_plan.tables(record["scale"])
    return found


def _cold_tables(part: dict[str, Any]) -> list[str]:
    best = max(part["disk_bytes_a_second"].values())
    rates = ", ".join(f"{k} {v / 1e9:.2f}" for k, v in part["disk_bytes_a_second"].items())
    rows, memory = [], []
    for case in part["cases"]:
        what = f"{case['dtype']}, {case['input_tokens']} tokens in"
        for phase, seen in case["phases"].items():
            if phase == "load":
                continue
            wanted = seen["hits"] + seen["misses"]
            rate = seen["bytes_read"] / seen["seconds"]
            tokens = case["steps"] if phase == "decode" else case["input_tokens"]
            rows.append(
                [
                    f"{what}, {phase}",
                    f"{seen['bytes_read'] / 1e9:.2f}",
                    f"{seen['seconds']:.2f}",
                    f"{rate / 1e9:.2f}",
                    f"{rate / best:.2f}",
                    f"{tokens / seen['seconds']:.1f}",
                    f"{seen['hits'] / wanted:.0%}",
                    f"{seen['foreseen']:,}",
                    f"{seen['wrong_guesses']:,} of {seen['guesses']:,}",
                ]
            )
        memory.append(
            [
                what,
                f"{case['phases']['load']['seconds']:.1f}",
                f"{case['peak_resident_bytes'] / 1e9:.2f}",
                f"{case['most_expert_bytes'] / 1e9:.2f} of {case['budget'] / 1e9:.2f}",
                f"{case['page_cache_grew_by'] / 1e9:.2f}",
            ]
        )
    headers = [
        f"{part['model']}, {part['bytes'] / 1e9:.1f} GB",
        "GB read",
        "seconds",
        "GB/s",
        "of the disk's rate",
        "tokens/s",
        "hits",
        "foreseen",
        "wrong guesses",
    ]
    second = ["memory", "loading, s", "peak resident GB", "experts, GB", "page cache grew by GB"]
    return [
        f"From nothing cached, one run (commit {part['environment']['commit']}). The disk reads "
        f"one file at (GB/s): {rates}; the best counts.\n\n" + harness.table(headers, rows),
        harness.table(second, memory),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=["hot", "cold", "scale"])
    parser.add_argument("--folder", type=Path, required=True, help="for the models, large")
    parser.add_argument("--budget", type=int, default=4 * 10**9, help="bytes for experts")
    parser.add_argument("--steps", type=int, default=48, help="tokens to generate")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    path = harness.RESULTS / "offload.json"
    record = json.loads(path.read_text()) if path.exists() else {}
    found = {"hot": hot, "cold": cold, "scale": scale}[options.part](options.folder, options)
    about = harness.environment(options.seed)
    record |= {
        "environment": about | {"command": "python benchmarks/offload.py PART --folder FOLDER"},
        "repeats": options.repeats,
        "clock": "wall",
        options.part: found | {"environment": about},
    }
    harness.write(
        "offload",
        "Experts on the disk against the disk's own rate, and against main memory",
        record,
        sections(record),
    )


if __name__ == "__main__":
    main()
