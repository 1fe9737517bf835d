"""How a figure grows along an axis: beside its place, between neighbours; and the exponent."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from itertools import pairwise

# (place on the axis, figure), both above 0, in the order of the axis.
Curve = Sequence[tuple[float, float]]


def beside_linear(curve: Curve) -> list[float]:
    """How much more the figure grows than the place between neighbours: 1 is linear, below it
    slower."""
    return [(after / before) / (end / start) for (start, before), (end, after) in pairwise(curve)]


def exponent(curve: Curve) -> float:
    """The slope of the line of least squares in logarithms: 1 is linear, 0 is constant. NaN for
    fewer than two places."""
    if len(curve) < 2:
        return math.nan
    places, figures = ([math.log(value) for value in axis] for axis in zip(*curve, strict=True))
    return statistics.linear_regression(places, figures).slope
