"""The README is up to date: its Python runs, its commands parse, its tree and links exist."""

import os
import re
import shlex
import sys
from pathlib import Path

import pytest
import typer
from tests.commands import run

from switchlm.cli.main import COMMANDS, load

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language):
    fences = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.S | re.M)
    return [text for name, text in fences if name == language]


def test_the_python_runs_from_top_to_bottom(tmp_path):
    """In one process, since the last block loads what the one before saved."""
    code = "\n".join(blocks("python"))
    assert code.count("switchlm.save") == 1
    assert code.count("switchlm.load") == 1
    environment = {**os.environ, "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = run([sys.executable, "-c", code], cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    assert "% dropped" in done.stdout
    assert (tmp_path / "my-model" / "model.safetensors").exists()


LINES = [line for block in blocks("") for line in block.splitlines() if line[:8] == "switchlm"]


@pytest.mark.parametrize("line", LINES)
def test_the_commands_parse(line):
    _, name, *arguments = shlex.split(line, comments=True)
    command = load(name)
    assert isinstance(command, typer.core.TyperCommand)
    command.make_context(name, arguments)


def test_every_command_is_in_the_readme():
    assert {line.split()[1] for line in LINES} == set(COMMANDS)


def test_the_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = re.findall(r"make (\w+)", README)
    assert {"demo", "test"} <= set(targets)
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.M), target


def test_links_and_tree_exist():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
    tree = next(block for block in blocks("") if block.startswith("src/"))
    packages = set(re.findall(r"\b(\w+)/", tree.split("benchmarks/")[0])) - {"src", "switchlm"}
    found = {path.name for path in (ROOT / "src" / "switchlm").iterdir() if path.is_dir()}
    assert packages == found - {"__pycache__"}


@pytest.mark.parametrize(
    "page",
    [
        ROOT / "CONTRIBUTING.md",
        *(path for path in ROOT.glob("docs/**/*.md") if path.name not in ("log.md", "results.md")),
    ],
    ids=lambda path: path.name,
)
def test_files_that_pages_name_exist(page):
    """Paths in backquotes, as from the root, from src/switchlm or beside the page, and links."""
    text = page.read_text("utf-8")
    named = re.findall(r"`([\w./-]+\.(?:py|c|js|yaml|md|sh))`", text)
    links = [link for link in re.findall(r"\]\(([^)#]+)", text) if ":" not in link]
    homes = (ROOT, ROOT / "src" / "switchlm", ROOT / "src/switchlm/kernels/cpu", page.parent)
    paths = [name for name in named if "/" in name]
    missing = [name for name in paths if not any((home / name).exists() for home in homes)]
    missing += [link for link in links if not (page.parent / link).exists()]
    assert not missing
