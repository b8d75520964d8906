"""Scores of predictions, of recovered latents and graphs, and their uncertainty: one function a metric.

Conventions that hold for every function here:

- the truth is the first argument, the prediction the second; several scores change when the two are swapped;
- a score that is not defined for its input (a constant vector, no gene, one cell) is NaN, never a warning and never a
  number that looks like a score, so that a table can count such conditions;
- nothing is clipped: a coefficient of determination of -70 is reported as -70;
- NaN or infinity *in the input* is a `DataError`, because a diverged model must not leave a table unseen;
- adjacency matrices have entry [i, j] for the edge i -> j, any non-zero value being an edge.

The mean expression of a condition is close to that of its control, so `r2` and `pearson` of absolute means flatter
every model, including the one that predicts no change: report them beside the `delta_` scores, a subset of
differentially expressed genes and a rank metric.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import linear_sum_assignment, minimize_scalar
from scipy.spatial.distance import cdist

from pyro_scm.errors import DataError, listing

__all__ = [
    "DCI",
    "Angle",
    "Detection",
    "Interval",
    "Matching",
    "ancestral_violations",
    "angle_to_axis",
    "bootstrap_interval",
    "changed_latents",
    "cosine",
    "dci",
    "degs_overlap",
    "delta_pearson",
    "delta_r2",
    "discrimination",
    "edge_scores",
    "effect_concentration",
    "energy_distance",
    "gene_wasserstein",
    "linear_r2",
    "mae",
    "mcc",
    "median_bandwidth",
    "mmd",
    "mse",
    "optimal_angle",
    "paired_difference",
    "pearson",
    "permuted_r2",
    "perturbation_rank",
    "r2",
    "rmse",
    "row_cosine_distances",
    "shd",
    "squared_pearson",
    "target_scores",
    "variance_r2",
]

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.intp]
BoolArray = NDArray[np.bool_]

BLOCK_ENTRIES = 2**21
"""Largest number of entries of a block of pairwise distances or bootstrap draws (16 MiB in double precision)."""

ROUNDING = 64 * np.finfo(np.float64).eps
"""A vector whose range is below this share of its largest value is constant up to rounding."""


# --- checked input ----------------------------------------------------------------------------------------------------


def _array(values: ArrayLike, name: str, dimensions: int) -> FloatArray:
    """`values` as finite doubles with the given number of dimensions."""
    try:
        array = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise DataError(
            f"{name} is not a dense array of numbers ({error}): pass a NumPy array; a sparse matrix needs .toarray()"
        ) from error
    if array.ndim != dimensions:
        raise DataError(f"{name} has shape {array.shape}: expected {dimensions} dimension(s)")
    finite = np.isfinite(array)
    if not finite.all():
        place = tuple(int(i) for i in np.argwhere(~finite)[0])
        raise DataError(
            f"{name} holds {array[place]} at position {place} and {np.size(finite) - int(finite.sum())} non-finite "
            "value(s) in all: expected finite numbers; leave the condition out and say so, or repair the model"
        )
    return array


def _same_shape(truth: FloatArray, prediction: FloatArray, names: tuple[str, str] = ("truth", "prediction")) -> None:
    """Raise when the two shapes differ, since broadcasting would give a number that means nothing."""
    if truth.shape != prediction.shape:
        raise DataError(
            f"{names[0]} has shape {truth.shape} and {names[1]} {prediction.shape}: expected equal shapes; "
            "align the two on the same conditions and genes"
        )


def _gene_index(genes: ArrayLike | None, size: int) -> IntArray:
    """Positions of the chosen genes: all for None; whole numbers in 0..size-1 or a mask of length `size`."""
    if genes is None:
        return np.arange(size)
    index = np.asarray(genes)
    if index.size == 0:
        return np.empty(0, dtype=np.intp)
    if index.dtype == np.bool_ and index.shape == (size,):
        return np.flatnonzero(index)
    if index.ndim != 1 or not np.issubdtype(index.dtype, np.integer):
        raise DataError(
            f"genes has shape {index.shape} and type {index.dtype}: expected gene positions or a boolean mask of "
            f"length {size}; translate gene names into positions first"
        )
    outside = index[(index < 0) | (index >= size)]
    if outside.size:
        raise DataError(
            f"genes holds {listing(outside.tolist())}: expected positions from 0 to {size - 1}; "
            "-1 often is a gene name that was not found"
        )
    return index.astype(np.intp)


def _vectors(truth: ArrayLike, prediction: ArrayLike, genes: ArrayLike | None) -> tuple[FloatArray, FloatArray]:
    """The two vectors, checked and restricted to `genes`."""
    true, predicted = _array(truth, "truth", 1), _array(prediction, "prediction", 1)
    _same_shape(true, predicted)
    index = _gene_index(genes, true.size)
    return true[index], predicted[index]


def _changes(truth: ArrayLike, prediction: ArrayLike, control: ArrayLike) -> tuple[FloatArray, FloatArray]:
    """Truth minus control and prediction minus the same control."""
    true, predicted = _vectors(truth, prediction, None)
    base = _array(control, "control", 1)
    _same_shape(true, base, ("truth", "control"))
    return true - base, predicted - base


def _cells(truth: ArrayLike, prediction: ArrayLike) -> tuple[FloatArray, FloatArray]:
    """Two sets of cells over the same genes, each with one cell or more."""
    x, y = _array(truth, "truth", 2), _array(prediction, "prediction", 2)
    if x.shape[1] != y.shape[1]:
        raise DataError(f"truth has {x.shape[1]} genes and prediction {y.shape[1]}: expected the same genes in both")
    if not len(x) or not len(y):
        raise DataError(f"truth has {len(x)} cells and prediction {len(y)}: expected one or more in each")
    return x, y


def _latents(truth: ArrayLike, inferred: ArrayLike) -> tuple[FloatArray, FloatArray]:
    """True and inferred latents of the same cells."""
    true, found = _array(truth, "truth", 2), _array(inferred, "inferred", 2)
    if len(true) != len(found) or not true.size or not found.size:
        raise DataError(
            f"truth has shape {true.shape} and inferred {found.shape}: expected (n, d) and (n, k), n > 0 cells"
        )
    return true, found


def _graph(adjacency: ArrayLike, name: str) -> BoolArray:
    """A square adjacency matrix without self-loops, as booleans."""
    array = _array(adjacency, name, 2)
    if array.shape[0] != array.shape[1]:
        raise DataError(f"{name} has shape {array.shape}: expected a square adjacency matrix")
    loops = np.flatnonzero(np.diag(array))
    if loops.size:
        raise DataError(f"{name} has self-loops at nodes {listing(loops.tolist())}: expected zeros on the diagonal")
    edges: BoolArray = array != 0
    return edges


def _graphs(true_adjacency: ArrayLike, adjacency: ArrayLike) -> tuple[BoolArray, BoolArray]:
    """Two adjacency matrices over the same nodes."""
    true, found = _graph(true_adjacency, "true_adjacency"), _graph(adjacency, "adjacency")
    if true.shape != found.shape:
        raise DataError(
            f"true_adjacency has {len(true)} nodes and adjacency {len(found)}: expected the same nodes, "
            "reorder the learnt graph with Matching.permutation"
        )
    return true, found


# --- per-condition mean expression ------------------------------------------------------------------------------------


def _deviations(values: FloatArray) -> FloatArray:
    """Values minus their mean, exactly zero for a vector that is constant up to rounding."""
    if not values.size or np.ptp(values) <= ROUNDING * np.max(np.abs(values)):
        return np.zeros_like(values)
    deviations: FloatArray = values - values.mean()
    return deviations


def _cosine(a: FloatArray, b: FloatArray) -> float:
    """Cosine of the angle between two vectors, NaN when either is zero; scaled first so that no square overflows."""
    largest_a, largest_b = np.max(np.abs(a), initial=0.0), np.max(np.abs(b), initial=0.0)
    if largest_a == 0.0 or largest_b == 0.0:
        return float("nan")
    a, b = a / largest_a, b / largest_b
    return float(np.clip(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)), -1.0, 1.0))


def _determination(truth: FloatArray, prediction: FloatArray) -> float:
    """1 - sum (t - p)^2 / sum (t - mean t)^2, NaN for a constant truth."""
    with np.errstate(over="ignore", invalid="ignore"):  # a diverged prediction scores -inf
        total = float(np.sum(_deviations(truth) ** 2))
        return float(1.0 - np.sum((truth - prediction) ** 2) / total) if total > 0.0 else float("nan")


def r2(truth: ArrayLike, prediction: ArrayLike, *, genes: ArrayLike | None = None) -> float:
    """R2 = 1 - sum_g (t_g - p_g)^2 / sum_g (t_g - mean t)^2: coefficient of determination over genes, never clipped.

    Range (-inf, 1], higher is better; 0 is the score of predicting the mean of the true vector for every gene. Not
    symmetric: swapping the arguments changes the value.

    Args:
        truth: True mean expression of one condition, shape [G].
        prediction: Predicted mean expression, shape [G].
        genes: Positions (or a mask) of the genes to score, for instance the condition's DEGs; all when None.

    Returns:
        The score; NaN when the truth is constant over the chosen genes, or fewer than two genes are chosen.

    Raises:
        DataError: for shapes that differ, non-finite values or gene positions out of range.

    Source:
        Lotfollahi et al., "Predicting cellular responses to complex perturbations in high-throughput screens"
        (CPA), Mol. Syst. Biol. 2023; Hetzel et al., chemCPA, NeurIPS 2022 (whose code clips at 0; this does not).
    """
    return _determination(*_vectors(truth, prediction, genes))


def pearson(truth: ArrayLike, prediction: ArrayLike, *, genes: ArrayLike | None = None) -> float:
    """Pearson correlation over genes, sum_g (t_g - mean t)(p_g - mean p) / (|t - mean t| |p - mean p|).

    Range [-1, 1], higher is better; symmetric, blind to a shift or a positive scale of the prediction.

    Args:
        truth: True mean expression, shape [G].
        prediction: Predicted mean expression, shape [G].
        genes: Positions (or a mask) of the genes to score; all when None.

    Returns:
        The correlation; NaN when either vector is constant over the chosen genes.

    Raises:
        DataError: for shapes that differ, non-finite values or gene positions out of range.
    """
    true, predicted = _vectors(truth, prediction, genes)
    return _cosine(_deviations(true), _deviations(predicted))


def squared_pearson(truth: ArrayLike, prediction: ArrayLike, *, genes: ArrayLike | None = None) -> float:
    """Square of `pearson`: the "R2" of papers that regress prediction on truth; not the coefficient of determination.

    Range [0, 1], higher is better, but an anti-correlated prediction also scores high. Never below `r2`.

    Args:
        truth: True mean expression, shape [G].
        prediction: Predicted mean expression, shape [G].
        genes: Positions (or a mask) of the genes to score; all when None.

    Returns:
        The squared correlation; NaN when either vector is constant over the chosen genes.

    Raises:
        DataError: for shapes that differ, non-finite values or gene positions out of range.

    Source:
        Lotfollahi, Wolf and Theis, scGen, Nat. Methods 2019.
    """
    return pearson(truth, prediction, genes=genes) ** 2


def delta_pearson(
    truth: ArrayLike, prediction: ArrayLike, control: ArrayLike, *, genes: ArrayLike | None = None
) -> float:
    """`pearson` of the changes from control, truth - control and prediction - control.

    Range [-1, 1], higher is better. Both changes are from the same, true control: with the model's own control a
    constant error of the decoder would cancel.

    Args:
        truth: True mean expression, shape [G].
        prediction: Predicted mean expression, shape [G].
        control: True mean expression of the matched control, shape [G].
        genes: Positions (or a mask) of the genes to score; all when None.

    Returns:
        The correlation; NaN when either change is constant, as for the prediction of no change at all.

    Raises:
        DataError: for shapes that differ, non-finite values or gene positions out of range.

    Source:
        Ahlmann-Eltze, Huber and Anders, Nat. Methods 2025; cell-eval (Arc Institute) ``pearson_delta``.
    """
    return pearson(*_changes(truth, prediction, control), genes=genes)


def delta_r2(truth: ArrayLike, prediction: ArrayLike, control: ArrayLike, *, genes: ArrayLike | None = None) -> float:
    """`r2` of the changes from control, truth - control and prediction - control.

    Range (-inf, 1], higher is better. The numerator is that of `r2`; the denominator is the spread of the true
    *effect*, so predicting no change scores 0 or less (exactly -n mean^2 / sum of squared deviations of the true
    change).

    Args:
        truth: True mean expression, shape [G].
        prediction: Predicted mean expression, shape [G].
        control: True mean expression of the matched control, shape [G].
        genes: Positions (or a mask) of the genes to score; all when None.

    Returns:
        The score; NaN when the true change is constant over the chosen genes.

    Raises:
        DataError: for shapes that differ, non-finite values or gene positions out of range.

    Source:
        The R2 of log fold changes of the CPA tutorials (theislab/cpa).
    """
    return r2(*_changes(truth, prediction, control), genes=genes)


def mse(truth: ArrayLike, prediction: ArrayLike, *, genes: ArrayLike | None = None) -> float:
    """Mean squared error over genes, mean_g (t_g - p_g)^2.

    Range [0, inf), squared expression units, lower is better; symmetric.

    Args:
        truth: True mean expression, shape [G].
        prediction: Predicted mean expression, shape [G].
        genes: Positions (or a mask) of the genes to score; all when None.

    Returns:
        The error; NaN when no gene is chosen.

    Raises:
        DataError: for shapes that differ, non-finite values or gene positions out of range.
    """
    true, predicted = _vectors(truth, prediction, genes)
    with np.errstate(over="ignore"):
        return float(np.mean((true - predicted) ** 2)) if true.size else float("nan")


def rmse(truth: ArrayLike, prediction: ArrayLike, *, genes: ArrayLike | None = None) -> float:
    """Root mean squared error over genes, sqrt(mean_g (t_g - p_g)^2).

    Range [0, inf), expression units, lower is better; symmetric.

    Args:
        truth: True mean expression, shape [G].
        prediction: Predicted mean expression, shape [G].
        genes: Positions (or a mask) of the genes to score; all when None.

    Returns:
        The error; NaN when no gene is chosen.

    Raises:
        DataError: for shapes that differ, non-finite values or gene positions out of range.
    """
    return float(np.sqrt(mse(truth, prediction, genes=genes)))


def mae(truth: ArrayLike, prediction: ArrayLike, *, genes: ArrayLike | None = None) -> float:
    """Mean absolute error over genes, mean_g |t_g - p_g|.

    Range [0, inf), expression units, lower is better; symmetric.

    Args:
        truth: True mean expression, shape [G].
        prediction: Predicted mean expression, shape [G].
        genes: Positions (or a mask) of the genes to score; all when None.

    Returns:
        The error; NaN when no gene is chosen.

    Raises:
        DataError: for shapes that differ, non-finite values or gene positions out of range.

    Source:
        cell-eval (Arc Institute) ``mae``, on pseudobulk means.
    """
    true, predicted = _vectors(truth, prediction, genes)
    return float(np.mean(np.abs(true - predicted))) if true.size else float("nan")


def cosine(truth: ArrayLike, prediction: ArrayLike, *, genes: ArrayLike | None = None) -> float:
    """Cosine similarity t . p / (|t| |p|); meant for changes from control, where the sign of a gene carries meaning.

    Range [-1, 1], higher is better; symmetric, blind to a positive scale of the prediction.

    Args:
        truth: True vector, shape [G].
        prediction: Predicted vector, shape [G].
        genes: Positions (or a mask) of the genes to score; all when None.

    Returns:
        The similarity; NaN when either vector is zero on the chosen genes.

    Raises:
        DataError: for shapes that differ, non-finite values or gene positions out of range.

    Source:
        Wu et al., PerturBench, arXiv:2408.10609 (cosine of log fold changes).
    """
    return _cosine(*_vectors(truth, prediction, genes))


# --- ranks over conditions --------------------------------------------------------------------------------------------


def _conditions(truths: ArrayLike, predictions: ArrayLike) -> tuple[FloatArray, FloatArray]:
    """Two [K, G] matrices of conditions by genes."""
    true, predicted = _array(truths, "truths", 2), _array(predictions, "predictions", 2)
    _same_shape(true, predicted, ("truths", "predictions"))
    return true, predicted


def _closer_than_own(distances: FloatArray) -> FloatArray:
    """For each row i the number of columns j != i with distances[i, j] < distances[i, i], ties counting one half."""
    own = np.diag(distances)[:, None]
    ties = np.sum(distances == own, axis=1) - 1
    count: FloatArray = np.sum(distances < own, axis=1) + ties / 2
    return count


def _cosine_distances(rows: FloatArray, columns: FloatArray) -> FloatArray:
    """1 - cosine of every pair, 1 where either vector is zero; pair by pair, so that equal vectors tie exactly."""
    distances = cdist(rows, columns, "cosine")
    distances[~rows.any(axis=1)] = 1.0
    distances[:, ~columns.any(axis=1)] = 1.0
    return distances


def perturbation_rank(
    truths: ArrayLike,
    predictions: ArrayLike,
    *,
    distance: Literal["euclidean", "cityblock", "cosine"] = "euclidean",
) -> FloatArray:
    """rank_i = share of the conditions j != i whose prediction is closer to truth i than prediction i; ties count half.

    Range [0, 1], lower is better: 0 is the best, 0.5 the value for random predictions and for a model that predicts the
    same for every condition, 1 the worst.

    Args:
        truths: True means or changes, conditions by genes, shape [K, G].
        predictions: Predicted ones in the same order, shape [K, G].
        distance: ``"euclidean"`` ranks as the RMSE does; ``"cosine"`` compares directions, where a zero vector
            has the distance 1 of an orthogonal one.

    Returns:
        The rank of each condition, shape [K]; NaN when K is 1.

    Raises:
        DataError: for shapes that differ, non-finite values or an unknown distance.

    Source:
        Wu et al., PerturBench, arXiv:2408.10609; its code divides by K and breaks ties at random, here K - 1 and a
        half.
    """
    true, predicted = _conditions(truths, predictions)
    if distance not in ("euclidean", "cityblock", "cosine"):
        raise DataError(f"distance is {distance!r}: expected 'euclidean', 'cityblock' or 'cosine'")
    if len(true) < 2:
        return np.full(len(true), np.nan)
    distances = _cosine_distances(true, predicted) if distance == "cosine" else cdist(true, predicted, distance)
    return _closer_than_own(distances) / (len(true) - 1)


def discrimination(
    truth_deltas: ArrayLike, predicted_deltas: ArrayLike, *, target_genes: ArrayLike | None = None
) -> FloatArray:
    """score_i = 1 - rank_i / K, rank_i = #{j : |p_i - t_j|_1 < |p_i - t_i|_1}: perturbation discrimination score.

    Range [1/K, 1], higher is better; random predictions score (K + 1) / (2 K), about 0.5. It ranks the *true* changes
    by their distance from one prediction, `perturbation_rank` the predictions by their distance from one truth. Ties
    count one half here; cell-eval leaves them to the order of an unstable sort, otherwise the numbers agree.

    Args:
        truth_deltas: True changes from control, conditions by genes, shape [K, G].
        predicted_deltas: Predicted changes in the same order, shape [K, G].
        target_genes: Position of the gene that each condition targets, shape [K], -1 where it targets none or it is not
            measured; that gene is left out of all distances of that condition, because its own change is trivial.

    Returns:
        The score of each condition, shape [K].

    Raises:
        DataError: for shapes that differ, non-finite values or target positions out of range.

    Source:
        cell-eval 0.8 (Arc Institute) ``discrimination_score_l1``; Roohani et al., "Virtual Cell Challenge", Cell 2025.
    """
    true, predicted = _conditions(truth_deltas, predicted_deltas)
    distances = cdist(predicted, true, "cityblock")
    if target_genes is not None:
        targets = np.asarray(target_genes)
        if targets.shape != (len(true),) or not np.issubdtype(targets.dtype, np.integer):
            raise DataError(
                f"target_genes has shape {targets.shape} and type {targets.dtype}: expected "
                f"{len(true)} gene positions, one for each condition, -1 for none"
            )
        if targets.min(initial=0) < -1 or targets.max(initial=-1) >= true.shape[1]:
            raise DataError(
                f"target_genes runs from {targets.min()} to {targets.max()}: expected -1 to {true.shape[1] - 1}"
            )
        rows = np.flatnonzero(targets >= 0)
        own = predicted[rows, targets[rows]]
        distances[rows] -= np.abs(own[:, None] - true[:, targets[rows]].T)
    return 1.0 - _closer_than_own(distances) / len(true)


def degs_overlap(true_ranked: ArrayLike, predicted_ranked: ArrayLike, n: int | None = None) -> float:
    """|first N true DEGs and first N predicted DEGs in common| / N, with N = min(n, number of true DEGs).

    Range [0, 1], higher is better. Both lists hold *significant* genes only (false discovery rate below 0.05),
    strongest absolute log2 fold change first. With `n` None, N is the number of true DEGs: the differential expression
    score of the Virtual Cell Challenge.

    Args:
        true_ranked: Identifiers of the true DEGs (names or positions), strongest first, each once.
        predicted_ranked: Identifiers of the predicted DEGs, strongest first, each once.
        n: Length of the two lists to compare; all true DEGs when None.

    Returns:
        The overlap. A condition without any true DEG scores 0, as in cell-eval: leave such conditions out and state how
        many there were.

    Raises:
        DataError: for an `n` below 1 or a gene listed twice.

    Source:
        cell-eval 0.8 (Arc Institute) ``overlap_at_N`` and ``overlap_at_50``.
    """
    if n is not None and n < 1:
        raise DataError(f"n is {n}: expected 1 or more genes, or None for all true DEGs")
    true, predicted = np.asarray(true_ranked).ravel().tolist(), np.asarray(predicted_ranked).ravel().tolist()
    for name, ranked in (("true_ranked", true), ("predicted_ranked", predicted)):
        if len(set(ranked)) != len(ranked):
            repeated = sorted({gene for gene in ranked if ranked.count(gene) > 1})
            raise DataError(f"{name} lists {listing(repeated)} more than once: expected each gene once")
    length = len(true) if n is None else min(n, len(true))
    return len(set(true[:length]) & set(predicted[:length])) / length if length else 0.0


# --- distributions of cells -------------------------------------------------------------------------------------------


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


def _centred(x: FloatArray, y: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Both sets minus the mean of the pooled cells: distances stay, rounding in |x|^2 + |y|^2 - 2 x.y shrinks."""
    centre = (x.sum(axis=0) + y.sum(axis=0)) / (len(x) + len(y))
    return x - centre, y - centre


