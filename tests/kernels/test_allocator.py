"""Freed memory stays for the next step: no page faults the second time."""

import resource
import subprocess
import sys
from pathlib import Path

import pytest

import switchlm

FAULTS = """
import resource, sys, torch
from switchlm.kernels.allocator import keep_freed_memory
if sys.argv[1] == "keep" and not keep_freed_memory():
    print("not understood")
    sys.exit()
for _ in range(3):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(1 << 24)  # 64 MiB
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(how: str) -> str:
    source = str(Path(switchlm.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", FAULTS, how],
        env={"PYTHONPATH": source},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


def test_the_second_tensor_takes_the_memory_of_the_first() -> None:
    kept = faults("keep")
    if kept == "not understood":
        pytest.skip("not glibc")
    pages = (64 << 20) // resource.getpagesize()
    assert int(kept) < pages / 10
    assert int(faults("leave")) > pages / 2
