"""Uncertainty of scores over conditions or seeds: bootstrap intervals, alone and of paired differences."""

from functools import lru_cache
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from pyro_scm.errors import DataError
from pyro_scm.metrics.arguments import IntArray, finite, matched, one_of
from pyro_scm.metrics.distances import BLOCK_ENTRIES


class Interval(NamedTuple):
    """Mean (or median) of n values over conditions or seeds and the two ends of its bootstrap interval."""

    estimate: float
    lower: float
    upper: float
    n: int


def bootstrap_interval(
    values: ArrayLike,
    *,
    level: float = 0.95,
    draws: int = 2000,
    seed: int,
    statistic: Literal["mean", "median"] = "mean",
) -> Interval:
    """Percentile bootstrap interval of the mean (or median) of values drawn independently, such as conditions or seeds.

    Too narrow for few values: with 3 seeds the interval never leaves their range and covers far less than `level`; show
    the values themselves there. Values that share a drug or a plate are not independent: average them first.

    Args:
        values: One score for each condition or seed, shape [n], n > 0; drop undefined (NaN) scores and state how many.
        level: Coverage aimed at, in (0, 1).
        draws: Number of resamples, 1 or more.
        seed: Seed of the resampling.
        statistic: What to estimate.

    Returns:
        Estimate, interval and number of values; the ends are NaN when there is one value only.

    Source: Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, chapter 13.
    """
    sample = finite(values, "values", 1)
    if not sample.size:
        raise DataError("values is empty: expected one score or more")
    if not 0.0 < level < 1.0 or draws < 1:
        raise DataError(f"level is {level} and draws {draws}: expected a level between 0 and 1 and one draw or more")
    one_of(statistic, "statistic", ("mean", "median"))
    summary = np.mean if statistic == "mean" else np.median
    estimate = float(summary(sample))
    if sample.size == 1:
        return Interval(estimate, float("nan"), float("nan"), 1)
    if draws * sample.size <= BLOCK_ENTRIES:
        resampled = summary(sample[_rows(sample.size, draws, seed)], axis=1)
    else:
        generator = np.random.default_rng(seed)
        rows = max(1, BLOCK_ENTRIES // sample.size)
        blocks = (min(rows, draws - done) for done in range(0, draws, rows))
        resampled = np.concatenate(
            [summary(sample[generator.integers(0, sample.size, size=(n, sample.size))], axis=1) for n in blocks]
        )
    lower, upper = np.quantile(resampled, [(1.0 - level) / 2.0, (1.0 + level) / 2.0])
    return Interval(estimate, float(lower), float(upper), sample.size)


@lru_cache(maxsize=4)
def _rows(size: int, draws: int, seed: int) -> IntArray:
    """Resampled rows, kept because a table asks for the same ones again and again."""
    rows: IntArray = np.random.default_rng(seed).integers(0, size, size=(draws, size))
    rows.flags.writeable = False
    return rows


def paired_difference(a: ArrayLike, b: ArrayLike, *, level: float = 0.95, draws: int = 2000, seed: int) -> Interval:
    """Mean of a_i - b_i over the same conditions or seeds with its percentile bootstrap interval over pairs.

    Positive when `a` is larger. Differences between conditions dwarf those between models, so two models are compared
    on pairs, never by whether their separate intervals overlap.

    Args: scores of the first and of the second model, shape [n], the same order; options of `bootstrap_interval`.
    Returns: mean difference, interval and number of pairs; the ends are NaN when there is one pair only.
    """
    first, second = matched(a, b, ("a", "b"), 1)
    return bootstrap_interval(first - second, level=level, draws=draws, seed=seed)
