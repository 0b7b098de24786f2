"""The versions of transformers that the class works with."""

import importlib

import pytest

import switchlm.transformers
from switchlm.errors import ConfigError


def test_an_older_transformers_is_refused_in_one_sentence(monkeypatch):
    monkeypatch.setattr("importlib.metadata.version", lambda name: "5.17.3")
    with pytest.raises(ConfigError, match=r"transformers 5.18 or newer, and 5.17.3 is installed"):
        importlib.reload(switchlm.transformers)
