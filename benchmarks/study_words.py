"""The words of study.py for the claims of the paper.

A word is earned: `reproduced` if the 95% interval of the mean over at least three seeds (Student's
t) lies wholly on the paper's side; `not reproduced` if it lies wholly on the other side; `too small
to tell` otherwise. For tasks the error of the examples is joined to that of the seeds.
"""

import math
import statistics
from collections.abc import Sequence

MEASURED_LATER = "not measured"
REPRODUCED, NOT_REPRODUCED, TOO_SMALL = "reproduced", "not reproduced", "too small to tell"
# Student's t: of 95% two-sided intervals, for 1, 2, ... degrees of freedom; then the last.
QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def word(differences: Sequence[float], error_of_examples: float = 0.0) -> str:
    """Return what to call a claim that says that the differences, one a seed, are above zero."""
    if len(differences) < 3:
        return TOO_SMALL
    mean = statistics.mean(differences)
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    quantile = QUANTILES[min(len(differences) - 2, len(QUANTILES) - 1)]
    half = math.hypot(quantile * error, 1.96 * error_of_examples)
    if abs(mean) <= half:
        return TOO_SMALL
    return REPRODUCED if mean > 0 else NOT_REPRODUCED


def several(values: Sequence[float], form: str = ".3f", unit: str = "") -> str:
    """Return mean and standard deviation over seeds."""
    if not values:
        return MEASURED_LATER
    mean = f"{statistics.mean(values):{form}}{unit}"
    if len(values) == 1:
        return mean
    return f"{mean} ± {statistics.stdev(values):{form.removeprefix('+')}}"
