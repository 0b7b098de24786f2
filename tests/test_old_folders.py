"""Folders of an older version load and resume, with the same results.

A run that was stopped after 3 of its 6 steps, its model, and that model quantised to 8 and 4 bits;
expected.json has the results of that version.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import switchlm
from switchlm.cli.main import app
from switchlm.kernels.cpu.quantised import Int4Matrix

FOLDERS = Path(__file__).parent / "golden" / "folders"
EXPECTED = json.loads((FOLDERS / "expected.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", ["model", "int8", "int4"])
def test_a_model_folder_gives_the_same_logits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = logits(name)
    expected = torch.tensor(EXPECTED["logits"][name])
    if name == "int4":
        # The code that wrote the values rounded products to bfloat16; the sums of float32 products
        # of the same codes are what is right.
        monkeypatch.setattr(Int4Matrix, "__call__", multiply)
        written, expected = expected, logits(name)
        torch.testing.assert_close(expected, written, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def multiply(matrix: Int4Matrix, x_RK: torch.Tensor) -> torch.Tensor:
    """Multiply the slow way: rows rounded to bfloat16, as all kernels do, with float32 weights."""
    return x_RK.bfloat16().float() @ matrix.dequantise().t()


def logits(name: str) -> torch.Tensor:
    model, _ = switchlm.load(str(FOLDERS / name))
    inputs_BS, targets_BT = torch.arange(70, 90)[None], torch.tensor([[0, 100, 101, 102]])
    with torch.no_grad():
        return model.eval()(inputs_BS, targets_BT).logits_BTV[0, -1, 65:97]


def test_a_run_resumes_with_its_losses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(FOLDERS, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["pretrain", "--out", "run", "--resume"])
    assert done.exit_code == 0, done.output
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    losses = {line["step"]: line["loss"] for line in lines if "loss" in line}
    assert list(losses) == [1, 2, 3, 4, 5, 6]
    later = [losses[step] for step in (4, 5, 6)]
    assert later == pytest.approx(list(EXPECTED["losses"].values()), rel=1e-4)
    assert lines[-1]["evaluation_loss"] == pytest.approx(EXPECTED["evaluation_loss"], rel=1e-4)
