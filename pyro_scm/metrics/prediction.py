"""Scores of predicted means: one condition over its genes, ranks over conditions, overlap of DEGs."""

from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.spatial.distance import cdist

from pyro_scm.errors import DataError, listing
from pyro_scm.metrics.arguments import BoolArray, FloatArray, IntArray, finite, matched, one_of

ROUNDING = 64 * np.finfo(np.float64).eps
"""A vector whose range is below this share of its largest value is constant up to rounding."""


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
    true, predicted = matched(truth, prediction, ("truth", "prediction"), 1)
    index = _gene_index(genes, true.size)
    return true[index], predicted[index]


def _changes(truth: ArrayLike, prediction: ArrayLike, control: ArrayLike) -> tuple[FloatArray, FloatArray]:
    """Truth minus control and prediction minus the same control."""
    true, predicted = matched(truth, prediction, ("truth", "prediction"), 1)
    _, base = matched(true, control, ("truth", "control"), 1)
    return true - base, predicted - base


def deviations(values: FloatArray) -> FloatArray:
    """Values minus their mean, exactly zero for a vector that is constant up to rounding."""
    if not values.size or np.ptp(values) <= ROUNDING * np.max(np.abs(values)):
        return np.zeros_like(values)
    centred: FloatArray = values - values.mean()
    return centred


def _cosine(a: FloatArray, b: FloatArray) -> float:
    """Cosine of the angle between two vectors, NaN when either is zero; scaled first so that no square overflows."""
    largest_a, largest_b = np.max(np.abs(a), initial=0.0), np.max(np.abs(b), initial=0.0)
    if largest_a == 0.0 or largest_b == 0.0:
        return float("nan")
    a, b = a / largest_a, b / largest_b
    return float(np.clip(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)), -1.0, 1.0))