def _mean_over_pairs(
    x: FloatArray, y: FloatArray, function: Callable[[FloatArray], FloatArray], *, unbiased: bool
) -> float:
    """Mean of `function` of the squared distance over all pairs, or of two different cells if unbiased and x is y."""
    total = float(sum(function(block).sum() for block in _squared_distances(x, y)))
    if unbiased and x is y:
        n, itself = len(x), float(function(np.zeros(1))[0])
        return (total - n * itself) / (n * (n - 1)) if n > 1 else float("nan")
    return total / (len(x) * len(y))


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
        The distance; NaN for the unbiased form with a single cell in either set. Memory stays below a few blocks of
        `BLOCK_ENTRIES` numbers besides copies of the input.

    Raises:
        DataError: for different numbers of genes, an empty set or non-finite values.

    Source:
        Székely and Rizzo, J. Stat. Plan. Inference 2013; Peidli et al., scPerturb, Nat. Methods 2024 (whose E-distance
        uses *squared* Euclidean distances in some releases).
    """
    x, y = _centred(*_cells(truth, prediction))
    between = _mean_over_pairs(x, y, np.sqrt, unbiased=unbiased)
    within = _mean_over_pairs(x, x, np.sqrt, unbiased=unbiased) + _mean_over_pairs(y, y, np.sqrt, unbiased=unbiased)
    value = 2.0 * between - within
    return value if unbiased else max(value, 0.0)


def median_bandwidth(cells: ArrayLike, *, limit: int = 1000) -> float:
    """Median of the Euclidean distances between two different cells: the median heuristic for the width of a kernel.

    Args:
        cells: Cells, shape [n, G].
        limit: Above this number of cells, only `limit` evenly spaced ones are used (deterministic).

    Returns:
        The median over pairs at a distance above 0, in the units of expression; NaN when all cells are equal.

    Raises:
        DataError: for an array that is not two-dimensional or not finite.

    Source:
        Gretton et al., "A Kernel Two-Sample Test", JMLR 2012, section 8.
    """
    x = _array(cells, "cells", 2)
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
            cells, which depends on the prediction: to compare models, pass ``[median_bandwidth(truth)]`` to all of
            them.
        unbiased: Leave k(x, x) = 1 out of the within-set means.

    Returns:
        The squared discrepancy; NaN for the unbiased form with a single cell in either set.

    Raises:
        DataError: for different numbers of genes, an empty set, non-finite values or a bandwidth that is not positive.

    Source:
        Gretton et al., JMLR 2012, lemma 6 (the unbiased and the biased estimate).
    """
    x, y = _centred(*_cells(truth, prediction))
    if bandwidths is None:
        median = median_bandwidth(np.concatenate([x, y]))
        widths = np.array([1.0 if np.isnan(median) else median])  # equal cells: every kernel gives 1
    else:
        widths = _array(bandwidths, "bandwidths", 1)
        if not widths.size or np.any(widths <= 0.0):
            raise DataError(
                f"bandwidths is {listing(widths.tolist()) or 'empty'}: expected one or more positive widths"
            )

    def kernel(squared: FloatArray) -> FloatArray:
        total = np.zeros_like(squared)
        for width in widths:
            total += np.exp(squared / (-2.0 * width**2))
        return total / len(widths)

    within = _mean_over_pairs(x, x, kernel, unbiased=unbiased) + _mean_over_pairs(y, y, kernel, unbiased=unbiased)
    value = within - 2.0 * _mean_over_pairs(x, y, kernel, unbiased=unbiased)
    return value if unbiased else max(value, 0.0)


