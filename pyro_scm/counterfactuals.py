"""Counterfactuals: what cells that were seen would have been."""

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from pyro_scm.abduction import Abducted, Arrays, Prepared, answers, observed
from pyro_scm.actions import Action, Actions, Place
from pyro_scm.couplings import coupled
from pyro_scm.data.dataset import EnvironmentDataset
from pyro_scm.errors import DataError
from pyro_scm.handlers import Expose
from pyro_scm.run import Fitted, Run, members
from pyro_scm.sites import C, X, Z
from pyro_scm.support import Support, seen_causes, standing

if TYPE_CHECKING:
    from anndata import AnnData

__all__ = ["Worlds", "both_worlds", "counterfactual", "embed", "expose", "named"]


@dataclass(frozen=True)
class Worlds:
    """The same cells in the factual world and in the one asked for: they share their noise.

    Args:
        z: ``[K, S, n, d]`` abducted noise, K members, S draws of the posterior.
        factual_c: ``[K, S, n, d]``.
        c: ``[K, S, n, d]`` after the intervention.
        factual_x: ``[K, S, n, G]`` reconstructed expression E[x | c].
        x: ``[K, S, n, G]`` expression in the world asked for.
        cells: n names.
        genes: G names.
        nodes: d labels.
        support: how far the world asked for is from what was seen; None where nothing was asked.
    """

    z: NDArray[np.float32]
    factual_c: NDArray[np.float32]
    c: NDArray[np.float32]
    factual_x: NDArray[np.float32]
    x: NDArray[np.float32]
    cells: tuple[str, ...]
    genes: tuple[str, ...]
    nodes: tuple[str, ...]
    support: Support | None = None

    @property
    def effect(self) -> NDArray[np.float32]:
        """``[K, S, n, G]`` individual effects on expression."""
        difference: NDArray[np.float32] = self.x - self.factual_x
        return difference

    def to_anndata(self, cells: EnvironmentDataset | None = None, member: int = 0) -> "AnnData":
        """Expression averaged over members and draws, as layers ``factual`` and ``counterfactual``; X is the latter.

        Where causal variables were acted on, obs ``extrapolation`` holds how many standard deviations the values of
        each cell lie from the mean of the reference cells (see `Support`), in uns ``support`` its table.

        Args:
            cells: the data set asked about, whose annotation is then kept.
            member: whose z and c are given, averaged over draws: latents of two members are not the same variables.
        """
        from anndata import AnnData

        obs = cells.obs.copy() if cells is not None else pd.DataFrame(index=list(self.cells))
        var = cells.var.copy() if cells is not None else pd.DataFrame(index=list(self.genes))
        x, factual = self.x.mean((0, 1)), self.factual_x.mean((0, 1))
        adata = AnnData(X=x, obs=obs, var=var, layers={"counterfactual": x.copy(), "factual": factual})
        adata.obsm["z"] = self.z[member].mean(0)
        adata.obsm["c"], adata.obsm["c_factual"] = self.c[member].mean(0), self.factual_c[member].mean(0)
        spread = self.x.mean(1).std(0) if len(self.x) > 1 else np.zeros_like(x)
        adata.layers["counterfactual_sd"] = spread
        adata.uns["nodes"] = np.array(self.nodes)
        if self.support is not None:
            if not np.isnan(self.support.distance[member]).all():
                adata.obs["extrapolation"] = self.support.distance[member]
            adata.uns["support"] = self.support.table.copy()
        return adata


