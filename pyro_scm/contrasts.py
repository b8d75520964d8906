"""Contrasts of actions: average effects, effects within groups of cells, effects of single cells, sweeps over nodes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import ArrayLike, NDArray
from pyro import poutine

from pyro_scm.abduction import abduct, causes, device_of, isolated
from pyro_scm.actions import Action, Actions, Place
from pyro_scm.chance import forked
from pyro_scm.counterfactuals import counterfactual
from pyro_scm.data.dataset import EnvironmentDataset
from pyro_scm.errors import DataError, listing
from pyro_scm.handlers import refuse_unknown
from pyro_scm.run import Fitted, members
from pyro_scm.sites import X, Z
from pyro_scm.support import Support

__all__ = ["Contrast", "effect", "sweep"]


@dataclass(frozen=True)
class Contrast:
    """Effects of one action against another, per cell.

    Intervals are credible ones, between quantiles over members and posterior draws. They hold what the model is unsure
    of, members about its parameters and draws about each cell's noise, not whether its assumptions hold.

    Args:
        values: ``[K, S, n, G]`` differences of expected expression.
        cells: n names.
        genes: G names.
        obs: annotation of the cells, to average within its groups.
        support: how far the world of the first action is from what was seen.
        versus_support: likewise of the second, None where it is no action.
    """

    values: NDArray[np.float32]
    cells: tuple[str, ...]
    genes: tuple[str, ...]
    obs: pd.DataFrame | None = None
    support: Support | None = None
    versus_support: Support | None = None

    def average(self, level: float = 0.9) -> pd.DataFrame:
        """Average effect on each gene: mean, sd and interval over members and draws.

        Args:
            level: of the interval.
        """
        return self._table(self.values.mean(2), level)

    def summary(self, level: float = 0.9) -> pd.DataFrame:
        """Another name of `average`."""
        return self.average(level)

    def by(self, column: str | ArrayLike, level: float = 0.9) -> pd.DataFrame:
        """Average effect on each gene within groups of cells: conditional on a covariate.

        Args:
            column: of `obs`, or n labels, such as ``pd.qcut(score, 4)``; cells whose label is missing are left out.
            level: of the interval.

        Returns:
            Columns effect, sd, low, high and cells; one row a group and gene.

        Raises:
            DataError: no such column, another number of labels than cells, or no label at all.
        """
        if isinstance(column, str):
            if self.obs is None or column not in self.obs:
                there = listing([] if self.obs is None else self.obs) or "none"
                raise DataError(f"no column {column!r} of obs: there are {there}")
            labels, name = pd.Series(self.obs[column].to_numpy()), column
        else:
            labels, name = pd.Series(np.asarray(column)), "group"
        if len(labels) != len(self.cells):
            raise DataError(f"{len(labels)} labels for {len(self.cells)} cells: give one each")
        groups = {str(label): rows.to_numpy() for label, rows in labels.groupby(labels, sort=True).groups.items()}
        if not groups:
            raise DataError(f"no cell has a label in {name!r}: choose another column")
        tables = {
            label: self._table(self.values[:, :, rows].mean(2), level).assign(cells=len(rows))
            for label, rows in groups.items()
        }
        return pd.concat(tables, names=[name, "gene"])

    def per_cell(self, level: float = 0.9) -> dict[str, pd.DataFrame]:
        """Effects of single cells: ``effect``, ``sd``, ``low`` and ``high``, each a table of cells by genes.

        Without draws (``effect(..., draws=None)``) a run of one member has no spread: low = high = effect.

        Args:
            level: of the interval.
        """
        index, columns = pd.Index(self.cells, name="cell"), pd.Index(self.genes, name="gene")
        flat = self.values.reshape(-1, len(self.cells), len(self.genes))
        return {name: pd.DataFrame(v, index, columns) for name, v in _spread(flat, level).items()}

    def _table(self, average: NDArray[np.float32], level: float) -> pd.DataFrame:
        spread = _spread(average.reshape(-1, len(self.genes)), level)
        return pd.DataFrame(spread, index=pd.Index(self.genes, name="gene"))


def _spread(values: NDArray[np.float32], level: float) -> dict[str, NDArray[np.float32]]:
    """Mean, sd and interval over the first axis.

    Raises:
        DataError: a level that is no probability.
    """
    if not 0 < level <= 1:
        raise DataError(f"level = {level}: give the share of draws that the interval is to hold, such as 0.9")
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return {"effect": values.mean(0), "sd": values.std(0), "low": low, "high": high}


def effect(
    fitted: Fitted,
    cells: EnvironmentDataset,
    *,
    do: Actions | None = None,
    environment: Place | None = None,
    covariates: Mapping[str, str] | None = None,
    noise: Actions | None = None,
    versus: Actions | Action | None = None,
    draws: int | None = None,
    seed: int = 0,
    site: str = X,
    reference: EnvironmentDataset | None = None,
) -> Contrast:
    """E[x | action a] - E[x | action b] of each cell, its noise held fixed; b is no action by default.

    What stochastic actions draw is the same on both sides where they draw the same. With mediators among the actions of
    both sides, ``do={"c_0": 1, "c_2": 0}, versus={"c_0": 0, "c_2": 0}``, this is a controlled direct effect.

    Args:
        fitted: a run, or (model, guide).
        cells: that were seen.
        do: action a on causal variables.
        environment: to put the cells in, as part of action a.
        covariates: of the cells, as part of action a.
        noise: action a on noise.
        versus: action b: on causal variables, or an `Action` of any kind.
        draws: S samples of each cell's posterior; None for its mean.
        seed: of the draws.
        site: the observed site to answer for.
        reference: cells that say which values are usual, see `counterfactual`.

    Raises:
        InterventionError: no such node.
        DataError: no such environment.
    """
    a = counterfactual(
        fitted, cells, do=do, environment=environment, covariates=covariates, noise=noise, draws=draws, seed=seed,
        site=site, reference=reference,
    )  # fmt: skip
    other = versus if isinstance(versus, Action) else Action(do=versus)
    if other.idle:
        return Contrast(a.x - a.factual_x, a.cells, a.genes, cells.obs, a.support)
    b = counterfactual(fitted, cells, **vars(other), draws=draws, seed=seed, site=site, reference=reference)
    return Contrast(a.x - b.x, a.cells, a.genes, cells.obs, a.support, b.support)


def sweep(
    fitted: Fitted,
    cells: EnvironmentDataset,
    values: Sequence[float],
    nodes: Sequence[str] | None = None,
    *,
    expression: bool = True,
    reference: EnvironmentDataset | None = None,
    seed: int = 0,
) -> dict[str, NDArray[np.float32]]:
    """do(c_j := v) for every node j and value v on the same cells, in one vectorised solution a member.

    Args:
        fitted: a run, or (model, guide).
        cells: that were seen; their noise is the guide's mean.
        values: V numbers.
        nodes: J sites; all by default.
        expression: also decode, which takes most of the time.
        reference: cells that say which values are usual; those asked about by default.
        seed: of the draws that say so.

    Returns:
        ``c`` ``[K, J, V, n, d]`` and, with `expression`, ``x`` ``[K, J, V, G]``, the average over cells of E[x | c];
        ``distance`` ``[K, J, V]`` of each value from the mean of c_j over the reference cells, in standard deviations,
        and ``quantile`` ``[K, J, V]``, the share of them below it.

    Raises:
        InterventionError: no such node.
    """
    solved: dict[str, list[NDArray[np.float32]]] = {}
    for k, (member, guide) in enumerate(members(fitted)):
        model: Any = member
        sites = list(model.sites)
        chosen = sites if nodes is None else list(nodes)
        refuse_unknown(chosen, sites)
        positions = [sites.index(name) for name in chosen]
        batch = cells.batch().to(device_of(model))
        with isolated(), forked():
            torch.manual_seed(seed + k)
            latents = abduct(guide, batch)
            z = latents[Z]
            with poutine.condition(data=latents):  # shifts may have noise of their own
                shift = model.shift(batch) if model.shift is not None else 0.0
                gain = model.regime(batch) if model.regime is not None else None
            levels = torch.as_tensor(values, dtype=z.dtype, device=z.device)
            c = model.scm.solve_each(z + shift, positions, levels, gain)
            found = {"c": c}
            if expression:
                likelihood = model.likelihoods[0]
                found["x"] = torch.stack([torch.stack([likelihood.mean(cv, batch).mean(0) for cv in cj]) for cj in c])
            usual = batch if reference is None else reference.batch().to(device_of(model))
            seen = causes(model, guide, usual)[:, positions].mT  # (J, N)
            mean, sd = seen.mean(-1, keepdim=True), seen.std(-1, keepdim=True, correction=0)
            found["distance"] = (levels - mean).abs() / sd.clamp(min=torch.finfo(sd.dtype).tiny)
            ordered = seen.sort(-1).values.contiguous()
            below = torch.searchsorted(ordered, levels.expand(len(positions), -1).contiguous(), right=True)
            found["quantile"] = below.to(z.dtype) / seen.shape[-1]
        for name, value in found.items():
            solved.setdefault(name, []).append(value.cpu().numpy())
    return {name: np.stack(parts) for name, parts in solved.items()}
