"""Coverage of predictive intervals on held-out environments, as they are and recalibrated by conformal prediction."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from pyro_scm.criticism.ranks import pit
from pyro_scm.criticism.verdicts import OWN, Check, canvas, graded, skipped
from pyro_scm.errors import DataError
from pyro_scm.sites import X

if TYPE_CHECKING:
    from arviz import InferenceData
    from matplotlib.figure import Figure

__all__ = ["LEVELS", "coverage", "interval_coverage"]

Array = NDArray[np.float64]

LEVELS = (0.5, 0.8, 0.95)
_GOOD, _LOOK = 475, 50  # a coverage of so many independent values scatters by 0.02 and 0.062 at 95 % (two sd)


def interval_coverage(
    data: "InferenceData", *, levels: Sequence[float] = LEVELS, conformal: bool = False, seed: int = 0
) -> pd.DataFrame:
    """Share of held-out expression values inside central predictive intervals, by environment.

    Intervals are those of `prior_predictive`: new cells of the environment, all members together. Values of counts that
    tie with the end of an interval are in it with the probability that makes the coverage exact.

    With `conformal` intervals are widened (or narrowed) on both sides by a multiple of each gene's predictive sd, the
    same for all genes: the smallest that covered the *other* environments of `data` (split conformal prediction of
    quantiles, leaving one environment out). It then covers a further environment as it did those, if they are alike.

    Args:
        data: from `to_arviz`, of cells that the run was not fitted to.
        levels: nominal coverages.
        conformal: needs two environments or more.
        seed: of the ties.

    Returns:
        A row for each environment and level: coverage, width (in units of the gene's predictive sd); with `conformal`
        also coverage_conformal, width_conformal.

    Raises:
        DataError: no `prior_predictive`, a level outside (0, 1), conformal with one environment.

    Source: Romano, Patterson and Candès, "Conformalized quantile regression", NeurIPS 2019.
    """
    if "prior_predictive" not in data.groups():
        raise DataError("these draws have no group prior_predictive: a flat prior does not say how to simulate cells")
    nominal = np.asarray(levels, np.float64)
    if not nominal.size or ((nominal <= 0) | (nominal >= 1)).any():
        raise DataError(f"levels = {list(levels)}: give coverages between 0 and 1")
    x = data.observed_data[X].to_numpy().astype(np.float64)
    draws = data.prior_predictive[X].to_numpy()
    draws = draws.reshape(-1, *draws.shape[2:])
    ranks = pit(x, draws, seed=seed)
    sd = np.maximum(draws.std(0, dtype=np.float64), 1e-12)
    environment = data.constant_data["environment"].to_numpy().astype(str)
    names = list(dict.fromkeys(environment))
    if conformal and len(names) < 2:
        raise DataError("conformal recalibration leaves one environment out at a time: hold out two or more")
    rows = []
    for level in nominal:
        low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2], axis=0)
        excess = np.maximum(low - x, x - high) / sd  # by how much an interval would have to grow
        inside = np.abs(2 * ranks - 1) <= level
        width = (high - low) / sd
        for name in names:
            of = environment == name
            row: dict[str, Any] = {"environment": name, "level": level, "coverage": inside[of].mean()}
            row["width"] = width[of].mean()
            if conformal:
                grown = _grown(excess[~of], float(level))
                row["coverage_conformal"] = (excess[of] <= grown).mean()
                row["width_conformal"] = np.maximum(width[of] + 2 * grown, 0).mean()
            rows.append(row)
    return pd.DataFrame(rows).set_index(["environment", "level"])


def _grown(excess: Array, level: float) -> float:
    """The smallest growth, in sd, that covers a share `level` of these values, one more value counted in."""
    number = excess.size
    return float(np.quantile(excess, min(1.0, np.ceil((number + 1) * level) / number), method="higher"))


def coverage(
    data: "InferenceData | None", *, levels: Sequence[float] = LEVELS, conformal: bool = False, seed: int = 0
) -> list[Check]:
    """`interval_coverage` judged, one check a level: the mean over environments of the coverage.

    Args:
        data: of held-out cells; None if there are none.
        levels: see there.
        conformal: see there; judged is then the recalibrated coverage.
        seed: see there.
    """
    names = [f"predictions: {level:.0%} intervals held out" for level in levels]
    if data is None or "prior_predictive" not in data.groups():
        why = "No held-out cells were given." if data is None else "A flat prior does not say how to simulate cells."
        return [skipped(name, why) for name in names]
    table = interval_coverage(data, levels=levels, conformal=conformal, seed=seed)
    column = "coverage_conformal" if conformal else "coverage"
    return [
        _check(name, float(level), table[table.index.get_level_values("level") == level], column, table)
        for name, level in zip(names, levels, strict=True)
    ]


def _check(name: str, level: float, own: pd.DataFrame, column: str, table: pd.DataFrame) -> Check:
    value = float(own[column].mean())
    good, look = (2 * float(np.sqrt(level * (1 - level) / n)) for n in (_GOOD, _LOOK))
    verdict = graded(abs(value - level), good, look)
    ends = f"from {own[column].min():.3f} to {own[column].max():.3f} over {len(own)} environments"
    narrow = value < level
    words = {
        "good": f"{level:.0%} intervals cover {value:.1%} of what was measured in held-out environments ({ends}).",
        "look": f"{level:.0%} intervals cover {value:.1%} ({ends}): they are a little too "
        f"{'narrow' if narrow else 'wide'}; conformal recalibration mends the average.",
        "bad": f"{level:.0%} intervals cover {value:.1%} ({ends}): they are far too {'narrow' if narrow else 'wide'}. "
        + (
            "The model is too sure of environments it has not seen."
            if narrow
            else "Predictions are vaguer than need be."
        ),
    }
    return Check(
        name,
        value,
        f"coverage: good within {good:.3f} of {level:g}, bad beyond {look:.3f}",
        f"{OWN}: two sd of the coverage of {_GOOD} ({_LOOK}) independent values",
        verdict,
        words[verdict],
        (lambda: _figure(table, column)) if level == max(table.index.get_level_values("level")) else None,
        own,
    )


def _figure(table: pd.DataFrame, column: str) -> "Figure":
    figure, axes = canvas()
    ax = axes[0, 0]
    for _, own in table.groupby(level="environment"):
        ax.plot(own.index.get_level_values("level"), own[column], "o-", color="#9bb8d9", linewidth=0.8, markersize=3)
    mean = table.groupby(level="level")[column].mean()
    ax.plot(mean.index, mean, "o-", color="#1f5fa8")
    ax.plot([0, 1], [0, 1], color="#888", linewidth=0.8)
    ax.set(xlabel="nominal level", ylabel="coverage in held-out environments", xlim=(0.4, 1), ylim=(0, 1.02))
    return figure
