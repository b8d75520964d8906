"""`dose_response`: predicted curves over doses with their bands, beside observed points and the Hill curves of these.

Every value is a change from control, in one number: of a gene, of expression along a perturbation's own direction, or
of the latents along it. A direction is that of the predicted change at the largest dose: projections on the observed
change, which holds the cells' noise, would be biased upwards.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from pyro_scm.baselines import controls, matched_references
from pyro_scm.conditions import at_dose, entered, novelty, perturbations, single_dose
from pyro_scm.data.dataset import EnvironmentDataset
from pyro_scm.errors import DataError, listing, nearest
from pyro_scm.hill import HillPosterior, fit_hill
from pyro_scm.mean_predictions import predict_means
from pyro_scm.query import abduct, isolated
from pyro_scm.run import Run, members
from pyro_scm.shifts import mover
from pyro_scm.sites import Z

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["DoseResponse", "dose_response"]

FloatArray: TypeAlias = NDArray[np.float64]

EFFECT, LATENT = "effect", "latent"
_BEYOND = 10**0.5  # curves are drawn so far beyond the doses of the table
_CHUNK = 2048
_LARGEST = 4 << 30  # bytes of predictions
_FEW = 5  # cells, whose own spread says little
_BLUE, _ORANGE, _INK = "#1f5fa8", "#d1663a", "#1b1f24"


@dataclass(frozen=True, eq=False)
class DoseResponse:
    """Curves and points.

    Args:
        readout: ``"effect"``, ``"latent"`` or a gene.
        curves: one row a curve and dose: perturbation (with time and cell line, where there are several), dose (uM),
            value (mean over members), low and high (over members and draws; NaN for one member and one draw), hill,
            hill_low and hill_high (of the curve fitted to the points), and warning (see `conditions.novelty`).
        points: one row a curve and measured dose, 0 for its controls: perturbation, environment, dose, mean, error
            (standard error of the mean), cells and trained.
        members: curve -> ``[K * S, doses]`` predicted values of each member and draw.
        hill: posterior of the Hill curves; None where no perturbation has controls and three doses.
        level: of all intervals.
    """

    readout: str
    curves: pd.DataFrame
    points: pd.DataFrame
    members: dict[str, FloatArray]
    hill: HillPosterior | None
    level: float
    unit: str = field(default="")

    def table(self) -> pd.DataFrame:
        """One row a curve.

        Returns:
            half, half_low and half_high: the dose at which the predicted change is half of that at the largest measured
            dose; and where Hill curves were fitted log_ec50, ec50, emax, slope, each with an interval, and outside (see
            `HillPosterior.summary`).
        """
        rows = []
        for name, own in self.curves.groupby("perturbation", sort=False):
            dosed = self.points[(self.points["perturbation"] == name) & (self.points["dose"] > 0)]["dose"]
            doses = own["dose"].to_numpy(np.float64)
            top = float(dosed.max()) if len(dosed) else float(doses.max())
            found = [_half(doses, values, top) for values in self.members[str(name)]]
            known = [v for v in found if np.isfinite(v)]
            tails = [(1 - self.level) / 2, 0.5, (1 + self.level) / 2]
            low, middle, high = np.quantile(known, tails) if known else [np.nan] * 3
            several = len(known) > 1
            rows.append(
                {"perturbation": name, "half": middle, "half_low": low if several else np.nan}
                | {"half_high": high if several else np.nan}
            )
        table = pd.DataFrame(rows).set_index("perturbation")
        return table if self.hill is None else table.join(self.hill.summary(self.level))

    def figure(self, number: int = 12) -> "Figure":
        """A panel for each curve, those of the largest observed (else predicted) changes first.

        Args:
            number: of panels at most.
        """
        from matplotlib.figure import Figure

        size = self.curves.groupby("perturbation", sort=False)["value"].agg(lambda v: v.abs().max())
        seen = self.points[self.points["dose"] > 0]
        if len(seen):
            size = seen.groupby("perturbation")["mean"].agg(lambda v: v.abs().max()).reindex(size.index).fillna(-1.0)
        names = size.sort_values(ascending=False, kind="stable").index[:number]
        across = min(4, len(names))
        down = -(-len(names) // across)
        figure = Figure(figsize=(3.1 * across + 0.4, 2.5 * down + 0.5), layout="constrained")
        panels = figure.subplots(down, across, squeeze=False).ravel()
        for axes, name in zip(panels, names, strict=False):
            self._panel(axes, str(name))
        for axes in panels[len(names) :]:
            axes.set_axis_off()
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=4, frameon=False, fontsize=8)
        figure.supxlabel("dose, µM (0 at the left)", fontsize=9)
        figure.supylabel(f"change from control\n{self.unit}", fontsize=9)
        return figure

    plot = figure

    def _panel(self, axes: "Axes", name: str) -> None:
        own = self.curves[self.curves["perturbation"] == name]
        points = self.points[self.points["perturbation"] == name]
        doses = own["dose"].to_numpy(np.float64)
        least = float(doses[doses > 0].min())
        x = np.where(doses > 0, doses, least / 3)
        if own["hill"].notna().any():
            axes.fill_between(x, own["hill_low"], own["hill_high"], color=_ORANGE, alpha=0.2, linewidth=0)
            axes.plot(x, own["hill"], color=_ORANGE, linewidth=1.2, label="Hill curve of the points")
        if own["low"].notna().any():
            axes.fill_between(x, own["low"], own["high"], color=_BLUE, alpha=0.2, linewidth=0)
        axes.plot(x, own["value"], color=_BLUE, linewidth=1.6, label="predicted")
        for trained, face, label in ((True, _INK, "observed, trained on"), (False, "white", "observed, held out")):
            some = points[points["trained"] == trained]
            at = np.where(some["dose"] > 0, some["dose"], least / 3)
            axes.errorbar(
                at, some["mean"], some["error"], fmt="o", color=_INK, markerfacecolor=face, markersize=4, linewidth=1,
                label=label,
            )  # fmt: skip
        axes.set_xscale("log")
        axes.set_title(name, fontsize=9)
        axes.tick_params(labelsize=7)
        axes.axhline(0, color="#d7dbe0", linewidth=0.8, zorder=0)
        axes.spines[["top", "right"]].set_visible(False)


def dose_response(
    run: Run,
    cells: EnvironmentDataset,
    perturbations: Sequence[str] | None = None,
    *,
    readout: str = EFFECT,
    doses: Sequence[float] | None = None,
    covariates: Mapping[str, str] | None = None,
    references: int = 200,
    draws: int = 1,
    hill: str | None = "svi",
    level: float = 0.9,
    seed: int = 0,
) -> DoseResponse:
    """What a run predicts over doses, and what was observed.

    Args:
        run: from `fit` or `load`, whose representation tells doses.
        cells: with the run's environments: references to predict from, and observed cells, held-out ones too.
        perturbations: names; by default all with a known dose. A perturbation has a curve for each time and cell line.
        readout: ``"effect"`` (expression along the predicted change, of unit length), a gene, or ``"latent"`` (the
            noise of the latents along the effect; each member has its own, in standard deviations of the noise).
        doses: uM; by default 13 from below the smallest of the table to beyond the largest, and 0.
        covariates: category of the cells to use, such as ``{"cell_type": "T"}``.
        references: cells to predict from.
        draws: S of the posterior of each member, each with latents and global sites drawn anew.
        hill: how to fit Hill curves to the points, see `fit_hill`; None not to.
        level: of all intervals.
        seed: of cells, draws and fit.

    Raises:
        DataError: an unknown perturbation, gene or category, no references, or no doses.
        ModelError: a representation that does not look at doses.
    """
    cells = _of_covariates(cells, covariates or {})
    if draws < 1 or references < 1:
        raise DataError(f"draws = {draws}, references = {references}: give 1 or more of each")
    if readout not in (EFFECT, LATENT, *cells.genes):
        raise DataError(
            f"no gene {readout!r}: did you mean {listing(nearest(readout, cells.genes))}? Or 'effect', or 'latent'"
        )
    groups = _groups(run, perturbations)
    if doses is not None and (not len(doses) or min(doses) < 0):
        raise DataError(f"doses {list(doses)}: give some of 0 or more, in uM")
    asked, grid, tops = {}, {}, {}
    for name, (rows, measured) in groups.items():
        label = str(run.environments.table.index[rows[int(np.argmax(measured))]])
        grid[name] = np.unique(np.asarray(_default_doses(measured) if doses is None else doses, np.float64))
        tops[name] = label
        for dose in grid[name]:
            asked[f"{name} at {dose:.6g} uM"] = (label, at_dose(run, label, float(dose)))
    need = len(asked) * len(cells.genes) * len(run) * draws * 8
    if readout != LATENT and need > _LARGEST:
        raise DataError(
            f"{len(asked)} conditions x {len(cells.genes)} genes x {len(run) * draws} members and draws take "
            f"{need / 2**30:.1f} GiB: ask for some of the perturbations, or fewer doses or draws"
        )
    wide, known = entered(run, cells, asked)
    if readout == LATENT:
        values, points = _latent(wide, known, groups, grid, tops)
        unit = "latent effect, sd of the noise"
    else:
        values, points = _expressed(wide, known, groups, grid, tops, readout, references, draws, seed)
        unit = "expression along the effect" if readout == EFFECT else readout
    posterior = _hill(points, hill, seed) if hill is not None else None
    news = novelty(wide, list(asked))["warning"]
    curves = pd.concat([_rows(name, grid[name], values[name], news, level) for name in groups], ignore_index=True)
    curves[["hill", "hill_low", "hill_high"]] = np.nan
    if posterior is not None:
        for name in posterior.perturbations:
            own = (curves["perturbation"] == name).to_numpy()
            fitted = posterior.curves(grid[name], level)
            fitted = fitted[fitted["perturbation"] == name]
            curves.loc[own, ["hill", "hill_low", "hill_high"]] = fitted[["value", "low", "high"]].to_numpy()
    return DoseResponse(readout, curves, points, values, posterior, level, unit)


def _of_covariates(cells: EnvironmentDataset, covariates: Mapping[str, str]) -> EnvironmentDataset:
    for name, value in covariates.items():
        if name not in cells.categories or value not in cells.categories[name]:
            known = listing(cells.categories.get(name, cells.categories), 8) or "none"
            raise DataError(f"no cells of {name} = {value!r}: there are {known}")
        cells = cells.subset(cells.covariates[name] == cells.categories[name].index(value))
    return cells


def _groups(run: Run, names: Sequence[str] | None) -> dict[str, tuple[list[int], list[float]]]:
    """Curve -> rows of its environments and their doses: a perturbation, time and cell line."""
    table = run.environments.table
    found: dict[tuple[str, ...], list[int]] = {}
    for name, rows in perturbations(run).items():
        for i in rows:
            own = table.iloc[i]
            if single_dose(own["dose"]) > 0:
                found.setdefault((name, _text(own["time"], " h"), _text(own["cell_line"], "")), []).append(i)
    present = {key[0] for key in found}
    unknown = [n for n in names or () if n not in present]
    if unknown or not found:
        near = listing(nearest(unknown[0], present)) if unknown and present else "none"
        raise DataError(f"no doses of {listing(unknown) or 'any perturbation'} in the run's table: it has {near}")
    several = [len({key[c] for key in found}) > 1 for c in (1, 2)]
    return {
        " ".join([key[0], *(key[c + 1] for c in (0, 1) if several[c] and key[c + 1])]): (
            rows,
            [single_dose(table["dose"].iloc[i]) for i in rows],
        )
        for key, rows in found.items()
        if names is None or key[0] in names
    }


def _text(value: Any, unit: str) -> str:
    if value is None or value != value:  # NaN
        return ""
    return f"{value:g}{unit}" if isinstance(value, float | int) else str(value)


def _default_doses(measured: Sequence[float]) -> FloatArray:
    low, high = np.log10(min(measured) / _BEYOND), np.log10(max(measured) * _BEYOND)
    return np.concatenate([[0.0], np.logspace(low, high, 13)])


def _rows(name: str, doses: FloatArray, values: FloatArray, news: "pd.Series[Any]", level: float) -> pd.DataFrame:
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2], axis=0)
    if len(values) == 1:
        low, high = np.full((2, len(doses)), np.nan)
    warning = [str(news[f"{name} at {dose:.6g} uM"]) for dose in doses]
    return pd.DataFrame(
        {"perturbation": name, "dose": doses, "value": values.mean(0), "low": low, "high": high, "warning": warning}
    )


def _expressed(
    run: Run,
    cells: EnvironmentDataset,
    groups: Mapping[str, tuple[list[int], list[float]]],
    grid: Mapping[str, FloatArray],
    tops: Mapping[str, str],
    readout: str,
    references: int,
    draws: int,
    seed: int,
) -> tuple[dict[str, FloatArray], pd.DataFrame]:
    """Predicted values of each curve, and observed points, of expression along a direction."""
    names = [f"{name} at {dose:.6g} uM" for name in groups for dose in grid[name]]
    every = [*names, *dict.fromkeys(tops.values())]
    before = controls(cells, every, cells.schema.summary.depth)
    parts = [predict_means(run, cells, every, cells=references, seed=seed + 1000 * s) - before for s in range(draws)]
    change = np.concatenate(parts)  # [S * K, Q, G]
    column = {name: q for q, name in enumerate(every)}
    values, directions = {}, {}
    for name in groups:
        if readout == EFFECT:
            along = change[:, column[tops[name]]].mean(0)
            directions[name] = along / (np.linalg.norm(along) or 1.0)
        else:
            directions[name] = (np.array(cells.genes) == readout).astype(np.float64)
        own = [column[f"{name} at {dose:.6g} uM"] for dose in grid[name]]
        values[name] = change[:, own] @ directions[name]
    matrix = np.stack(list(directions.values()), 1)
    depth = cells.schema.summary.depth
    projected = np.concatenate([np.asarray(x @ matrix) for _, x in cells.normalised_blocks(depth)])
    return values, _points(run, cells, groups, [projected[:, m] for m in range(len(groups))])


def _latent(
    run: Run,
    cells: EnvironmentDataset,
    groups: Mapping[str, tuple[list[int], list[float]]],
    grid: Mapping[str, FloatArray],
    tops: Mapping[str, str],
) -> tuple[dict[str, FloatArray], pd.DataFrame]:
    """The same of the latents, along each member's own effect; observed points are those of the best member."""
    values: dict[str, list[FloatArray]] = {name: [] for name in groups}
    projected: list[FloatArray] = []
    for k, (model, guide) in enumerate(members(run)):
        like = next(model.parameters())
        r = torch.as_tensor(run.environments.representation).to(like)
        with torch.no_grad():
            effects = mover(model).moments(r, r.new_ones(len(r)))[0].double().cpu().numpy()
        directions = []
        for name in groups:
            along = effects[run.environments.index(tops[name])]
            directions.append(along / (np.linalg.norm(along) or 1.0))
            own = [run.environments.index(f"{name} at {dose:.6g} uM") for dose in grid[name]]
            values[name].append(effects[own] @ directions[-1])
        if k == run.best:
            noise = _noise(model, guide, cells)
            projected = [noise @ d for d in directions]
    return {name: np.stack(v) for name, v in values.items()}, _points(run, cells, groups, projected)


