"""Predicted intervals against what was observed: coverage, its distance from the nominal level, and interval score."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from pyro_scm.errors import DataError, listing
from pyro_scm.metrics.arguments import FloatArray, finite, matched


class Calibration(NamedTuple):
    """Central predicted intervals at several levels."""

    levels: FloatArray
    """Nominal coverage, shape [L]."""
    coverage: FloatArray
    """Share of the observed values inside, shape [L]."""
    width: FloatArray
    """Mean width of the intervals, in units of the values, shape [L]."""
    score: FloatArray
    """Mean `interval_score`, shape [L]; lower is better."""
    error: float
    """Mean over levels of |coverage - level|; 0 is best. Wide intervals do not make it small: they cover too much."""


def coverage(truth: ArrayLike, lower: ArrayLike, upper: ArrayLike) -> float:
    """Share of true values with lower <= truth <= upper; to be compared with the level of the intervals.

    Neither higher nor lower is better: a 95 % interval should cover 0.95.

    Args:
        truth: Observed values, such as the mean change of each gene, shape [n].
        lower: Lower ends of the predicted intervals, shape [n].
        upper: Upper ends, shape [n], none below its lower end.

    Returns:
        The share; NaN without any value.

    Source: Dawid, JASA 1982 (calibration of forecasts).
    """
    true, low, high = _intervals(truth, lower, upper)
    return float(np.mean((low <= true) & (true <= high))) if true.size else float("nan")


def interval_score(truth: ArrayLike, lower: ArrayLike, upper: ArrayLike, *, level: float) -> float:
    """Mean of (u - l) + 2/a (l - t)+ + 2/a (t - u)+ with a = 1 - level: width, and a fine for what falls outside.

    Range [0, inf), units of the values, lower is better. A proper score: it is least in expectation for the true
    quantiles, so that neither wide nor narrow intervals can win by their width alone.

    Args:
        truth: Observed values, shape [n].
        lower: Lower ends of the predicted intervals, shape [n].
        upper: Upper ends, shape [n], none below its lower end.
        level: Nominal coverage, in (0, 1).

    Returns:
        The score; NaN without any value.

    Source: Gneiting and Raftery, JASA 2007, equation 43.
    """
    true, low, high = _intervals(truth, lower, upper)
    if not 0.0 < level < 1.0:
        raise DataError(f"level is {level}: expected a number between 0 and 1")
    outside = np.maximum(low - true, 0.0) + np.maximum(true - high, 0.0)
    return float(np.mean(high - low + 2.0 / (1.0 - level) * outside)) if true.size else float("nan")


def calibration(truth: ArrayLike, draws: ArrayLike, *, levels: Sequence[float] = (0.5, 0.8, 0.9, 0.95)) -> Calibration:
    """Central intervals between quantiles of predictive draws, against what was observed.

    The draws must be of what was observed: of cells for a cell's value; of means over as many cells, with the noise of
    the truth's own mean, for a mean. Draws of a parameter alone give intervals that are too narrow.

    Args:
        truth: Observed values, shape [n].
        draws: Draws from the prediction of each, such as posterior samples or the members of an ensemble, shape [S, n].
            With few draws the outer quantiles lie too far in: S should be several times 2 / (1 - level).
        levels: Nominal coverages, each in (0, 1).

    Returns:
        Coverage, width and interval score at each level, and the mean distance of coverage from level; lower is better
        for the score and the error.

    Source: Kuleshov, Fenner and Ermon, ICML 2018 (calibration error of quantiles).
    """
    true, drawn = finite(truth, "truth", 1), finite(draws, "draws", 2)
    if drawn.shape[1] != true.size or not len(drawn) or not true.size:
        raise DataError(
            f"truth has shape {true.shape} and draws {drawn.shape}: expected (n,) and (S, n), neither of them empty"
        )
    nominal = finite(levels, "levels", 1)
    if not nominal.size or np.any((nominal <= 0.0) | (nominal >= 1.0)):
        raise DataError(f"levels is {listing(nominal.tolist()) or 'empty'}: expected numbers between 0 and 1")
    ends = [np.quantile(drawn, [(1.0 - level) / 2.0, (1.0 + level) / 2.0], axis=0) for level in nominal]
    covered = np.array([coverage(true, low, high) for low, high in ends])
    return Calibration(
        levels=nominal,
        coverage=covered,
        width=np.array([float(np.mean(high - low)) for low, high in ends]),
        score=np.array(
            [interval_score(true, *pair, level=float(level)) for pair, level in zip(ends, nominal, strict=True)]
        ),
        error=float(np.mean(np.abs(covered - nominal))),
    )


def _intervals(truth: ArrayLike, lower: ArrayLike, upper: ArrayLike) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Values and the ends of their intervals, checked."""
    true, low = matched(truth, lower, ("truth", "lower"), 1)
    _, high = matched(true, upper, ("truth", "upper"), 1)
    crossed = np.flatnonzero(high < low)
    if crossed.size:
        raise DataError(f"upper is below lower at position {int(crossed[0])} and in {crossed.size} in all: swap them")
    return true, low, high
