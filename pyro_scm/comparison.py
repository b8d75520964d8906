"""Scores of models and simple baselines on the same held-out environments: tables, verdicts, figure, files."""

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from pyro_scm import checkpoints, gate
from pyro_scm.gate import Units
from pyro_scm.run import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["COLUMNS", "Comparison"]

FloatArray: TypeAlias = NDArray[np.float64]
Genes: TypeAlias = NDArray[np.int64]

COLUMNS = ["model", "kind", "seed", "environment", "metric", "value"]
"""Of `Comparison.scores`."""


@dataclass(frozen=True, eq=False)
class Comparison:
    """Scores of models and baselines on the same held-out environments.

    Metrics of each environment: delta_pearson, delta_r2, rmse and mae of the mean change from control, and r2 and
    squared_pearson of the mean itself (which flatter all), over all genes and (``_deg``) over its differential genes;
    deg_recall, the share of these genes among as many of largest predicted change; rank, the share of the other
    environments' predictions that are nearer to its true change (`metrics.perturbation_rank`); discrimination, which
    ranks the true changes by their L1 distance from its prediction, without the genes that the perturbation is named
    for (`metrics.discrimination`). Where cells were drawn: energy_distance, mmd and variance_r2. Of models alone, in a
    mean over held-out cells: nll, minus the ELBO, and reconstruction, -E_q log p(x | z), both in nats a cell as in
    `Run.history`; reconstruction_rmse, of normalised expression reconstructed from the posterior mean of z. nll and
    reconstruction compare models of one likelihood only.

    Args:
        scores: columns model, kind (``"baseline"`` or ``"model"``), seed (-1 for a baseline), environment, metric and
            value, NaN where a score is not defined.
        runs: fitted ensembles by the name of the model.
        degs: environment -> columns of its differential genes, for those that have them.
        config: what was compared, with which options, on how many cells and environments; leaks and notes; and units,
            the parts of each environment's perturbation, which verdicts need.
    """

    scores: pd.DataFrame
    runs: dict[str, Run] = field(default_factory=dict)
    degs: dict[str, Genes] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)

    def summary(self, metrics: Sequence[str] | None = None) -> pd.DataFrame:
        """One row a model, baselines first.

        Args:
            metrics: to show; all by default.

        Returns:
            Columns kind, seeds (0 for a baseline) and environments, then for each metric: the median over seeds of the
            mean over environments, ``_sd``, ``_min`` and ``_max`` over seeds, and ``_n``, the number of environments in
            which the score is defined.
        """
        rows = []
        for model, own in self._by_model():
            kind = str(own["kind"].iloc[0])
            seeds = 0 if kind == "baseline" else own["seed"].nunique()
            row: dict[str, Any] = {"model": model, "kind": kind, "seeds": seeds}
            row["environments"] = own["environment"].nunique()
            for metric in self._metrics() if metrics is None else metrics:
                row |= _spread(metric, own[own["metric"] == metric])
            rows.append(row)
        return pd.DataFrame(rows).set_index("model")

    def brief(
        self, metrics: Sequence[str] = ("delta_pearson", "delta_r2", "delta_pearson_deg", "rank")
    ) -> pd.DataFrame:
        """`summary` for reading: one row a model, each metric as "median ± sd over seeds"; a dash where undefined.

        Args:
            metrics: to show, those of them that were scored.
        """
        chosen = [m for m in metrics if m in self._metrics()]
        table = self.summary(chosen)
        shown = table[["seeds", "environments"]].astype(str)
        for metric in chosen:
            pairs = zip(table[metric], table[f"{metric}_sd"], strict=True)
            shown[metric] = [
                "–" if np.isnan(v) else f"{v:.3f}" + ("" if np.isnan(s) else f" ± {s:.3f}") for v, s in pairs
            ]
        return shown

    def verdict(self) -> pd.DataFrame:
        """Each model against the best baseline of each metric: `gate.against_best`.

        Returns:
            Columns model, metric, baseline, difference (model - baseline), lower, upper, environments (in which both
            scores are defined) and verdict: ``"better"``, ``"worse"``, ``"not different"`` where the interval holds 0,
            ``"too few environments"`` below 6, where a bootstrap is sure too easily, or ``"not defined"`` for a model
            without scores, such as the delta_pearson of one that predicts no change.
        """
        return gate.against_best(self.scores, units=self._units())

    def differences(self, metric: str = "delta_pearson") -> pd.DataFrame:
        """Each model against each baseline on one metric: `gate.differences`."""
        return gate.differences(self.scores, metric=metric, units=self._units())

    def gate(self, metric: str = "delta_pearson") -> pd.DataFrame:
        """Is a model better than every simple baseline? One row a model: `gate.verdicts`.

        Args:
            metric: to judge by.

        Raises:
            DataError: no baseline was scored by the metric.
        """
        return gate.verdicts(self.scores, metric=metric, units=self._units())

    def figure(self) -> "Figure":
        """delta_pearson and delta_r2 of every model: its seeds as points, their median as a line, baselines on top.

        The best baseline is drawn through; a score below -1 stands at the left edge, with its number.
        """
        from matplotlib.figure import Figure

        models = self._by_model()
        environments = self.scores["environment"].nunique()
        figure = Figure(figsize=(10, 1.2 + 0.36 * len(models)), layout="constrained")
        for axes, metric in zip(figure.subplots(1, 2, sharey=True), ("delta_pearson", "delta_r2"), strict=True):
            left, best = 0.0, -np.inf
            for y, (_, own) in enumerate(models):
                values = own[own["metric"] == metric].groupby("seed")["value"].mean().dropna().to_numpy()
                baseline = own["kind"].iloc[0] == "baseline"
                _draw(axes, y, values, "#6e7781" if baseline else "#1f5fa8")
                left = min([left, *values])
                best = max([best, *values]) if baseline else best
            if np.isfinite(best):
                axes.axvline(max(best, -1.0), color="#6e7781", linewidth=0.8, linestyle=(0, (4, 3)), zorder=0)
            axes.set(yticks=range(len(models)), yticklabels=[name for name, _ in models])
            axes.set(xlim=(max(left, -1.0) - 0.05, 1.02), ylim=(len(models) - 0.4, -0.6))
            axes.set_xlabel(f"{metric}, mean over {environments} held-out environments")
            axes.grid(axis="x", color="#e6e9ed")
            axes.set_axisbelow(True)
            axes.spines[["top", "right", "left"]].set_visible(False)
            axes.tick_params(left=False)
        return figure

    def save(self, folder: str | Path) -> Path:
        """Write scores.csv, summary.csv, verdict.csv, degs.json, config.json and figure.png; return the folder.

        And, where baselines were scored by delta_pearson, gate.csv and differences.csv.

        Raises:
            CheckpointError: a file cannot be written; none is ever left half written.
        """
        folder = Path(folder)
        checkpoints.write_text(folder / "scores.csv", self.scores.to_csv(index=False))
        checkpoints.write_text(folder / "summary.csv", self.summary().to_csv())
        checkpoints.write_text(folder / "verdict.csv", self.verdict().to_csv(index=False))
        if self._judged():
            checkpoints.write_text(folder / "gate.csv", self.gate().to_csv(index=False))
            checkpoints.write_text(folder / "differences.csv", self.differences().to_csv(index=False))
        degs = {name: genes.tolist() for name, genes in self.degs.items()}
        checkpoints.write_text(folder / "degs.json", json.dumps(degs))
        checkpoints.write_text(folder / "config.json", json.dumps(self.config, indent=1, default=str))
        picture = io.BytesIO()
        self.figure().savefig(picture, format="png", dpi=150)
        checkpoints.write_bytes(folder / "figure.png", picture.getvalue())
        return folder

    def _judged(self) -> bool:
        """Whether there are baselines with the metric of the gate."""
        return bool(((self.scores["kind"] == "baseline") & (self.scores["metric"] == "delta_pearson")).any())

    def _units(self) -> Units | None:
        units: Units | None = self.config.get("units")
        return units

    def _by_model(self) -> list[tuple[str, pd.DataFrame]]:
        """Scores of each model, baselines first."""
        groups = [(str(model), own) for model, own in self.scores.groupby("model", sort=False)]
        return sorted(groups, key=lambda group: str(group[1]["kind"].iloc[0]) != "baseline")

    def _metrics(self) -> list[str]:
        return [str(metric) for metric in self.scores["metric"].unique()]


