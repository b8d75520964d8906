"""Recovery of true latents, of the targets of environments and of their effects by inferred latents."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import linear_sum_assignment

from pyro_scm.errors import DataError
from pyro_scm.metrics.arguments import BoolArray, FloatArray, IntArray, finite, one_of
from pyro_scm.metrics.prediction import ROUNDING, determination, deviations


def _latents(truth: ArrayLike, inferred: ArrayLike) -> tuple[FloatArray, FloatArray]:
    """True and inferred latents of the same cells."""
    true, found = finite(truth, "truth", 2), finite(inferred, "inferred", 2)
    if len(true) != len(found) or not true.size or not found.size:
        raise DataError(
            f"truth has shape {true.shape} and inferred {found.shape}: expected (n, d) and (n, k), n > 0 cells"
        )
    return true, found


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
    centred = np.column_stack([deviations(column) for column in columns.T])
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
        inferred: Inferred latents of the same cells, shape [n, k]; a true latent without partner (k < d) counts 0.
        method: Correlation of the values or of their ranks.

    Returns:
        The score, the pairs, their absolute correlations and signs. A constant inferred latent correlates 0 with
        everything; a constant *true* latent makes its own correlation and the score NaN.

    Source: Hyvärinen and Morioka, NeurIPS 2016; Khemakhem et al., iVAE, AISTATS 2020.

    Example:
        >>> z = np.array([[0.0, 1.0], [1.0, 0.0], [2.0, 5.0]])
        >>> found = mcc(z, -3 * z[:, ::-1])  # in another order, with other signs and scales
        >>> round(found.score, 6), found.permutation.tolist()
        (1.0, [1, 0])
    """
    true, found = _latents(truth, inferred)
    one_of(method, "method", ("pearson", "spearman"))
    if method == "spearman":
        from scipy.stats import rankdata

        true, found = rankdata(true, axis=0), rankdata(found, axis=0)
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
    return float(np.mean([determination(t, p) for t, p in zip(truth.T, prediction.T, strict=True)]))


def linear_r2(truth: ArrayLike, inferred: ArrayLike, *, held_out: bool = False) -> float:
    """Mean over true latents of R2 of z_i regressed on all inferred latents and a constant (least squares).

    Higher is better; range [0, 1] in sample, (-inf, 1] held out. 1 when the truth is an affine map of the inferred
    latents: it is blind to rotation, so compare it with `permuted_r2` and `mcc` to see how entangled they are.

    Args:
        truth: True latents, shape [n, d].
        inferred: Inferred latents of the same cells, shape [n, k].
        held_out: Fit on the first half of the cells and score on the second; shuffle sorted cells before, or the score
            is that of an extrapolation. In sample, k inferred latents of pure noise score about k / n.

    Returns:
        The mean score; NaN when a true latent is constant on the scored cells.

    Source: Ahuja et al., "Interventional Causal Representation Learning", ICML 2023 (affine identification).
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

    Args: those of `linear_r2`; held out, the first half of the cells also decides the matching.
    Returns: the mean score; NaN when a true latent is constant on the scored cells.

    Source: Lachapelle et al., "Disentanglement via Mechanism Sparsity Regularization", CLeaR 2022.
    """
    true, found = _latents(truth, inferred)
    fit, score = _fit_and_score(len(true), held_out)
    predicted = np.tile(true[fit].mean(axis=0), (len(true[score]), 1))
    for latent, partner in enumerate(mcc(true[fit], found[fit]).permutation):
        if partner >= 0:
            deviation = deviations(found[fit, partner])
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
    H_b the entropy in base b. All three higher is better. One lasso for each true latent on the inferred ones, both
    standardised: linear, so a nonlinear component-wise map lowers I, and the shrinkage costs it about penalty^2.

    Args:
        truth: True latents, shape [n, d].
        inferred: Inferred latents of the same cells, shape [n, k].
        penalty: L1 penalty on the standardised scale, above 0; small weights of chance correlations become 0.
        held_out: As for `linear_r2`; it concerns informativeness.

    Returns:
        The three scores and the importances. With d = 1 disentanglement is NaN, with k = 1 completeness, because an
        entropy over one outcome says nothing. A latent without any importance counts as fully spread, 0.

    Source: Eastwood and Williams, ICLR 2018 (whose importances are those of a lasso or of a random forest).
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