def determination(truth: FloatArray, prediction: FloatArray) -> float:
    """1 - sum (t - p)^2 / sum (t - mean t)^2, NaN for a constant truth."""
    with np.errstate(over="ignore", invalid="ignore"):  # a diverged prediction scores -inf
        total = float(np.sum(deviations(truth) ** 2))
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

    Source: Lotfollahi et al., CPA, Mol. Syst. Biol. 2023; Hetzel et al., chemCPA, NeurIPS 2022 (whose code clips at 0).
    """
    return determination(*_vectors(truth, prediction, genes))


def pearson(truth: ArrayLike, prediction: ArrayLike, *, genes: ArrayLike | None = None) -> float:
    """Pearson correlation over genes, sum_g (t_g - mean t)(p_g - mean p) / (|t - mean t| |p - mean p|).

    Range [-1, 1], higher is better; symmetric, blind to a shift or a positive scale of the prediction.

    Args: those of `r2`. Returns: the correlation; NaN when either vector is constant over the chosen genes.
    """
    true, predicted = _vectors(truth, prediction, genes)
    return _cosine(deviations(true), deviations(predicted))


def squared_pearson(truth: ArrayLike, prediction: ArrayLike, *, genes: ArrayLike | None = None) -> float:
    """Square of `pearson`: the "R2" of papers that regress prediction on truth; not the coefficient of determination.

    Range [0, 1], higher is better, but an anti-correlated prediction also scores high. Never below `r2`.

    Args: those of `r2`. Returns: NaN when either vector is constant over the chosen genes.

    Source: Lotfollahi, Wolf and Theis, scGen, Nat. Methods 2019.
    """
    return pearson(truth, prediction, genes=genes) ** 2


def delta_pearson(
    truth: ArrayLike, prediction: ArrayLike, control: ArrayLike, *, genes: ArrayLike | None = None
) -> float:
    """`pearson` of the changes from control, truth - control and prediction - control.

    Range [-1, 1], higher is better. Both changes are from the same, true control: with the model's own control a
    constant error of the decoder would cancel.

    Args: those of `r2`, and third the true mean expression of the matched control, shape [G].
    Returns: the correlation; NaN when either change is constant, as for the prediction of no change at all.

    Source: Ahlmann-Eltze, Huber and Anders, Nat. Methods 2025; cell-eval (Arc Institute) ``pearson_delta``.

    Example:
        >>> round(delta_pearson([1.0, 2.0, 0.0], [2.0, 4.0, 0.0], control=[0.0, 0.0, 0.0]), 6)
        1.0
    """
    return pearson(*_changes(truth, prediction, control), genes=genes)


def delta_r2(truth: ArrayLike, prediction: ArrayLike, control: ArrayLike, *, genes: ArrayLike | None = None) -> float:
    """`r2` of the changes from control, truth - control and prediction - control.

    Range (-inf, 1], higher is better. The numerator is that of `r2`; the denominator is the spread of the true
    *effect*, so predicting no change scores 0 or less (exactly -n mean^2 / sum of squared deviations of the change).

    Args: those of `delta_pearson`. Returns: NaN when the true change is constant over the chosen genes.

    Source: the R2 of log fold changes of the CPA tutorials (theislab/cpa).
    """
    return r2(*_changes(truth, prediction, control), genes=genes)


def mse(truth: ArrayLike, prediction: ArrayLike, *, genes: ArrayLike | None = None) -> float:
    """Mean squared error over genes, mean_g (t_g - p_g)^2.

    Range [0, inf), squared expression units, lower is better; symmetric.

    Args: those of `r2`. Returns: the error; NaN when no gene is chosen.
    """
    true, predicted = _vectors(truth, prediction, genes)
    with np.errstate(over="ignore"):
        return float(np.mean((true - predicted) ** 2)) if true.size else float("nan")


def rmse(truth: ArrayLike, prediction: ArrayLike, *, genes: ArrayLike | None = None) -> float:
    """Root mean squared error over genes, sqrt(mean_g (t_g - p_g)^2).

    Range [0, inf), expression units, lower is better; symmetric.

    Args: those of `r2`. Returns: the error; NaN when no gene is chosen.
    """
    return float(np.sqrt(mse(truth, prediction, genes=genes)))


def mae(truth: ArrayLike, prediction: ArrayLike, *, genes: ArrayLike | None = None) -> float:
    """Mean absolute error over genes, mean_g |t_g - p_g|.

    Range [0, inf), expression units, lower is better; symmetric.

    Args: those of `r2`. Returns: the error; NaN when no gene is chosen.

    Source: cell-eval (Arc Institute) ``mae``, on pseudobulk means.
    """
    true, predicted = _vectors(truth, prediction, genes)
    return float(np.mean(np.abs(true - predicted))) if true.size else float("nan")


def cosine(truth: ArrayLike, prediction: ArrayLike, *, genes: ArrayLike | None = None) -> float:
    """Cosine similarity t . p / (|t| |p|); meant for changes from control, where the sign of a gene carries meaning.

    Range [-1, 1], higher is better; symmetric, blind to a positive scale of the prediction.

    Args: those of `r2`. Returns: the similarity; NaN when either vector is zero on the chosen genes.

    Source: Wu et al., PerturBench, arXiv:2408.10609 (cosine of log fold changes).
    """
    return _cosine(*_vectors(truth, prediction, genes))


def _closer_than_own(distances: FloatArray) -> FloatArray:
    """For each row i the number of columns j != i with distances[i, j] < distances[i, i], ties counting one half."""
    own = np.diag(distances)[:, None]
    ties = np.sum(distances == own, axis=1) - 1
    count: FloatArray = np.sum(distances < own, axis=1) + ties / 2
    return count


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
        distance: ``"euclidean"`` ranks as the RMSE does; in ``"cosine"`` a zero vector is orthogonal to all others.

    Returns:
        The rank of each condition, shape [K]; NaN when K is 1.

    Source: Wu et al., PerturBench, arXiv:2408.10609 (whose code divides by K, not K - 1, and breaks ties at random).
    """
    true, predicted = matched(truths, predictions, ("truths", "predictions"), 2)
    one_of(distance, "distance", ("euclidean", "cityblock", "cosine"))
    if len(true) < 2:
        return np.full(len(true), np.nan)
    distances = cdist(true, predicted, distance)
    if distance == "cosine":
        distances[~true.any(axis=1)] = 1.0
        distances[:, ~predicted.any(axis=1)] = 1.0
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
            measured; or a mask of its targets, shape [K, G]. They are left out of all distances of that condition,
            because their own change is trivial.

    Returns:
        The score of each condition, shape [K].

    Source: cell-eval 0.8 (Arc Institute) ``discrimination_score_l1``; Roohani et al., Cell 2025.
    """
    true, predicted = matched(truth_deltas, predicted_deltas, ("truths", "predictions"), 2)
    distances = cdist(predicted, true, "cityblock")
    if target_genes is not None:
        excluded = _excluded(np.asarray(target_genes), true.shape)
        for row in np.flatnonzero(excluded.any(axis=1)):
            genes = excluded[row]
            distances[row] -= np.abs(predicted[row, genes] - true[:, genes]).sum(axis=1)
            distances[row] = np.maximum(distances[row], 0.0)  # rounding can leave -1e-16
    return 1.0 - _closer_than_own(distances) / len(true)


def _excluded(targets: NDArray[Any], shape: tuple[int, ...]) -> BoolArray:
    """Mask [K, G] of each condition's target genes."""
    if targets.dtype == np.bool_ and targets.shape == shape:
        return targets
    if targets.shape != shape[:1] or not np.issubdtype(targets.dtype, np.integer):
        raise DataError(
            f"target_genes has shape {targets.shape} and type {targets.dtype}: expected "
            f"{shape[0]} gene positions, one for each condition, -1 for none, or a mask of shape {shape}"
        )
    if targets.min(initial=0) < -1 or targets.max(initial=-1) >= shape[1]:
        raise DataError(f"target_genes runs from {targets.min()} to {targets.max()}: expected -1 to {shape[1] - 1}")
    mask: BoolArray = np.arange(shape[1]) == targets[:, None]
    return mask