def _spread(metric: str, scores: pd.DataFrame) -> dict[str, float]:
    """Statistics of one model's scores of one metric; see `Comparison.summary`."""
    means = scores.groupby("seed")["value"].mean().dropna()
    defined = scores.loc[scores["value"].notna(), "environment"].nunique()
    return {
        metric: float(means.median()) if len(means) else float("nan"),
        f"{metric}_sd": float(means.std()),
        f"{metric}_min": float(means.min()),
        f"{metric}_max": float(means.max()),
        f"{metric}_n": defined,
    }


def _draw(axes: "Axes", y: int, values: FloatArray, colour: str) -> None:
    """One row of the figure."""
    if not len(values):
        place = axes.get_yaxis_transform()
        axes.text(0.02, y, "not defined", va="center", fontsize="small", color=colour, transform=place)
        return
    shown, middle = np.maximum(values, -1.0), float(np.median(values))
    axes.plot(shown, np.full(len(shown), y), "o", color=colour, alpha=0.7, markersize=6, markeredgewidth=0)
    axes.plot([max(middle, -1.0)] * 2, [y - 0.28, y + 0.28], color=colour, linewidth=2)
    if middle < -1:
        axes.text(-0.96, y, f"{middle:.2g}", va="center", fontsize="small", color=colour)
