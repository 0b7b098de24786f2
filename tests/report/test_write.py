"""report.html: one file, no outside resource, the data as given."""

import json
import math
import re

import pytest

from switchlm.report.write import MAX_POINTS, ReportRun, write_report


@pytest.fixture
def metrics():
    lines = []
    for step in range(10, 110, 10):
        lines.append(
            {
                "step": step,
                "seconds": step / 10,
                "loss": 5.0 - step / 50,
                "tokens_per_second": 1e5,
                "layers": ["encoder.blocks.0.feedforward"],
                "load": [[0.5, 0.25, 0.25, 0.0]],
                "gate": [0.4],
                "dropped_by_layer": [0.01],
            }
        )
    return [*lines, {"step": 100, "seconds": 10.0, "evaluation_loss": 2.9}]


def embedded(path):
    text = path.read_text(encoding="utf-8")
    found = re.search(r'<script id="data" type="application/json">(.*?)</script>', text, re.S)
    return json.loads(found.group(1))


def test_the_page_holds_what_it_was_given(tmp_path, metrics):
    path = tmp_path / "report.html"
    write_report(
        path,
        title="a title",
        headline="a result",
        runs=[ReportRun(name="sparse", metrics=metrics)],
        table=[{"model": "sparse", "loss": "2.9"}],
        target_loss=3.0,
        crossing={"step": 90.0, "seconds": 9.0},
        example={"text": "</script><script>alert(1)</script>"},
    )
    data = embedded(path)
    assert data["headline"] == "a result"
    assert data["runs"][0]["layers"] == ["encoder 0"]
    assert [point["loss"] for point in data["runs"][0]["training"]] == [
        pytest.approx(5.0 - step / 50) for step in range(10, 110, 10)
    ]
    assert data["runs"][0]["evaluation"] == [{"step": 100, "seconds": 10.0, "evaluation_loss": 2.9}]
    assert data["example"]["text"] == "</script><script>alert(1)</script>"
    assert not list(tmp_path.glob("*.partial"))


def test_the_page_opens_offline(tmp_path, metrics):
    path = tmp_path / "report.html"
    write_report(path, title="t", headline="h", runs=[ReportRun(name="run", metrics=metrics)])
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"""(src|href)\s*=|@import|fetch\(|url\(""", text)


def test_what_is_not_finite_becomes_a_gap(tmp_path):
    path = tmp_path / "report.html"
    lines = [
        {"step": 1, "seconds": 1.0, "loss": math.nan},
        {"step": 2, "seconds": 2.0, "loss": 1.0},
    ]
    write_report(path, title="t", headline="h", runs=[ReportRun(name="run", metrics=lines)])
    assert [point["loss"] for point in embedded(path)["runs"][0]["training"]] == [None, 1.0]


def test_long_runs_are_thinned_and_keep_both_ends(tmp_path):
    path = tmp_path / "report.html"
    lines = [{"step": step, "seconds": float(step), "loss": 1.0} for step in range(5000)]
    write_report(path, title="t", headline="h", runs=[ReportRun(name="run", metrics=lines)])
    points = embedded(path)["runs"][0]["training"]
    assert len(points) == MAX_POINTS
    assert (points[0]["step"], points[-1]["step"]) == (0, 4999)
