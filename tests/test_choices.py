"""Every option of a `Literal` type is checked where it comes from Python, too."""

import dataclasses
import importlib
import inspect
import re
from typing import Literal, get_args, get_origin, get_type_hints

import pytest
from tests.test_architecture import MODULES
from torch import nn

import switchlm
from switchlm import ModelConfig, RouterConfig, SwitchFeedForward
from switchlm.errors import ConfigError
from switchlm.model.experts import FeedForwardExperts
from switchlm.model.precision import set_precision
from switchlm.training.optimizer import train_only

ALIASES = re.compile(
    r"\b(Literal\[|Activation|Mode\b|Precision|Measure\b|LongTargets|Trainable|FeedForwardSource)"
)
# What users do not make: records that the package fills in.
INTERNAL = {"Event", "Output", "ParsedKey", "Semantics", "TokenPairs"}
OTHERS = {
    "DistillationConfig": {"teacher": "x"},
    "FinetuneConfig": {"model": "x", "tasks": ("boolq",)},
    "Quantisation": {"bits": 8},
    "FeedForward": {"d_model": 4, "d_ff": 4},
    "FeedForwardExperts": {"d_model": 4, "d_ff": 4, "num_experts": 2},
    "SwitchFeedForward": {"d_model": 4, "d_ff": 4, "num_experts": 2},
    "QuantisedExperts": {"up": [], "gate": None, "down": []},
    "OffloadedExperts": dict.fromkeys(("layer", "num_experts", "width", "hidden", "memory"), 1),
    "Teacher": {"model": nn.Identity()},
    "PairLoader": {
        "examples_by_task": {}, "tokenizer": None,
        "input_length": 8, "target_length": 8, "batch_size": 1, "seed": 0,
    },
}  # fmt: skip


def choices():
    """Yield (class, name of the argument, its values) of every Literal that a class takes."""
    for name, path in MODULES.items():
        if "transformers" in name or not ALIASES.search(path.read_text("utf-8")):
            continue
        module = importlib.import_module(name)
        for cls in vars(module).values():
            if not inspect.isclass(cls) or cls.__module__ != name or cls.__name__ in INTERNAL:
                continue
            made = cls if dataclasses.is_dataclass(cls) else cls.__init__
            if made is not cls and "__init__" not in vars(cls):
                continue  # inherited: checked where it is defined, or another library's
            try:
                hints = get_type_hints(made)
            except (NameError, TypeError):
                continue
            for argument, hint in hints.items():
                for kind in (hint, *get_args(hint)):
                    if get_origin(kind) is Literal and argument != "return":
                        yield cls, argument, get_args(kind)


FOUND = list(choices())


def test_there_are_such_options():
    assert len(FOUND) > 20
    assert FeedForwardExperts in {cls for cls, *_ in FOUND}


@pytest.mark.parametrize(
    ("cls", "argument", "values"),
    FOUND,
    ids=[f"{cls.__name__}.{argument}" for cls, argument, _ in FOUND],
)
def test_another_value_is_refused_with_the_near_miss(cls, argument, values):
    others = OTHERS.get(cls.__name__, {})
    near = f"{values[0]}x"
    hint = f"(Did you mean '{values[0]}'|Known: )"
    with pytest.raises(ConfigError, match=f"{argument} is '{near}'.*{hint}"):
        cls(**{**others, argument: near})


def test_functions_refuse_other_values():
    with pytest.raises(ConfigError, match=r"precision is 'bfloat61'\. Did you mean 'bfloat16'"):
        set_precision(None, "bfloat61")
    with pytest.raises(ConfigError, match=r"part is 'experts'\. Did you mean 'expert'"):
        train_only(None, "experts")


def test_dir_lists_what_the_package_exports():
    assert set(switchlm.__all__) <= set(dir(switchlm))
    assert {"load", "SwitchFeedForward", "__version__"} <= set(dir(switchlm))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SwitchFeedForward(8, 16, -2), "num_experts must be at least 1, got -2"),
        (lambda: SwitchFeedForward(-8, 16, 2), "d_model must be at least 1, got -8"),
        (lambda: SwitchFeedForward(8, 0, 2), "d_ff must be at least 1, got 0"),
        (lambda: ModelConfig(num_experts="4"), "model.num_experts must be a number, got '4'"),
        (
            lambda: RouterConfig(capacity_factor="a"),
            "router.capacity_factor must be a number, got 'a'",
        ),
    ],
)
def test_numbers_from_python_are_checked(make, message):
    with pytest.raises(ConfigError, match=message):
        make()
