"""The baseline gate: is a model better than every simple baseline, by paired differences over held-out environments.

Scores of one environment and another differ by far more than those of two models, so models are compared in pairs: the
same environments, the mean over seeds. Environments are no independent cases: doses and times of one perturbation are
averaged first, and combinations that share a part widen the interval by the design effect of their dependence (the
dyadic cluster-robust variance of Aronow, Samii and Assenova, Political Analysis 23, 564 (2015), over that of
independent cases). Without it, a model as good as the additive baseline was above it in 5 to 9 of 100 simulated sets of
pairs that share perturbations, instead of 2.5. Intervals are percentile bootstraps (`metrics.paired_difference`),
expanded for small numbers as in Hesterberg, The American Statistician 69, 371 (2015). They know nothing of the spread
over seeds, nor of noise that all environments share, such as that of the control.

A verdict (`verdicts`) is of one metric, guarded by the others of `GUARDS`, because each can be raised alone: scaling a
prediction up leaves its correlation as it is and may improve its ranks, while its errors grow. Nothing is clipped: a
score far below the baseline's is not the baseline's.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from pyro_scm import metrics
from pyro_scm.errors import DataError, listing

__all__ = ["GUARDS", "LOWER_IS_BETTER", "Units", "against_best", "differences", "sentence", "verdicts"]

LOWER_IS_BETTER = (
    "rmse", "rmse_deg", "mae", "mae_deg", "rank", "nll", "reconstruction", "reconstruction_rmse",
    "energy_distance", "mmd",
)  # fmt: skip
"""Metrics of `Comparison`; of all others a larger value is better."""

GUARDS = ("delta_pearson", "rmse", "rank")
"""In none of these, where they were scored, may a winner be worse than the best baseline."""

Units: TypeAlias = Mapping[str, Sequence[str]]

_CORRELATIONS = ("delta_pearson", "delta_pearson_deg", "squared_pearson", "squared_pearson_deg")
_DRAWS = 20_000  # of a bootstrap whose interval ends at its 0.1 % quantile or further in
_LEVEL = 0.95
_SAME = 1e-9  # scores that differ by less are equal: scaling a prediction changes its correlation by rounding

BETTER, NO_BETTER, WORSE = "better than every simple baseline", "no better", "worse"
FEW, UNDEFINED = "too few environments", "not defined"


# ---------------------------------------------------------------------- one verdict a model
def verdicts(
    scores: pd.DataFrame,
    *,
    metric: str = "delta_pearson",
    guards: Sequence[str] = GUARDS,
    units: Units | None = None,
) -> pd.DataFrame:
    """One verdict for each model on one metric.

    Better than every simple baseline: each of the paired intervals lies on the better side of 0, and no guard is worse
    than its best baseline. Worse: the interval against the hardest baseline lies on the other side. The hardest is the
    one against which the model's interval reaches furthest down. The 5 % of false wins are shared out among the models
    of the table (Bonferroni), so that they hold for the table as a whole. A correlation that is undefined, because the
    same change is predicted for every gene, counts as 0 here: a model gains nothing by abstaining.

    Args:
        scores: of `Comparison`, with baselines.
        metric: to judge by.
        guards: metrics that may not be worse; those that were not scored are passed over.
        units: environment -> parts of its perturbation; environments of the same parts are averaged, and those that
            share a part are dependent. By default each environment is a case of its own.

    Returns:
        Columns model, metric, baseline (the hardest), difference (model - baseline), lower, upper, environments,
        units, guard (those that failed), baselines (how many), and verdict: ``"better than every simple baseline"``,
        ``"no better"``, ``"worse"``, ``"too few environments"`` (a bootstrap of so few is sure too easily), or ``"not
        defined"``.

    Raises:
        DataError: no baseline was scored by the metric.
    """
    pairs = differences(scores, metric=metric, units=units)
    others = [name for name in guards if name != metric and name in set(scores["metric"])]
    failed = against_best(scores, metrics=others, units=units, fill=True)
    failed = failed[failed["verdict"] == "worse"]
    sign = -1.0 if metric in LOWER_IS_BETTER else 1.0
    rows = []
    for model, own in pairs.groupby("model", sort=False):
        guard = failed.loc[failed["model"] == model, "metric"].tolist()
        low = (own["lower"] if sign > 0 else -own["upper"]).fillna(sign * own["difference"])
        hardest = own.iloc[int(np.argmin(low.fillna(np.inf).to_numpy()))]
        rows.append({**hardest.to_dict(), "guard": ", ".join(guard), "verdict": _verdict(own, hardest, sign, guard)})
    columns = [*pairs.columns.drop("enough"), "guard", "verdict"]
    table = pd.DataFrame(rows, columns=columns)
    table.insert(len(columns) - 1, "baselines", pairs.groupby("model", sort=False).size().to_numpy())
    return table


def _verdict(pairs: pd.DataFrame, hardest: "pd.Series[Any]", sign: float, failed: Sequence[str]) -> str:
    """Of one model against all baselines."""
    if not hardest["units"]:
        return UNDEFINED
    if not pairs.loc[pairs["units"] > 0, "enough"].all():
        return FEW
    lower, upper = (hardest["lower"], hardest["upper"]) if sign > 0 else (-hardest["upper"], -hardest["lower"])
    if upper < 0:
        return WORSE
    return BETTER if lower > 0 and not failed else NO_BETTER


def differences(scores: pd.DataFrame, *, metric: str = "delta_pearson", units: Units | None = None) -> pd.DataFrame:
    """Each model against each baseline on one metric, in pairs over environments.

    Args: those of `verdicts`.

    Returns:
        Columns model, metric, baseline, difference (model - baseline), lower, upper (95 % for all models at once),
        environments and units in which both are defined, and enough: whether there are enough units for a verdict.

    Raises:
        DataError: no baseline was scored by the metric.
    """
    table, kinds = _table(scores, metric)
    baselines = [name for name in kinds.index[kinds == "baseline"] if name in table and table[name].notna().any()]
    if metric in _CORRELATIONS:
        baselines = [str(name) for name in kinds.index[kinds == "baseline"]]
        table = _filled(table)
    if not baselines:
        raise DataError(
            f"no baseline has scores of {metric!r}: judge by one of "
            f"{listing(sorted(set(scores.loc[scores['kind'] == 'baseline', 'metric'])))}"
        )
    models = [str(name) for name in kinds.index[kinds == "model"]]
    level = 1 - (1 - _LEVEL) / max(len(models), 1)
    rows = [
        {"model": model, "metric": metric, "baseline": other} | _paired(table[model], table[other], units, level)
        for model in models
        for other in baselines
    ]
    columns = ["model", "metric", "baseline", "difference", "lower", "upper", "environments", "units", "enough"]
    return pd.DataFrame(rows, columns=columns)


def sentence(row: Mapping[str, Any]) -> str:
    """A row of `verdicts` in words.

    Args:
        row: as a dictionary.
    """
    number = f"{row['environments']} environment{'s' if row['environments'] != 1 else ''}"
    if row["units"] != row["environments"]:
        number += f" ({row['units']} perturbations)"
    if not row["units"]:
        return f"{row['model']}: {row['verdict']} ({row['metric']})"
    low, high = row["lower"], row["upper"]
    interval = f" [{low:+.3f}, {high:+.3f}]" if low == low else ""  # NaN where there is one environment
    lost = f"; worse than the best baseline in {row['guard']}" if row["guard"] else ""
    return (
        f"{row['model']}: {row['verdict']} ({row['metric']}, against {row['baseline']}, the hardest of "
        f"{row['baselines']}: {row['difference']:+.3f}{interval} over {number}{lost})"
    )


# ---------------------------------------------------------------------- every metric against its best baseline
def against_best(
    scores: pd.DataFrame,
    *,
    metrics: Sequence[str] | None = None,
    units: Units | None = None,
    fill: bool = False,
) -> pd.DataFrame:
    """Each model against the best baseline of each metric, in pairs over environments.

    The best baseline is the one of best mean on these same environments, which favours the baselines. Each interval is
    a 95 % one of its own: of twenty, one misses.

    Args:
        scores: of `Comparison`.
        metrics: to compare by; all by default.
        units: see `verdicts`.
        fill: count a correlation that is undefined as 0, instead of leaving its environment out.

    Returns:
        Columns model, metric, baseline, difference (model - baseline), lower, upper, environments (in which both
        scores are defined) and verdict: ``"better"``, ``"worse"``, ``"not different"`` where the interval holds 0,
        ``"too few environments"`` below 6, where a bootstrap is sure too easily, or ``"not defined"``.
    """
    rows = []
    for metric in [str(name) for name in scores["metric"].unique()] if metrics is None else metrics:
        table, kinds = _table(scores, metric)
        table = _filled(table) if fill and metric in _CORRELATIONS else table
        sign = -1.0 if metric in LOWER_IS_BETTER else 1.0
        average = (sign * table[kinds.index[kinds == "baseline"]].mean()).dropna()
        if average.empty:
            continue
        best = str(average.idxmax())
        for model in kinds.index[kinds == "model"]:
            found = _paired(table[model], table[best], units, _LEVEL)
            rows.append({"model": model, "metric": metric, "baseline": best} | found | {"verdict": _word(found, sign)})
    columns = ["model", "metric", "baseline", "difference", "lower", "upper", "environments", "verdict"]
    return pd.DataFrame(rows, columns=columns)


def _word(found: Mapping[str, Any], sign: float) -> str:
    if not found["environments"]:
        return UNDEFINED
    if not found["enough"]:
        return FEW
    if found["lower"] > 0 or found["upper"] < 0:
        return "better" if sign * found["difference"] > 0 else "worse"
    return "not different"


# ---------------------------------------------------------------------- paired differences
def _table(scores: pd.DataFrame, metric: str) -> "tuple[pd.DataFrame, pd.Series[str]]":
    """Means over seeds, environments by models, and the kind of each model."""
    kinds: pd.Series[str] = scores.drop_duplicates("model").set_index("model")["kind"]
    own = scores[scores["metric"] == metric]
    means = own.groupby(["model", "environment"], sort=False)["value"].mean()
    return means.unstack("model").reindex(index=own["environment"].unique(), columns=kinds.index), kinds


def _filled(table: pd.DataFrame) -> pd.DataFrame:
    """Undefined correlations as 0, but for environments in which none is defined: there the truth is constant."""
    return table[table.notna().any(axis=1)].fillna(0.0)


def _paired(
    model: "pd.Series[float]",
    baseline: "pd.Series[float]",
    units: Units | None,
    level: float,
) -> dict[str, Any]:
    """Mean difference and its interval, and whether there are enough cases for a verdict at this level."""
    both = model.notna() & baseline.notna()
    a, b = model[both], baseline[both]
    nan = float("nan")
    if not len(a):
        return {"difference": nan, "lower": nan, "upper": nan, "environments": 0, "units": 0, "enough": False}
    change = a - b
    change[change.abs() <= _SAME * np.maximum(1.0, np.maximum(a.abs(), b.abs()))] = 0.0
    parts = [tuple(sorted({*(units or {}).get(str(name), (str(name),))})) for name in change.index]
    cases = sorted(set(parts))
    case = np.array([cases.index(own) for own in parts])
    n = len(cases)
    values = np.bincount(case, weights=change.to_numpy(dtype=np.float64)) / np.bincount(case)
    effective = min(n, len({part for own in cases for part in own}))
    needed = math.ceil(math.log2(2 / (1 - level)))  # fewer have one sign by chance too often: 6 for one model
    expanded = _expanded_level(n, effective - 1, level) if effective >= needed else level
    draws = _DRAWS if expanded < 0.998 else 5 * _DRAWS
    found = metrics.paired_difference(values, np.zeros(n), level=expanded, draws=draws, seed=0)
    wider = _dependence(values, cases)
    return {
        "difference": found.estimate,
        "lower": found.estimate + wider * (found.lower - found.estimate),
        "upper": found.estimate + wider * (found.upper - found.estimate),
        "environments": len(a),
        "units": n,
        "enough": effective >= needed,
    }


def _dependence(values: NDArray[np.float64], cases: Sequence[tuple[str, ...]]) -> float:
    """Standard error of the mean of cases that share parts, over that of independent cases; 1 at least.

    The sum over pairs of cases that share a part of the products of their deviations, with the small-sample factor that
    makes it right for independent deviations, whose sum is held at 0.
    """
    n = len(values)
    names = sorted({part for own in cases for part in own})
    column = {part: j for j, part in enumerate(names)}
    member = np.zeros((n, len(names)))
    for row, own in zip(member, cases, strict=True):
        row[[column[part] for part in own]] = 1.0
    share = (member @ member.T) > 0
    deviation = values - values.mean()
    alone = float(deviation @ deviation) / (n * max(n - 1, 1))
    if alone <= 0 or share.mean() >= 1:
        return 1.0
    together = float(deviation @ share @ deviation) / n**2 / (1 - float(share.mean()))
    return math.sqrt(max(together / alone, 1.0))


def _expanded_level(n: int, freedom: int, level: float) -> float:
    """Level at which a percentile bootstrap of n values covers their mean as often as Student's interval does."""
    from scipy.stats import norm, t

    return float(2 * norm.cdf(t.ppf((1 + level) / 2, freedom) * np.sqrt(n / (n - 1))) - 1)