def counterfactual(
    fitted: Fitted,
    cells: EnvironmentDataset,
    *,
    do: Actions | None = None,
    environment: Place | None = None,
    covariates: Mapping[str, str] | None = None,
    noise: Actions | None = None,
    draws: int | None = None,
    sample: bool = False,
    measured: bool = False,
    seed: int = 0,
    site: str = X,
    reference: EnvironmentDataset | None = None,
) -> Worlds:
    """What these cells would have been: abduction, action, prediction.

    With no action the counterfactual is the factual reconstruction. Under another environment what is held fixed is
    the standardised noise (z - mu_e) / sigma_e. Actions of all kinds may be combined: the environment gives the noise,
    the noise is replaced, then the equations are cut.

    Latents are learnt up to permutation, sign and scale: ``c_3`` of one member is not ``c_3`` of another. Ask a run
    about a node through one member, ``run.member(run.best)``; about an environment through all of them.

    Args:
        fitted: a run, or (model, guide).
        cells: that were seen.
        do: site (``"c_3"``) -> number, one value a cell, a distribution (a stochastic intervention, drawn anew for each
            cell and draw), or a function of the natural value to a value or a distribution.
        environment: to put the cells in: its name, or the representation ``[F]`` of one outside the table.
        covariates: covariate -> category that the cells would have had.
        noise: site -> new distribution or value of that node's noise, or a function of its abducted noise; its
            mechanism stays.
        draws: S samples of each cell's posterior; None for its mean.
        sample: draw x instead of giving its expectation given c, with the same observation noise in both worlds.
        measured: the factual world is the cell as it was measured, and the counterfactual keeps its observation noise,
            which is abducted too: the residual of a continuous measurement, the quantile of a count.
        seed: of the draws.
        site: the observed site to answer for: ``"x"``, or ``"y"`` for proteins.
        reference: cells that say which values are usual, such as the training cells; those asked about by default.

    Raises:
        InterventionError: no such node, or a value that cannot be imposed.
        DataError: no such environment, covariate, category or site, no cells or draws, or an answer too large for
            memory.
    """
    if sample and measured:
        raise DataError("sample and measured exclude each other: draw expression, or keep what was measured")
    action = Action(do, noise, environment, covariates)
    model, _ = next(members(fitted))
    genes = observed(model, site, cells)

    def ask(abducted: Abducted, actions: Mapping[str, Prepared]) -> dict[str, Tensor]:
        return both_worlds(abducted, actions["action"], site, sample, measured)

    found = answers(fitted, cells, {"action": action}, ask, draws, seed)
    worlds = named(found, cells.cells, genes, model.scm.nodes)
    return worlds if action.idle else replace(worlds, support=_support(fitted, cells, action, worlds, reference, seed))


def both_worlds(abducted: Abducted, action: Prepared, site: str, sample: bool, measured: bool) -> dict[str, Tensor]:
    """The arrays of `Worlds`, ``(S, n, ...)``, of one batch of cells.

    Args:
        abducted: the cells with their noise.
        action: what is to be different.
        site: the observed site to answer for.
        sample: see `counterfactual`.
        measured: see `counterfactual`.
    """
    factual = abducted.factual(sample)
    asked = abducted.world(action, factual, sample=sample)
    law, other = factual.nodes[site]["fn"], asked.nodes[site]["fn"]
    if sample or measured:
        before = factual.nodes[site]["value"]
        after = coupled(law, other, before, torch.Generator().manual_seed(abducted.seed))
        before = before.expand_as(after)
    else:
        before, after = law.mean, other.mean
    c, z = factual.nodes[C]["value"], factual.nodes[Z]["value"]
    return {"z": z, "factual_c": c, "c": asked.nodes[C]["value"], "factual_x": before, "x": after}


def named(arrays: Arrays, cells: Sequence[str], genes: Sequence[str], nodes: Iterable[Hashable]) -> Worlds:
    """`Worlds` of arrays with their names.

    Args:
        arrays: z, factual_c, c, factual_x and x, ``[K, S, n, ...]``.
        cells: n names.
        genes: G names.
        nodes: d labels.
    """
    names = {"cells": tuple(cells), "genes": tuple(genes), "nodes": tuple(str(n) for n in nodes)}
    return Worlds(**{**arrays, **names})  # type: ignore[arg-type]


def _support(
    fitted: Fitted,
    cells: EnvironmentDataset,
    action: Action,
    worlds: Worlds,
    reference: EnvironmentDataset | None,
    seed: int,
) -> Support:
    place = action.environment
    compared = (fitted, place) if isinstance(fitted, Run) and isinstance(place, str) else None
    # cells asked about say what is usual where they are, not in another environment
    joint = reference is not None or (place is None and not action.covariates)
    need = joint or action.nodes
    seen = seen_causes(fitted, cells if reference is None else reference, seed) if need else []
    return standing(action, worlds.c, seen, worlds.nodes, joint=joint, environment=compared)


def embed(fitted: Fitted, cells: EnvironmentDataset) -> dict[str, NDArray[np.float32]]:
    """Posterior means of the noise ``z`` and the causal variables ``c`` of cells, each ``[K, n, d]``."""
    found = counterfactual(fitted, cells)
    return {"z": found.z[:, 0], "c": found.factual_c[:, 0]}


def expose(model: Any) -> Any:
    """The program with a site of its own for every causal variable: for traces, pictures and teaching."""
    return Expose(model.sites)(model)
