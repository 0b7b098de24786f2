"""The bytes that a training step sends are those of section 5 of the paper."""

from collections import defaultdict

import pytest
import torch
from tests.parallel.processes import run_in_processes

from switchlm.data.batch import Batch
from switchlm.model.config import ModelConfig, RouterConfig
from switchlm.model.precision import set_precision
from switchlm.model.transformer import SwitchTransformer
from switchlm.parallel.apply import apply, materialise
from switchlm.parallel.mesh import Mesh, MeshConfig
from switchlm.planning.recorder import Collective, CollectiveRecorder
from switchlm.training.config import TrainingConfig
from switchlm.training.optimizer import build_optimizer, set_learning_rate
from switchlm.training.step import training_step

B, S, T, D, V, F, E = 2, 12, 8, 32, 64, 48, 4  # rows, inputs, targets of a process; sizes
BLOCKS, SWITCH_LAYERS = 2, 2  # a stack; in all: every second layer of both stacks
MODEL = ModelConfig(
    vocabulary_size=V,
    d_model=D,
    d_ff=F,
    d_kv=8,
    num_heads=4,
    num_encoder_layers=BLOCKS,
    num_decoder_layers=BLOCKS,
    num_experts=E,
    router=RouterConfig(capacity_factor=0.75, min_capacity=1, exploration="argmax", group_rows=1),
)
LAYOUTS = [
    MeshConfig(data=4),
    MeshConfig(expert=4),
    MeshConfig(data=2, expert=2),
    MeshConfig(data=2, tensor=2),
    MeshConfig(expert=2, tensor=2),
    MeshConfig(tensor=4),
]


@pytest.mark.parametrize("precision", ["float32", "selective"])
def test_four_processes_send_what_the_paper_counts(tmp_path, precision):
    run_in_processes(4, tmp_path, count_all, precision)


def count_all(rank: int, precision: str) -> None:
    # The precision decides the bytes of a number alone, so that float32 needs no layout twice.
    for layout in LAYOUTS if precision == "selective" else LAYOUTS[2:5:2]:
        count(Mesh.of(layout, "cpu"), precision)


def by_kind(collectives: list[Collective]) -> dict[tuple[str, str, torch.dtype], tuple[int, int]]:
    """Return (number of calls, payload in bytes) of each (kind, axes, dtype)."""
    totals = defaultdict(lambda: (0, 0))
    for one in collectives:
        number, payload = totals[one.kind, one.axes, one.dtype]
        totals[one.kind, one.axes, one.dtype] = (number + 1, payload + one.payload)
    return dict(totals)


