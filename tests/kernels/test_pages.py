import re
import sys
from pathlib import Path

import pytest
import torch

from switchlm.kernels import pages


@pytest.mark.parametrize("shape", [(3,), (1 << 19,), (1000, 1001), (2, 700, 900)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_tensors_are_ordinary_ones(shape, dtype):
    tensor = pages.empty(shape, dtype)
    assert tensor.shape == shape
    assert tensor.dtype == dtype
    assert tensor.is_contiguous()
    assert torch.equal(tensor.fill_(3), torch.full(shape, 3, dtype=dtype))


def test_large_ones_begin_at_a_page():
    assert pages.empty((1 << 20,), torch.float32).data_ptr() % pages.PAGE == 0


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="madvise of Linux")
def test_the_system_gives_large_pages_where_it_has_any():
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not setting.exists() or "[never]" in setting.read_text():
        pytest.skip("this system has no large pages")
    tensor = pages.empty((16 << 20,), torch.uint8).fill_(1)
    text = Path("/proc/self/smaps").read_text()
    found = re.findall(r"^([0-9a-f]+)-([0-9a-f]+) .*?AnonHugePages: +(\d+) kB", text, re.M | re.S)
    large = [
        int(kb)
        for first, last, kb in found
        if int(first, 16) <= tensor.data_ptr() + pages.PAGE < int(last, 16)
    ]
    assert large
    assert large[0] >= 2048
