import json

import pytest

NANO = ("--preset", "nano", "--batch-tokens", 4096)


def test_a_plan_has_every_metric_of_every_layout(run_json):
    found = run_json("plan", *NANO, "--gpus-per-node", 2, "--gpu", "h100")
    assert len(found["layouts"]) == 4
    best = found["layouts"][0]
    memory = best["memory"]
    assert memory["total"] == sum(memory[name] for name in memory if name != "total")
    assert best["rows"] * best["mesh"]["data"] * best["mesh"]["replicas"] in (4, 8)
    assert best["seconds"]["step"] == min(one["seconds"]["step"] for one in found["layouts"])
    assert best["flops"] > 0
    assert {"kind", "axes", "dtype", "calls", "payload", "sent"} <= best["traffic"][0].keys()
    assert "is bound by" in found["reason"]


def test_layouts_that_do_not_fit_are_listed_with_advice(run):
    result = run("plan", *NANO, "--gpus-per-node", 2, "--memory", 0.001, "--json")
    assert result.exit_code == 1
    found = json.loads(result.stdout)
    assert found["layouts"] == []
    assert len(found["misfits"]) == 4
    assert "Nothing fits" in found["reason"]


def test_a_design_of_which_nothing_fits_says_so_once_and_fails(run):
    result = run("plan", *NANO, "--gpus-per-node", 1, "--memory", 0.001, "--design")
    assert result.exit_code == 1
    assert result.output.count("fit") < 4
    assert "With 8 experts" in result.output


def test_a_design_chooses_the_number_of_experts(run_json):
    found = run_json("plan", *NANO, "--gpus-per-node", 1, "--design")
    assert [choice["num_experts"] for choice in found["choices"]][:2] == [8, 16]
    assert sum(choice["chosen"] for choice in found["choices"]) == 1


def test_a_simulation_is_compared_with_the_plan(run_json):
    found = run_json("simulate", *NANO, "--ranks", 4, "--set", "mesh.expert=4")
    assert (found["ranks"], found["rows"], found["parameters"]) == (4, 2, 78592)
    assert found["traffic"] == found["planned_traffic"]
    planned, simulated = found["planned_memory"]["total"], found["memory"]["total"]
    assert planned == pytest.approx(simulated, rel=0.05)
