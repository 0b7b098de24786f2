"""benchmarks/demo.py: real short races, what it makes of them, and what "only AVX2" means."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tests import commands

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmarks" / "demo.py"
CAPABILITY = """
import torch
from switchlm.kernels.cpu.native import native
assert native().library is not None, native().reason
print(torch.backends.cpu.get_cpu_capability(), native().library._name)
"""


@pytest.fixture
def demo(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    import demo

    return demo


def run(tmp_path, *arguments):
    environment = {**os.environ, "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), "--draft", "--runs", str(tmp_path / "runs")]
    return commands.run([*command, *map(str, arguments)], cwd=tmp_path, env=environment)


def test_a_race_is_run_once_and_read_again(tmp_path, demo, monkeypatch, capsys):
    texts = tmp_path / "texts"
    texts.mkdir()
    for number in range(40):
        (texts / f"{number}.txt").write_text(f"{number} and one are {number + 1}. " * 40)
    arguments = ["--seeds", 3, "--budget", "2s", "--instructions", "native"]
    for setting in (f"data.sources=[{texts}]", "training.evaluate_every=10", "data.batch_size=8"):
        arguments += ["--set", setting]
    done = run(tmp_path, *arguments)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "runs" / "2s-native-3" / "compare.json").read_text())
    assert result["seeds"] == [3]
    assert f"| native | 3 | {result['steps']:,} | {result['dense_loss']:.3f} |" in done.stdout
    written = (tmp_path / "runs" / "2s-native-3" / "compare.json").stat().st_mtime_ns
    arguments = ["--draft", "--runs", tmp_path / "runs", *arguments]
    monkeypatch.setattr(sys, "argv", ["demo.py", *map(str, arguments)])
    demo.main()
    assert capsys.readouterr().out.splitlines()[0] == done.stdout.splitlines()[0]
    assert (tmp_path / "runs" / "2s-native-3" / "compare.json").stat().st_mtime_ns == written


def test_nothing_to_write_is_said(tmp_path):
    done = run(tmp_path, "--write")
    assert done.returncode != 0
    assert re.search("No finished runs in .*runs", done.stderr)


def test_the_spread_says_how_many_runs_never_got_there(demo):
    runs = [{"step_ratio": 0.2, "time_ratio": 0.3}, {"step_ratio": 0.4, "time_ratio": 0.4}]
    steps, time = demo.spread(runs)
    assert "mean 0.300, smallest 0.200, largest 0.400, of 2 runs" in steps
    assert "mean 0.350" in time
    steps, _ = demo.spread([*runs, {"step_ratio": None, "time_ratio": None}])
    assert "1 of 3 runs never reached" in steps


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="AVX2 is of x86-64 processors")
def test_only_avx2_uses_no_wider_registers(demo, tmp_path):
    environment = demo.only_avx2(tmp_path) | {"HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", CAPABILITY], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    capability, library = done.stdout.split()
    assert capability == "AVX2"
    if shutil.which("objdump"):
        code = subprocess.run(["objdump", "-d", library], capture_output=True, text=True).stdout
        assert "%ymm" in code
        assert "%zmm" not in code
