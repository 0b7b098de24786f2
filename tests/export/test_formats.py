"""Exported programs against the model, in any number of rows, inputs and places."""

import shutil

import numpy as np
import pytest
import torch

from switchlm.data.text.tokenizer import Tokenizer
from switchlm.errors import CheckpointError, MissingExtraError
from switchlm.export import formats
from switchlm.export.formats import copy_views, new_folder, open_programs, write_programs
from switchlm.generation.decode import dropless


def assert_dims_are_free(encode, step, model):
    """Other numbers of rows, inputs and places than those it was traced with, 1 included."""
    for batch, source, places in ((1, 1, 1), (3, 50, 20)):
        tokens = torch.randint(3, 300, (batch, source))
        mask = np.ones((batch, source), dtype=bool)
        encoded, keys, values = encode(tokens.numpy(), mask)
        with torch.no_grad(), dropless(model):
            expected = model.encode(tokens)[0]
            first = model.decode(tokens[:, :1], expected).logits_BTV[:, 0]
        np.testing.assert_allclose(encoded, expected, rtol=1e-3, atol=1e-4)
        cache = np.zeros((2, batch, 2, places, 16), dtype=np.float32)
        token = tokens[:, :1].numpy()
        logits, *_ = step(token, np.array(0), mask, keys, values, cache, cache)
        np.testing.assert_allclose(logits, first, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "factor"),
    [
        ({}, None),
        ({"gated": True, "activation": "gelu"}, None),
        ({"router": {"experts_per_token": 2}}, None),
        ({"num_experts": 0}, None),
        ({}, 4.0),
    ],
    ids=["switch", "v1.1", "two experts", "dense", "capacity for all"],
)
def test_exported_programs_are_the_model(build, tmp_path, changes, factor):
    model, tokenizer = build(**changes), Tokenizer.bytes()
    for to in ("onnx", "torch"):
        write_programs(model, tokenizer, tmp_path / "x", to, capacity_factor=factor)
        assert_dims_are_free(*open_programs(tmp_path / "x", to), model)


def test_views_of_larger_storages_are_copied_before_saving():
    whole = torch.arange(8.0)
    weights = {"part": whole[2:5], "whole": whole}
    copy_views(weights)
    assert weights["part"].untyped_storage().nbytes() == 3 * 4
    assert weights["part"].tolist() == [2, 3, 4]
    assert weights["whole"] is whole


def test_other_files_of_the_user_s_are_not_replaced(tmp_path):
    tmp_path.joinpath("thesis.tex").write_text("years of work")
    with (
        pytest.raises(CheckpointError, match=r"'thesis\.tex', which switchlm has not written"),
        new_folder(tmp_path),
    ):
        pass
    assert tmp_path.joinpath("thesis.tex").read_text() == "years of work"


def test_an_export_that_fails_leaves_the_earlier_one(tmp_path):
    folder = tmp_path / "x"
    with new_folder(folder) as partial:
        (partial / "export.json").write_text("1")
    with pytest.raises(ZeroDivisionError), new_folder(folder) as partial:
        (partial / "export.json").write_text(str(1 / 0))
    assert (folder / "export.json").read_text() == "1"
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_the_earlier_export_is_deleted_when_the_new_one_is_in_its_place(tmp_path, monkeypatch):
    folder, seen, rmtree = tmp_path / "x", [], shutil.rmtree

    def noted(path):
        seen.append((folder / "export.json").read_text())
        rmtree(path)

    for text in ("1", "2"):
        monkeypatch.setattr(shutil, "rmtree", noted if text == "2" else rmtree)
        with new_folder(folder) as partial:
            (partial / "export.json").write_text(text)
    assert seen == ["2"]
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_a_missing_package_names_its_extra(build, tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"'onnx', which is not.*switchlm\[onnx\]"):
        write_programs(build(), Tokenizer.bytes(), tmp_path / "x", "onnx")
    with pytest.raises(MissingExtraError, match=r"'onnxruntime', .*switchlm\[onnx\]"):
        open_programs(tmp_path / "x", "onnx")
