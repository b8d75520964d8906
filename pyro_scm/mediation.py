"""Mediated effects: how much of an effect goes through some causal variables, or along some paths, of the graph.

The graph and the noise of each cell are there, so that nested counterfactuals are solved, not estimated: natural direct
and indirect effects (Pearl, UAI 2001) and path-specific effects (Avin, Shpitser and Pearl, IJCAI 2005) of single cells.
What is learnt may still be wrong, and with noise interventions alone the edges are not identified.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import networkx as nx
import numpy as np
import pandas as pd
from numpy.typing import NDArray
from pyro import poutine
from torch import Tensor

from pyro_scm.abduction import Abducted, Prepared, answers, observed
from pyro_scm.actions import Action, Actions, Place
from pyro_scm.contrasts import Contrast
from pyro_scm.data.dataset import EnvironmentDataset
from pyro_scm.errors import InterventionError, listing
from pyro_scm.handlers import refuse_unknown
from pyro_scm.run import Fitted, members
from pyro_scm.sites import C, X

__all__ = ["Mediation", "mediate", "path_effect"]


@dataclass(frozen=True)
class Mediation:
    """Expression in four worlds: action a or b, the mediators M as they are under a or under b.

    Args:
        x: ``[K, S, n, G]`` E[x | a, M(a)].
        baseline: E[x | b, M(b)].
        direct_x: E[x | a, M(b)].
        indirect_x: E[x | b, M(a)].
        mediators: their sites.
        cells: n names.
        genes: G names.
        obs: annotation of the cells.
    """

    x: NDArray[np.float32]
    baseline: NDArray[np.float32]
    direct_x: NDArray[np.float32]
    indirect_x: NDArray[np.float32]
    mediators: tuple[str, ...]
    cells: tuple[str, ...]
    genes: tuple[str, ...]
    obs: pd.DataFrame | None = None

    @property
    def total(self) -> Contrast:
        """X(a, M(a)) - X(b, M(b)) = direct + total_indirect = total_direct + indirect."""
        return self._contrast(self.x, self.baseline)

    @property
    def direct(self) -> Contrast:
        """Natural direct effect, X(a, M(b)) - X(b, M(b)): the action, with the mediators left as they were."""
        return self._contrast(self.direct_x, self.baseline)

    @property
    def indirect(self) -> Contrast:
        """Natural indirect effect, X(b, M(a)) - X(b, M(b)): the mediators as the action makes them, without it."""
        return self._contrast(self.indirect_x, self.baseline)

    @property
    def total_direct(self) -> Contrast:
        """X(a, M(a)) - X(b, M(a)): minus the direct effect of the reverse transition, from a to b."""
        return self._contrast(self.x, self.indirect_x)

    @property
    def total_indirect(self) -> Contrast:
        """X(a, M(a)) - X(a, M(b)): minus the indirect effect of the reverse transition, from a to b."""
        return self._contrast(self.x, self.direct_x)

    def summary(self, level: float = 0.9) -> pd.DataFrame:
        """Average total, direct, indirect, total_direct and total_indirect effect on each gene, with intervals.

        Args:
            level: of the intervals, over members and draws.
        """
        kinds = ("total", "direct", "indirect", "total_direct", "total_indirect")
        tables: list[pd.DataFrame] = [getattr(self, kind).average(level) for kind in kinds]
        return pd.concat(tables, keys=kinds, names=["kind", "gene"])

    def _contrast(self, a: NDArray[np.float32], b: NDArray[np.float32]) -> Contrast:
        return Contrast(a - b, self.cells, self.genes, self.obs)


def mediate(
    fitted: Fitted,
    cells: EnvironmentDataset,
    through: Sequence[str],
    *,
    do: Actions | None = None,
    noise: Actions | None = None,
    environment: Place | None = None,
    covariates: Mapping[str, str] | None = None,
    versus: Actions | Action | None = None,
    draws: int | None = None,
    seed: int = 0,
    site: str = X,
) -> Mediation:
    """How much of an effect goes through a set of causal variables, the noise of each cell held fixed.

    A node and an environment may act: then the mediators are the nodes through which the environment is asked to work.

    Args:
        fitted: a run, or (model, guide).
        cells: that were seen.
        through: sites of the mediators M.
        do: action a on causal variables, none of them a mediator.
        noise: action a on noise.
        environment: to put the cells in, as part of action a.
        covariates: of the cells, as part of action a.
        versus: action b; none by default.
        draws: S samples of each cell's posterior; None for its mean.
        seed: of the draws.
        site: the observed site to answer for.

    Raises:
        InterventionError: no such node, no mediators, or one that is set by an action itself.
        DataError: no such environment.
    """
    a = Action(do, noise, environment, covariates)
    b = versus if isinstance(versus, Action) else Action(do=versus)
    set_anyway = [name for name in through if name in (a.do or {}) or name in (b.do or {})]
    if set_anyway or not through:
        raise InterventionError(
            f"mediators {listing(set_anyway) or 'none'}: name some nodes that the actions do not set themselves"
        )
    for model, _ in members(fitted):
        refuse_unknown(through, model.sites)
        names = observed(model, site, cells)

    def ask(abducted: Abducted, actions: Mapping[str, Prepared]) -> dict[str, Tensor]:
        factual = abducted.factual()
        worlds = {name: abducted.world(action, factual) for name, action in actions.items()}
        sites = list(abducted.model.sites)
        held = {
            name: {m: world.nodes[C]["value"][..., sites.index(m)] for m in through} for name, world in worlds.items()
        }
        direct = abducted.world(actions["a"], factual, held["b"])
        indirect = abducted.world(actions["b"], factual, held["a"])
        traces = {"x": worlds["a"], "baseline": worlds["b"], "direct_x": direct, "indirect_x": indirect}
        return {name: trace.nodes[site]["fn"].mean for name, trace in traces.items()}

    found = answers(fitted, cells, {"a": a, "b": b}, ask, draws, seed)
    return Mediation(**found, mediators=tuple(through), cells=cells.cells, genes=names, obs=cells.obs)


def path_effect(
    fitted: Fitted,
    cells: EnvironmentDataset,
    paths: Sequence[Sequence[str]],
    *,
    do: Actions,
    versus: Actions | None = None,
    draws: int | None = None,
    seed: int = 0,
) -> Contrast:
    """The effect of do(a) against do(b) that goes along some paths, the noise of each cell held fixed.

    Along these paths each variable hears what it would hear under a, from everything else what it hears under b. Any
    set of paths has such an effect for single cells. It is not additive over paths where the equations are not linear.

    Args:
        fitted: a run, or (model, guide).
        cells: that were seen.
        paths: sites from a node that is acted on along edges of the graph to expression, ``("c_0", "c_2", "x")``.
        do: action a.
        versus: action b on some of the same nodes; none by default.
        draws: S samples of each cell's posterior; None for its mean.
        seed: of the draws.

    Raises:
        InterventionError: no such node, no paths, or what is no path from an action to expression.
    """
    b = dict(versus or {})
    strange = [name for name in b if name not in do]
    if strange:
        raise InterventionError(f"versus sets {listing(strange)}, do does not: act on the same nodes in both worlds")
    chosen = tuple(dict.fromkeys(tuple(path) for path in paths))
    if not chosen:
        raise InterventionError('no paths: name some, such as ("c_0", "c_2", "x")')
    for model, _ in members(fitted):
        _check(chosen, do, model)

    def ask(abducted: Abducted, actions: Mapping[str, Prepared]) -> dict[str, Tensor]:
        factual = abducted.factual()
        worlds = {name: abducted.world(action, factual) for name, action in actions.items()}
        baseline, acted = (worlds[name].nodes[C]["value"] for name in ("b", "a"))
        model, batch = abducted.model, abducted.batch
        with poutine.condition(data=dict(abducted.latents)):  # parts may have noise of their own
            _, _, gain = model.parts(batch)
        along = _Along(model, baseline, acted, gain)
        likelihood = model.likelihoods[0]
        change = likelihood.mean(along.heard(chosen), batch) - likelihood.mean(baseline, batch)
        return {"values": change}

    found = answers(fitted, cells, {"a": Action(do), "b": Action(b)}, ask, draws, seed)
    return Contrast(found["values"], cells.cells, cells.genes, cells.obs)


def _check(paths: Sequence[tuple[str, ...]], do: Actions, model: Any) -> None:
    graph = model.scm.graph if model.scm.acyclic else model.scm.learnt()
    sites = dict(zip(model.scm.nodes, model.scm.sites, strict=True))
    edges = set(nx.relabel_nodes(graph, sites).edges)
    refuse_unknown(do, model.sites)
    for path in paths:
        inner = path[:-1]
        refuse_unknown(inner, model.sites)
        missing = [edge for edge in pairwise(inner) if edge not in edges]
        passed = [name for name in inner[1:] if name in do]
        if not inner or path[-1] != X or inner[0] not in do or missing or passed:
            why = (
                f"{' -> '.join(missing[0])} is no edge of the graph" if missing
                else f"do cuts it at {passed[0]}" if passed
                else "it has to go from a node that do sets to 'x'"
            )  # fmt: skip
            raise InterventionError(f"{' -> '.join(path)} is no path of an effect: {why}")


@dataclass(frozen=True)
class _Along:
    """Nested counterfactuals along paths.

    Args:
        model: a `LatentModel`.
        baseline: c ``(..., d)`` under b.
        acted: c ``(..., d)`` under a.
        gain: of the structural equations.
    """

    model: Any
    baseline: Tensor
    acted: Tensor
    gain: Tensor | None

    def heard(self, paths: Sequence[tuple[str, ...]]) -> Tensor:
        """c ``(..., d)`` as the common last variable of the paths hears it."""
        sites = list(self.model.sites)
        heard = self.baseline.clone()
        for parent in dict.fromkeys(path[-2] for path in paths):
            heard[..., sites.index(parent)] = self._value(parent, [p[:-1] for p in paths if p[-2] == parent])
        return heard

    def _value(self, node: str, paths: Sequence[tuple[str, ...]]) -> Tensor:
        """c_j where paths that end in j are as under a."""
        j = list(self.model.sites).index(node)
        if any(len(path) == 1 for path in paths):  # the node is acted on itself
            return self.acted[..., j]
        scm = self.model.scm
        change = (scm.effects(self.heard(paths)) - scm.effects(self.baseline))[..., j]
        if self.gain is not None:
            change = change * self.gain[..., j]
        value: Tensor = self.baseline[..., j] + change
        return value
