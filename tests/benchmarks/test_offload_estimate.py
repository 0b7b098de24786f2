import dataclasses

import pytest
import torch
from benchmarks.offload_estimate import Machine, plan_offload

from switchlm.compression.offload import load_offloaded
from switchlm.errors import ConfigError
from switchlm.generation.decode import generate
from switchlm.huggingface import load
from switchlm.huggingface.quantised import Quantisation
from switchlm.model.presets import preset
from switchlm.model.transformer import SwitchTransformer

DISK = Machine(disk=1e9, memory=1e13, flops=1e16)  # so that nothing but the disk counts


def plan(name="switch-c-2048", **changes):
    fields = {"budget": 4 * 10**9, "input_tokens": 64, "new_tokens": 32} | changes
    return plan_offload(preset(name), DISK, **fields)


def test_sizes_are_those_of_the_paper():
    found = plan()
    assert found.num_parameters == pytest.approx(1.57e12, rel=0.01)
    assert found.expert_bytes == 2 * 2 * 2080 * 6144
    assert found.experts == 30 * 2048
    assert found.file_bytes == pytest.approx(2 * found.num_parameters)
    assert plan("switch-base-256").num_parameters == pytest.approx(14.7e9, rel=0.01)


def test_little_text_touches_an_expert_a_token_and_much_text_all():
    assert plan(input_tokens=1).encoded_experts == pytest.approx(15)
    assert plan(input_tokens=64).encoded_experts == pytest.approx(15 * 63, rel=0.01)
    assert plan(input_tokens=10**6).encoded_experts == pytest.approx(15 * 2048)


def test_time_is_what_the_disk_takes():
    found = plan()
    assert found.encode_seconds == pytest.approx(found.encode_bytes / DISK.disk, rel=0.01)
    assert found.decoded_experts == pytest.approx(32 * 15, rel=0.01)
    assert found.tokens_a_second == pytest.approx(1 / (15 * 0.0511), rel=0.01)


def test_with_room_for_all_each_expert_is_read_once():
    found = plan("switch-base-8", budget=10**10, new_tokens=1000, batch=16)
    assert found.decoded_experts == pytest.approx(6 * 8)
    scarce = plan("switch-base-8", budget=10 * found.expert_bytes, new_tokens=1000, batch=16)
    assert scarce.decoded_experts > 10 * found.decoded_experts


def test_fewer_bits_are_fewer_bytes():
    four = plan(quantisation=Quantisation(bits=4)).expert_bytes
    assert four == pytest.approx(2 * 2080 * 6144 * 5 / 8, rel=0.1)  # 2080 is cut into groups of 32
    assert plan(quantisation=Quantisation(bits=8)).expert_bytes == 2 * 2080 * 6144 + 4 * 8224


def test_the_plan_agrees_with_a_run(tmp_path):
    torch.manual_seed(0)
    shape = {"num_encoder_layers": 2, "num_decoder_layers": 2, "num_experts": 8}
    config = dataclasses.replace(preset("nano"), **shape)
    load.save(SwitchTransformer(config), None, tmp_path / "model")
    offloaded = load_offloaded(tmp_path / "model", 10**6)
    inputs_BS = torch.randint(3, 300, (4, 60))
    generate(offloaded.model, inputs_BS, max_new_tokens=40)
    found = plan_offload(
        config, DISK, budget=10**6, input_tokens=60, new_tokens=40, batch=4, dtype="float32"
    )
    counters = offloaded.memory.counters
    assert counters.bytes_read == counters.experts_read * found.expert_bytes
    dense = sum(parameter.nbytes for parameter in offloaded.model.parameters())
    assert found.dense_bytes == dense
    assert found.encoded_experts + found.decoded_experts == pytest.approx(16, rel=0.01)
    assert counters.experts_read <= 16
    offloaded.memory.close()


def test_what_makes_no_sense_is_refused():
    with pytest.raises(ConfigError, match="dense"):
        plan("dense-base")
    with pytest.raises(ConfigError, match="one expert takes 51,118,080"):
        plan(budget=10**7)