def variance_r2(truth: ArrayLike, prediction: ArrayLike, *, genes: ArrayLike | None = None) -> float:
    """`r2` over genes of the per-gene variances of the cells (sample variances, n - 1), never clipped.

    Range (-inf, 1], higher is better. A model of means alone has no variance and scores below 0.

    Args:
        truth: Observed cells, shape [n, G].
        prediction: Predicted cells, shape [m, G].
        genes: Positions (or a mask) of the genes to score; all when None.

    Returns:
        The score; NaN with a single cell in either set, or true variances equal over the chosen genes.

    Raises:
        DataError: for different numbers of genes, an empty set, non-finite values or gene positions out of range.

    Source:
        Lotfollahi et al., CPA, Mol. Syst. Biol. 2023 (R2 of variances).
    """
    x, y = _cells(truth, prediction)
    if min(len(x), len(y)) < 2:
        return float("nan")
    return r2(x.var(axis=0, ddof=1), y.var(axis=0, ddof=1), genes=genes)


def gene_wasserstein(truth: ArrayLike, prediction: ArrayLike) -> FloatArray:
    """W_g = integral |F_g^-1(u) - H_g^-1(u)| du: 1-Wasserstein distance between the two marginals of each gene.

    Range [0, inf), expression units, lower is better; the match of each gene's distribution, not only of its mean.

    Args:
        truth: Observed cells, shape [n, G].
        prediction: Predicted cells, shape [m, G].

    Returns:
        The distance of each gene, shape [G].

    Raises:
        DataError: for different numbers of genes, an empty set or non-finite values.

    Source:
        Villani, "Optimal Transport", 2009, for one dimension.
    """
    from scipy.stats import wasserstein_distance

    x, y = _cells(truth, prediction)
    return np.array([wasserstein_distance(a, b) for a, b in zip(x.T, y.T, strict=True)], dtype=np.float64)


