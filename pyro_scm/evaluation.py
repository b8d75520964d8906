"""Models beside simple baselines on unseen environments, and `recovery` of a truth that is known.

The protocol keeps apart what a prediction is made from and what it is scored on:

- the cells of each reference environment are halved: one half is for training and for predicting from, the other only
  for scoring, because the noise of a control that is shared by the predicted and the true change would be scored as
  agreement (a screen in which nothing has an effect would not score 0);
- the cells of each held-out environment are halved: its differential genes are called on one half, against training
  controls, and its true mean is that of the other half;
- what is scored is the change from control: true mean minus the scoring controls' mean against the predicted change.
"""

import importlib.util
import io
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from pyro_scm import checkpoints, metrics, recipes
from pyro_scm.baselines import BASELINES, controls, environment_means, matched_references
from pyro_scm.batch import Batch
from pyro_scm.chance import forked
from pyro_scm.data.dataset import EnvironmentDataset
from pyro_scm.data.single_cell import differential_genes, halves
from pyro_scm.data.splits import Split
from pyro_scm.distributions import NegativeBinomial
from pyro_scm.errors import DataError, ModelError, listing
from pyro_scm.handlers import diagonal
from pyro_scm.infer import fit
from pyro_scm.objectives import Objective
from pyro_scm.query import abduct, embed, isolated, transport
from pyro_scm.run import Environments, Fitted, Run, members
from pyro_scm.sites import X, Z

if TYPE_CHECKING:
    from anndata import AnnData
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["Comparison", "compare", "evaluate", "predict_means", "recovery", "score"]

FloatArray: TypeAlias = NDArray[np.float64]
Genes: TypeAlias = NDArray[np.int64]

LOWER_IS_BETTER = ("rmse", "rmse_deg", "rank", "nll", "reconstruction", "reconstruction_rmse")
"""Metrics of `Comparison`; of all others a larger value is better."""

_COLUMNS = ["model", "kind", "seed", "environment", "metric", "value"]
_CHUNK = 512
_PARTICLES = 4
_SAMPLES = 16
_DRAWS = 20_000  # of a bootstrap whose interval may end at its 0.1 % quantile
_ENOUGH = 6  # environments; with 5, all differences have one sign by chance in 1 of 16 cases, and the bootstrap is sure


