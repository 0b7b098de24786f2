import subprocess
import sys
from pathlib import Path

import pytest
import torch

from switchlm.kernels.cpu import memory


@pytest.mark.parametrize("shape", [(3,), (1 << 19,), (1000, 1001), (2, 700, 900)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_tensors_are_ordinary_ones(shape, dtype):
    tensor = memory.empty_on_large_pages(shape, dtype)
    assert tensor.shape == shape
    assert tensor.dtype == dtype
    assert tensor.is_contiguous()
    assert torch.equal(tensor.fill_(3), torch.full(shape, 3, dtype=dtype))


def test_large_ones_begin_at_a_page():
    assert memory.empty_on_large_pages((1 << 20,), torch.float32).data_ptr() % memory.PAGE == 0


LARGE = """
import re
import torch
from switchlm.kernels.cpu import memory

tensor = memory.empty_on_large_pages((16 << 20,), torch.uint8).fill_(1)
text = open("/proc/self/smaps").read()
for first, last, kilobytes in re.findall(
    r"^([0-9a-f]+)-([0-9a-f]+) .*?AnonHugePages: +([0-9]+) kB", text, re.M | re.S
):
    if int(first, 16) <= tensor.data_ptr() + memory.PAGE < int(last, 16):
        print(kilobytes)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="madvise of Linux")
def test_the_system_gives_large_pages_where_it_has_any():
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not setting.exists() or "[never]" in setting.read_text():
        pytest.skip("this system has no large pages")
    # A process of its own: memory that this one has freed is on ordinary pages already.
    command = [sys.executable, "-c", LARGE]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert found
    assert int(found[0]) >= 2048