class Detection(NamedTuple):
    """precision = hits / found, recall = hits / true, f1 = 2 hits / (found + true), each in [0, 1], higher is better.

    NaN where the denominator is 0: nothing was found, nothing is true, or neither.
    """

    precision: float
    recall: float
    f1: float


def detection(true: BoolArray, found: BoolArray) -> Detection:
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
        effects: Effects of the environments on the inferred latents (shifts, masks or their means), shape [E, k].
        permutation: Inferred latent of each true latent, shape [d], as in `Matching.permutation`; -1 (no partner) finds
            nothing. Effects on inferred latents that are no one's partner do not count.
        threshold: Share of the column maximum above which an effect is a target, in [0, 1).

    Returns:
        Precision, recall and F1 over all pairs (environment, latent).

    Source: Lopez et al., sVAE+, CLeaR 2023; Bereket and Karaletsos, SAMS-VAE, NeurIPS 2023 (masks after matching).
    """
    true, effect = finite(true_targets, "true_targets", 2), np.abs(finite(effects, "effects", 2))
    if not np.isin(true, (0.0, 1.0)).all():
        raise DataError(
            "true_targets holds values other than 0 and 1: expected booleans; compare the true shifts with 0"
        )
    if len(true) != len(effect):
        raise DataError(f"true_targets has {len(true)} environments and effects {len(effect)}: expected the same ones")
    if not 0.0 <= threshold < 1.0:
        raise DataError(f"threshold is {threshold}: expected a share of the column maximum, from 0 up to but not 1")
    partner = np.asarray(permutation)
    fits = partner.shape == (true.shape[1],) and np.issubdtype(partner.dtype, np.integer)
    used = partner[partner != -1] if fits else partner
    if not fits or len(np.unique(used)) < used.size or not np.isin(used, np.arange(effect.shape[1])).all():
        raise DataError(
            f"permutation is {partner.tolist()}: expected {true.shape[1]} different positions from 0 to "
            f"{effect.shape[1] - 1}, or -1 for no partner, as in Matching.permutation"
        )
    on = effect > threshold * effect.max(axis=0, initial=0.0)
    found = np.zeros(true.shape, dtype=np.bool_)
    found[:, partner != -1] = on[:, used]
    return detection(true != 0, found)


def effect_concentration(shifts: ArrayLike, *, scale: ArrayLike | None = None) -> FloatArray:
    """s_e = max_i |shift_ei| / sum_i |shift_ei|: share of an environment's total shift carried by its largest latent.

    Range [1/d, 1], higher is better when each environment truly acts on one latent; 1 when only one latent moves.

    Args:
        shifts: Shift of each inferred latent's mean from the reference environment, shape [E, d].
        scale: Standard deviation of each latent in the reference environment, shape [d]: shifts are divided by it,
            since the units of latents are arbitrary. None when the shifts are in such units already.

    Returns:
        The share of each environment, shape [E]; NaN for an environment that shifts nothing.

    Source: "Towards Learning Cell Causal-Embeddings", section 6: latents disentangled from the environment effect.
    """
    shift = np.abs(finite(shifts, "shifts", 2))
    if scale is not None:
        unit = finite(scale, "scale", 1)
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
    rounding = ROUNDING * max(np.abs(x).max(), np.abs(y).max())
    if a + b <= rounding**2:
        return float(difference <= rounding)
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
        test: ``"ks"`` compares distributions (Kolmogorov-Smirnov, asymptotic p-value), ``"mean"`` the means (Welch).

    Returns:
        The number of latents called different.

    Source: "Towards Learning Cell Causal-Embeddings", section 6; Benjamini and Hochberg, J. R. Stat. Soc. B 1995.
    """
    from scipy.stats import false_discovery_control, ks_2samp

    x, y = finite(reference, "reference", 2), finite(environment, "environment", 2)
    if x.shape[1] != y.shape[1] or min(len(x), len(y)) < 2 or not x.shape[1]:
        raise DataError(
            f"reference has shape {x.shape} and environment {y.shape}: expected (n, d) and (m, d), n, m > 1"
        )
    if not 0.0 < alpha < 1.0:
        raise DataError(f"alpha is {alpha}: expected a false discovery rate between 0 and 1")
    one_of(test, "test", ("ks", "mean"))
    pairs = zip(x.T, y.T, strict=True)
    p_values = [_welch_p_value(a, b) if test == "mean" else ks_2samp(a, b, method="asymp").pvalue for a, b in pairs]
    return int(np.sum(false_discovery_control(np.array(p_values, dtype=np.float64)) <= alpha))
