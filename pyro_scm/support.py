"""How far an answer lies from what a model has seen: interventions ask for values that data may never have shown."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from pyro_scm.abduction import causes, device_of, isolated
from pyro_scm.actions import Action
from pyro_scm.chance import forked
from pyro_scm.conditions import novelty
from pyro_scm.data.dataset import EnvironmentDataset
from pyro_scm.errors import DataError
from pyro_scm.run import Fitted, Run, members
from pyro_scm.sites import node_site

__all__ = ["Support", "seen_causes", "standing"]

_CENTRAL = 0.99
"""Share of the reference cells within the usual range of a node."""
_TOLERATED = 0.05
"""Share of cells outside it from which on an answer is said to extrapolate; 0.01 are outside anyway."""
_CELLS = 1024
_CELLS_A_NODE = 10

FloatArray = NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Support:
    """Where the values that an action brings about lie among those of reference cells.

    Args:
        table: one row a member and thing asked: kind (``"do"``, ``"noise"``: a node that is acted on; ``"joint"``: all
            causal variables together, by Mahalanobis distance; ``"environment"``), low and high (range of the values
            brought about), quantile_low and quantile_high (share of reference cells below these), distance (mean over
            cells, in standard deviations of the reference; of an environment that of `conditions.novelty`), outside
            (share of cells beyond the central 99 % of the reference), extrapolates (outside > 5 %), reference (number
            of its cells).
        distance: ``[K, n]`` largest distance of each cell over the nodes acted on, NaN if there are none.
    """

    table: pd.DataFrame
    distance: NDArray[np.float32]

    @property
    def extrapolates(self) -> bool:
        """Whether any part of the answer does."""
        return bool(self.table["extrapolates"].any())

    def warnings(self) -> list[str]:
        """One sentence for each thing asked that lies outside, the worst member's."""
        said = []
        for (kind, name), rows in self.table[self.table["extrapolates"]].groupby(["kind", "name"], sort=False):
            worst = rows.iloc[int(np.argmax(rows["distance"].to_numpy()))]
            if kind == "environment":
                said.append(f"environment {name} is far from those that the model was fitted to")
                continue
            what = "the causal variables together" if kind == "joint" else name
            said.append(
                f"{what}: {worst['outside']:.0%} of the cells are brought beyond where 99 % of "
                f"{worst['reference']:.0f} reference cells are, {worst['distance']:.1f} standard deviations from their "
                "mean: the model extrapolates"
            )
        return said


def seen_causes(fitted: Fitted, cells: EnvironmentDataset, seed: int = 0) -> list[NDArray[np.float32]]:
    """Causal variables ``[N, d]`` of reference cells for each member, one posterior draw a cell.

    Draws, because means of latents that a model does not use vary by next to nothing. Of more than 1024 cells some are
    taken, evenly.

    Args:
        fitted: a run, or (model, guide).
        cells: that were seen, such as the training cells.
        seed: of the draws.
    """
    rows = np.unique(np.linspace(0, len(cells) - 1, min(len(cells), _CELLS)).round().astype(np.int64))
    found = []
    for k, (model, guide) in enumerate(members(fitted)):
        with isolated(), forked():
            torch.manual_seed(seed + k)
            found.append(causes(model, guide, cells.batch(rows).to(device_of(model))).cpu().numpy())
    return found


def standing(
    action: Action,
    c: NDArray[np.float32],
    reference: Sequence[NDArray[np.float32]],
    nodes: Sequence[str],
    *,
    joint: bool = True,
    environment: tuple[Run, str] | None = None,
) -> Support:
    """Where an answer lies among reference cells.

    Args:
        action: what was asked.
        c: ``[K, S, n, d]`` causal variables in the world asked for.
        reference: K arrays ``[N, d]``, see `seen_causes`.
        nodes: d labels.
        joint: also all variables together, where there are 10 d reference cells or more.
        environment: a run and the name of the environment asked for.
    """
    sites = [node_site(n) for n in nodes]
    acted = {name: "do" if name in (action.do or {}) else "noise" for name in action.nodes}
    rows: list[dict[str, Any]] = []
    distance = np.full((len(c), c.shape[2]), np.nan, np.float32)
    for k, seen in enumerate(reference):
        for name, kind in acted.items():
            j = sites.index(name)
            row, each = _one(c[k, ..., j], seen[:, j])
            rows.append({"member": k, "kind": kind, "name": name, **row})
            distance[k] = np.fmax(distance[k], each)
        if joint and len(seen) >= _CELLS_A_NODE * len(sites):
            rows.append({"member": k, "kind": "joint", "name": "c", **_all(c[k], seen)})
    if environment is not None:
        rows.append({"member": -1, "kind": "environment", "name": environment[1], **_place(*environment)})
    columns = ["member", "kind", "name", "low", "high", "quantile_low", "quantile_high", "distance", "outside"]
    table = pd.DataFrame(rows, columns=[*columns, "reference"])
    table.insert(len(columns), "extrapolates", table["outside"].astype(float) > _TOLERATED)
    return Support(table, distance)


def _one(values: FloatArray, seen: FloatArray) -> tuple[dict[str, Any], FloatArray]:
    """Of one node: values ``[S, n]`` among ``[N]``; its row, and the distance of each cell."""
    values, ordered = values.astype(np.float64), np.sort(seen.astype(np.float64))
    if len(ordered) < _CELLS_A_NODE:  # so few say nothing of what is usual
        unknown = np.full(values.shape[-1], np.nan)
        return {"low": values.min(), "high": values.max(), "outside": np.nan, "reference": len(ordered)}, unknown
    spread = ordered.std()
    away = np.abs(values - ordered.mean())
    away = away / spread if spread > 0 else np.where(away > 0, np.inf, 0.0)  # of a latent that never moved
    low, high = np.quantile(ordered, [(1 - _CENTRAL) / 2, (1 + _CENTRAL) / 2])
    ends = np.array([values.min(), values.max()])
    quantiles = np.searchsorted(ordered, ends, side="right") / len(ordered)
    outside = (values < low) | (values > high)
    row = {
        "low": ends[0],
        "high": ends[1],
        "quantile_low": quantiles[0],
        "quantile_high": quantiles[1],
        "distance": away.mean(),
        "outside": outside.mean(),
        "reference": len(ordered),
    }
    return row, away.mean(0)


def _all(c: FloatArray, seen: FloatArray) -> dict[str, Any]:
    """Of all nodes together: c ``[S, n, d]`` among ``[N, d]``."""
    centre = seen.astype(np.float64).mean(0)
    deviations = seen - centre
    covariance = deviations.T @ deviations / len(seen)
    # a latent that a model leaves constant must not make everything far; one that never moved may not move
    inverse = np.linalg.pinv(covariance + 1e-6 * np.trace(covariance) / len(covariance) * np.eye(len(covariance)))
    own, found = (
        np.sqrt(np.einsum("...i,ij,...j->...", v, inverse, v) / len(covariance)) for v in (deviations, c - centre)
    )
    quantiles = np.searchsorted(np.sort(own), [found.min(), found.max()], side="right") / len(own)
    return {
        "low": found.min(),
        "high": found.max(),
        "quantile_low": quantiles[0],
        "quantile_high": quantiles[1],
        "distance": found.mean(),
        "outside": (found > np.quantile(own, _CENTRAL)).mean(),
        "reference": len(own),
    }


def _place(run: Run, name: str) -> Mapping[str, Any]:
    try:
        found = novelty(run, name).iloc[0]
    except DataError:  # a run without training conditions has nothing to compare with
        return {"outside": np.nan}
    return {"distance": found["distance"], "outside": float(found["far"])}