def _noise(model: Any, guide: Any, cells: EnvironmentDataset) -> FloatArray:
    """``[N, d]`` posterior mean of each cell's noise, with what its perturbation adds; without covariates' effects."""
    parts = []
    device = next(model.parameters()).device
    moved = model.shift is not None and hasattr(model.shift, "moments")
    with isolated():
        for batch in (b.to(device) for b in cells.batches(_CHUNK)):
            z = abduct(guide, batch)[Z]
            if moved:
                z = z + model.shift.moments(batch.r, batch.perturbed)[0][batch.row]
            parts.append(z.double().cpu().numpy())
    return np.concatenate(parts)


def _points(
    run: Run,
    cells: EnvironmentDataset,
    groups: Mapping[str, tuple[list[int], list[float]]],
    projected: Sequence[FloatArray],
) -> pd.DataFrame:
    """Means of a curve's controls and doses, from the controls' mean, with their standard errors.

    A dose of few cells (or wells) is given the spread that all doses of the curve have within themselves.
    """
    labels = [str(n) for n in run.environments.table.index]
    trained = run.environments.table["trained"].to_numpy(dtype=bool)
    rows: list[dict[str, Any]] = []
    for (name, (own, doses)), y in zip(groups.items(), projected, strict=True):
        reference = matched_references(cells, [labels[own[0]]])[0]
        control = y[np.isin(cells.env, reference)]
        told = [(0.0, "controls", control, True)]
        told += [(d, labels[e], y[cells.env == e], bool(trained[e])) for e, d in sorted(zip(own, doses, strict=True))]
        within = sum(float(((v - v.mean()) ** 2).sum()) for _, _, v, _ in told if len(v))
        spread = (within / max(sum(max(len(v) - 1, 0) for _, _, v, _ in told), 1)) ** 0.5
        for dose, label, values, seen in told:
            if len(values):
                own_spread = float(values.std(ddof=1)) if len(values) >= _FEW else spread
                error = own_spread / len(values) ** 0.5
                mean = float(values.mean() - control.mean())
                row = {"perturbation": name, "environment": label, "dose": dose, "mean": mean, "error": error}
                rows.append(row | {"cells": len(values), "trained": seen})
    columns = ["perturbation", "environment", "dose", "mean", "error", "cells", "trained"]
    return pd.DataFrame(rows, columns=columns).sort_values(["perturbation", "dose"], kind="stable", ignore_index=True)


def _hill(points: pd.DataFrame, method: str, seed: int) -> HillPosterior | None:
    """Of the curves with controls and three doses or more."""
    fine = points[points["error"] > 0]
    own = fine.groupby("perturbation")["dose"]
    enough = [n for n, d in own if (d == 0).any() and d[d > 0].nunique() >= 3]
    return fit_hill(fine[fine["perturbation"].isin(enough)], method=method, seed=seed) if enough else None


def _half(doses: FloatArray, values: FloatArray, top: float) -> float:
    """Smallest dose at which a curve reaches half of its value at `top`; NaN where it never does, or is flat."""
    order = np.argsort(doses)
    doses, values = doses[order], values[order]
    positive = doses > 0
    x, y = np.log10(doses[positive]), values[positive]
    if not len(x):
        return float("nan")
    at = float(np.interp(np.log10(top), x, y))
    share = y / at if at else np.zeros_like(y)
    above = np.flatnonzero(share >= 0.5)
    if not len(above) or not at:
        return float("nan")
    i = int(above[0])
    if i == 0:
        return float(10 ** x[0])
    step = (0.5 - share[i - 1]) / (share[i] - share[i - 1])
    return float(10 ** (x[i - 1] + step * (x[i] - x[i - 1])))
