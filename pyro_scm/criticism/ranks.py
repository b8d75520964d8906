"""Probability integral transforms: where observed values lie among draws, and how far that is from uniform."""

from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from pyro_scm.criticism.verdicts import OWN, Check, canvas, graded, ks_band
from pyro_scm.posterior import warnings_of_arviz

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["distances", "ecdf_figure", "pit", "uniformity"]

Array: TypeAlias = NDArray[np.float64]

_WRONG = 0.1  # distance from uniform at which a central interval's coverage may be off by 0.2


def pit(values: Any, draws: Any, weights: Any = None, seed: int = 0) -> Array:
    """P(draw < value) of each value, ties and the finite number of draws broken at random: uniform if both are alike.

    Args:
        values: ``[n, G]``.
        draws: ``[S, n, G]``.
        weights: ``[S, n]`` of the draws, whose sums over S are 1; equal by default.
        seed: of the ties.

    Source: Czado, Gneiting and Held, "Predictive model assessment for count data", Biometrics 2009.
    """
    rng = np.random.default_rng(seed)
    number = len(draws)
    if weights is None:
        below, equal = (draws < values).mean(0), (draws == values).mean(0)
    else:
        below = np.einsum("sn,sng->ng", weights, draws < values)
        equal = np.einsum("sn,sng->ng", weights, draws == values)
    u = rng.random(below.shape)
    found: Array = (number * (below + u * equal) + u) / (number + 1)
    return found


def distances(values: Array) -> Array:
    """Kolmogorov's distance of each column ``[n, G]`` of values in [0, 1] from uniform, ``[G]``."""
    ordered = np.sort(values, axis=0)
    n = len(ordered)
    steps = np.arange(n + 1)[:, None] / n
    found: Array = np.maximum(steps[1:] - ordered, ordered - steps[:-1]).max(0)
    return found


def uniformity(name: str, values: Array, labels: list[str], words: dict[str, str], quantile: float = 1.0) -> Check:
    """Whether values that should be uniform are.

    Args:
        name: of the check.
        values: ``[n, G]``; the n values of a column are independent.
        labels: G names.
        words: of each verdict.
        quantile: of the G columns' distances that is judged; 1 for the largest, which is then held to the band of all
            columns at once.
    """
    import pandas as pd

    found = distances(values)
    value = float(np.quantile(found, quantile))
    good = ks_band(len(values), len(labels) if quantile == 1 else 1)
    verdict = graded(value, good, max(_WRONG, good))
    order = np.argsort(-found)
    skew = (values - 0.5).mean(0)
    spread = values.std(0) / np.sqrt(1 / 12)
    detail = pd.DataFrame({"distance": found, "shift": skew, "width": spread}, index=pd.Index(labels, name="of"))
    which = "largest" if quantile == 1 else f"{quantile:.0%} quantile over {len(labels)} genes"
    shape = _shape(float(np.median(skew)), float(np.median(spread)))
    return Check(
        name,
        value,
        f"distance from uniform ({which}): good up to {good:.3f}, bad above {max(_WRONG, good):.2f}",
        "good: 95 % band of the ECDF (Massart 1990; Säilynoja et al. 2022); "
        f"bad: {OWN}, a 90 % interval may then cover 70 %",
        verdict,
        words[verdict] + (shape if verdict != "good" else ""),
        lambda: ecdf_figure(values[:, order], [labels[i] for i in order]),
        detail.iloc[order],
    )


def _shape(skew: float, spread: float) -> str:
    """What the deviation looks like."""
    if abs(skew) > 0.05:
        return f" Observed values lie too {'high' if skew > 0 else 'low'} among the draws."
    if spread > 1.05:
        return " Observed values lie too far out: the draws are too narrow."
    return " Observed values lie too near the middle: the draws are too wide." if spread < 0.95 else ""


def ecdf_figure(values: Array, labels: list[str], number: int = 3) -> "Figure":
    """ECDF minus diagonal of the first columns, with a simultaneous 95 % band: inside the band is uniform.

    Args:
        values: ``[n, G]`` in [0, 1].
        labels: G names.
        number: of panels.
    """
    import arviz as az
    from scipy.stats import uniform

    shown = min(number, len(labels))
    columns = min(shown, 3)
    figure, axes = canvas((shown + columns - 1) // columns, columns, (3.6, 2.6))
    for ax, column, label in zip(axes.flat, values.T, labels, strict=False):
        with warnings_of_arviz():
            az.plot_ecdf(
                column, cdf=uniform().cdf, eval_points=np.linspace(0, 1, 51), difference=True, ax=ax, random_state=0,
                confidence_bands="auto", ci_prob=0.95, rvs=uniform().rvs,
            )  # fmt: skip
        ax.set(title=label, xlabel="PIT", ylabel="ECDF - uniform")
    for ax in list(axes.flat)[shown:]:
        ax.set_visible(False)
    return figure