# --- recovery of latents ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Matching:
    """One inferred latent for each true one, each inferred latent used once.

    Attributes:
        score: Mean of `correlations`, the mean correlation coefficient.
        permutation: Position in the inferred latents of each true latent's partner, shape [d]; -1 where there is none.
        correlations: Absolute correlation of each pair, shape [d]; 0 for a true latent without partner.
        sign: +1 or -1, the sign of each pair's correlation, shape [d]; 0 where the correlation is 0 or not defined.
    """

    score: float
    permutation: IntArray
    correlations: FloatArray
    sign: IntArray


def _standardised(columns: FloatArray) -> FloatArray:
    """Columns at mean 0 and variance 1; a constant column becomes exactly 0."""
    centred = np.column_stack([_deviations(column) for column in columns.T])
    spread = np.sqrt(np.mean(centred**2, axis=0))
    standard: FloatArray = np.divide(centred, spread, out=np.zeros_like(centred), where=spread > 0.0)
    return standard


def mcc(truth: ArrayLike, inferred: ArrayLike, *, method: Literal["pearson", "spearman"] = "pearson") -> Matching:
    """MCC = max over injections p of (1/d) sum_i |corr(z_i, c_p(i))|: mean correlation coefficient, Hungarian matching.

    Score in [0, 1], higher is better; 1 when each latent is found up to sign, scale, shift and order (``"pearson"``),
    or up to any monotone map of each (``"spearman"``). Even unrelated latents score above 0, the more so the fewer the
    cells and the more inferred latents there are to choose from.

    Args:
        truth: True latents, cells by latents, shape [n, d].
        inferred: Inferred latents of the same cells, shape [n, k]; k may differ from d, a true latent without partner
            counts 0.
        method: Correlation of the values or of their ranks.

    Returns:
        The score, the pairs, their absolute correlations and signs. A constant inferred latent correlates 0 with
        everything; a constant *true* latent makes its own correlation and the score NaN.

    Raises:
        DataError: for different numbers of cells, non-finite values or an unknown method.

    Source:
        Hyvärinen and Morioka, NeurIPS 2016; Khemakhem et al., iVAE, AISTATS 2020.
    """
    true, found = _latents(truth, inferred)
    if method == "spearman":
        from scipy.stats import rankdata

        true, found = rankdata(true, axis=0), rankdata(found, axis=0)
    elif method != "pearson":
        raise DataError(f"method is {method!r}: expected 'pearson' or 'spearman'")
    standard = _standardised(true)
    correlation = np.clip(standard.T @ _standardised(found) / len(true), -1.0, 1.0)
    rows, columns = linear_sum_assignment(np.abs(correlation), maximize=True)
    permutation = np.full(true.shape[1], -1, dtype=np.intp)
    permutation[rows] = columns
    signed = np.zeros(true.shape[1])
    signed[rows] = correlation[rows, columns]
    absolute = np.where(standard.any(axis=0), np.abs(signed), np.nan)
    return Matching(float(absolute.mean()), permutation, absolute, np.sign(signed).astype(np.intp))


