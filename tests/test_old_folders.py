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

FOLDERS = Path(__file__).parent / "golden" / "folders"
EXPECTED = json.loads((FOLDERS / "expected.json").read_text(encoding="utf-8"))


# The kernel for 4 bits rounds activations to bfloat16; the one that wrote the values did not.
@pytest.mark.parametrize(("name", "close"), [("model", 1e-4), ("int8", 1e-4), ("int4", 1e-3)])
def test_a_model_folder_gives_the_same_logits(name: str, close: float) -> None:
    model, _ = switchlm.load(str(FOLDERS / name))
    inputs_BS, targets_BT = torch.arange(70, 90)[None], torch.tensor([[0, 100, 101, 102]])
    with torch.no_grad():
        logits_BTV = model.eval()(inputs_BS, targets_BT).logits_BTV
    expected = torch.tensor(EXPECTED["logits"][name])
    torch.testing.assert_close(logits_BTV[0, -1, 65:97], expected, rtol=1e-4, atol=close)


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
