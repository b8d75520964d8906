"""Simulated cells: of an environment, and of its twin world under interventions (Pearl's second rung)."""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from pyro import poutine

from pyro_scm.abduction import Abducted, Prepared, as_array, device_of, isolated, observed
from pyro_scm.actions import Action, Actions, Place, category_codes, components, of_cells, recoded
from pyro_scm.batch import Batch
from pyro_scm.chance import forked
from pyro_scm.composition import CovariateShift
from pyro_scm.counterfactuals import Worlds, both_worlds, named
from pyro_scm.data.dataset import EnvironmentDataset
from pyro_scm.errors import DataError, InterventionError, listing
from pyro_scm.handlers import Do, NoiseIntervention, refuse_unknown
from pyro_scm.run import Run, members
from pyro_scm.sites import DATA, X
from pyro_scm.support import seen_causes, standing

__all__ = ["intervene", "predict"]


def predict(
    run: Run,
    environment: Place,
    *,
    do: Actions | None = None,
    noise: Actions | None = None,
    covariates: Mapping[str, str] | None = None,
    cells: int = 500,
    seed: int = 0,
    mean: bool = False,
    site: str = X,
) -> NDArray[np.float32]:
    """Cells simulated in an environment: z ~ p(z | e), c = scm(z), x ~ p(x | c); under interventions, if any.

    Args:
        run: from `fit` or `load`.
        environment: its name, or the representation ``[F]`` of one that the run has never heard of (such as `dosed`).
        do: see `counterfactual`.
        noise: see `counterfactual`.
        covariates: covariate -> category of the cells; needed of those that the model uses.
        cells: to simulate.
        seed: of the simulation.
        mean: E[x | c] of each cell instead of a draw of x.
        site: the observed site to simulate: ``"x"``, or ``"y"`` for proteins.

    Returns:
        ``[K, cells, G]`` expression in the data's units (counts at the training cells' median library size).

    Raises:
        InterventionError: no such node, or a value that cannot be imposed.
        DataError: no such environment, covariate, category or site, or a representation of another length.
    """
    batch = _simulated(run, environment, covariates, cells)
    observed(run.model, site, run.schema)
    rows, results = np.arange(cells), []
    for k, (model, _) in enumerate(members(run)):
        refuse_unknown([*(do or {}), *(noise or {})], model.sites)
        program = model
        if noise:
            program = NoiseIntervention(components(model, of_cells("noise", noise, rows, cells)))(program)
        if do:
            program = Do(of_cells("do", do, rows, cells))(program)
        with isolated(), forked():
            torch.manual_seed(seed + k)
            trace = poutine.trace(program).get_trace(batch.to(device_of(model)))
        node = trace.nodes[site]
        results.append(as_array(node["fn"].mean if mean else node["value"], 1))
    return np.stack(results)


def intervene(
    run: Run,
    environment: Place,
    *,
    do: Actions | None = None,
    noise: Actions | None = None,
    covariates: Mapping[str, str] | None = None,
    cells: int = 500,
    seed: int = 0,
    sample: bool = False,
    site: str = X,
    reference: EnvironmentDataset | None = None,
) -> Worlds:
    """Simulated cells of an environment as they are and under interventions, with the same noise: twin worlds.

    The second rung: nothing is abducted, z ~ p(z | e). The differences average to the effect on the population.

    Args:
        run: from `fit` or `load`.
        environment: of the cells: its name, or a representation ``[F]``.
        do: see `counterfactual`.
        noise: see `counterfactual`.
        covariates: covariate -> category of the cells; needed of those that the model uses.
        cells: to simulate.
        seed: of the simulation.
        sample: draw x instead of giving its expectation given c, with the same observation noise in both worlds.
        site: the observed site to answer for.
        reference: cells that say which values are usual; the simulated ones, without interventions, by default.

    Raises:
        InterventionError: no such node, a value that cannot be imposed, or no intervention at all.
        DataError: no such environment, covariate, category or site, or a representation of another length.
    """
    action = Action(do, noise)
    if action.idle:
        raise InterventionError("say what is to be different: do= or noise=; without it, predict simulates cells")
    batch = _simulated(run, environment, covariates, cells)
    names = observed(run.model, site, run.schema)
    rows, found = np.arange(cells), []
    for k, (model, _) in enumerate(members(run)):
        refuse_unknown(action.nodes, model.sites)
        prepared = Prepared(of_cells("do", do, rows, cells), of_cells("noise", noise, rows, cells), None)
        own = batch.to(device_of(model))
        with isolated(), forked():
            mine, shared = (int(s) for s in np.random.SeedSequence([seed, k]).generate_state(2))
            torch.manual_seed(mine)
            simulated = poutine.trace(model).get_trace(own)
            latents = {
                name: simulated.nodes[name]["value"]
                for name in simulated.stochastic_nodes
                if name not in (DATA, *(likelihood.site for likelihood in model.likelihoods))
            }
            parts = both_worlds(Abducted(model, own, latents, None, shared), prepared, site, sample, False)
        found.append({name: as_array(value, None) for name, value in parts.items()})
    stacked = {name: np.stack([f[name] for f in found]) for name in found[0]}
    worlds = named(stacked, [f"cell_{i}" for i in range(cells)], names, run.model.scm.nodes)  # type: ignore
    seen = seen_causes(run, reference, seed) if reference is not None else list(worlds.factual_c[:, 0])
    return replace(worlds, support=standing(action, worlds.c, seen, worlds.nodes))


def _simulated(run: Run, environment: Place, covariates: Mapping[str, str] | None, cells: int) -> Batch:
    """A batch of cells in an environment, of which nothing was observed."""
    codes = category_codes(covariates or {}, run.schema.covariates)
    used = [n for m in run.model.modules() if isinstance(m, CovariateShift) for n in m.names if n not in codes]
    if used:
        raise DataError(f"this model has effects of {listing(used)}: say which cells to simulate (covariates=...)")
    zeros = torch.zeros(cells, dtype=torch.int64)
    template = replace(Batch.example(run.schema, cells), index=zeros, x=None, y=None, size=None)
    if isinstance(environment, str):
        batch = run.environments.place(template, environment)
    else:
        batch = template.under(torch.as_tensor(np.asarray(environment, np.float32)))
    return recoded(batch, codes)