def _fit_and_score(n: int, held_out: bool) -> tuple[slice, slice]:
    """Rows to fit on and rows to score on: all and all, or the first and the second half."""
    if not held_out:
        return slice(0, n), slice(0, n)
    if n < 4:
        raise DataError(f"held_out needs 4 or more cells to split in halves, there are {n}: pass held_out=False")
    return slice(0, n // 2), slice(n // 2, n)


def _mean_determination(truth: FloatArray, prediction: FloatArray) -> float:
    """Mean over columns of the coefficient of determination."""
    return float(np.mean([_determination(t, p) for t, p in zip(truth.T, prediction.T, strict=True)]))


def linear_r2(truth: ArrayLike, inferred: ArrayLike, *, held_out: bool = False) -> float:
    """Mean over true latents of R2 of z_i regressed on all inferred latents and a constant (least squares).

    Higher is better; range [0, 1] in sample, (-inf, 1] held out. 1 when the truth is an affine map of the inferred
    latents: it is blind to rotation, so compare it with `permuted_r2` and `mcc` to see how entangled they are.

    Args:
        truth: True latents, shape [n, d].
        inferred: Inferred latents of the same cells, shape [n, k].
        held_out: Fit on the first half of the cells and score on the second. Shuffle cells that are sorted by
            environment first, or the score is that of an extrapolation. In sample, k inferred latents of pure noise
            score about k / n.

    Returns:
        The mean score; NaN when a true latent is constant on the scored cells.

    Raises:
        DataError: for different numbers of cells, non-finite values, or fewer than 4 cells to halve.

    Source:
        Ahuja et al., "Interventional Causal Representation Learning", ICML 2023 (affine identification).
    """
    true, found = _latents(truth, inferred)
    fit, score = _fit_and_score(len(true), held_out)
    design = np.column_stack([np.ones(len(found)), found])
    weights = np.linalg.lstsq(design[fit], true[fit], rcond=None)[0]
    return _mean_determination(true[score], design[score] @ weights)


def permuted_r2(truth: ArrayLike, inferred: ArrayLike, *, held_out: bool = False) -> float:
    """Mean over true latents of R2 of z_i ~ a_i + b_i c_p(i), p the Pearson matching of `mcc`.

    Order, scale and shift are free, nothing else. Higher is better; range [0, 1] in sample, where it is the mean
    squared matched correlation, (-inf, 1] held out. A true latent without partner is predicted by its mean.

    Args:
        truth: True latents, shape [n, d].
        inferred: Inferred latents of the same cells, shape [n, k].
        held_out: Match and fit on the first half of the cells, score on the second (shuffle sorted cells first).

    Returns:
        The mean score; NaN when a true latent is constant on the scored cells.

    Raises:
        DataError: for different numbers of cells, non-finite values, or fewer than 4 cells to halve.

    Source:
        Lachapelle et al., "Disentanglement via Mechanism Sparsity Regularization", CLeaR 2022 (permutation and
        scaling).
    """
    true, found = _latents(truth, inferred)
    fit, score = _fit_and_score(len(true), held_out)
    predicted = np.tile(true[fit].mean(axis=0), (len(true[score]), 1))
    for latent, partner in enumerate(mcc(true[fit], found[fit]).permutation):
        if partner >= 0:
            deviation = _deviations(found[fit, partner])
            spread = float(deviation @ deviation)
            slope = float(deviation @ true[fit, latent]) / spread if spread > 0.0 else 0.0
            predicted[:, latent] += slope * (found[score, partner] - found[fit, partner].mean())
    return _mean_determination(true[score], predicted)


@dataclass(frozen=True)
class DCI:
    """Disentanglement, completeness and informativeness, each at most 1, higher is better.

    Attributes:
        disentanglement: 1 when each inferred latent matters for one true latent only; in [0, 1].
        completeness: 1 when each true latent is carried by one inferred latent only; in [0, 1].
        informativeness: Mean R2 of the true latents from the sparse linear regression; in (-inf, 1].
        importance: Weight of inferred latent i for true latent j, shape [k, d].
    """

    disentanglement: float
    completeness: float
    informativeness: float
    importance: FloatArray


def _concentration(weights: FloatArray) -> FloatArray:
    """1 - H(row / sum row) / log(columns) of each row: 1 for one non-zero entry, 0 for equal entries or none at all."""
    columns = weights.shape[1]
    if columns < 2:
        return np.full(len(weights), np.nan)
    total = weights.sum(axis=1, keepdims=True)
    share = np.divide(weights, total, out=np.full_like(weights, 1.0 / columns), where=total > 0.0)
    logarithm = np.log(share, out=np.zeros_like(share), where=share > 0.0)
    score: FloatArray = np.clip(1.0 + np.sum(share * logarithm, axis=1) / np.log(columns), 0.0, 1.0)
    return score


def dci(truth: ArrayLike, inferred: ArrayLike, *, penalty: float = 0.01, held_out: bool = False) -> DCI:
    """D = sum_i rho_i (1 - H_d(P_i)), C = mean_j (1 - H_k(Q_j)), I = mean R2, from importances |lasso weights|.

    P_i is row i of the importance matrix divided by its sum, Q_j column j, rho_i the share of all importance in row i,
    H_b the entropy in base b. All three higher is better. Importances are the absolute weights of one lasso for each
    true latent on the inferred latents, both standardised: deterministic, and linear, so a nonlinear but component-wise
    map lowers informativeness, and the shrinkage costs it about penalty^2.

    Args:
        truth: True latents, shape [n, d].
        inferred: Inferred latents of the same cells, shape [n, k].
        penalty: L1 penalty on the standardised scale; small weights of chance correlations become 0.
        held_out: Fit on the first half of the cells and take informativeness on the second (shuffle sorted cells
            first).

    Returns:
        The three scores and the importances. With d = 1 disentanglement is NaN, with k = 1 completeness, because an
        entropy over one outcome says nothing. A latent without any importance counts as fully spread, 0.

    Raises:
        DataError: for different numbers of cells, non-finite values, a penalty that is not positive, or fewer than 4
            cells to halve.

    Source:
        Eastwood and Williams, "A framework for the quantitative evaluation of disentangled representations", ICLR 2018.
    """
    from sklearn.linear_model import Lasso

    if not penalty > 0.0:
        raise DataError(f"penalty is {penalty}: expected a positive number, such as 0.01")
    true, found = _latents(truth, inferred)
    fit, score = _fit_and_score(len(true), held_out)
    # scaled by all rows: of the results only the strength of the penalty depends on it
    target, design = _standardised(true), _standardised(found)
    predicted = np.empty_like(target[score])
    importance = np.empty((found.shape[1], true.shape[1]))
    for latent in range(true.shape[1]):
        model = Lasso(alpha=penalty, max_iter=20_000).fit(design[fit], target[fit, latent])
        importance[:, latent] = np.abs(model.coef_)
        predicted[:, latent] = model.predict(design[score])
    total = importance.sum()
    rho = importance.sum(axis=1) / total if total > 0.0 else np.full(len(importance), 1.0 / len(importance))
    return DCI(
        disentanglement=float(rho @ _concentration(importance)),
        completeness=float(_concentration(importance.T).mean()),
        informativeness=_mean_determination(target[score], predicted),
        importance=importance,
    )


# --- recovery of targets and graphs -----------------------------------------------------------------------------------


class Detection(NamedTuple):
    """Scores of a yes-or-no decision, each in [0, 1], higher is better.

    Attributes:
        precision: True positives / all found; NaN when nothing was found.
        recall: True positives / all true; NaN when nothing is true.
        f1: 2 true positives / (all found + all true); NaN when nothing was found and nothing is true.
    """

    precision: float
    recall: float
    f1: float


def _detection(true: BoolArray, found: BoolArray) -> Detection:
    """Precision, recall and F1 of the entries of `found`."""
    hits, all_true, all_found = int(np.sum(true & found)), int(true.sum()), int(found.sum())
    nan = float("nan")
    return Detection(
        precision=hits / all_found if all_found else nan,
        recall=hits / all_true if all_true else nan,
        f1=2 * hits / (all_found + all_true) if all_found + all_true else nan,
    )


def target_scores(
    true_targets: ArrayLike, effects: ArrayLike, permutation: ArrayLike, *, threshold: float = 0.3
) -> Detection:
    """Precision, recall and F1 of the targets {(e, j) : |effect_ej| > threshold max_e' |effect_e'j|} of environments.

    Higher is better. The threshold is relative to the largest effect on the same latent over all environments, so the
    scale of a latent does not matter and no truth is used.

    Args:
        true_targets: Whether environment e acts on true latent i, boolean, shape [E, d].
        effects: Effects of the environments on the inferred latents (shifts, masks or their posterior means), shape [E,
            k].
        permutation: Inferred latent of each true latent, shape [d], as in `Matching.permutation`; -1 (no partner) finds
            nothing. Effects on inferred latents that are no one's partner do not count.
        threshold: Share of the column maximum above which an effect is a target, in [0, 1).

    Returns:
        Precision, recall and F1 over all pairs (environment, latent).

    Raises:
        DataError: for shapes or a permutation that do not fit, non-finite effects or a threshold out of range.

    Source:
        Lopez et al., sVAE+, CLeaR 2023; Bereket and Karaletsos, SAMS-VAE, NeurIPS 2023 (masks after matching).
    """
    true, effect = _array(true_targets, "true_targets", 2), np.abs(_array(effects, "effects", 2))
    if not np.isin(true, (0.0, 1.0)).all():
        raise DataError(
            "true_targets holds values other than 0 and 1: expected booleans; compare the true shifts with 0"
        )
    if len(true) != len(effect):
        raise DataError(f"true_targets has {len(true)} environments and effects {len(effect)}: expected the same ones")
    if not 0.0 <= threshold < 1.0:
        raise DataError(f"threshold is {threshold}: expected a share of the column maximum, from 0 up to but not 1")
    partner = np.asarray(permutation)
    used = partner[partner >= 0] if np.issubdtype(partner.dtype, np.integer) else partner
    if (
        partner.shape != (true.shape[1],)
        or not np.issubdtype(partner.dtype, np.integer)
        or len(set(used.tolist())) != used.size
        or partner.min(initial=0) < -1
        or partner.max(initial=-1) >= effect.shape[1]
    ):
        raise DataError(
            f"permutation is {partner.tolist()}: expected {true.shape[1]} different positions from 0 to "
            f"{effect.shape[1] - 1}, or -1 for no partner, as in Matching.permutation"
        )
    on = effect > threshold * effect.max(axis=0, initial=0.0)
    found = np.zeros(true.shape, dtype=np.bool_)
    found[:, partner >= 0] = on[:, used]
    return _detection(true != 0, found)


def shd(true_adjacency: ArrayLike, adjacency: ArrayLike) -> int:
    """Structural Hamming distance: number of node pairs {i, j} whose edges differ; a reversed edge counts once.

    Range 0 to d (d - 1) / 2, lower is better. Its reference points are the number of true edges (the score of the empty
    graph) and the score of a random graph of the same density.

    Args:
        true_adjacency: True graph, shape [d, d], entry [i, j] non-zero for i -> j.
        adjacency: Learnt graph in the same order of nodes, shape [d, d]; cut small weights to 0 first.

    Returns:
        The number of missing, extra and reversed edges.

    Raises:
        DataError: for matrices that are not square, differ in size or have self-loops.

    Source:
        Tsamardinos, Brown and Aliferis, Mach. Learn. 2006.
    """
    true, found = _graphs(true_adjacency, adjacency)
    differs = true != found
    return int(np.sum(np.triu(differs | differs.T, 1)))


def edge_scores(true_adjacency: ArrayLike, adjacency: ArrayLike) -> Detection:
    """Precision, recall and F1 of the directed edges; a reversed edge is one false and one missed edge.

    Args:
        true_adjacency: True graph, shape [d, d], entry [i, j] non-zero for i -> j.
        adjacency: Learnt graph in the same order of nodes, shape [d, d]; cut small weights to 0 first.

    Returns:
        Precision, recall and F1, each in [0, 1] or NaN, higher is better.

    Raises:
        DataError: for matrices that are not square, differ in size or have self-loops.
    """
    return _detection(*_graphs(true_adjacency, adjacency))


def _descendants(adjacency: BoolArray) -> BoolArray:
    """Entry [i, j]: a directed path of one edge or more leads from i to j."""
    reach = adjacency.copy()
    for middle in range(len(reach)):
        reach |= reach[:, middle, None] & reach[None, middle, :]
    return reach


def ancestral_violations(true_adjacency: ArrayLike, adjacency: ArrayLike) -> int:
    """Number of ordered pairs (i, j), i an ancestor of j in truth, for which the learnt graph makes j an ancestor of i.

    Range 0 to d (d - 1) / 2, lower is better. It measures the causal order alone, which soft interventions can identify
    when single edges cannot; the empty graph scores 0, so read it beside the recall of `edge_scores`.

    Args:
        true_adjacency: True acyclic graph, shape [d, d], entry [i, j] non-zero for i -> j.
        adjacency: Learnt graph in the same order of nodes, shape [d, d]; cycles are allowed and violate the order.

    Returns:
        The number of reversed ancestor relations.

    Raises:
        DataError: for matrices that are not square, differ in size or have self-loops, or a true graph with a cycle.

    Source:
        The order that is identifiable under soft interventions: Squires et al., ICML 2023.
    """
    true, found = _graphs(true_adjacency, adjacency)
    truth = _descendants(true)
    cyclic = np.flatnonzero(np.diag(truth))
    if cyclic.size:
        raise DataError(
            f"true_adjacency has a cycle through nodes {listing(cyclic.tolist())}: expected an acyclic graph"
        )
    return int(np.sum(truth & _descendants(found).T))


# --- disentanglement of the environment's effect ----------------------------------------------------------------------


def effect_concentration(shifts: ArrayLike, *, scale: ArrayLike | None = None) -> FloatArray:
    """s_e = max_i |shift_ei| / sum_i |shift_ei|: share of an environment's total shift carried by its largest latent.

    Range [1/d, 1], higher is better when each environment truly acts on one latent; 1 when only one latent moves.

    Args:
        shifts: Shift of each inferred latent's mean from the reference environment, shape [E, d].
        scale: Standard deviation of each latent in the reference environment, shape [d]: shifts are divided by it,
            since the units of latents are arbitrary. None when the shifts are in such units already.

    Returns:
        The share of each environment, shape [E]; NaN for an environment that shifts nothing.

    Raises:
        DataError: for non-finite values, a scale of another length or one that is not positive.

    Source:
        "Towards Learning Cell Causal-Embeddings", section 6: latents disentangled from the environment effect.
    """
    shift = np.abs(_array(shifts, "shifts", 2))
    if scale is not None:
        unit = _array(scale, "scale", 1)
        if unit.shape != shift.shape[1:] or np.any(unit <= 0.0):
            raise DataError(
                f"scale has shape {unit.shape} and minimum {unit.min(initial=np.inf)}: expected "
                f"{shift.shape[1]} positive standard deviations; leave collapsed latents out"
            )
        shift = shift / unit
    total = shift.sum(axis=1)
    largest = shift.max(axis=1, initial=0.0)
    share: FloatArray = np.divide(largest, total, out=np.full(len(shift), np.nan), where=total > 0.0)
    return share


def _welch_p_value(x: FloatArray, y: FloatArray) -> float:
    """Two-sided p-value of Welch's t-test; two constant samples differ surely or not at all."""
    from scipy.special import stdtr

    a, b = x.var(ddof=1) / len(x), y.var(ddof=1) / len(y)
    difference = abs(float(x.mean() - y.mean()))
    if a + b <= (ROUNDING * max(np.abs(x).max(), np.abs(y).max())) ** 2:
        return float(difference <= ROUNDING * max(np.abs(x).max(), np.abs(y).max()))
    degrees = (a + b) ** 2 / (a**2 / (len(x) - 1) + b**2 / (len(y) - 1))
    return float(2.0 * stdtr(degrees, -difference / np.sqrt(a + b)))


def changed_latents(
    reference: ArrayLike, environment: ArrayLike, *, alpha: float = 0.01, test: Literal["ks", "mean"] = "ks"
) -> int:
    """Number of latents i whose P(c_i | e) differs from the reference: two-sample tests with Benjamini-Hochberg.

    Range 0 to d; best when it equals the number of latents that the environment truly acts on. The power grows with the
    number of cells, so state that number; with very many cells every tiny error of the encoder is significant.

    Args:
        reference: Inferred latents in the reference environment, shape [n, d], n > 1.
        environment: Inferred latents in the other environment, shape [m, d], m > 1.
        alpha: False discovery rate over the d latents, in (0, 1).
        test: ``"ks"`` compares whole distributions (Kolmogorov-Smirnov, asymptotic p-value), ``"mean"`` the means
            (Welch).

    Returns:
        The number of latents called different.

    Raises:
        DataError: for different numbers of latents, fewer than two cells, non-finite values, or an unknown test or
            alpha.

    Source:
        "Towards Learning Cell Causal-Embeddings", section 6; Benjamini and Hochberg, J. R. Stat. Soc. B 1995.
    """
    from scipy.stats import false_discovery_control, ks_2samp

    x, y = _array(reference, "reference", 2), _array(environment, "environment", 2)
    if x.shape[1] != y.shape[1] or min(len(x), len(y)) < 2 or not x.shape[1]:
        raise DataError(
            f"reference has shape {x.shape} and environment {y.shape}: expected (n, d) and (m, d), n, m > 1"
        )
    if not 0.0 < alpha < 1.0:
        raise DataError(f"alpha is {alpha}: expected a false discovery rate between 0 and 1")
    if test not in ("ks", "mean"):
        raise DataError(f"test is {test!r}: expected 'ks' or 'mean'")
    pairs = zip(x.T, y.T, strict=True)
    p_values = [_welch_p_value(a, b) if test == "mean" else ks_2samp(a, b, method="asymp").pvalue for a, b in pairs]
    return int(np.sum(false_discovery_control(np.array(p_values, dtype=np.float64)) <= alpha))


class Angle(NamedTuple):
    """The rotation between two decoders of two latents.

    Attributes:
        angle: Rotation in radians, in [0, pi).
        distance: Mean cosine distance of the rows at that rotation, in [0, 1]; near 0 when all rows agree on the angle.
        reflected: Whether the first column of the true matrix was multiplied by -1 first.
    """

    angle: float
    distance: float
    reflected: bool


def _two_columns(truth: ArrayLike, inferred: ArrayLike) -> tuple[FloatArray, FloatArray]:
    """Two decoder matrices of two latents over the same genes."""
    true, found = _array(truth, "truth", 2), _array(inferred, "inferred", 2)
    _same_shape(true, found, ("truth", "inferred"))
    if true.shape[1] != 2:
        raise DataError(f"truth has shape {true.shape}: expected (G, 2), the angle is defined for two latents")
    return true, found


def _unit_columns(matrices: FloatArray) -> FloatArray:
    """Matrices [..., G, 2] with columns at unit length; a column that is zero beside the other one stays zero."""
    length = np.linalg.norm(matrices, axis=-2, keepdims=True)
    kept = length > 1e-12 * length.max(axis=-1, keepdims=True)
    unit: FloatArray = np.divide(matrices, length, out=np.zeros_like(matrices), where=kept)
    return unit


def row_cosine_distances(
    truth: ArrayLike, inferred: ArrayLike, angles: ArrayLike, *, reflected: bool = False, scaled: bool = False
) -> FloatArray:
    """D[t, i] = 1 - cos(row i of M R_theta_t, row i of M_hat): agreement of two linear decoders at each rotation.

    R_theta = [[cos, -sin], [sin, cos]]; range [0, 2], lower is better. Where all rows have their minimum 0 at the same
    angle, the inferred latents are a rotation of the true ones.

    Args:
        truth: True decoder M, genes by latents, shape [G, 2]; columns multiplied by the standard deviations of the true
            latents if those differ, because a rotation mixes latents in units of their spread.
        inferred: Learnt decoder M_hat, shape [G, 2].
        angles: Angles theta in radians, shape [T].
        reflected: Multiply the first column of M by -1 before the rotation.
        scaled: Allow any positive scale of each inferred latent, M_hat = M R_theta diag(lambda): at each angle the
            columns of M R_theta, and those of M_hat, are divided by their lengths, which is exact when lambda is the
            only difference.

    Returns:
        The distances, shape [T, G]; NaN for genes whose row of either matrix is zero.

    Raises:
        DataError: for shapes other than [G, 2], shapes that differ or non-finite values.

    Source:
        "Towards Learning Cell Causal-Embeddings", section 6.1 and figure 6 (there without `scaled`).
    """
    true, found = _two_columns(truth, inferred)
    theta = _array(angles, "angles", 1)
    if reflected:
        true = true * np.array([-1.0, 1.0])
    cosines, sines = np.cos(theta), np.sin(theta)
    rotations = np.stack([np.stack([cosines, -sines], axis=-1), np.stack([sines, cosines], axis=-1)], axis=-2)
    rotated = true @ rotations
    if scaled:
        rotated, found = _unit_columns(rotated), _unit_columns(found)
    lengths = np.linalg.norm(rotated, axis=-1) * np.linalg.norm(found, axis=-1)
    products = np.sum(rotated * found, axis=-1)
    similarity = np.divide(products, lengths, out=np.full_like(products, np.nan), where=lengths > 0.0)
    distances: FloatArray = 1.0 - np.clip(similarity, -1.0, 1.0)
    return distances


def _refined_angle(true: FloatArray, found: FloatArray, reflected: bool, steps: int) -> Angle:
    """The best of `steps` angles in [0, pi), refined between its neighbours."""

    def distance(angles: FloatArray) -> FloatArray:
        rows = row_cosine_distances(true, found, angles, reflected=reflected, scaled=True)
        mean = np.nan_to_num(rows, nan=1.0).mean(axis=1)  # a row that lies in a vanished column has no direction
        folded: FloatArray = np.minimum(mean, 2.0 - mean)  # 2 - mean is the distance at theta + pi
        return folded

    grid = np.linspace(0.0, np.pi, steps, endpoint=False)
    start, width = float(grid[np.argmin(distance(grid))]), np.pi / steps
    refined = minimize_scalar(
        lambda angle: float(distance(np.array([angle]))[0]),
        bounds=(start - width, start + width),
        method="bounded",
        options={"xatol": 1e-9},
    )
    candidates = np.array([start, float(refined.x)])  # the grid may hold the exact angle
    values = distance(candidates)
    best = int(np.argmin(values))
    return Angle(float(candidates[best] % np.pi), float(values[best]), reflected)


def optimal_angle(truth: ArrayLike, inferred: ArrayLike, *, steps: int = 1800) -> Angle:
    """Best theta in [0, pi) and reflection S for the mean over rows of 1 - cos(row of M S R_theta, row of M_hat).

    The model is M_hat = M S R_theta diag(lambda), S the identity or diag(-1, 1), lambda any two numbers. Scale: columns
    of M S R_theta and of M_hat are divided by their lengths (see `row_cosine_distances`). Sign: theta + pi is theta
    with both signs of lambda flipped, so both are tried and theta is reported in [0, pi); one flipped sign is the
    reflection. The grid has `steps` angles for each reflection and the best is refined by bounded scalar minimisation.

    The inferred latents are disentangled from the environment effect if and only if the angle is a multiple of pi/2
    (`angle_to_axis` is 0) at a distance near 0; at a large distance no angle matches and the angle means nothing.

    Args:
        truth: True decoder M, genes by latents, shape [G, 2], columns in units of the true latents' spread.
        inferred: Learnt decoder M_hat, shape [G, 2].
        steps: Number of angles on the grid.

    Returns:
        The angle, the mean distance over genes whose rows are not zero, and whether the reflection was needed; NaN for
        angle and distance when no gene has two non-zero rows. Equal distances prefer no reflection, then the smaller
        angle.

    Raises:
        DataError: for shapes other than [G, 2], shapes that differ, non-finite values or fewer than 8 steps.

    Source:
        "Towards Learning Cell Causal-Embeddings", section 6.1.
    """
    true, found = _two_columns(truth, inferred)
    if steps < 8:
        raise DataError(f"steps is {steps}: expected 8 or more angles")
    rows = true.any(axis=1) & found.any(axis=1)
    if not rows.any():
        return Angle(float("nan"), float("nan"), False)
    plain, mirrored = (_refined_angle(true[rows], found[rows], reflected, steps) for reflected in (False, True))
    return mirrored if mirrored.distance < plain.distance - 1e-12 else plain


def angle_to_axis(angle: float) -> float:
    """Distance of an angle to the nearest multiple of pi/2, |((angle + pi/4) mod pi/2) - pi/4|.

    Range [0, pi/4] radians, lower is better: 0 when the latents are the true ones up to order, sign and scale; the mean
    for an angle drawn at random is pi/8.

    Args:
        angle: Angle in radians, such as `Angle.angle`.

    Returns:
        The distance in radians; NaN for NaN.
    """
    return float(abs((angle + np.pi / 4) % (np.pi / 2) - np.pi / 4))


# --- uncertainty ------------------------------------------------------------------------------------------------------


class Interval(NamedTuple):
    """An estimate over conditions or seeds with its bootstrap interval.

    Attributes:
        estimate: Mean (or median) of the values.
        lower: Lower end of the interval.
        upper: Upper end of the interval.
        n: Number of values behind the estimate.
    """

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
        values: One score for each condition or seed, shape [n], without NaN.
        level: Coverage aimed at, in (0, 1).
        draws: Number of resamples.
        seed: Seed of the resampling.
        statistic: What to estimate.

    Returns:
        Estimate, interval and number of values; the ends are NaN when there is one value only.

    Raises:
        DataError: for no values, non-finite ones (drop undefined scores and state how many), or options out of range.

    Source:
        Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, chapter 13.
    """
    sample = _array(values, "values", 1)
    if not sample.size:
        raise DataError("values is empty: expected one score or more")
    if not 0.0 < level < 1.0 or draws < 1:
        raise DataError(f"level is {level} and draws {draws}: expected a level between 0 and 1 and one draw or more")
    if statistic not in ("mean", "median"):
        raise DataError(f"statistic is {statistic!r}: expected 'mean' or 'median'")
    summary = np.mean if statistic == "mean" else np.median
    estimate = float(summary(sample))
    if sample.size == 1:
        return Interval(estimate, float("nan"), float("nan"), 1)
    generator = np.random.default_rng(seed)
    rows = max(1, BLOCK_ENTRIES // sample.size)
    resampled = np.concatenate(
        [
            summary(sample[generator.integers(0, sample.size, size=(min(rows, draws - done), sample.size))], axis=1)
            for done in range(0, draws, rows)
        ]
    )
    lower, upper = np.quantile(resampled, [(1.0 - level) / 2.0, (1.0 + level) / 2.0])
    return Interval(estimate, float(lower), float(upper), sample.size)


def paired_difference(a: ArrayLike, b: ArrayLike, *, level: float = 0.95, draws: int = 2000, seed: int) -> Interval:
    """Mean of a_i - b_i over the same conditions or seeds with its percentile bootstrap interval over pairs.

    Positive when `a` is larger. Differences between conditions dwarf those between models, so two models are compared
    on pairs, never by whether their separate intervals overlap.

    Args:
        a: Scores of the first model, shape [n].
        b: Scores of the second model on the same conditions in the same order, shape [n].
        level: Coverage aimed at, in (0, 1).
        draws: Number of resamples.
        seed: Seed of the resampling.

    Returns:
        Mean difference, interval and number of pairs; the ends are NaN when there is one pair only.

    Raises:
        DataError: for shapes that differ, no values, non-finite ones, or options out of range.
    """
    first, second = _array(a, "a", 1), _array(b, "b", 1)
    _same_shape(first, second, ("a", "b"))
    return bootstrap_interval(first - second, level=level, draws=draws, seed=seed)
