"""State flattened into named tensors and JSON, and unflattened again."""

import json
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from switchlm.checkpoint.format import DTYPES, flatten_state, tensor_specs, unflatten_state
from switchlm.errors import CheckpointError

# No key is an integer and a string at once: their tensors would have one name.
KEYS = st.one_of(st.text(alphabet="ab/~$.", min_size=1, max_size=4), st.integers(-3, -1))
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(max_size=5)
)
TENSORS = st.builds(
    lambda dtype, shape: torch.arange(math.prod(shape)).reshape(shape).to(dtype),
    st.sampled_from(list(DTYPES.values())),
    st.lists(st.integers(0, 3), max_size=3).map(tuple),
)
TREES = st.recursive(
    st.one_of(SCALARS, TENSORS),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(KEYS, inner, max_size=3),
    ),
    max_leaves=8,
)


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return one is other
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return type(one) is type(other) and len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and repr(one) == repr(other)


@given(st.dictionaries(KEYS, TREES, max_size=3))
def test_unflatten_is_the_inverse_of_flatten_through_json(state: dict[Any, Any]) -> None:
    tensors, structure = flatten_state(state)
    structure = json.loads(json.dumps(structure))
    assert same(unflatten_state(structure, tensors), state)
    specs = tensor_specs(structure)
    assert specs == {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}


@pytest.mark.parametrize("value", [math.inf, -math.inf, -0.0, 5e-324, 0.1, 2**80])
def test_numbers_come_back_exactly(value: float) -> None:
    _, structure = flatten_state({"x": value})
    text = json.dumps(structure, allow_nan=False)
    assert repr(unflatten_state(json.loads(text), {})["x"]) == repr(value)


def test_nan_comes_back() -> None:
    assert math.isnan(unflatten_state(flatten_state({"x": math.nan})[1], {})["x"])


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"a": {"b": object()}}, "Cannot save a/b, which is a object"),
        ({"a": b"bytes"}, "Cannot save a, which is a bytes"),
        ({"a": {1.5: 0}}, "Cannot save the key 1.5 of a"),
        ({"a": torch.eye(2).to_sparse()}, "Cannot save the tensor a"),
        ({"a": torch.zeros(2, dtype=torch.complex64)}, "Cannot save the tensor a"),
        ({"a": {1: torch.zeros(1), "1": torch.zeros(1)}}, "two tensors under the name a/1"),
    ],
)
def test_what_cannot_be_saved_is_named(value: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message.replace(".", r"\.")):
        flatten_state(value)


@pytest.mark.parametrize("size", [math.inf, math.nan, 1e400, True, 2.0, "2", None, [1]])
def test_sizes_that_are_no_whole_numbers_are_errors(size: Any) -> None:
    structure = {"$tensor": "a", "dtype": "float32", "shape": [size]}
    with pytest.raises((ValueError, TypeError)):
        tensor_specs({"weights": [structure]})
