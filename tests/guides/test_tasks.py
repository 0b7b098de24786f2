"""docs/guides/tasks.md lists what the registry has, and its commands parse."""

import shlex
from pathlib import Path

import pytest
import typer

from switchlm.cli.main import load
from switchlm.data.tasks.registry import GROUPS, MIXTURES, TASKS
from switchlm.evaluation.metrics import METRICS

GUIDE = Path(__file__).parents[2].joinpath("docs", "guides", "tasks.md").read_text("utf-8")


def table():
    """Return what the guide's table should be; paste it there where the test fails."""
    lines = ["| task | reads | writes | metrics | on the hub |", "|---|---|---|---|---|"]
    for group, tasks in GROUPS.items():
        lines.append(f"| **{group}** | | | | |")
        for task in tasks:
            answers = ", ".join(task.labels) if task.labels else f"`{task.target}`"
            metrics = ", ".join(task.metrics)
            lines.append(f"| {task.name} | `{task.input}` | {answers} | {metrics} | `{task.hub}` |")
    return "\n".join(lines)


def test_the_table_is_the_registry():
    assert table() in GUIDE, f"\n{table()}"
    assert set(TASKS) == {task.name for tasks in GROUPS.values() for task in tasks}


def test_mixtures_and_metrics_are_listed():
    for name, parts in MIXTURES.items():
        assert f"`{name}`: {', '.join(parts)}" in " ".join(GUIDE.split())
    for name in METRICS:
        assert f"`{name}`" in GUIDE


@pytest.mark.parametrize(
    "line", [line for line in GUIDE.splitlines() if line.startswith("switchlm evaluate")]
)
def test_its_commands_parse(line):
    _, name, *arguments = shlex.split(line)
    command = load(name)
    assert isinstance(command, typer.core.TyperCommand)
    command.make_context(name, arguments)
