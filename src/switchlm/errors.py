"""The package's errors. A message says what is wrong, the value, and what to do.

A `UserError` has a message of one paragraph, which the command line prints without a traceback
before it exits with status 2.
"""

from collections.abc import Iterable
from difflib import get_close_matches
from importlib import import_module
from typing import Any


class SwitchLMError(Exception):
    """The base of all errors of this package."""


class UserError(SwitchLMError):
    """A mistake that the user can correct: bad configuration, bad input, a missing file."""


class ConfigError(UserError):
    """A configuration that is not valid: unknown key, wrong type, value out of range."""


class DataError(UserError):
    """Text or a tokenizer that cannot be read or used."""


class CheckpointError(UserError):
    """A checkpoint or model folder that is missing, damaged, or does not fit."""


class LaunchError(UserError):
    """Started processes that do not form one job."""


class LostRankError(SwitchLMError):
    """Another process of the job died or hangs; the message names it."""


class DivergedError(SwitchLMError):
    """Training broke the weights; the message says what is left and what to try."""


class WorkerError(SwitchLMError):
    """A child process ended too early."""


class MissingExtraError(UserError):
    """An optional dependency is not installed; the message names the extra to install."""

    def __init__(self, module: str, extra: str, purpose: str) -> None:
        super().__init__(
            f"{purpose} needs the package {module!r}, which is not installed. "
            f"Install it with: pip install 'switchlm[{extra}]'"
        )


def require(module: str, extra: str, purpose: str) -> Any:
    """Import and return an optional module; raises MissingExtraError if it is not installed."""
    try:
        return import_module(module)
    except ImportError:
        raise MissingExtraError(module.split(".")[0], extra, purpose) from None


def nearest(name: str, known: Iterable[str]) -> str:
    """Return ` Did you mean 'x'?` for the closest of `known`, or all of them if none is close."""
    known = sorted(known)
    close = get_close_matches(name, known, n=1, cutoff=0.6)
    if close:
        return f" Did you mean {close[0]!r}?"
    return f" Known: {', '.join(known)}."
