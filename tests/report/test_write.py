"""report.html: one file without outside resources, with the data as given."""

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


def test_the_page_contains_the_data(tmp_path, metrics):
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


@pytest.mark.parametrize("text", ["<!--<script", "</script>", "<!-- <SCRIPT -->", "a < b"])
def test_no_text_ends_or_extends_the_element_with_the_data(tmp_path, metrics, text):
    path = tmp_path / "report.html"
    runs = [ReportRun(name=text, metrics=metrics)]
    write_report(path, title=text, headline=text, runs=runs, example={text: text})
    data = embedded(path)
    assert (data["title"], data["runs"][0]["name"], data["example"]) == (text, text, {text: text})
    page = path.read_text(encoding="utf-8")
    start = page.index(">", page.index('<script id="data"')) + 1
    assert "<" not in page[start : page.index("</script>", start)]


def test_the_page_opens_offline(tmp_path, metrics):
    path = tmp_path / "report.html"
    write_report(path, title="t", headline="h", runs=[ReportRun(name="run", metrics=metrics)])
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"""(src|href)\s*=|@import|fetch\(|url\(""", text)


def layer(name="encoder.blocks.0.feedforward", experts=4, sources=("en", "ru", "uk", "fr")):
    """Records of a layer: `en` and `fr` choose one expert, `ru` and `uk` another, none expert 3."""
    half = [0, 100, 0, 0] + [0] * (experts - 4)
    source_load = {
        name: [90, 10, 0, 0, *half[4:]] if name in ("en", "fr") else [10, 85, 5, 0, *half[4:]]
        for name in sources
    }
    load_E = [sum(column) for column in zip(*source_load.values(), strict=True)]
    return {
        "name": name,
        "load_E": load_E,
        "class_load": {"space": load_E},
        "source_load": source_load,
        "top_tokens": [[["e", 9], ["</script>", 1]], *[[] for _ in load_E[1:]]],
        "dropped": 0.25,
        "dropped_by_place": [0.0, 0.5],
        "gate": 0.5,
    }


def test_routing_and_sources_are_in_the_page(tmp_path, metrics):
    path = tmp_path / "report.html"
    run = ReportRun(name="sparse", metrics=metrics, routing=[layer()])
    sources = {"en": {"dense_loss": 2.0, "sparse_loss": 1.5, "step_ratio": None}}
    write_report(path, title="t", headline="h", runs=[run], sources=sources)
    data = embedded(path)
    assert data["sources"] == [
        {"name": "en", "dense_loss": 2.0, "sparse_loss": 1.5, "step_ratio": None}
    ]
    shown = data["runs"][0]["routing"]["layers"][0]
    assert shown["name"] == "encoder 0"
    assert shown["dead"] == [3]
    assert shown["listed"][0]["tokens"] == ["e", "</script>"]
    places = dict(zip(data["runs"][0]["routing"]["sources"], shown["by_source"], strict=True))
    assert places["ru"][shown["experts"].index(1)] == 8500


def test_values_that_are_not_finite_become_gaps(tmp_path):
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
