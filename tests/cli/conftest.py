import json

import pytest
import torch
from typer.testing import CliRunner

from switchlm.cli.main import app
from switchlm.data.text.tokenizer import Tokenizer
from switchlm.huggingface import load
from switchlm.model.presets import preset
from switchlm.model.transformer import SwitchTransformer


@pytest.fixture(scope="session")
def nano(tmp_path_factory):
    """A folder with an untrained nano model."""
    folder = tmp_path_factory.mktemp("models") / "nano"
    torch.manual_seed(0)
    load.save(SwitchTransformer(preset("nano")), Tokenizer.bytes(), folder)
    return str(folder)


@pytest.fixture
def text_file(tmp_path):
    """Enough text for a few short rows."""
    path = tmp_path / "story.txt"
    path.write_text("".join(f"Sentence {i} says that {i} is {i * i}.\n" for i in range(60)))
    return str(path)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run a command line in this process, with caches in a folder of the test."""
    monkeypatch.setenv("HOME", str(tmp_path))

    def run(*arguments, **options):
        return CliRunner().invoke(app, [str(argument) for argument in arguments], **options)

    return run


@pytest.fixture
def run_json(run):
    """Run a command line with --json and return what it prints."""

    def run_json(*arguments, **options):
        result = run(*arguments, "--json", **options)
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)

    return run_json


@pytest.fixture
def run_unchanged(run):
    """Run a command line that leaves a folder as it is, and return what it prints, in one line."""

    def content(folder):
        files = (path for path in folder.rglob("*") if path.is_file())
        return {path: (path.stat().st_ino, path.read_bytes()) for path in files}

    def run_unchanged(folder, *arguments):
        before = content(folder)
        result = run(*arguments)
        assert result.exit_code == 0, result.output
        assert content(folder) == before
        return " ".join(result.output.split())

    return run_unchanged


@pytest.fixture
def refuse(run):
    """Run a command line with a mistake; return the error message."""

    def refuse(*arguments, **options):
        result = run(*arguments, **options)
        assert result.exit_code == 2, (result.output, result.exception)
        assert "Traceback" not in result.output
        errors = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
        assert len(errors) == 1
        return errors[0]

    return refuse
