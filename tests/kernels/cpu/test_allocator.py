"""Freed memory stays for the next steps: hardly a page fault once there is enough of it."""

import resource
import subprocess
import sys
from pathlib import Path

import pytest

import switchlm

FAULTS = """
import resource, sys, torch
from switchlm.kernels.cpu.memory import keep_freed_memory
if sys.argv[1] == "keep" and not keep_freed_memory():
    print("not understood")
    sys.exit()
for _ in range(8):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    tensors = [torch.ones(megabytes << 18) for megabytes in (64, 8, 16, 48, 8, 32)]
    del tensors
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


def test_a_step_takes_the_memory_of_those_before() -> None:
    kept = faults("keep")
    if kept == "not understood":
        pytest.skip("not glibc")
    pages = (176 << 20) // resource.getpagesize()
    assert int(kept) < pages / 2
    # How much the allocator keeps when left alone depends on the system, but it is far less.
    assert int(faults("leave")) > 2 * int(kept)
