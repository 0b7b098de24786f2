"""The points of curves as paper takes them: no more than it shows, in few digits, none infinite."""

from collections.abc import Sequence
from typing import Any

MAX_POINTS = 400  # of a curve: more than the page has pixels for


def rounded(value: Any, digits: int = 6) -> Any:
    """Return numbers in so many significant digits; what is not finite has no place on paper."""
    if isinstance(value, (list, tuple)):
        return [rounded(item, digits) for item in value]
    if isinstance(value, float):
        return float(f"{value:.{digits}g}") if abs(value) < float("inf") else None
    return value


def thin(lines: Sequence[Any], most: int = MAX_POINTS) -> Sequence[Any]:
    """Return at most so many (2 or more) of the lines, evenly, the first and the last included."""
    if len(lines) <= most:
        return lines
    last = len(lines) - 1
    return [lines[round(i * last / (most - 1))] for i in range(most)]
