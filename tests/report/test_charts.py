"""Charts of losses in a real browser: every point is drawn, at its place."""

import re

import pytest

from switchlm.report.write import ReportRun

# Losses fall steeply at first; steps start anywhere.
SHORT = [(5, 9.0), (10, 4.0), (15, 3.0)]
LONG = [(step, 1.5 + 100 / step) for step in range(20, 2000, 20)]


def run(name, points, key="evaluation_loss"):
    lines = [{"step": step, "seconds": step / 10, key: loss} for step, loss in points]
    return ReportRun(name=name, metrics=lines)


def drawn(page, title):
    """Return the points of each line of a chart, in units of the picture."""
    figure = page.locator("figure", has=page.locator(f"svg[aria-label='{title}']"))
    paths = [path.get_attribute("d") for path in figure.locator("svg path").all()]
    return [
        [tuple(map(float, xy)) for xy in re.findall(r"[ML]([\d.]+) ([\d.]+)", d)] for d in paths
    ]


@pytest.mark.parametrize("points", [SHORT, LONG], ids=["short", "long"])
def test_every_point_is_drawn_inside_the_picture(draw, points):
    dense = [(step, loss + 3) for step, loss in points]
    page = draw([run("sparse", points), run("dense", dense)], target_loss=1.4)
    for title in ("Held-out loss by step", "Held-out loss by time"):
        lines = drawn(page, title)
        assert [len(line) for line in lines] == [len(points)] * 2
        for line in lines:
            x, y = zip(*line, strict=True)
            assert list(x) == sorted(set(x))
            assert list(y) == sorted(y)  # downwards, as the loss
            assert 52 <= min(x) <= max(x) <= 548
            assert 10 <= min(y) <= max(y) <= 212


def test_a_long_run_has_a_logarithmic_axis_of_steps(draw):
    page = draw([run("sparse", LONG)])
    (line,) = drawn(page, "Held-out loss by step")
    first, middle, last = (line[i][0] for i in (0, LONG.index((200, 2.0)), -1))
    assert (middle - first) / (last - first) == pytest.approx(1 / 2, abs=0.01)  # 20, 200, 1980
    assert "step, logarithmic" in page.locator("main").inner_text()


def test_a_single_point_is_a_dot(draw):
    page = draw([run("sparse", [(3, 5.0)])])
    assert page.locator("svg[aria-label='Held-out loss by step'] circle").count() == 1


def test_a_chart_without_points_says_why(draw):
    page = draw([run("sparse", SHORT, "loss")])
    figure = page.locator("figure", has_text="Held-out loss by step")
    assert "ended before its first evaluation" in figure.inner_text()
    assert drawn(page, "Training loss")
