"""Whether a model's counterfactuals are sound: the axioms of counterfactuals.

Any structural causal model that is solved exactly satisfies composition, effectiveness, reversibility and consistency
(Galles and Pearl, 1998), and so does what happens to c here, up to rounding. What a learnt model can break is the way
through expression: a counterfactual cell, decoded and abducted again, need not be the cell that it was made to be.
Both are measured, in the forms that Monteiro et al. (ICLR 2023) gave the axioms for images.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from pyro_scm.abduction import alone, device_of, isolated
from pyro_scm.counterfactuals import Worlds, counterfactual
from pyro_scm.data.dataset import EnvironmentDataset
from pyro_scm.errors import DataError
from pyro_scm.handlers import refuse_unknown
from pyro_scm.run import Fitted, members
from pyro_scm.support import seen_causes

__all__ = ["axioms"]

_LEVELS = (0.1, 0.5, 0.9)


def axioms(
    fitted: Fitted,
    cells: EnvironmentDataset,
    *,
    nodes: Sequence[str] | None = None,
    environments: Sequence[str] = (),
    levels: Sequence[float] = _LEVELS,
    cycles: int = 3,
    seed: int = 0,
) -> pd.DataFrame:
    """How far a model's counterfactuals break each axiom.

    Composition: what is not changed stays. Nothing is asked, the answer is taken for a measurement and asked about
    again, `cycles` times; in c, a node is also set to what it is anyway. Effectiveness: a node that was set has the
    value it was set to; in expression, when the counterfactual cell is abducted again. Reversibility: what was changed
    and is changed back is as before. Consistency: a cell put into the environment where it is stays as it is.

    Errors are root mean squares over cells, in standard deviations over the cells: of c_j, of each gene. That of
    composition after one cycle is the reconstruction error. Where a latent does not vary between cells (the model does
    not use it) its errors in expression mean nothing: `metrics` of latents tell which.

    Args:
        fitted: a run, or (model, guide).
        cells: that were seen; 2 or more.
        nodes: sites to set; all by default.
        environments: to put the cells in and take them back from.
        levels: quantiles of each node's values over the cells that it is set to.
        cycles: of composition.
        seed: of the posterior draws that say what values nodes have.

    Returns:
        One row a member, axiom and thing changed: member, axiom, changed, cycle, latent (error in c by the equations
        alone) and expression (error after decoding and abducting again; of x, or for effectiveness of c_j).

    Raises:
        InterventionError: no such node.
        DataError: no such environment, or fewer than two cells.
    """
    if len(cells) < 2:
        raise DataError(f"{len(cells)} cells: axioms are scored in standard deviations over cells, give two or more")
    scale = _scale(_dense(cells))
    rows: list[dict[str, Any]] = []
    for k, (run, seen) in enumerate(zip(alone(fitted), seen_causes(fitted, cells, seed), strict=True)):
        model, _ = next(members(run))
        sites = list(model.sites)
        chosen = sites if nodes is None else list(nodes)
        refuse_unknown(chosen, sites)
        spread = _scale(seen)
        found = [
            *_composition(run, cells, cycles, scale, spread, chosen, sites),
            *(
                row
                for name in chosen
                for row in _set(run, model, cells, name, sites.index(name), seen, levels, scale, spread)
            ),
            *(_moved(run, cells, place, scale) for place in environments),
            _consistency(run, cells, scale, spread),
        ]
        rows += [{"member": k, **row} for row in found]
    return pd.DataFrame(rows, columns=["member", "axiom", "changed", "cycle", "latent", "expression"])


def _composition(
    run: Fitted, cells: EnvironmentDataset, cycles: int, scale: Any, spread: Any, chosen: Sequence[str], sites: Any
) -> Iterator[dict[str, Any]]:
    now, x = cells, _dense(cells)
    for cycle in range(1, cycles + 1):
        worlds = counterfactual(run, now)
        now = _measured(now, worlds.x[0, 0])
        latent = np.nan
        if cycle == 1:
            natural = {name: worlds.factual_c[0, 0, :, sites.index(name)] for name in chosen}
            latent = _rms(counterfactual(run, cells, do=natural).c - worlds.factual_c, spread)
        error = _rms(worlds.x[0, 0] - x, scale)
        yield {"axiom": "composition", "changed": "", "cycle": cycle, "latent": latent, "expression": error}


def _set(
    run: Fitted,
    model: Any,
    cells: EnvironmentDataset,
    name: str,
    j: int,
    seen: NDArray[np.float32],
    levels: Sequence[float],
    scale: Any,
    spread: Any,
) -> Iterator[dict[str, Any]]:
    """Effectiveness and reversibility of one node, over values that it takes among the cells."""
    effective, reversible = [], []
    for value in np.quantile(seen[:, j], levels).astype(np.float32):
        worlds = counterfactual(run, cells, do={name: float(value)})
        again = counterfactual(run, _measured(cells, worlds.x[0, 0]), do={name: worlds.factual_c[0, 0, :, j]})
        effective.append((_rms(worlds.c[..., j] - value, spread[j]), _rms(again.factual_c[..., j] - value, spread[j])))
        back = _solved_back(model, cells, worlds, j)
        reversible.append((_rms(back - worlds.factual_c[0, 0], spread), _rms(again.x - worlds.factual_x, scale)))
    for axiom, errors in (("effectiveness", effective), ("reversibility", reversible)):
        latent, expression = np.sqrt(np.mean(np.square(errors), axis=0))
        yield {"axiom": axiom, "changed": name, "cycle": 1, "latent": latent, "expression": expression}


def _solved_back(model: Any, cells: EnvironmentDataset, worlds: Worlds, j: int) -> NDArray[np.float32]:
    """c of the cells by their noise as the counterfactual world shows it, but for z_j, which it does not show."""
    with isolated():
        batch = cells.batch().to(device_of(model))
        _, _, gain = model.parts(batch)
        before, after = (torch.as_tensor(c[0, 0]).to(batch.r) for c in (worlds.factual_c, worlds.c))
        noise = model.scm.noise(after, gain)
        noise[:, j] = model.scm.noise(before, gain)[:, j]
        c: NDArray[np.float32] = model.scm.solve(noise, gain).cpu().numpy()
    return c


def _moved(run: Fitted, cells: EnvironmentDataset, place: str, scale: Any) -> dict[str, Any]:
    """Reversibility of another environment: there, abducted there, and back to where each cell was."""
    there = counterfactual(run, cells, environment=place)
    away = replace(
        _measured(cells, there.x[0, 0]), env=np.full_like(cells.env, list(cells.environments.index).index(place))
    )
    x = np.empty_like(there.factual_x[0, 0])
    for e in np.unique(cells.env):
        own = np.flatnonzero(cells.env == e)
        home = counterfactual(run, away.subset(own), environment=str(cells.environments.index[e]))
        x[own] = home.x[0, 0]
    return {
        "axiom": "reversibility",
        "changed": place,
        "cycle": 1,
        "latent": np.nan,
        "expression": _rms(x - there.factual_x[0, 0], scale),
    }


def _consistency(run: Fitted, cells: EnvironmentDataset, scale: Any, spread: Any) -> dict[str, Any]:
    latent, expression = [], []
    for e in np.unique(cells.env):
        own = cells.subset(cells.env == e)
        worlds = counterfactual(run, own, environment=str(cells.environments.index[e]))
        latent.append(_squares(worlds.c - worlds.factual_c, spread) * len(own))
        expression.append(_squares(worlds.x - worlds.factual_x, scale) * len(own))
    errors = {name: float(np.sqrt(sum(v) / len(cells))) for name, v in (("latent", latent), ("expression", expression))}
    return {"axiom": "consistency", "changed": "", "cycle": 1, **errors}


def _measured(cells: EnvironmentDataset, x: NDArray[np.float32]) -> EnvironmentDataset:
    """The same cells, had this been measured of them."""
    return replace(cells, x=x)


def _dense(cells: EnvironmentDataset) -> NDArray[np.float64]:
    x = cells.batch().x
    assert x is not None
    return x.cpu().double().numpy()


def _scale(values: NDArray[Any]) -> NDArray[np.float64]:
    """Standard deviation of each column; 1 where it is constant."""
    spread = np.asarray(values, np.float64).std(0)
    return np.where(spread > 0, spread, 1.0)


def _squares(difference: Any, scale: Any) -> float:
    return float(np.mean(np.square(np.asarray(difference, np.float64) / scale)))


def _rms(difference: Any, scale: Any) -> float:
    return float(np.sqrt(_squares(difference, scale)))
