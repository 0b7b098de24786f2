import json
import sys

import pytest

from switchlm.errors import MissingExtraError
from switchlm.training.config import TrainingConfig
from switchlm.training.monitor import open_monitor, read_metrics, scalars
from switchlm.training.run_folder import RunFolder

LINE = {"step": 3, "loss": 2.5, "load": [[0.5, 0.5]], "layers": ["a"], "skipped": 0}


def test_lines_are_on_disk_at_once_and_appended(tmp_path):
    run = RunFolder(tmp_path / "run")
    with open_monitor(run, TrainingConfig()) as write:
        assert write(LINE) == LINE
        assert read_metrics(run.metrics) == [LINE]
    with open_monitor(run, TrainingConfig()) as write:
        write({"step": 4, "loss": None})
    assert read_metrics(run.metrics) == [LINE, {"step": 4, "loss": None}]


def test_a_line_cut_short_is_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(json.dumps(LINE).encode() + b'\n{"step": 4, "lo')
    assert read_metrics(path) == [LINE]
    assert read_metrics(tmp_path / "none.jsonl") == []


def test_numbers_that_json_lacks_are_null(tmp_path):
    run = RunFolder(tmp_path)
    expected = {"step": 1, "loss": None, "gate": [0.5, None]}
    with open_monitor(run, TrainingConfig()) as write:
        assert write({"step": 1, "loss": float("nan"), "gate": [0.5, float("inf")]}) == expected
    assert json.loads(run.metrics.read_text()) == expected


def test_scalars_are_single_numbers():
    assert scalars(LINE) == {"loss": 2.5, "skipped": 0}


def test_tensorboard_gets_the_scalars(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = RunFolder(tmp_path)
    with open_monitor(run, TrainingConfig(tensorboard=True)) as write:
        write(LINE)
    events = EventAccumulator(str(run.tensorboard))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(3, 2.5)]


def test_a_resumed_run_replaces_what_tensorboard_had_after_its_step(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run, config = RunFolder(tmp_path), TrainingConfig(tensorboard=True)
    with open_monitor(run, config) as write:
        for step in (2, 4, 6):
            write({"step": step, "loss": 1.0})
    with open_monitor(run, config, resumed_at=2) as write:
        write({"step": 4, "loss": 0.5})
    events = EventAccumulator(str(run.tensorboard))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(2, 1.0), (4, 0.5)]


@pytest.mark.parametrize(
    ("module", "config"),
    [
        ("tensorboard", TrainingConfig(tensorboard=True)),
        ("wandb", TrainingConfig(wandb="project")),
    ],
)
def test_a_missing_package_is_named(tmp_path, monkeypatch, module, config):
    monkeypatch.setitem(sys.modules, module, None)
    with (
        pytest.raises(MissingExtraError, match=rf"{module}.*pip install 'switchlm\["),
        open_monitor(RunFolder(tmp_path), config),
    ):
        pass


def test_wandb_gets_the_scalars_and_knows_the_run_again(tmp_path, monkeypatch):
    calls, names = [], []

    class FakeRun:
        def log(self, values: dict[str, float], step: int) -> None:
            calls.append((step, values))

        def finish(self) -> None:
            calls.append("finished")

    class FakeModule:
        @staticmethod
        def init(**options: object) -> FakeRun:
            calls.append(options["project"])
            names.append((options["id"], options["resume"]))
            return FakeRun()

    monkeypatch.setitem(sys.modules, "wandb", FakeModule)  # type: ignore[arg-type]
    with open_monitor(RunFolder(tmp_path), TrainingConfig(wandb="mine")) as write:
        write(LINE)
    assert calls == ["mine", (3, {"loss": 2.5, "skipped": 0}), "finished"]
    with open_monitor(RunFolder(tmp_path), TrainingConfig(wandb="mine"), resumed_at=3):
        pass
    with open_monitor(RunFolder(tmp_path / "other"), TrainingConfig(wandb="mine")):
        pass
    first, resumed, other = names
    assert first == resumed
    assert first[1] == "allow"
    assert first[0] not in ("", other[0])


def test_without_a_run_folder_nothing_is_written():
    with open_monitor(None, TrainingConfig(tensorboard=True)) as write:
        assert write(LINE) == LINE
