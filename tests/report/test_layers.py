"""Metrics of layers: curves in the page's data, and their charts in a real browser."""

import math

from switchlm.report.write import (
    MAX_POINTS,
    MOST_NUMBERS,
    ReportRun,
    layers_data,
)

SWITCHES = ["encoder.blocks.1.feedforward", "decoder.blocks.1.feedforward"]


def training(step, experts=4):
    load = [[1 / experts] * experts for _ in SWITCHES]
    return {"step": step, "seconds": step / 10, "loss": 3.0, "layers": SWITCHES, "load": load}


def evaluation(step, *, sparse=True, heads=2, layers=2):
    line = {
        "step": step,
        "seconds": step / 10,
        "evaluation_loss": 2.0,
        "attention_near": {
            f"{stack}.blocks.{layer}.attention": [0.5 + head / 10 for head in range(heads)]
            for stack in ("encoder", "decoder")
            for layer in range(layers)
        },
    }
    if sparse:
        line |= {
            "layers": SWITCHES,
            "gate": [0.5, 0.6],
            "kept_expert": [None, None] if step == 10 else [0.8, step / 100],
            "router_entropy": [1.0, 1.1],
            "load_entropy": [1.2, 1.3],
            "dead_experts": [0, 1],
        }
    return line


def test_every_metric_is_a_curve():
    metrics = [training(10), evaluation(10), training(20), evaluation(20)]
    data = layers_data(metrics)
    assert data["step"] == [10, 20]
    assert [stack["name"] for stack in data["stacks"]] == ["encoder", "decoder"]
    assert data["stacks"][0]["layers"] == [
        {"name": "encoder 0", "near": [[0.5, 0.5], [0.6, 0.6]]},
        {"name": "encoder 1", "near": [[0.5, 0.5], [0.6, 0.6]]},
    ]
    assert data["switches"][1] == {
        "name": "decoder 1",
        "experts": 4,
        "gate": [0.6, 0.6],
        "kept_expert": [None, 0.2],
        "router_entropy": [1.1, 1.1],
        "load_entropy": [1.3, 1.3],
        "dead_experts": [1, 1],
    }


def test_dense_models_have_heads_alone_and_older_runs_nothing():
    assert layers_data([evaluation(10, sparse=False)])["switches"] == []
    assert layers_data([training(10), {"step": 10, "evaluation_loss": 2.0}]) is None


def test_without_lines_of_training_the_number_of_experts_is_not_known():
    switches = layers_data([evaluation(10)])["switches"]
    assert [layer["experts"] for layer in switches] == [None, None]


def test_deep_models_have_fewer_points():
    small = layers_data([evaluation(step, sparse=False) for step in range(1, 1000)])
    deep = layers_data([evaluation(step, sparse=False, heads=20, layers=20) for step in range(500)])
    assert (len(small["step"]), small["step"][-1]) == (MAX_POINTS, 999)
    assert len(deep["step"]) * 2 * 20 * 20 <= MOST_NUMBERS
    assert (deep["step"][0], deep["step"][-1]) == (0, 499)


def charts(page):
    """Return the lines of each chart of the section, by title; several runs have a list."""
    found = {}
    for figure in page.locator(".narrow figure").all():
        title = figure.locator("svg").get_attribute("aria-label")
        found.setdefault(title, []).append(figure.locator("svg path").count())
    return found


def test_the_charts_of_both_runs_are_drawn(draw):
    steps = (10, 20, 30)
    sparse = [line for step in steps for line in (training(step), evaluation(step))]
    dense = [evaluation(step, sparse=False) for step in steps]
    runs = [ReportRun(name="sparse", metrics=sparse), ReportRun(name="dense", metrics=dense)]
    page = draw(runs)
    assert charts(page) == {
        "Near attention, encoder": [4, 4],
        "Near attention, decoder": [4, 4],
        "Mean gate": [2],
        "Kept expert": [2],
        "Entropy of the router": [4],
        "Dead experts": [2],
    }
    text = page.locator("main").inner_text()
    assert text.count("Metrics of layers") == 1
    assert f"ln 4 = {math.log(4):.2f}" in text
    assert "of 4, chosen by no token" in text


def test_the_mouse_shows_the_head_under_it(draw):
    metrics = [evaluation(step, sparse=False) for step in (10, 20, 30)]
    page = draw([ReportRun(name="run", metrics=metrics)])
    svg = page.locator(".narrow svg").first
    svg.scroll_into_view_if_needed()
    box = svg.bounding_box()
    page.mouse.move(box["x"] + 0.6 * box["width"], box["y"] + 5)
    assert "head 1: 0.6   at" in svg.text_content()


def test_a_single_evaluation_is_a_dot(draw):
    page = draw([ReportRun(name="run", metrics=[training(10), evaluation(10)])])
    gate = page.locator("svg[aria-label='Mean gate']")
    assert gate.locator("circle").count() == 2
    assert not page.locator("svg[aria-label='Kept expert']").count()


def test_runs_without_measurements_have_no_section(draw):
    page = draw([ReportRun(name="run", metrics=[training(10)])])
    assert "Metrics of layers" not in page.locator("main").inner_text()