def degs_overlap(true_ranked: ArrayLike, predicted_ranked: ArrayLike, n: int | None = None) -> float:
    """|first N true DEGs and first N predicted DEGs in common| / N, with N = min(n, number of true DEGs).

    Range [0, 1], higher is better. Both lists hold *significant* genes only (false discovery rate below 0.05),
    strongest absolute log2 fold change first. Without `n`: the score of the Virtual Cell Challenge.

    Args:
        true_ranked: Identifiers of the true DEGs (names or positions), strongest first, each once.
        predicted_ranked: Identifiers of the predicted DEGs, strongest first, each once.
        n: Length of the two lists to compare, 1 or more; all true DEGs when None.

    Returns:
        The overlap; 0 without any true DEG, as in cell-eval: leave such conditions out and state how many there were.

    Source: cell-eval 0.8 (Arc Institute) ``overlap_at_N`` and ``overlap_at_50``.
    """
    if n is not None and n < 1:
        raise DataError(f"n is {n}: expected 1 or more genes, or None for all true DEGs")
    true, predicted = _once(true_ranked, "true_ranked"), _once(predicted_ranked, "predicted_ranked")
    length = len(true) if n is None else min(n, len(true))
    return len(set(true[:length]) & set(predicted[:length])) / length if length else 0.0


def degs_recall(true_degs: ArrayLike, predicted_degs: ArrayLike) -> float:
    """|true DEGs that are predicted to be DEGs| / |true DEGs|, in any order.

    Range [0, 1], higher is better. A model that calls every gene scores 1: report how many it calls, or `degs_overlap`
    or `top_recall`, which give it no more places than there are true DEGs.

    Args:
        true_degs: Identifiers of the true DEGs (names or positions), each once.
        predicted_degs: Identifiers of the predicted DEGs, each once.

    Returns:
        The recall; NaN without any true DEG (cell-eval leaves such conditions out).

    Source: cell-eval 0.8 (Arc Institute) ``de_sig_genes_recall``.
    """
    true, predicted = _once(true_degs, "true_degs"), _once(predicted_degs, "predicted_degs")
    return len(set(true) & set(predicted)) / len(true) if true else float("nan")


def top_recall(true_degs: ArrayLike, predicted_delta: ArrayLike) -> float:
    """|true DEGs among the N genes of largest |predicted change|| / N, with N the number of true DEGs.

    Range [0, 1], higher is better; N / G is the value of a random ranking, and of the prediction of no change, because
    genes that tie for the last places share them.

    Args:
        true_degs: Positions of the true DEGs, shape [N], each once.
        predicted_delta: Predicted change from control, shape [G].

    Returns:
        The recall; NaN without any true DEG.

    Source: recall of the top DEGs as in Wu et al., PerturBench, arXiv:2408.10609, for predictions without replicates,
    of which there is no test and no significance.
    """
    size = np.abs(finite(predicted_delta, "predicted_delta", 1))
    degs = _gene_index(_once(true_degs, "true_degs"), size.size)
    if not degs.size:
        return float("nan")
    last = np.partition(size, size.size - degs.size)[size.size - degs.size]
    above, tied = size > last, size == last
    share = (degs.size - above.sum()) / tied.sum()
    return float((above[degs].sum() + share * tied[degs].sum()) / degs.size)


def _once(genes: ArrayLike, name: str) -> list[Any]:
    """Identifiers of genes, none of them twice."""
    listed: list[Any] = np.asarray(genes).ravel().tolist()
    if len(set(listed)) != len(listed):
        repeated = sorted({gene for gene in listed if listed.count(gene) > 1})
        raise DataError(f"{name} lists {listing(repeated)} more than once: expected each gene once")
    return listed
