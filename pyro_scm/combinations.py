"""`interactions`: what combinations do beyond the sum of their parts, as predicted, and as observed where measured.

With changes from control D of a combination of parts p and S = sum_p D_p:

    synergy = <D - S, S> / <S, S>       0 additive, above it more than additive, below it less (-1: no change at all)
    deviation = |D - S| / |S|           any departure from the sum, also in other genes; 0 additive
    D = sum_p w_p D_p + rest            least squares: `weight` is |w| / sqrt(number of parts), `fit` its R^2 about 0

as in Norman et al., Science 2019 ("Exploring genetic interaction manifolds constructed from rich single-cell
phenotypes"), whose magnitude is |w| without the division: 1 here for an additive combination. Of one gene, synergy is
not divided: D - S, in the unit of expression.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from pyro_scm.baselines import controls, matched_references
from pyro_scm.composition import Columns
from pyro_scm.conditions import SEPARATOR, alone_at, entered, novelty, part_doses, singles
from pyro_scm.conditions import parts as parts_of
from pyro_scm.data.dataset import EnvironmentDataset
from pyro_scm.errors import DataError, listing, nearest
from pyro_scm.mean_predictions import predict_means
from pyro_scm.run import Run

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Interactions", "interactions", "scores"]

FloatArray: TypeAlias = NDArray[np.float64]

ALL = "all"
_MEASURES = ("synergy", "deviation", "weight", "fit")
_MOST = 2000  # conditions of a matrix
_ALONE = " alone for "


def scores(moments: FloatArray) -> dict[str, FloatArray]:
    """Synergy, deviation, weight and fit.

    Args:
        moments: ``[..., 1 + P, 1 + P]`` scalar products of the changes of a combination and of its P parts.

    Returns:
        ``[...]`` each; NaN where the parts together change nothing.
    """
    whole, cross, gram = moments[..., 0, 0], moments[..., 0, 1:], moments[..., 1:, 1:]
    size, along = gram.sum((-1, -2)), cross.sum(-1)
    size = np.where(size > 0, size, np.nan)
    weights = (np.linalg.pinv(gram, rcond=1e-9, hermitian=True) @ cross[..., None])[..., 0]
    explained = (weights * cross).sum(-1)
    return {
        "synergy": along / size - 1,
        "deviation": np.sqrt(np.maximum(whole - 2 * along + size, 0) / size),
        "weight": np.sqrt((weights**2).mean(-1)),
        "fit": explained / np.where(whole > 0, whole, np.nan),
    }


@dataclass(frozen=True, eq=False)
class Interactions:
    """Scores of combinations.

    Args:
        scores: one row a combination: parts, trained, then each measure as predicted (mean over members and draws) with
            ``_low`` and ``_high``, and as ``observed_`` with bootstrap intervals over cells, NaN where the combination
            or a part of it was not measured, or the parts' sum cannot be told from noise; and warning (see
            `conditions.novelty`; and parts that were never trained on alone).
        gene: whose synergy it is, in the unit of expression; None for all genes together.
        level: of the intervals.
    """

    scores: pd.DataFrame
    gene: str | None
    level: float

    def matrix(self, measure: str = "synergy", observed: bool = False) -> pd.DataFrame:
        """Parts against parts, of the combinations of two; NaN where nothing is known.

        Several doses of a pair are averaged.

        Args:
            measure: of `scores`.
            observed: those observed instead of the predicted.

        Raises:
            DataError: no such measure, or no combination of two.
        """
        column = f"observed_{measure}" if observed else measure
        if column not in self.scores:
            known = [m for m in _MEASURES if m in self.scores]
            raise DataError(f"no measure {measure!r}: there are {listing(known)}")
        pairs = [str(p).split(SEPARATOR) for p in self.scores["parts"]]
        of_two = [i for i, pair in enumerate(pairs) if len(pair) == 2]
        if not of_two:
            raise DataError("no combination of two parts: a matrix shows pairs")
        names = sorted({part for i in of_two for part in pairs[i]})
        both = pd.DataFrame(
            [(*order, self.scores[column].iloc[i]) for i in of_two for order in (pairs[i], pairs[i][::-1])],
            columns=["a", "b", "value"],
        )
        table = both.groupby(["a", "b"])["value"].mean().unstack("b")
        return table.reindex(index=names, columns=names)

    def figure(self, measure: str = "synergy") -> "Figure":
        """The matrix, predicted above its diagonal and observed below it, and one against the other.

        Args:
            measure: of `scores`.
        """
        from matplotlib.figure import Figure

        predicted, observed = self.matrix(measure), self.matrix(measure, observed=True)
        names = list(predicted.index)
        above = np.triu(np.ones(predicted.shape, dtype=bool), 1)
        shown = np.where(above, predicted.to_numpy(), np.where(above.T, observed.to_numpy(), np.nan))
        both = self.scores.dropna(subset=[measure, f"observed_{measure}"])
        side = min(3 + 0.2 * len(names), 12)
        figure = Figure(figsize=(side + 1 + (4 if len(both) else 0), max(side, 4)), layout="constrained")
        panels = figure.subplots(1, 2 if len(both) else 1, squeeze=False)[0]
        bound = float(np.nanmax(np.abs(shown))) if np.isfinite(shown).any() else 1.0
        signed = measure == "synergy"
        limits: dict[str, Any] = {"cmap": "RdBu_r", "vmin": -bound, "vmax": bound} if signed else {"vmin": 0}
        image = panels[0].imshow(np.ma.masked_invalid(shown), interpolation="nearest", **limits)
        panels[0].set_facecolor("#eef0f2")
        step = max(1, len(names) // 60)
        panels[0].set_xticks(range(0, len(names), step), names[::step], rotation=90, fontsize=7)
        panels[0].set_yticks(range(0, len(names), step), names[::step], fontsize=7)
        title = measure if self.gene is None else f"{self.gene} beyond the sum"
        panels[0].set_title(f"{title}\npredicted above, observed below the diagonal", fontsize=9)
        figure.colorbar(image, ax=panels[0], shrink=0.7)
        if len(both):
            self._against(panels[1], both, measure)
        return figure

    plot = figure

    def _against(self, axes: Any, both: pd.DataFrame, measure: str) -> None:
        x, y = both[f"observed_{measure}"], both[measure]
        for trained, face in ((True, "#1f5fa8"), (False, "white")):
            own = (both["trained"] == trained).to_numpy()
            if not own.any():
                continue
            gaps = [
                np.abs(np.nan_to_num(np.stack([v - both[f"{c}_low"], both[f"{c}_high"] - v]))[:, own])
                for c, v in ((f"observed_{measure}", x), (measure, y))
            ]
            axes.errorbar(
                x[own], y[own], xerr=gaps[0], yerr=gaps[1], fmt="o", color="#1f5fa8", markerfacecolor=face,
                ecolor="#b6c4d6", markersize=5, linewidth=0.8, label="trained on" if trained else "held out",
            )  # fmt: skip
        ends = [min(x.min(), y.min()), max(x.max(), y.max())]
        axes.plot(ends, ends, color="#6e7781", linewidth=0.8, linestyle=(0, (4, 3)))
        axes.set(xlabel=f"observed {measure}", ylabel=f"predicted {measure}")
        axes.legend(frameon=False, fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)


def interactions(
    run: Run,
    cells: EnvironmentDataset,
    combinations: str | Sequence[str] | None = None,
    *,
    amounts: Mapping[str, float] | None = None,
    gene: str | None = None,
    references: int = 200,
    draws: int = 1,
    bootstraps: int = 200,
    level: float = 0.9,
    seed: int = 0,
) -> Interactions:
    """Predicted combinations against the predicted sum of their parts, and the same of observed cells.

    All changes of a member are predicted from the same cells with the same noise. Observed scores are made from scalar
    products of changes of means, less what the cells' noise adds to these, by the bootstrap. Additivity is that of
    log-normalised expression where x holds counts.

    Args:
        run: from `fit` or `load`.
        cells: with the run's environments: references to predict from, and observed cells, held-out ones too.
        combinations: names of environments; all combinations of the table by default; or ``"all"`` pairs of the named
            perturbations of the representation, at `amounts`.
        amounts: perturbation -> amount in the representation's unit, for ``"all"``; by default the largest that it has
            alone in the table.
        gene: to look at alone.
        references: cells to predict from.
        draws: S of the posterior of each member, each with latents and global sites drawn anew.
        bootstraps: resamples of observed cells.
        level: of all intervals.
        seed: of cells, draws and resamples.

    Raises:
        DataError: an unknown environment or gene, one that is no combination, a part that nothing describes, no
            references, or no combinations.
    """
    if gene is not None and gene not in cells.genes:
        raise DataError(f"no gene {gene!r}: did you mean {listing(nearest(gene, cells.genes))}?")
    if min(draws, references, bootstraps) < 1:
        raise DataError(f"draws {draws}, references {references}, bootstraps {bootstraps}: give 1 or more of each")
    table = run.environments.table
    conditions: dict[str, tuple[str, Any]] = {}
    parts: dict[str, tuple[str, ...]] = {}
    if combinations == ALL:
        conditions, parts = _pairs(run, amounts or {})
    else:
        given = [combinations] if isinstance(combinations, str) else combinations
        for name in _combinations(run) if given is None else given:
            alone = singles(run, name)
            parts[name] = tuple(alone)
            conditions |= {f"{part}{_ALONE}{name}": (name, r) for part, r in alone.items()}
    wide, known = entered(run, cells, conditions)
    asked = [*dict.fromkeys([*(n for n in parts if n not in conditions), *conditions])]
    before = controls(known, asked, known.schema.summary.depth)
    change = np.concatenate(
        [predict_means(wide, known, asked, cells=references, seed=seed + 1000 * s) - before for s in range(draws)]
    )  # [S * K, Q, G]
    column = {name: q for q, name in enumerate(asked)}
    chosen = np.arange(change.shape[2]) if gene is None else np.array([cells.genes.index(gene)])
    news = novelty(wide, list(parts))["warning"] if parts else pd.Series(dtype=object)
    seen_in = table["trained"].to_numpy(dtype=bool)
    trained_alone = {p[0] for p, used in zip(parts_of(table), seen_in, strict=True) if used and len(p) == 1}
    observed = _Observed(cells, chosen, bootstraps, seed)
    rows = []
    for name, own in parts.items():
        asked_for = [column[name], *(column[_part_name(name, part, conditions)] for part in own)]
        found = _measured(change[:, asked_for][:, :, chosen], gene)
        in_table = name in table.index
        row: dict[str, Any] = {"combination": name, "parts": SEPARATOR.join(own)}
        row["trained"] = in_table and bool(table["trained"].iloc[run.environments.index(name)])
        several = change.shape[0] > 1
        for measure, values in found.items():
            row |= _interval(measure, values, float(values.mean()), level, several)
        changes = observed.changes(name, own) if in_table else None
        seen = None if changes is None else _measured(changes, gene, resampled=True)
        for measure in found:
            drawn = np.full(2, np.nan) if seen is None or not np.isfinite(seen[measure]).all() else seen[measure]
            row |= _interval(f"observed_{measure}", drawn[1:], float(drawn[0]), level, True)
        lonely = [part for part in own if part not in trained_alone]
        said = [str(news[name])] if news[name] else []
        said += [f"never trained on alone: {listing(lonely)}"] if lonely else []
        rows.append(row | {"warning": "; ".join(said)})
    return Interactions(pd.DataFrame(rows).set_index("combination"), gene, level)


def _part_name(combination: str, part: str, conditions: Mapping[str, Any]) -> str:
    own = f"{part}{_ALONE}{combination}"
    return own if own in conditions else f"{part}{_ALONE}pairs"


def _measured(changes: FloatArray, gene: str | None, resampled: bool = False) -> dict[str, FloatArray]:
    """Scores of changes ``[N, 1 + P, G]``; `resampled`: the first as observed, the others of resamples of the cells."""
    if gene is not None:
        return {"synergy": (changes[:, 0] - changes[:, 1:].sum(1))[..., 0]}
    moments = changes @ changes.swapaxes(1, 2)
    if resampled:  # a resample has the noise of the cells and, once more, that of drawing from them
        away = changes[1:] - changes[0]
        noise = (away @ away.swapaxes(1, 2)).mean(0)
        moments = moments - np.where(np.arange(len(moments)) > 0, 2, 1)[:, None, None] * noise
    return scores(moments)


def _interval(name: str, values: FloatArray, middle: float, level: float, several: bool) -> dict[str, float]:
    ends = [np.nan, np.nan]
    if several and len(values) and np.isfinite(values).all():
        ends = list(np.quantile(values, [(1 - level) / 2, (1 + level) / 2]))
    return {name: middle, f"{name}_low": float(ends[0]), f"{name}_high": float(ends[1])}


def _combinations(run: Run) -> list[str]:
    table = run.environments.table
    found = [str(label) for label, own in zip(table.index, parts_of(table), strict=True) if len(own) > 1]
    if not found:
        raise DataError("no combinations such as 'A+B' in the run's table: ask for combinations='all', or name some")
    return found


def _pairs(run: Run, amounts: Mapping[str, float]) -> tuple[dict[str, tuple[str, Any]], dict[str, tuple[str, ...]]]:
    """Every pair of named perturbations and every one alone, as conditions."""
    columns = Columns.of(run.schema)
    table, representation = run.environments.table, run.environments.representation
    unknown = [n for n in amounts if n not in columns.perturbations]
    if not columns.perturbations or unknown:
        what = f"there is no {listing(unknown)}" if unknown else "the representation names no perturbations"
        raise DataError(f"{what}: pairs need 'multi-dose' or 'multi-hot', which hold an amount of each perturbation")
    every = list(columns.perturbations.values())
    largest: dict[str, tuple[str, NDArray[np.float32]]] = {}
    for label, r, reference in zip(table.index, representation, table["is_reference"], strict=True):
        used = [n for n, i in columns.perturbations.items() if r[i] != 0]
        if not reference and len(used) == 1:
            i = columns.perturbations[used[0]]
            if used[0] not in largest or r[i] > largest[used[0]][1][i]:
                largest[used[0]] = (str(label), r)
    names = [n for n in columns.perturbations if n in largest and (not amounts or n in amounts)]
    total = len(names) * (len(names) - 1) // 2
    if len(names) < 2 or total > _MOST:
        raise DataError(
            f"{total} pairs of {len(names)} perturbations: there must be 1 to {_MOST}; choose some with amounts="
        )
    conditions: dict[str, tuple[str, Any]] = {}
    parts: dict[str, tuple[str, ...]] = {}
    for name in names:
        label, r = largest[name]
        alone = r.copy()
        alone[columns.perturbations[name]] = amounts.get(name, float(r[columns.perturbations[name]]))
        conditions[f"{name}{_ALONE}pairs"] = (label, alone)
    for k, a in enumerate(names):
        for b in names[k + 1 :]:
            both = conditions[f"{a}{_ALONE}pairs"][1].copy()
            both[every] += conditions[f"{b}{_ALONE}pairs"][1][every]
            name = f"{a}{SEPARATOR}{b} predicted"
            conditions[name] = (largest[a][0], both)
            parts[name] = (a, b)
    return conditions, parts


class _Observed:
    """Mean changes of measured conditions and their bootstrap resamples."""

    def __init__(self, cells: EnvironmentDataset, genes: NDArray[np.int64], bootstraps: int, seed: int) -> None:
        self.cells, self.genes, self.bootstraps = cells, genes, bootstraps
        self.rng = np.random.default_rng(seed)
        self.depth = cells.schema.summary.depth
        self.means: dict[tuple[int, ...], FloatArray] = {}
        self.number = np.bincount(cells.env, minlength=len(cells.environments))

    def mean(self, environments: tuple[int, ...]) -> FloatArray:
        """``[1 + B, G]``: of the cells, then of resamples of them."""
        if environments not in self.means:
            part = self.cells.subset(np.isin(self.cells.env, environments))
            x: Any = part.normalised(self.depth)[:, self.genes]
            n = len(part)
            weights = np.concatenate(
                [np.ones((1, n)), self.rng.multinomial(n, np.full(n, 1 / n), size=self.bootstraps)]
            )
            self.means[environments] = np.asarray(weights @ x, np.float64) / n
        return self.means[environments]

    def changes(self, name: str, parts: Sequence[str]) -> FloatArray | None:
        """``[1 + B, 1 + P, G]`` changes of a combination and of its parts alone; None where one was not measured."""
        table = self.cells.environments
        e = int(self.cells.environment_index(name)[0])
        found = [e, *(alone_at(table, p, d, e) for p, d in zip(parts, part_doses(table, e), strict=True))]
        if any(i < 0 or self.number[i] < 2 for i in found):
            return None
        references = matched_references(self.cells, [str(table.index[i]) for i in found])
        changes = [self.mean((i,)) - self.mean(own) for i, own in zip(found, references, strict=True)]
        return np.stack(changes, 1)
