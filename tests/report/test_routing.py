"""The page's data of routing records."""

import itertools
import json

import numpy as np
import pytest

from switchlm.report.write import (
    MOST_CELLS,
    MOST_EXPERTS,
    MOST_SOURCES,
    dead_experts,
    describe_expert,
    routing_data,
    similarity_order,
)


def record(loads, classes=None, name="encoder.blocks.1.feedforward"):
    """A layer with the counts of every source by expert."""
    load_E = [sum(column) for column in zip(*loads.values(), strict=True)]
    return {
        "name": name,
        "load_E": load_E,
        "class_load": classes or {"space": load_E},
        "source_load": loads,
        "top_tokens": [[["a", number]] if number else [] for number in load_E],
        "dropped": 0.0,
        "dropped_by_place": [0.0] * 16,
        "gate": 0.5,
    }


def test_similar_sources_and_experts_are_neighbours():
    slavic, latin = [0, 80, 20, 0], [70, 0, 0, 30]
    data = routing_data([record({"ru": slavic, "fr": latin, "uk": slavic, "es": latin})])
    assert data["sources"] in (["ru", "uk", "fr", "es"], ["fr", "es", "ru", "uk"])
    experts = data["layers"][0]["experts"]
    assert {frozenset(experts[:2]), frozenset(experts[2:])} == {
        frozenset({1, 2}),
        frozenset({0, 3}),
    }


def test_shares_are_of_the_source_and_follow_its_order():
    data = routing_data([record({"a": [30, 10], "b": [0, 5]})])
    layer = data["layers"][0]
    by_name = dict(zip(data["sources"], layer["by_source"], strict=True))
    assert by_name["a"][layer["experts"].index(0)] == 7500
    assert by_name["b"][layer["experts"].index(1)] == 10_000
    assert layer["share"][layer["experts"].index(0)] == 6667


def test_an_expert_is_described_by_its_most_frequent_tokens():
    classes = {"number": [40, 10], "space": [10, 30], "rare": [1, 9]}
    layer = record({"en": [50, 0], "de": [1, 49]}, classes)
    found = describe_expert(layer, 0, ["en", "de"])
    assert found["share"] == pytest.approx(0.51)
    assert found["classes"] == [("number", 0.784), ("space", 0.196)]
    assert found["sources"] == [("en", 1.96)]


def test_dead_experts_have_less_than_a_twentieth_of_an_even_load():
    assert dead_experts([100, 100, 2, 0]) == [2, 3]
    assert dead_experts([100, 100, 100, 6]) == []


def test_without_sources_the_kinds_of_tokens_are_shown():
    layer = record({"a": [30, 10]}) | {"source_load": {}}
    data = routing_data([layer])
    assert data["sources"] == []
    assert data["layers"][0]["classes"][0]["name"] == "space"
    assert data["layers"][0]["listed"][0]["sources"] == []


def test_no_layers_is_nothing():
    assert routing_data([]) is None


def test_the_data_of_large_models_is_limited():
    draw = np.random.default_rng(0)
    loads = {f"s{number}": draw.integers(0, 99, 2048).tolist() for number in range(300)}
    layers = [record(loads, name=f"encoder.blocks.{number}.feedforward") for number in range(6)]
    data = routing_data(layers)
    assert len(data["sources"]) == MOST_SOURCES
    shown = sum(np.size(layer["by_source"]) for layer in data["layers"])
    assert shown <= MOST_CELLS
    assert len(data["layers"][0]["experts"]) <= MOST_EXPERTS
    assert len(json.dumps(data)) < 2_000_000


def test_the_order_is_a_permutation_with_clusters_together():
    draw = np.random.default_rng(1)
    cluster = draw.integers(0, 5, 60)
    vectors = draw.normal(0, 0.1, (60, 8)) + 10 * np.eye(5, 8)[cluster]
    order = similarity_order(vectors)
    assert sorted(order) == list(range(60))
    changes = sum(cluster[a] != cluster[b] for a, b in itertools.pairwise(order))
    assert changes == 4
    assert similarity_order(np.zeros((1, 3))) == [0]
    assert similarity_order(np.zeros((0, 3))) == []
