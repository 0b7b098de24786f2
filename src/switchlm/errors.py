"""The project's own errors: what is wrong, the value, what to do. The bottom layer.

Every mistake of a user's reaches them as a `UserError` with a message of one paragraph. The command
line prints it without a traceback and exits with status 2.
"""

from collections.abc import Iterable
from difflib import get_close_matches
from importlib import import_module
from typing import Any


class SwitchLMError(Exception):
    """The root of all errors that this package raises on purpose."""


class UserError(SwitchLMError):
    """A mistake that the user can mend: bad configuration, bad input, a missing file."""


class ConfigError(UserError):
    """A configuration that is not valid: unknown key, wrong type, value out of range."""


class DataError(UserError):
    """Text or a tokenizer that cannot be read or used."""


class CheckpointError(UserError):
    """A checkpoint or model folder that is missing, damaged, or does not fit."""


class LaunchError(UserError):
    """Processes that were started, but do not make up one job."""


class LostRankError(SwitchLMError):
    """Another process of the job died or hangs; the message names it."""


class WorkerError(SwitchLMError):
    """A process that this one started ended before its time."""


class MissingExtraError(UserError):
    """An optional dependency is not installed; the message names the extra that brings it."""

    def __init__(self, module: str, extra: str, purpose: str) -> None:
        super().__init__(
            f"{purpose} needs the package {module!r}, which is not installed. "
            f"Install it with: pip install 'switchlm[{extra}]'"
        )


def require(module: str, extra: str, purpose: str) -> Any:
    """Import and return an optional module; MissingExtraError names the extra that brings it."""
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
