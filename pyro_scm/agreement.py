"""`scatter`: each condition's predicted change from control against the observed one, differential genes marked."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from pyro_scm.baselines import controls, environment_means
from pyro_scm.conditions import novelty
from pyro_scm.data.dataset import EnvironmentDataset
from pyro_scm.errors import DataError, listing
from pyro_scm.evaluation import score
from pyro_scm.mean_predictions import predict_means
from pyro_scm.run import Run

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Scatter", "scatter"]

FloatArray: TypeAlias = NDArray[np.float64]

_NAMED = 5  # differential genes that are named in a panel


@dataclass(frozen=True, eq=False)
class Scatter:
    """Predicted and observed changes of each condition.

    Args:
        genes: one row a condition and gene: environment, gene, control (mean of the controls), observed and predicted
            (mean changes; the prediction a mean over members), low and high (of members), and deg.
        scores: one row a condition: r2 and pearson of changes on all genes and, ``_deg``, on differential genes;
            trained, cells, and warning (see `conditions.novelty`).
    """

    genes: pd.DataFrame
    scores: pd.DataFrame

    def figure(self, environments: Sequence[str] | None = None, number: int = 12) -> "Figure":
        """A panel for each condition.

        Args:
            environments: to show; by default all.
            number: of panels at most.

        Raises:
            DataError: a condition that is not there.
        """
        from matplotlib.figure import Figure

        names = [str(n) for n in self.scores.index] if environments is None else list(environments)
        unknown = [n for n in names if n not in self.scores.index]
        if unknown or not names:
            raise DataError(f"no scatter of {listing(unknown)}: there is {listing(self.scores.index)}")
        names = names[:number]
        across = min(4, len(names))
        down = -(-len(names) // across)
        figure = Figure(figsize=(3.3 * across, 3.4 * down), layout="constrained")
        for axes, name in zip(figure.subplots(down, across, squeeze=False).ravel(), names, strict=False):
            own, found = self.genes[self.genes["environment"] == name], self.scores.loc[name]
            ends = [float(own[["observed", "predicted"]].to_numpy().min())]
            ends.append(float(own[["observed", "predicted"]].to_numpy().max()))
            axes.plot(ends, ends, color="#6e7781", linewidth=0.8, linestyle=(0, (4, 3)), zorder=0)
            for deg, colour, size in ((False, "#a8b0b8", 8), (True, "#d1663a", 14)):
                some = own[own["deg"] == deg]
                axes.scatter(some["observed"], some["predicted"], s=size, color=colour, linewidths=0)
            marked = own[own["deg"]]
            largest = marked.iloc[np.argsort(-np.abs(marked["observed"].to_numpy()))[:_NAMED]]
            for gene, x, y in zip(largest["gene"], largest["observed"], largest["predicted"], strict=True):
                axes.annotate(str(gene), (x, y), xytext=(3, 3), textcoords="offset points", fontsize=6)
            seen = " (trained on)" if found["trained"] else ""
            axes.set_title(f"{name}{seen}\nr² {found['r2']:.2f}, Pearson Δ {found['pearson']:.2f}", fontsize=8)
            axes.tick_params(labelsize=7)
            axes.spines[["top", "right"]].set_visible(False)
        for axes in figure.axes[len(names) :]:
            axes.set_axis_off()
        figure.supxlabel("observed change from control", fontsize=9)
        figure.supylabel("predicted change", fontsize=9)
        return figure

    plot = figure


def scatter(
    run: Run,
    cells: EnvironmentDataset,
    environments: Sequence[str] | None = None,
    *,
    degs: Mapping[str, Sequence[int]] | None = None,
    top: int = 20,
    references: int = 200,
    level: float = 0.9,
    seed: int = 0,
) -> Scatter:
    """Predicted against observed changes of mean (log-normalised) expression.

    A picture, not a benchmark: the controls that are subtracted from what was observed are those predicted from, whose
    noise both sides share; `compare` and `evaluate` keep them apart.

    Args:
        run: from `fit` or `load`.
        cells: with the run's environments: references, and cells of the conditions.
        environments: names; by default those with cells that the run was not fitted to, or all where there are none.
        degs: environment -> columns of its differential genes, such as those of a `Comparison`; by default the `top`
            genes of largest |Welch t| against controls in these cells, which are marked, not tested.
        top: number of genes to mark.
        references: cells to predict from.
        level: of the members' interval.
        seed: of these cells and draws.

    Raises:
        DataError: an unknown environment, one with fewer than 2 cells or a reference, or no references.

    Example:
        >>> scatter(run, cells, ["env_1"]).figure()
        <Figure size ...>
    """
    table = run.environments.table
    number = np.bincount(cells.env, minlength=len(cells.environments))
    fine = (number > 1) & ~cells.reference
    usable = [str(n) for n in cells.environments.index[fine]]
    if environments is None:
        held = [n for n in usable if not table["trained"].iloc[run.environments.index(n)]]
        chosen = held or usable
    else:
        chosen = list(environments)
        cells.environment_index(*chosen)
        bad = [n for n in chosen if n not in usable]
        if bad:
            raise DataError(f"{listing(bad)} has fewer than 2 cells here, or is a reference: choose other environments")
    if not chosen:
        raise DataError("no condition has 2 cells or more: give cells of some conditions")
    depth = cells.schema.summary.depth
    rows = cells.environment_index(*chosen)
    control = controls(cells, chosen, depth)
    truth = environment_means(cells, depth)[0][rows]
    predicted = predict_means(run, cells, chosen, cells=references, seed=seed)
    if degs is None:
        marked = _marked(cells, rows, chosen, top, depth)
    else:
        marked = {name: np.asarray(genes, np.int64) for name, genes in degs.items()}
    news = novelty(run, chosen)
    parts, scores = [], []
    for i, name in enumerate(chosen):
        genes = marked.get(name, np.empty(0, np.int64))
        change = predicted[:, i] - control[i]
        low, high = np.quantile(change, [(1 - level) / 2, (1 + level) / 2], axis=0)
        own = {"environment": name, "gene": list(cells.genes), "control": control[i], "observed": truth[i] - control[i]}
        own |= {"predicted": change.mean(0), "low": low, "high": high, "deg": np.isin(np.arange(len(low)), genes)}
        parts.append(pd.DataFrame(own))
        found = score(truth[i], predicted[:, i].mean(0), control[i], genes)
        kept = {a: found[b] for a, b in _SHOWN.items()}
        told = {"trained": bool(news["trained"].loc[name]), "cells": int(number[rows[i]])}
        scores.append({"environment": name, **kept, **told, "warning": news["warning"].loc[name]})
    return Scatter(pd.concat(parts, ignore_index=True), pd.DataFrame(scores).set_index("environment"))


_SHOWN = {"r2": "delta_r2", "pearson": "delta_pearson", "r2_deg": "delta_r2_deg", "pearson_deg": "delta_pearson_deg"}


def _marked(
    cells: EnvironmentDataset, rows: NDArray[np.int64], names: Sequence[str], top: int, depth: float
) -> dict[str, NDArray[np.int64]]:
    """Genes of largest |Welch t| of each condition against all references."""
    reference = _moments(cells.subset(cells.reference[cells.env]), depth)
    found = {}
    for name, e in zip(names, rows.tolist(), strict=True):
        own = _moments(cells.subset(cells.env == e), depth)
        error = np.sqrt(own[1] + reference[1])
        t = np.divide(own[0] - reference[0], error, out=np.zeros_like(error), where=error > 0)
        found[name] = np.argsort(-np.abs(t), kind="stable")[:top]
    return found


def _moments(cells: EnvironmentDataset, depth: float) -> tuple[FloatArray, FloatArray]:
    """Each gene's mean and its squared standard error."""
    total = np.zeros((2, len(cells.genes)))
    for _, x in cells.normalised_blocks(depth):
        dense = np.asarray(x if isinstance(x, np.ndarray) else x.toarray(), np.float64)
        total += np.stack([dense.sum(0), (dense**2).sum(0)])
    n = max(len(cells), 2)
    mean = total[0] / n
    return mean, np.maximum(total[1] / n - mean**2, 0) / (n - 1)