def count(mesh: Mesh, precision: str) -> None:
    wire = torch.float32 if precision == "float32" else torch.bfloat16
    with torch.device("meta"):
        model = SwitchTransformer(MODEL)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    apply(model, mesh, wire_dtype=None if precision == "float32" else wire)
    materialise(model, torch.device("cpu"), seed=0)
    config = TrainingConfig()
    optimizer = build_optimizer(model, config)
    set_learning_rate(optimizer, 1e-3)
    noise = torch.Generator().manual_seed(mesh.data_rank)
    batch = Batch(
        inputs_BS=torch.randint(2, V, (B, S), generator=noise),
        targets_BT=torch.randint(2, V, (B, T), generator=noise),
        input_segments_BS=None,
        target_segments_BT=None,
        source_B=torch.zeros(B, dtype=torch.int32),
    )
    set_precision(model, precision)
    step = {"gradient_clip": 1.0, "mesh": mesh}
    training_step(model, optimizer, [batch], **step)
    with CollectiveRecorder(mesh) as recorder:
        record = training_step(model, optimizer, [batch], **step)
    found = by_kind(recorder.collectives)
    kept = sum(int(layer.kept_A.sum()) for layer in record.routing[0])
    everywhere = int(mesh.all_reduce_sum(torch.tensor(kept)))
    assert everywhere < mesh.data_size * SWITCH_LAYERS // 2 * B * (S + T), "capacity must bind"

    # Expert parallelism (5.4): two all-to-alls a layer and direction, of kept tokens alone.
    if mesh.size("expert") > 1:
        calls, payload = found.pop(("all_to_all", "expert", wire))
        assert calls == 4 * SWITCH_LAYERS
        sent = int(mesh.all_reduce_sum(torch.tensor(payload)))
        assert sent == 4 * everywhere * D * wire.itemsize
        # The numbers of rows are exchanged first: one per expert.
        counts = found.pop(("all_to_all", "expert", torch.int64))
        assert counts == (SWITCH_LAYERS, SWITCH_LAYERS * E * 8)

    # Model parallelism (5.3): an all-reduce of [tokens, D] where a split sublayer ends, and one of
    # its gradient where it begins; cross-attention has two beginnings.
    if mesh.size("tensor") > 1:
        dense_ffn = BLOCKS - BLOCKS // 2
        encoder = 2 * (BLOCKS + dense_ffn) * B * S
        decoder = 2 * (2 * BLOCKS + dense_ffn) * B * T + BLOCKS * B * S
        embedding_and_head = B * S + B * T + B * T
        received = received_rows(record, mesh)
        numbers = (encoder + decoder + embedding_and_head + 2 * received) * D
        found_numbers = sum(
            payload // dtype.itemsize
            for (kind, axes, dtype), (_, payload) in found.items()
            if kind == "all_reduce" and axes == "tensor"
        )
        # The loss needs, of each target, the largest logit, the sum, and the target's own.
        norm = 5 * (mesh.size("tensor") == 4)  # bookkeeping, see below
        assert found_numbers == numbers + 3 * B * T + norm, (mesh, found)
        for key in [key for key in found if key[:2] == ("all_reduce", "tensor")]:
            del found[key]

    # Data parallelism (5.1), as FSDP has it: weights are gathered, forward and backward, and
    # gradients summed once, in float32.
    shards = mesh.size("data") * mesh.size("expert")
    tensor = mesh.size("tensor")
    if shards > 1:
        axes = "x".join(axis for axis in ("data", "expert") if mesh.size(axis) > 1)
        own = {name: size // cut(name, tensor) for name, size in sizes.items()}
        others = sum(size for name, size in own.items() if ".experts." not in name)
        experts = sum(size for name, size in own.items() if ".experts." in name)
        by_data = experts // mesh.size("expert") if mesh.size("data") > 1 else 0
        expected = others + by_data
        summed = sum(
            payload for (kind, _, _), (_, payload) in found.items() if kind == "reduce_scatter"
        )
        assert summed == 4 * expected, (mesh, summed, 4 * expected)
        gathered = sum(
            payload // dtype.itemsize
            for (kind, _, dtype), (_, payload) in found.items()
            if kind == "all_gather"
        )
        # The root's weights stay gathered between forward and backward.
        root = sum(size for name, size in own.items() if ".blocks." not in name)
        assert gathered == 2 * expected - root
        exact = found.get(("all_gather", axes, torch.float32), (0, 0))[1]
        if precision == "selective":
            kept_exact = sum(
                size
                for name, size in own.items()
                if ".blocks." in name and ("router" in name or "norm" in name)
            )
            assert exact == 4 * (2 * kept_exact + root)
        found = {
            key: value
            for key, value in found.items()
            if key[0] not in ("all_gather", "reduce_scatter")
        }

    # What is left is the step's bookkeeping: targets, losses, the gradient's norm, tokens, stops.
    assert all(kind == "all_reduce" for kind, _, _ in found), found
    assert sum(payload for _, payload in found.values()) <= 8 + 3 * 4 + 3 * 8


def received_rows(record, mesh: Mesh) -> int:
    """Return the number of rows that the local experts received, from all processes."""
    first = mesh.rank("expert") * E // mesh.size("expert")
    mine = slice(first, first + E // mesh.size("expert"))
    total = 0
    for layer in record.routing[0]:
        loads_E = torch.bincount(layer.expert_A[layer.kept_A], minlength=E)
        group = mesh.device_mesh["expert"].get_group()
        if mesh.size("expert") > 1:
            torch.distributed.all_reduce(loads_E, group=group)
        total += int(loads_E[mine].sum())
    return total


def cut(name: str, tensor: int) -> int:
    """Return the number of parts into which the tensor axis splits a parameter."""
    return 1 if "norm" in name or "router" in name else tensor
