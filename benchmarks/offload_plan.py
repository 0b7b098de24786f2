"""The estimate of `plan_offload` for a measured run at 1/32 scale, and for switch-c-2048.

The run is of switch-c with 64 experts per layer instead of 2,048 and five layers in each stack
instead of 15, otherwise equal, experts of 4 bits. Weights are random (random_weights.py).
"""

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from benchmarks.offload_estimate import Machine, OffloadPlan, plan_offload

import few_tokens
import harness
import random_weights
from switchlm.huggingface.quantised import Quantisation
from switchlm.model.config import ModelConfig
from switchlm.model.presets import preset

INT4 = Quantisation(bits=4)
SCALE = 32
LAYERS = 5
WHOLE = "switch-c-2048"
NVME = (3.5e9, 7e9)  # bytes per second of disks of the third and fourth PCIe generation
BUDGET = 16 * 10**9


def small() -> ModelConfig:
    config = preset(WHOLE)
    return dataclasses.replace(
        config,
        num_experts=config.num_experts // SCALE,
        num_encoder_layers=LAYERS,
        num_decoder_layers=LAYERS,
    )


def write(home: Path, seed: int) -> None:
    random_weights.write_int4(small(), home, seed)


def predictions(
    disk: float, options: argparse.Namespace, cases: list[dict[str, Any]]
) -> dict[str, Any]:
    """Return the estimates of the measured cases, and of the full model on several disks."""
    machine = Machine(disk=disk, memory=few_tokens.read_bandwidth(), flops=harness.matrix_peak())
    planned = []
    for case in cases:
        found = plan_offload(
            small(),
            machine,
            budget=options.budget,
            input_tokens=case["input_tokens"],
            new_tokens=case["steps"],
            dtype="float32",
            quantisation=INT4,
        )
        planned.append(_as_json(found))
    whole = []
    for rate in (disk, *NVME):
        for quantisation in (None, INT4):
            for batch in (1, 32):
                found = plan_offload(
                    preset(WHOLE),
                    dataclasses.replace(machine, disk=rate),
                    budget=BUDGET,
                    input_tokens=64,
                    new_tokens=64,
                    batch=batch,
                    quantisation=quantisation,
                )
                bits = 16 if quantisation is None else 4
                about = {"disk": rate, "bits": bits, "batch": batch}
                whole.append(about | _as_json(found))
    return {"machine": dataclasses.asdict(machine), "planned": planned, "whole": whole}


def tables(part: dict[str, Any]) -> list[str]:
    rows = []
    for case, planned in zip(part["cases"], part["planned"], strict=True):
        for phase in ("encode", "decode"):
            if phase not in case["phases"]:
                continue
            seen = case["phases"][phase]
            tokens = case["steps"] if phase == "decode" else case["input_tokens"]
            wanted, took = planned[f"{phase}_bytes"], planned[f"{phase}_seconds"]
            for_these = took + (seen["bytes_read"] - wanted) / part["machine"]["disk"]
            rows.append(
                [
                    f"{phase}, {tokens} tokens",
                    f"{wanted / 1e9:.2f}",
                    f"{seen['bytes_read'] / 1e9:.2f}",
                    f"{seen['bytes_read'] / wanted:.2f}",
                    f"{took:.2f}",
                    f"{for_these:.2f}",
                    f"{seen['seconds']:.2f}",
                    f"{seen['seconds'] / for_these:.2f}",
                ]
            )
    headers = [
        "switch-c of 64 experts, 5 + 5 layers, int4",
        "planned GB read",
        "read",
        "ratio",
        "planned seconds",
        "for what was read",
        "took",
        "ratio",
    ]
    whole = [
        [
            f"{case['bits']} bits, {case['disk'] / 1e9:.1f} GB/s, batch {case['batch']}",
            f"{case['file_bytes'] / 1e12:.2f}",
            f"{case['expert_bytes'] / 1e6:.1f}",
            f"{case['memory_bytes'] / 1e9:.1f}",
            f"{case['encode_bytes'] / 1e9:.0f}",
            f"{case['encode_seconds']:.0f}",
            f"{case['decode_bytes'] / 64 / 1e9:.2f}",
            f"{case['tokens_a_second']:.2f}",
        ]
        for case in part["whole"]
    ]
    titles = [
        f"{WHOLE}, planned",
        "TB on disk",
        "MB per expert",
        "GB resident",
        "GB read for 64 tokens per row in",
        "seconds",
        "GB read per step",
        "tokens/s",
    ]
    return [
        f"Plan against one run (commit {part['environment']['commit']}), disk "
        f"{part['machine']['disk'] / 1e9:.2f} GB/s, memory "
        f"{part['machine']['memory'] / 1e9:.1f} GB/s, products "
        f"{part['machine']['flops'] / 1e9:.0f} GFLOP/s, all measured beside it:\n\n"
        + harness.table(headers, rows),
        f"On paper, {BUDGET / 1e9:.0f} GB for experts; the first rate is this disk's, the others "
        "are what NVMe disks promise and were not measured:\n\n" + harness.table(titles, whole),
    ]


def _as_json(found: OffloadPlan) -> dict[str, Any]:
    return dataclasses.asdict(found) | {
        name: getattr(found, name)
        for name in ("file_bytes", "encode_bytes", "decode_bytes", "memory_bytes")
    }
