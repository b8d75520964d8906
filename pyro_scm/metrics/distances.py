"""Distances of two sets of cells: energy distance, maximum mean discrepancy, per-gene variances and marginals."""

from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import ArrayLike
from scipy.spatial.distance import cdist

from pyro_scm.errors import DataError, listing
from pyro_scm.metrics.arguments import FloatArray, finite
from pyro_scm.metrics.prediction import r2

BLOCK_ENTRIES = 2**21
"""Largest number of entries of a block of pairwise distances or bootstrap draws (16 MiB in double precision)."""


def _cells(truth: ArrayLike, prediction: ArrayLike) -> tuple[FloatArray, FloatArray]:
    """Two sets of cells over the same genes, each with one cell or more."""
    x, y = finite(truth, "truth", 2), finite(prediction, "prediction", 2)
    if x.shape[1] != y.shape[1]:
        raise DataError(f"truth has {x.shape[1]} genes and prediction {y.shape[1]}: expected the same genes in both")
    if not len(x) or not len(y):
        raise DataError(f"truth has {len(x)} cells and prediction {len(y)}: expected one or more in each")
    return x, y


def _squared_distances(x: FloatArray, y: FloatArray) -> Iterator[FloatArray]:
    """Blocks of rows of the matrix |x_i - y_j|^2, at most `BLOCK_ENTRIES` entries each; exact zeros where x is y."""
    same, norms = x is y, np.sum(y**2, axis=1)
    rows = max(1, BLOCK_ENTRIES // len(y))
    for start in range(0, len(x), rows):
        part = x[start : start + rows]
        block: FloatArray = part @ y.T
        block *= -2.0
        block += norms
        block += np.sum(part**2, axis=1)[:, None]
        np.maximum(block, 0.0, out=block)  # rounding can leave -1e-16
        if same:
            block[np.arange(len(part)), np.arange(start, start + len(part))] = 0.0
        yield block


def _mean_over_pairs(
    x: FloatArray, y: FloatArray, function: Callable[[FloatArray], FloatArray], unbiased: bool
) -> float:
    """Mean of `function` of the squared distance over all pairs, or of two different cells if unbiased and x is y."""
    total = float(sum(function(block).sum() for block in _squared_distances(x, y)))
    if unbiased and x is y:
        n, itself = len(x), float(function(np.zeros(1))[0])
        return (total - n * itself) / (n * (n - 1)) if n > 1 else float("nan")
    return total / (len(x) * len(y))


def _energy(x: FloatArray, y: FloatArray, distance: Callable[[FloatArray], FloatArray], unbiased: bool) -> float:
    """2 mean d(x, y) - mean d(x, x') - mean d(y, y'), d a function of the squared Euclidean distance."""
    centre = (x.sum(axis=0) + y.sum(axis=0)) / (len(x) + len(y))
    x, y = x - centre, y - centre  # distances stay, rounding in |x|^2 + |y|^2 - 2 x.y shrinks
    within = _mean_over_pairs(x, x, distance, unbiased) + _mean_over_pairs(y, y, distance, unbiased)
    value = 2.0 * _mean_over_pairs(x, y, distance, unbiased) - within
    return value if unbiased else max(value, 0.0)


def energy_distance(truth: ArrayLike, prediction: ArrayLike, *, unbiased: bool = False) -> float:
    """E = 2 mean |x - y| - mean |x - x'| - mean |y - y'| with Euclidean norms: energy distance of two sets of cells.

    Lower is better; in the units of expression. Range [0, inf), and 0 only for equal distributions in the limit; the
    unbiased form has mean 0 for equal distributions and may be negative. The plain form grows as cells get fewer, by
    about E|x - x'| (1/n + 1/m): compare models on equal numbers of cells, or take the unbiased one.

    Args:
        truth: Observed cells, shape [n, G].
        prediction: Predicted cells, shape [m, G].
        unbiased: Leave the zero distance of a cell from itself out of the within-set means.

    Returns:
        The distance; NaN for the unbiased form with a single cell in either set.

    Source: Székely and Rizzo, J. Stat. Plan. Inference 2013; Peidli et al., scPerturb, Nat. Methods 2024 (whose
    E-distance uses *squared* Euclidean distances in some releases). The plain form is cell-eval's ``edistance`` of two
    sets of cells, and pertpy's ``edistance`` with its Euclidean cell-wise metric.
    """
    return _energy(*_cells(truth, prediction), np.sqrt, unbiased)


def median_bandwidth(cells: ArrayLike, *, limit: int = 1000) -> float:
    """Median of the Euclidean distances between two different cells: the median heuristic for the width of a kernel.

    Args:
        cells: Cells, shape [n, G].
        limit: Above this number of cells, only `limit` evenly spaced ones are used (deterministic).

    Returns:
        The median over pairs at a distance above 0, in the units of expression; NaN when all cells are equal.

    Source: Gretton et al., "A Kernel Two-Sample Test", JMLR 2012, section 8.
    """
    x = finite(cells, "cells", 2)
    if len(x) > limit:
        x = x[np.linspace(0, len(x) - 1, limit).round().astype(np.intp)]
    # exact distances: with |x|^2 + |y|^2 - 2 x.y equal cells would be 1e-8 apart and count as a positive distance
    distances = cdist(x, x)[np.triu_indices(len(x), 1)]
    positive = distances[distances > 0.0]
    return float(np.median(positive)) if positive.size else float("nan")


def mmd(
    truth: ArrayLike, prediction: ArrayLike, bandwidths: ArrayLike | None = None, *, unbiased: bool = False
) -> float:
    """MMD^2 = mean k(x, x') + mean k(y, y') - 2 mean k(x, y), k(x, y) = mean over s of exp(-|x - y|^2 / (2 s^2)).

    The *squared* maximum mean discrepancy, as tables in this field report it. Lower is better. Range [0, 2]; the
    unbiased form has mean 0 for equal distributions and may be negative.

    Args:
        truth: Observed cells, shape [n, G].
        prediction: Predicted cells, shape [m, G].
        bandwidths: Widths s of the Gaussian kernels, in expression units. None takes `median_bandwidth` of the pooled
            cells, which depends on the prediction: to compare models, pass all ``[median_bandwidth(truth)]``.
        unbiased: Leave k(x, x) = 1 out of the within-set means.

    Returns:
        The squared discrepancy; NaN for the unbiased form with a single cell in either set.

    Source: Gretton et al., JMLR 2012, lemma 6 (the unbiased and the biased estimate).
    """
    x, y = _cells(truth, prediction)
    if bandwidths is None:
        median = median_bandwidth(np.concatenate([x, y]))
        widths = np.array([1.0 if np.isnan(median) else median])  # equal cells: every kernel gives 1
    else:
        widths = finite(bandwidths, "bandwidths", 1)
        if not widths.size or np.any(widths <= 0.0):
            given = listing(widths.tolist()) or "empty"
            raise DataError(f"bandwidths is {given}: expected one or more positive widths")

    def minus_kernel(squared: FloatArray) -> FloatArray:
        total = np.zeros_like(squared)
        for width in widths:
            total -= np.exp(squared / (-2.0 * width**2))
        return total / len(widths)

    return _energy(x, y, minus_kernel, unbiased)


def variance_r2(truth: ArrayLike, prediction: ArrayLike, *, genes: ArrayLike | None = None) -> float:
    """`r2` over genes of the per-gene variances of the cells (sample variances, n - 1), never clipped.

    Range (-inf, 1], higher is better. A model of means alone has no variance and scores below 0.

    Args: observed cells, shape [n, G], predicted cells, shape [m, G], and genes as for `r2`.
    Returns: the score; NaN with a single cell in either set, or true variances equal over the chosen genes.

    Source: Lotfollahi et al., CPA, Mol. Syst. Biol. 2023 (R2 of variances).
    """
    x, y = _cells(truth, prediction)
    if min(len(x), len(y)) < 2:
        return float("nan")
    return r2(x.var(axis=0, ddof=1), y.var(axis=0, ddof=1), genes=genes)


def gene_wasserstein(truth: ArrayLike, prediction: ArrayLike) -> FloatArray:
    """W_g = integral |F_g^-1(u) - H_g^-1(u)| du: 1-Wasserstein distance between the two marginals of each gene.

    Range [0, inf), expression units, lower is better; the match of each gene's distribution, not only of its mean.

    Args: observed cells, shape [n, G], and predicted cells, shape [m, G]. Returns: the distance of each gene, [G].

    Source: Villani, "Optimal Transport", 2009, for one dimension.
    """
    from scipy.stats import wasserstein_distance

    x, y = _cells(truth, prediction)
    return np.array([wasserstein_distance(a, b) for a, b in zip(x.T, y.T, strict=True)], dtype=np.float64)
