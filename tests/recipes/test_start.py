"""A run begins once, and is verified when it is resumed; without training."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from switchlm.config import read_yaml
from switchlm.data.text.tokenizer import Tokenizer, Vocabulary
from switchlm.errors import CheckpointError, ConfigError, DataError
from switchlm.parallel.mesh import ALONE
from switchlm.recipes.config import run_config, to_sections
from switchlm.recipes.start import differences, open_run, settings_of_run
from switchlm.training.run_folder import RunFolder

TOKENIZER = Tokenizer.bytes()
SECTIONS = to_sections(run_config(preset="nano", sources=["a"]))


def changed(**settings: Any) -> dict[str, Any]:
    """Return the sections with settings such as training_steps=5."""
    result = {
        name: dict(part) if isinstance(part, dict) else part for name, part in SECTIONS.items()
    }
    for name, value in settings.items():
        section, _, key = name.partition("_")
        result[section][key] = value
    return result


def start(
    out: Path,
    resume: bool = False,
    *,
    text: str = "text",
    tokenizer: Tokenizer = TOKENIZER,
    fail: BaseException | None = None,
    **settings: Any,
) -> list[str]:
    """Start or resume a run as a recipe does; return what it reports."""
    lines: list[str] = []
    stated = {"config.yaml": changed(**settings)}
    with open_run(out, resume, ALONE) as run:
        run.check(stated, lines.append)
        run.begin(stated, tokenizer, text=text)
        if fail is not None:
            raise fail
    return lines


def content(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def out(tmp_path: Path) -> Path:
    start(tmp_path / "run")
    return tmp_path / "run"


def test_a_run_is_not_started_twice(out: Path) -> None:
    with pytest.raises(ConfigError, match="There is a run in"):
        start(out)


def test_what_exists_is_verified_and_not_written(out: Path) -> None:
    before = {path: path.stat().st_ino for path in out.rglob("*")}
    assert start(out, resume=True) == []
    assert {path: path.stat().st_ino for path in out.rglob("*")} == before


def test_a_second_process_is_refused_at_once(out: Path) -> None:
    with open_run(out, True, ALONE), pytest.raises(ConfigError, match=r"^Process \d+ is writing"):
        start(out, resume=True)


def test_the_course_of_training_may_change_and_that_is_said(out: Path) -> None:
    (line,) = start(out, resume=True, training_steps=7, training_learning_rate=0.5)
    assert "training.learning_rate 0.5 (the run has " in line
    assert "training.steps 7 (the run has " in line
    assert settings_of_run(RunFolder(out))["training"]["steps"] == 7


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"training_seed": 3}, r"training\.seed 3 \(the run has 0\)"),
        ({"model_d_model": 64}, r"model\.d_model 64 \(the run has 32\)"),
        ({"data_tokenizer": "unigram"}, r"data\.tokenizer 'unigram'"),
        ({"data_batch_size": 1, "training_steps": 7}, r"data\.batch_size 1"),
        ({"router_balance_weight": 0.5}, r"router\.balance_weight 0\.5"),
    ],
)
def test_another_run_is_refused_before_anything_is_written(
    out: Path, settings: dict[str, Any], named: str
) -> None:
    before = content(out)
    with pytest.raises(ConfigError, match=rf"{named}.* may change\."):
        start(out, resume=True, **settings)
    assert content(out) == before


@pytest.mark.parametrize(
    ("settings", "done", "said"),
    [
        ({"steps": 10}, {"step": 1139}, "1,139 steps already, and .* is 10: nothing was trained"),
        ({"learning_rate": 0.5}, {"step": 10_000}, "10,000 steps already.*: nothing was trained"),
        ({"seconds": 9}, {}, r"9\.5 s already, and training.seconds is 9: nothing was trained"),
        ({"steps": 50_000}, {"stopped": True}, "ended at step 40, .*: nothing was trained"),
        ({"steps": 41, "seconds": 10}, {}, ""),
        ({"steps": 40}, {}, "has 40 steps already, and training.steps is 40: nothing is left"),
        ({}, {"step": 20_000}, "has 20,000 steps already, and .* is 10,000: nothing is left"),
        ({"device": "cpu"}, {"stopped": True}, "ended at step 40, .*: nothing is left"),
    ],
)
def test_a_run_that_has_ended_takes_no_other_course(
    out: Path, settings: dict[str, Any], done: dict[str, Any], said: str
) -> None:
    """Settings by which nothing is trained are not those of the run; it is finished without."""
    state = {"progress": {"done": {"step": 40, "seconds": 9.5, "stopped": False, **done}}}
    for step, saved in ((7, {}), (state["progress"]["done"]["step"], state)):
        folder = out / "checkpoints" / f"step-{step:08d}"
        folder.mkdir(parents=True)
        (folder / "state.json").write_text(json.dumps(saved))
    lines: list[str] = []
    with open_run(out, True, ALONE) as run:
        stated = changed(**{f"training_{name}": value for name, value in settings.items()})
        ended = run.check({"config.yaml": stated}, lines.append)
    assert (ended is not None) == ("nothing was trained" in said)
    lines += [ended] if ended else []
    assert re.search(said, lines[-1])
    assert said or "nothing" not in " ".join(lines)


@pytest.mark.parametrize("state", [b"", b"[]", b'{"progress": 3}', b"[" * 100_000, b"\xff"])
def test_a_damaged_checkpoint_is_not_the_end_of_a_run(out: Path, state: bytes) -> None:
    folder = out / "checkpoints" / "step-00000040"
    folder.mkdir(parents=True)
    (folder / "state.json").write_bytes(state)
    (line,) = start(out, resume=True, training_steps=10)
    assert "training.steps 10 (the run has " in line


def test_another_text_or_vocabulary_is_refused(out: Path) -> None:
    before = content(out)
    with pytest.raises(ConfigError, match="The text is not the one that the run in"):
        start(out, resume=True, text="other")
    with pytest.raises(ConfigError, match="The vocabulary is not the one"):
        start(out, resume=True, tokenizer=Tokenizer.bytes(num_sentinels=7))
    assert content(out) == before


def test_the_same_text_may_lie_elsewhere(out: Path) -> None:
    assert start(out, resume=True, data_sources=["b"]) == []
    (out / "start.json").unlink()  # as in earlier versions
    with pytest.raises(ConfigError, match=r"data\.sources \['c'\]"):
        start(out, resume=True, data_sources=["c"])


@pytest.mark.parametrize("error", [RuntimeError(), KeyboardInterrupt()])
def test_a_start_that_fails_leaves_nothing(tmp_path: Path, error: BaseException) -> None:
    with pytest.raises(type(error)):
        start(tmp_path / "new" / "run", fail=error)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "notes.txt").touch()
    with pytest.raises(type(error)):
        start(tmp_path, fail=error)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_failure_after_the_first_line_leaves_the_run(tmp_path: Path) -> None:
    def fail() -> None:
        with open_run(tmp_path, False, ALONE) as run:
            run.begin({"config.yaml": SECTIONS}, TOKENIZER, text="text")
            run.folder.metrics.write_text('{"step": 1}\n')
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert RunFolder(tmp_path).exists()


def test_a_resumed_start_that_fails_gives_the_settings_back(out: Path) -> None:
    before = content(out)
    with pytest.raises(RuntimeError):
        start(out, resume=True, training_steps=7, fail=RuntimeError())
    assert content(out) == before


def test_what_a_killed_start_left_is_replaced(out: Path) -> None:
    (out / "config.yaml").unlink()  # which is written last
    (out / ".model.partial-1").mkdir()
    (out / ".start.json.partial-1").touch()
    start(out, training_seed=9)
    assert settings_of_run(RunFolder(out))["training"]["seed"] == 9
    assert not list(out.glob(".*.partial-*"))


def test_a_model_without_its_run_is_not_replaced(out: Path) -> None:
    (out / "config.yaml").unlink()
    (out / "model").mkdir()
    with pytest.raises(ConfigError, match="it holds 'model', which is not of this run"):
        start(out)


@pytest.mark.parametrize("name", ["model", "tokenizer", "report.html", "tensorboard"])
def test_files_that_are_not_of_a_run_are_not_replaced(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / name / "mine").write_text("years of work")
    with pytest.raises(ConfigError, match=f"it holds '{name}', which is not of this run"):
        start(tmp_path)
    assert (tmp_path / name / "mine").read_text() == "years of work"


def test_a_changed_model_is_seen_before_the_run_goes_on(out: Path) -> None:
    (out / "model").mkdir()
    (out / "model" / "mine").touch()
    with pytest.raises(CheckpointError, match="'mine', which switchlm has not written"):
        start(out, resume=True)


def test_settings_that_were_cut_are_refused_or_restored(out: Path) -> None:
    path = out / "config.yaml"
    whole = path.read_text()
    lines = whole.splitlines(keepends=True)
    for keep in (len(lines) - 1, len(lines) // 2, 1, 0):
        path.write_text("".join(lines[:keep]))
        with pytest.raises(ConfigError, match=r"lacks .*, which the run began with: it was cut"):
            start(out, resume=True)
    path.write_text("training: {")
    with pytest.raises(
        ConfigError, match=r"(?s)Cannot read .* Delete it to go on with the settings"
    ):
        start(out, resume=True)
    path.unlink()
    assert settings_of_run(RunFolder(out)) == SECTIONS
    (out / "metrics.jsonl").touch()
    start(out, resume=True)
    assert path.read_text() == whole


def test_damaged_files_say_what_to_do(out: Path) -> None:
    (out / "tokenizer" / "tokenizer.json").write_text("{")
    with (
        pytest.raises(DataError, match="copy the one of its model"),
        open_run(out, True, ALONE) as run,
    ):
        run.tokenizer(Vocabulary(size=384, pad_id=0, end_id=1))
    (out / "start.json").write_text("{")
    with pytest.raises(ConfigError, match="Delete it to resume without comparing"):
        start(out, resume=True)


def test_a_run_without_settings_is_not_resumed_with_others(out: Path) -> None:
    (out / "config.yaml").unlink()
    (out / "start.json").unlink()
    (out / "metrics.jsonl").touch()
    with pytest.raises(ConfigError, match=r"has no config\.yaml"):
        start(out, resume=True)


def test_another_command_does_not_go_on_with_a_run(out: Path) -> None:
    with (
        pytest.raises(ConfigError, match="was started by another command"),
        open_run(out, True, ALONE) as run,
    ):
        run.check({"config.yaml": SECTIONS, "distillation.yaml": {"distillation": {}}}, print)


def test_runs_of_an_earlier_version_are_compared_by_what_they_have(out: Path) -> None:
    (out / "start.json").unlink()
    sections = read_yaml(out / "config.yaml")
    del sections["training"]["schedule"], sections["kernels"]
    (out / "config.yaml").write_text(json.dumps(sections))
    start(out, resume=True, text="not compared")
    assert settings_of_run(RunFolder(out)) == SECTIONS


def test_an_upgraded_setting_does_not_differ() -> None:
    now = {"model": {"initialisation": {"scale": 0.1}}}
    assert differences({"model": {"initialisation_scale": 0.1}}, now) == {}
    assert list(differences({"model": {"initialisation_scale": 0.2}}, now)) == [
        "model.initialisation.scale"
    ]