# ---------------------------------------------------------------------- predictions
def predict_means(
    run: Fitted, train: EnvironmentDataset, environments: Sequence[str], *, cells: int = 500, seed: int = 0
) -> FloatArray:
    """Control + mean over reference cells of (expression in e - reconstructed expression), each cell's noise held.

    Observed reference cells are put into each environment (`query.transport`), so that a model's error in the control
    cancels. Where x holds counts, the difference is that of E[log1p(x / size * depth) | c], integrated over the counts:
    log1p of expected counts is biased, because the mean of log1p is not log1p of the mean, and counts that are drawn in
    both worlds are noisy. On negative binomial screens with 500 reference cells, whose true change is known, the errors
    (RMSE over genes, root mean square of the change in brackets) of the three were, of integration, expectation and
    drawing: 0.013, 0.021, 0.031 (0.36) at 300 counts a cell and 0.019, 0.025, 0.032 (0.55) at 2000.

    Args:
        run: K members, or (model, guide).
        train: training cells with those references that are put into each environment: of its time and cell line, or
            all.
        environments: names.
        cells: reference cells to use of each set, drawn at random where there are more. Where there are fewer, each is
            used with several draws of its posterior.
        seed: of these draws.

    Returns:
        ``[K, len(environments), G]`` mean normalised expression, at the median library size of `train`.

    Raises:
        DataError: an unknown environment, no reference cells, other genes than the run's, or less than one cell asked
            for.
    """
    if cells < 1:
        raise DataError(f"cells is {cells}: predict from 1 reference cell or more")
    if isinstance(run, Run) and run.schema.genes != train.genes:
        raise DataError(
            f"the run was fitted to {len(run.schema.genes)} genes and the cells have {len(train.genes)}, or others: "
            "give cells with the run's genes in their order"
        )
    sets = matched_references(train, environments)
    depth = train.schema.summary.depth
    table = run.environments if isinstance(run, Run) else Environments.of(train)
    for name in environments:
        table.index(name)  # an unknown name is refused before any work
    several = list(members(run))
    result = np.repeat(controls(train, environments, depth)[None], len(several), axis=0)
    for own in dict.fromkeys(sets):
        asked = [i for i, references in enumerate(sets) if references == own]
        names = [environments[i] for i in asked]
        chosen = _some(train.subset(np.isin(train.env, own)), cells, seed)
        draws = max(1, cells // len(chosen))
        for k, (model, guide) in enumerate(several):
            with isolated(), forked():
                torch.manual_seed(seed + k)
                result[k, asked] += _mean_changes(model, guide, chosen, table, names, depth, draws)
    return result


def _some(cells: EnvironmentDataset, number: int, seed: int) -> EnvironmentDataset:
    """At most `number` of the cells."""
    if len(cells) <= number:
        return cells
    return cells.subset(np.sort(np.random.default_rng(seed).choice(len(cells), number, replace=False)))


def _mean_changes(
    model: Any,
    guide: Any,
    cells: EnvironmentDataset,
    table: Environments,
    environments: Sequence[str],
    depth: float,
    draws: int,
) -> FloatArray:
    """``[len(environments), G]`` mean over cells and draws of the change in each environment."""
    total = np.zeros((len(environments), len(cells.genes)))
    places = [lambda batch, name=name: table.place(batch, name) for name in environments]
    for batch in _batches(model, cells, max(1, _CHUNK // draws)):
        traces = transport(model, guide, batch, places, draws)
        before = _log_expression(next(traces), batch.size, depth)
        for row, trace in zip(total, traces, strict=True):
            change = _log_expression(trace, batch.size, depth) - before
            row += change.double().sum((0, 1)).cpu().numpy()
    return total / (len(cells) * draws)


def _batches(model: Any, cells: EnvironmentDataset, size: int) -> Iterator[Batch]:
    """Mini-batches on the model's device."""
    device = next(model.parameters(), torch.zeros(())).device
    for batch in cells.batches(size):
        yield batch.to(device)


def _log_expression(trace: Any, size: Tensor | None, depth: float) -> Tensor:
    """E[log1p(x / size * depth) | c] where x holds counts, else E[x | c], ``(..., n, G)``."""
    law = diagonal(trace.nodes[X]["fn"])
    if size is None:
        mean: Tensor = law.mean
        return mean
    factor = (depth / size).unsqueeze(-1)
    if isinstance(law, NegativeBinomial):
        return _expected_log1p(law, factor)
    drawn: Tensor = torch.log1p(law.sample((_SAMPLES,)) * factor).mean(0)
    return drawn


def _expected_log1p(law: NegativeBinomial, factor: Tensor) -> Tensor:
    """E[log1p(a x)] = integral over t > 0 of (1 - E[exp(-t a x)]) exp(-t) / t, x ~ NB(mu, theta).

    With the Laplace transform (1 + mu / theta (1 - exp(-t a)))^-theta, and the trapezoidal rule in s = log t, whose
    integrand is analytic and falls off at both ends; where it is a mu exp(s), the rest of the sum is a geometric
    series. Some 20 nodes give 5 decimals.

    Args:
        law: of batch shape ``(..., n, G)``.
        factor: a, ``(n, 1)``.
    """
    theta, odds = law.log_dispersion.exp(), (law.log_mean - law.log_dispersion).exp()
    largest = float((law.log_mean + factor.log()).max())
    first, step = -7.0 - max(largest, 0.0), 0.75
    total = law.mean * factor * (step * math.exp(first) / math.expm1(step))
    for s in np.arange(first, 4.0, step):
        t = math.exp(s)
        missing = -torch.expm1(-theta * torch.log1p(odds * -torch.expm1(-t * factor)))
        total += step * math.exp(-t) * missing
    return total


# ---------------------------------------------------------------------- scores
def score(
    truth: ArrayLike, prediction: ArrayLike, control: ArrayLike, genes: ArrayLike | None = None
) -> dict[str, float]:
    """delta_pearson, delta_r2 and rmse of one environment; of its differential genes too, as ``*_deg``.

    Args:
        truth: ``[G]`` true mean expression.
        prediction: ``[G]`` predicted.
        control: ``[G]`` mean expression of the controls.
        genes: columns of the differential genes; an empty list gives NaN, None leaves these scores out.

    Raises:
        DataError: shapes that differ, or values that are not finite.
    """
    subsets: dict[str, ArrayLike | None] = {"": None}
    if genes is not None:
        subsets["_deg"] = genes
    scores: dict[str, float] = {}
    for suffix, chosen in subsets.items():
        scores[f"delta_pearson{suffix}"] = metrics.delta_pearson(truth, prediction, control, genes=chosen)
        scores[f"delta_r2{suffix}"] = metrics.delta_r2(truth, prediction, control, genes=chosen)
        scores[f"rmse{suffix}"] = metrics.rmse(truth, prediction, genes=chosen)
    return scores


def _cell_scores(model: Any, guide: Any, cells: EnvironmentDataset, total: int, depth: float) -> dict[str, float]:
    """Negative ELBO and reconstruction of held-out cells: a mean over cells, never of cells that a model has seen."""
    objective = Objective()
    sums = dict.fromkeys(("nll", "reconstruction", "squares"), 0.0)
    with isolated(), forked():
        torch.manual_seed(0)
        for batch in _batches(model, cells, _CHUNK):
            batch = replace(batch, total=max(total, len(batch)))  # global sites are shared out over the training cells
            weight = len(batch) / (batch.total * _PARTICLES)
            for _ in range(_PARTICLES):
                terms = objective.terms(objective.world(model.forward, guide.forward, batch))
                sums["nll"] += float(terms.loss()) * weight
                sums["reconstruction"] += float(terms.reconstruction) * weight
            found = _log_expression(next(transport(model, guide, batch, ())), batch.size, depth)
            assert batch.x is not None
            x = batch.x if batch.size is None else torch.log1p(batch.x * (depth / batch.size).unsqueeze(-1))
            sums["squares"] += float((x - found).square().mean(-1).sum())
    return {
        "nll": sums["nll"] / len(cells),
        "reconstruction": sums["reconstruction"] / len(cells),
        "reconstruction_rmse": float(np.sqrt(sums["squares"] / len(cells))),
    }


# ---------------------------------------------------------------------- what is asked, fixed before any model is fitted
@dataclass(frozen=True, eq=False)
class _Task:
    """Held-out environments, and what their predictions are scored on.

    Args:
        train: training cells without the reference cells that are kept for scoring.
        held_out: all cells of the environments.
        environments: E names.
        truth: ``[E, G]`` mean expression.
        control: ``[E, G]`` of the reference cells kept for scoring.
        genes: differential genes of each environment, None where they cannot be called for want of scanpy.
        notes: what a reader of the scores should know.
    """

    train: EnvironmentDataset
    held_out: EnvironmentDataset
    environments: tuple[str, ...]
    truth: FloatArray
    control: FloatArray
    genes: dict[str, Genes] | None
    notes: tuple[str, ...]

    def scores(self, change: FloatArray) -> Iterator[tuple[str, str, float]]:
        """(environment, metric, value) of predicted changes ``[E, G]``."""
        ranks = metrics.perturbation_rank(self.truth - self.control, change)
        for i, name in enumerate(self.environments):
            genes = None if self.genes is None else self.genes.get(name, np.empty(0, np.int64))
            values = score(self.truth[i], self.control[i] + change[i], self.control[i], genes)
            for metric, value in {**values, "rank": float(ranks[i])}.items():
                yield name, metric, value


def _task(split: Split, degs: int, seed: int, references: EnvironmentDataset | None = None) -> _Task:
    names, skipped = _held_out(split)
    if references is None:
        train, kept, shared = _halved_controls(split.train, seed)
    else:
        train, kept, shared = split.train, _other_references(split.train, references), []
    test = split.test.of(*names)
    depth = train.schema.summary.depth
    counts = dict(zip(names, np.bincount(test.env)[test.environment_index(*names)].tolist(), strict=True))
    halved = [name for name in names if counts[name] >= 4]
    first, second = halves(test.of(*halved), seed)
    scored = test.subset(np.isin(_rows(test), _rows(second)) | ~np.isin(test.env, first.env))
    notes = []
    if skipped:
        notes.append(f"not scored, for they have a single cell: {listing(skipped)}")
    if shared:
        notes.append(f"references of one cell, both trained on and scored against: {listing(shared)}")
    genes, lacking = _differential(first, halved, train, degs) if degs else (None, "")
    if genes is not None and len(genes) < len(names):
        few = len(names) - len(genes)
        lacking = f"differential genes need 4 cells and 2 controls: not called in {few} environments"
    return _Task(
        train=train,
        held_out=test,
        environments=tuple(names),
        truth=environment_means(scored, depth)[0][scored.environment_index(*names)],
        control=controls(kept, names, depth),
        genes=genes,
        notes=(*notes, lacking) if lacking else tuple(notes),
    )


def _held_out(split: Split) -> tuple[list[str], list[str]]:
    """Environments with two test cells or more, and those with one."""
    test = split.test
    counts = np.bincount(test.env, minlength=len(test.environments))
    asked = [int(e) for e in test.present if not test.reference[e]]
    names = [str(test.environments.index[e]) for e in asked if counts[e] >= 2]
    if not names:
        raise DataError("no environment has 2 held-out cells or more: hold out more cells, or whole environments")
    trained = set(split.train.present.tolist()) & set(asked)
    if split.combination is not None and trained:
        name = test.environments.index[min(trained)]
        raise DataError(
            f"the split holds out pairs of a perturbation and {split.combination!r}, and environment {str(name)!r} has "
            f"cells on both sides: read the data with cell_line={split.combination!r}, so that each category has "
            "environments of its own"
        )
    return names, [str(test.environments.index[e]) for e in asked if counts[e] < 2]


def _rows(cells: EnvironmentDataset) -> NDArray[np.int64]:
    """What tells cells of one data set apart."""
    return np.arange(len(cells)) if cells.origin is None else cells.origin


def _halved_controls(train: EnvironmentDataset, seed: int) -> tuple[EnvironmentDataset, EnvironmentDataset, list[str]]:
    """Training cells without half of each reference's, that half, and the references of one cell, which are in both."""
    references = train.subset(train.reference[train.env])
    counts = np.bincount(references.env, minlength=len(train.environments))
    names = [str(name) for name in train.environments.index]
    several, single = ([names[e] for e in np.flatnonzero(those)] for those in (counts >= 2, counts == 1))
    if not several:
        return train, references, single
    _, second = halves(references.of(*several), seed)
    out = np.isin(_rows(references), _rows(second))
    alone = counts[references.env] == 1
    return train.subset(~np.isin(_rows(train), _rows(second))), references.subset(out | alone), single


def _other_references(train: EnvironmentDataset, references: EnvironmentDataset) -> EnvironmentDataset:
    """Reference cells that were measured apart from the training cells."""
    kept = references.subset(references.reference[references.env])
    if not len(kept):
        raise DataError("references has no reference cells: give unperturbed cells to score against")
    if np.isin(_rows(kept), _rows(train)).any():
        raise DataError("references are among the training cells: leave them out of the training split")
    return kept


def _differential(
    cells: EnvironmentDataset, names: Sequence[str], train: EnvironmentDataset, top: int
) -> tuple[dict[str, Genes] | None, str]:
    """Differential genes of environments against training controls, or why there are none."""
    if importlib.util.find_spec("scanpy") is None:
        return None, "no scores of differential genes: scanpy is not installed (pyro-scm[single-cell])"
    counts = np.bincount(train.env, minlength=len(train.environments))
    sets = matched_references(train, names)
    called = [name for name, own in zip(names, sets, strict=True) if counts[list(own)].sum() >= 2]
    if not called:
        return {}, ""
    both = _joined(cells.of(*called), train.subset(train.reference[train.env]))
    return differential_genes(both, top=top, environments=called), ""


def _joined(a: EnvironmentDataset, b: EnvironmentDataset) -> EnvironmentDataset:
    """Expression of two sets of cells of one environment table; their annotation is left out."""
    stack: Any = sp.vstack if sp.issparse(a.x) else np.concatenate
    x = stack([a.x, b.x])
    return replace(
        a,
        x=sp.csr_matrix(x) if sp.issparse(a.x) else x,
        env=np.concatenate([a.env, b.env]),
        size=np.concatenate([a.size, b.size]),
        obs=pd.DataFrame(index=np.arange(x.shape[0])),
        covariates={},
        categories={},
        y=None,
        proteins=(),
        origin=None,
    )


# ---------------------------------------------------------------------- the comparison
@dataclass(frozen=True, eq=False)
class Comparison:
    """Scores of models and baselines on the same held-out environments.

    Metrics of each environment: delta_pearson, delta_r2 and rmse of the mean change from control, over all genes and
    (``_deg``) over its differential genes; rank, the share of the other environments' predictions that are nearer to
    its true change (`metrics.perturbation_rank`). Of models alone, in a mean over held-out cells: nll, minus the ELBO,
    and reconstruction, -E_q log p(x | z), both in nats a cell as in `Run.history`; reconstruction_rmse, of normalised
    expression reconstructed from the posterior mean of z. nll and reconstruction compare models of one likelihood only.

    Args:
        scores: columns model, kind (``"baseline"`` or ``"model"``), seed (-1 for a baseline), environment, metric and
            value, NaN where a score is not defined.
        runs: fitted ensembles by the name of the model.
        degs: environment -> columns of its differential genes, for those that have them.
        config: what was compared, with which options, on how many cells and environments, and notes.
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
        """Each model against the best baseline of each metric, in pairs over environments.

        The best baseline is the one of best mean on these same environments, which favours the baselines. The
        difference is that of a model's mean over seeds. Its 95 % interval is a percentile bootstrap over environments
        (`metrics.paired_difference`), expanded for their small number as in Hesterberg, The American Statistician 69,
        371 (2015); it knows nothing of the spread over seeds, nor of the number of tests made.

        Returns:
            Columns model, metric, baseline, difference (model - baseline), lower, upper, environments (in which both
            scores are defined) and verdict: ``"better"``, ``"worse"``, ``"not different"`` where the interval holds 0,
            ``"too few environments"`` below 6, where a bootstrap is sure too easily, or ``"not defined"`` for a model
            without scores, such as the delta_pearson of one that predicts no change.
        """
        means = self.scores.groupby(["metric", "model", "environment"], sort=False)["value"].mean()
        kinds = self.scores.drop_duplicates("model").set_index("model")["kind"]
        rows = []
        for metric in self._metrics():
            table = means.loc[metric].unstack("model").reindex(columns=kinds.index)
            sign = -1.0 if metric in LOWER_IS_BETTER else 1.0
            average = (sign * table[kinds.index[kinds == "baseline"]].mean()).dropna()
            if average.empty:
                continue
            best = str(average.idxmax())
            rows += [
                {"model": model, "metric": metric, "baseline": best} | _difference(table[model], table[best], sign)
                for model in kinds.index[kinds == "model"]
            ]
        columns = ["model", "metric", "baseline", "difference", "lower", "upper", "environments", "verdict"]
        return pd.DataFrame(rows, columns=columns)

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

        Raises:
            CheckpointError: a file cannot be written; none is ever left half written.
        """
        folder = Path(folder)
        checkpoints.write_text(folder / "scores.csv", self.scores.to_csv(index=False))
        checkpoints.write_text(folder / "summary.csv", self.summary().to_csv())
        checkpoints.write_text(folder / "verdict.csv", self.verdict().to_csv(index=False))
        degs = {name: genes.tolist() for name, genes in self.degs.items()}
        checkpoints.write_text(folder / "degs.json", json.dumps(degs))
        checkpoints.write_text(folder / "config.json", json.dumps(self.config, indent=1, default=str))
        picture = io.BytesIO()
        self.figure().savefig(picture, format="png", dpi=150)
        checkpoints.write_bytes(folder / "figure.png", picture.getvalue())
        return folder

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


def _difference(model: "pd.Series[float]", baseline: "pd.Series[float]", sign: float) -> dict[str, Any]:
    both = model.notna() & baseline.notna()
    n = int(both.sum())
    if not n:
        nan = float("nan")
        return {"difference": nan, "lower": nan, "upper": nan, "environments": 0, "verdict": "not defined"}
    pairs = model[both].to_numpy(), baseline[both].to_numpy()
    found = metrics.paired_difference(*pairs, level=_expanded_level(n), draws=_DRAWS, seed=0)
    verdict = "not different"
    if n < _ENOUGH:
        verdict = "too few environments"
    elif found.lower > 0 or found.upper < 0:
        verdict = "better" if sign * found.estimate > 0 else "worse"
    return {
        "difference": found.estimate,
        "lower": found.lower,
        "upper": found.upper,
        "environments": n,
        "verdict": verdict,
    }


def _expanded_level(n: int) -> float:
    """Level at which a percentile bootstrap of n values covers their mean as often as Student's 95 % interval does."""
    from scipy.stats import norm, t

    if n < _ENOUGH:
        return 0.95
    return float(2 * norm.cdf(t.ppf(0.975, n - 1) * np.sqrt(n / (n - 1))) - 1)


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


def compare(
    split: Split,
    models: Sequence[str] | Mapping[str, Mapping[str, Any]],
    *,
    baselines: Sequence[str] = tuple(BASELINES),
    seeds: Sequence[int] = (0, 1, 2),
    references: EnvironmentDataset | None = None,
    degs: int = 50,
    cells: int = 500,
    latent: int | None = None,
    epochs: int = 100,
    seed: int = 0,
    progress: bool | None = None,
    **fit_options: Any,
) -> Comparison:
    """Fit models and baselines to the training cells and score their predictions of the held-out environments.

    See the top of this module for what is kept apart from what: the reference cells kept for scoring are not trained
    on. Scored are the environments with two test cells or more; of those with fewer than four all cells make the truth,
    and no differential genes are called. Models never see a test cell; `split.validation`, where there is one, decides
    which epoch's parameters are kept.

    Args:
        split: of `pyro_scm.data.splits`.
        models: names of recipes, or name -> options of `recipes.make`, with ``"recipe"`` for the recipe where the name
            is a label of your own: ``{"shallow": {"recipe": "vae", "hidden": ()}}``.
        baselines: names in `BASELINES`.
        seeds: of each model's ensemble.
        references: reference cells that are not in training, to score against, for example those of the held-out
            plates; half of the training references by default, which are then not trained on.
        degs: differential genes of each environment; 0 for none.
        cells: reference cells to predict from; see `predict_means`.
        latent: of every model whose options do not say.
        epochs: of the training.
        seed: of the halves and of predictions.
        progress: see `fit`.
        **fit_options: more of `fit`.

    Raises:
        DataError: nothing to score, no reference cells, or environments that are in training and held out by category.
        ModelError: an unknown model, baseline or option.
        TrainingError: see `fit`.
    """
    made = _options(models, latent)
    _check_names(made, baselines)
    task = _task(split, degs, seed, references)
    programs = {n: recipes.make(recipe, task.train.schema, **options) for n, (recipe, options) in made.items()}
    rows = _baseline_rows(task, baselines)
    runs = {}
    for name, (model, guide) in programs.items():
        recipe = recipes.recipe(made[name][0])
        own = {"objective": recipes.objective(made[name][0], model, task.train), "critic_steps": recipe.critic_steps}
        settings = {"seeds": seeds, "epochs": epochs, "progress": progress, **own, **fit_options}
        runs[name] = fit(model, guide, task.train, validation=split.validation, **settings)
        rows += [(name, "model", *found) for found in _model_scores(runs[name], task, _before(task), cells, seed)]
    described = {name: {"recipe": recipe, **options} for name, (recipe, options) in made.items()}
    training = {"seeds": list(seeds), "epochs": epochs, **fit_options}
    config = _config(split, task, described, training, baselines, degs, cells, seed)
    return Comparison(pd.DataFrame(rows, columns=_COLUMNS), runs, task.genes or {}, config)


def evaluate(
    runs: Mapping[str, Run],
    split: Split,
    *,
    baselines: Sequence[str] = tuple(BASELINES),
    degs: int = 50,
    cells: int = 500,
    seed: int = 0,
) -> Comparison:
    """Score runs that are fitted already beside baselines, as `compare` does.

    A run that was fitted to all of `split.train` has also seen the reference cells that `compare` keeps for scoring:
    what it learnt of their noise may flatter it, if there are few of them. Whether it has seen the held-out
    environments is for the caller to say (`run.environments.table["trained"]`).

    Args:
        runs: by the name to give them.
        split: of cells with the runs' genes and environments.
        baselines: names in `BASELINES`; fitted here.
        degs: differential genes of each environment; 0 for none.
        cells: reference cells to predict from; see `predict_means`.
        seed: of the halves and of predictions.

    Raises:
        DataError: see `compare`; or cells of other genes or environments than a run's.
        ModelError: an unknown baseline.
    """
    _check_names(runs, baselines)
    task = _task(split, degs, seed)
    rows = _baseline_rows(task, baselines)
    for name, run in runs.items():
        rows += [(name, "model", *found) for found in _model_scores(run, task, _before(task), cells, seed)]
    described = {name: dict(getattr(run.model, "spec", None) or {}) for name, run in runs.items()}
    training = {name: {"seeds": list(run.seeds), **asdict(run.settings)} for name, run in runs.items()}
    config = _config(split, task, described, training, baselines, degs, cells, seed)
    return Comparison(pd.DataFrame(rows, columns=_COLUMNS), dict(runs), task.genes or {}, config)


def _check_names(models: Iterable[str], baselines: Sequence[str]) -> None:
    unknown = [name for name in baselines if name not in BASELINES]
    if unknown:
        raise ModelError(f"unknown baseline {listing(unknown)}: use some of {', '.join(BASELINES)}")
    both = [name for name in models if name in baselines]
    if both:
        raise ModelError(f"{listing(both)} names a model and a baseline: rename the model")


def _before(task: _Task) -> FloatArray:
    """``[E, G]`` control that predictions start from."""
    return controls(task.train, task.environments, task.train.schema.summary.depth)


def _baseline_rows(task: _Task, baselines: Sequence[str]) -> list[tuple[str, str, int, str, str, float]]:
    """Rows of `Comparison.scores`."""
    rows: list[tuple[str, str, int, str, str, float]] = []
    for name in baselines:
        change = BASELINES[name]().fit(task.train).predict(task.environments) - _before(task)
        rows += [(name, "baseline", -1, *found) for found in task.scores(change)]
    return rows


def _options(
    models: Sequence[str] | Mapping[str, Mapping[str, Any]], latent: int | None
) -> dict[str, tuple[str, dict[str, Any]]]:
    """Label -> recipe and options."""
    if isinstance(models, str):
        models = [models]
    given = models if isinstance(models, Mapping) else {name: {} for name in models}
    made = {}
    for name, own in given.items():
        options = {"latent": latent, **own} if latent is not None else dict(own)
        made[name] = (str(options.pop("recipe", name)), options)
    return made


def _model_scores(
    run: Run, task: _Task, before: FloatArray, cells: int, seed: int
) -> Iterator[tuple[int, str, str, float]]:
    """(seed, environment, metric, value) of every member."""
    depth = task.train.schema.summary.depth
    predicted = predict_means(run, task.train, task.environments, cells=cells, seed=seed)
    for own, means, (model, guide) in zip(run.seeds, predicted, members(run), strict=True):
        for found in task.scores(means - before):
            yield own, *found
        for name in task.environments:
            for metric, value in _cell_scores(model, guide, task.held_out.of(name), len(task.train), depth).items():
                yield own, name, metric, value


def _config(
    split: Split,
    task: _Task,
    models: Mapping[str, Mapping[str, Any]],
    training: Mapping[str, Any],
    baselines: Sequence[str],
    degs: int,
    cells: int,
    seed: int,
) -> dict[str, Any]:
    """What `save` writes beside the scores."""
    from importlib.metadata import version

    return {
        "models": dict(models),
        "training": dict(training),
        "baselines": list(baselines),
        "degs": degs if task.genes is not None else 0,
        "predicted_from": cells,
        "seed": seed,
        "environments": list(task.environments),
        "cells": {
            "training": len(task.train),
            "controls kept for scoring": len(split.train) - len(task.train),
            "validation": 0 if split.validation is None else len(split.validation),
            "held out": len(task.held_out),
        },
        "genes": len(task.train.genes),
        "library_size": task.train.schema.summary.depth,
        "notes": list(task.notes),
        "versions": {name: version(name) for name in ("pyro-scm", "torch", "pyro-ppl", "numpy")},
    }


# ---------------------------------------------------------------------- recovery of a known truth
def recovery(run: Run, cells: EnvironmentDataset, adata: "AnnData") -> pd.DataFrame:
    """How well each member finds the latents of a synthetic screen.

    The noise z of a member is taken with the shift of its environment, as the truth's is, so that models that shift z
    in the prior and after it are scored alike. The effect of an environment is the mean of its z minus that of the
    reference.

    Args:
        run: fitted to cells of the screen.
        cells: of `synthetic.dataset`, or a part of them, with some of the reference.
        adata: of `synthetic.simulate`.

    Returns:
        One row a member, with its seed; mcc_z, mcc_c (Pearson, matched one to one), linear_r2_z, linear_r2_c (affine);
        target_precision, target_recall, target_f1 of the effects (see `metrics.target_scores`); and concentration, the
        mean over environments of `metrics.effect_concentration`, in standard deviations of the reference cells' z.

    Raises:
        DataError: cells or a screen that the truth is not known of, or no cells of the reference or any other
            environment.
    """
    true, targets = _truth(cells, adata)
    found = embed(run, cells)
    present = cells.present
    perturbed = present[~cells.reference[present]]
    if len(perturbed) == len(present) or not len(perturbed):
        raise DataError("recovery needs cells of the reference and of another environment: give more of the cells")
    rows = []
    for k, (model, guide) in enumerate(members(run)):
        z, scale = _noise(model, guide, cells, found["z"][k])
        means = np.stack([z[cells.env == e].mean(axis=0) for e in perturbed])
        effects = means - z[cells.reference[cells.env]].mean(axis=0)
        matched, causes = metrics.mcc(true["z"], z), metrics.mcc(true["c"], found["c"][k])
        detected = metrics.target_scores(targets[perturbed], effects, matched.permutation)
        rows.append(
            {
                "seed": run.seeds[k],
                "mcc_z": matched.score,
                "mcc_c": causes.score,
                "linear_r2_z": metrics.linear_r2(true["z"], z),
                "linear_r2_c": metrics.linear_r2(true["c"], found["c"][k]),
                "target_precision": detected.precision,
                "target_recall": detected.recall,
                "target_f1": detected.f1,
                "concentration": float(np.nanmean(metrics.effect_concentration(effects, scale=scale))),
            }
        )
    return pd.DataFrame(rows)


def _truth(cells: EnvironmentDataset, adata: "AnnData") -> tuple[dict[str, FloatArray], NDArray[np.bool_]]:
    """True z and c of the cells, and the targets ``[E, d]`` in the order of their environment table."""
    if "truth" not in adata.uns or "z" not in adata.obsm:
        raise DataError("this AnnData has no uns['truth']: recovery is scored on a screen made by `simulate`")
    rows = adata.obs_names.get_indexer(pd.Index(cells.cells))
    if (rows < 0).any():
        unknown = [name for name, row in zip(cells.cells, rows, strict=True) if row < 0]
        raise DataError(f"{listing(unknown)} are not cells of this screen: give the screen that they come from")
    order = [str(name) for name in adata.obs["perturbation"].cat.categories]
    own = [order.index(str(name)) for name in cells.environments["perturbation"]]
    return {name: np.asarray(adata.obsm[name], np.float64)[rows] for name in ("z", "c")}, np.asarray(
        adata.uns["truth"]["targets"], dtype=bool
    )[own]


def _noise(model: Any, guide: Any, cells: EnvironmentDataset, z: NDArray[np.float32]) -> tuple[FloatArray, FloatArray]:
    """Noise with the shift of each cell's environment, and the standard deviation of posterior draws in the reference.

    Draws, because the posterior means of a latent that the model does not use vary by next to nothing.
    """
    total = z.astype(np.float64)
    with isolated(), forked():
        torch.manual_seed(0)
        if model.shift is not None:
            shifts = [model.shift(batch).cpu().numpy() for batch in _batches(model, cells, _CHUNK)]
            total += np.concatenate(shifts)
        references = cells.subset(cells.reference[cells.env])
        drawn = [abduct(guide, batch, 1)[Z][0].cpu().numpy() for batch in _batches(model, references, _CHUNK)]
    scale = np.concatenate(drawn).astype(np.float64).std(axis=0)
    return total, np.where(scale > 0, scale, 1.0)
