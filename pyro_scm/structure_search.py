"""Which causal graph, and how sure of each edge: of observed variables, or of the latents behind a linear decoder.

`learn_graph` is for variables that were measured, or are known otherwise: an exact search over all acyclic graphs.
`learn_latent_graph` is for screens: it finds the latents and their graph together, where each latent has an environment
in which it alone is acted on, and its parents are cut. Every answer carries a probability for each edge and what theory
grants to such a design.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import networkx as nx
import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from pyro_scm import hard_gaussian, hard_network, orders
from pyro_scm.data.dataset import EnvironmentDataset
from pyro_scm.errors import DataError, ModelError
from pyro_scm.identify import Claim, Design, claims
from pyro_scm.regimes import target_labels, target_table
from pyro_scm.signal_space import Signal, signal
from pyro_scm.threads import few_threads

__all__ = ["GraphPosterior", "learn_graph", "learn_latent_graph", "regression_scores"]

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
MECHANISMS = ("linear", "additive")
LATENT_MECHANISMS = ("linear", "network")
INTERVENTIONS = ("hard", "shift")
_ROUNDS = 8
_MOST_PARENTS = 5  # above _ALL_SETS nodes
_ALL_SETS = 12
_KNOTS = (0.02, 0.2, 0.4, 0.6, 0.8, 0.98)  # quantiles
_ORDER_CELLS = 250  # of each environment, to compare causal orders by


@dataclass(frozen=True, eq=False)
class GraphPosterior:
    """A causal graph, with how sure each edge is.

    Args:
        edge_probabilities: ``[d, d]``, row the parent, column the child.
        graph: the best one.
        score: its log score, nats.
        claims: what theory grants to the design, if the model holds and cells are without number.
        design: that the claims are about.
        effects: ``[d, d]`` linear effect of row on column in `graph`, in standard deviations of the column's own noise;
            None where mechanisms are not linear.
        values: ``[n, d]`` the causal variables of each cell.
    """

    edge_probabilities: pd.DataFrame
    graph: nx.DiGraph
    score: float
    claims: tuple[Claim, ...]
    design: Design
    values: pd.DataFrame
    effects: pd.DataFrame | None = None

    def edges(self, least: float = 0.01) -> pd.DataFrame:
        """One row an edge, the surest first: parent, child, probability, whether it is in the best graph.

        Args:
            least: probability of the edges that are shown; those of the best graph always are.
        """
        names, p = list(self.edge_probabilities.index), self.edge_probabilities.to_numpy(np.float64)
        rows = [
            {"parent": a, "child": b, "probability": float(p[i, j]), "in best graph": self.graph.has_edge(a, b)}
            for i, a in enumerate(names)
            for j, b in enumerate(names)
            if i != j and (p[i, j] >= least or self.graph.has_edge(a, b))
        ]
        table = pd.DataFrame(rows, columns=["parent", "child", "probability", "in best graph"])
        return table.sort_values("probability", ascending=False, kind="stable").reset_index(drop=True)

    def identifiability(self) -> pd.DataFrame:
        """The claims, one row each."""
        return pd.DataFrame([asdict(c) for c in self.claims]).set_index("quantity")

    def __str__(self) -> str:
        said = [f"{c.quantity:13s} {'yes' if c.holds else 'no ':3s}  {c.extent} [{c.source}]" for c in self.claims]
        table = self.edges(0.05).to_string(index=False, float_format=lambda v: f"{v:.2f}")
        return "\n".join([str(self.design), "", *said, "", table])


# ---------------------------------------------------------------------- observed variables
def learn_graph(
    values: pd.DataFrame,
    env: ArrayLike,
    targets: ArrayLike,
    *,
    mechanism: str = "linear",
    interventions: str = "hard",
    batches: bool = False,
    most_parents: int | None = None,
    resamples: int = 0,
    seed: int = 0,
) -> GraphPosterior:
    """The best acyclic graph over measured variables, and the probability of each edge: both exact, up to 20 variables.

    Each variable is regressed on each set of others, scored by BIC, on the cells in which its own mechanism was at
    work: under hard interventions those of all environments that do not act on it; shifts of the noise keep the
    mechanism and give the environment an intercept of its own.

    Args:
        values: ``[n, d]``, one column a variable.
        env: ``[n]`` environment of each cell.
        targets: ``[E, d]`` 1 where an environment acts on a variable.
        mechanism: ``"linear"``, or ``"additive"``: a sum of natural cubic splines.
        interventions: ``"hard"`` or ``"shift"``.
        batches: whether environments also differ in what nobody meant (day, plate, medium): all variables then have an
            intercept of their own in each, and only how cells differ within environments counts.
        most_parents: of a variable; any number by default, 5 where there are more than 12 variables.
        resamples: bootstrap samples of the cells that edge probabilities are averaged over; none by default.
        seed: of these.

    Raises:
        DataError: shapes that do not fit, values that are not finite, a variable that is never left alone.
        ModelError: an unknown option, or more than 20 variables.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> a = rng.normal(size=400)
        >>> values = pd.DataFrame({"a": a, "b": 2 * a + rng.normal(size=400)})
        >>> values.loc[200:, "b"] = rng.normal(size=200)  # environment 1 acts on b
        >>> list(learn_graph(values, np.repeat([0, 1], 200), [[0, 0], [0, 1]]).graph.edges)
        [('a', 'b')]
    """
    _chosen("mechanism", mechanism, MECHANISMS)
    _chosen("interventions", interventions, INTERVENTIONS)
    x, e, table = np.asarray(values, np.float64), np.asarray(env), np.asarray(targets, np.float64)
    _check(x, e, table)
    names = list(values.columns)

    def scored(rows: IntArray) -> list[orders.Local]:
        return regression_scores(
            x[rows],
            e[rows],
            table,
            mechanism=mechanism,
            interventions=interventions,
            batches=batches,
            most=_most(most_parents, len(names)),
        )

    local = scored(np.arange(len(x)))
    probabilities = _averaged(lambda rows: orders.edge_probabilities(scored(rows)), local, e, resamples, seed)
    graph = orders.best(local)
    alone = (table > 0) & (table.sum(1) == 1)[:, None]
    design = Design(
        interventions="hard" if interventions == "hard" else "noise",
        targets="known",
        latents=len(names),
        environments=len(np.unique(e)),
        hits=tuple(int(n) for n in alone[np.unique(e)].sum(0)),
        decoder="none",
        mechanism="linear" if mechanism == "linear" else "network",
    )
    return _posterior(names, probabilities, graph, _total(local, graph), design, x, values.index)


def regression_scores(
    x: FloatArray,
    env: IntArray,
    targets: FloatArray,
    *,
    mechanism: str = "linear",
    interventions: str = "hard",
    batches: bool = False,
    most: int | None = None,
) -> list[orders.Local]:
    """BIC of each variable's parent sets.

    Args:
        x: ``[n, d]``.
        env: ``[n]``.
        targets: ``[E, d]``.
        mechanism: see `learn_graph`.
        interventions: see `learn_graph`.
        batches: see `learn_graph`.
        most: largest set.
    """
    basis = x[:, :, None] if mechanism == "linear" else _splines(x)
    n, d, width = basis.shape
    result = []
    for j in range(d):
        acted = targets[env, j] > 0
        rows = np.flatnonzero(~acted) if interventions == "hard" else np.arange(n)
        group = np.zeros(len(rows), np.int64)
        if batches or interventions == "shift":
            group = np.where(batches | acted[rows], env[rows] + 1, 0)
        features = _centred(basis[rows].reshape(len(rows), -1), group)
        response = _centred(x[rows, j : j + 1], group)[:, 0]
        gram, right, square = features.T @ features, features.T @ response, float(response @ response)
        gram[np.diag_indices(d * width)] += 1e-9 * len(rows)
        scored = []
        for sets in orders.parent_sets(j, d, most):
            columns = (sets[:, :, None] * width + np.arange(width)).reshape(len(sets), -1)
            b = right[columns]
            inner = gram[columns[:, :, None], columns[:, None, :]]
            explained = (b * np.linalg.solve(inner, b[:, :, None])[:, :, 0]).sum(1)
            left = (square - explained).clip(min=1e-9 * square) / len(rows)
            scored.append((sets, -0.5 * len(rows) * np.log(left) - 0.5 * columns.shape[1] * np.log(len(rows))))
        result.append(orders.collect(d, scored))
    return result


def _centred(columns: FloatArray, group: IntArray) -> FloatArray:
    """Columns minus their mean within each group of rows, divided by what spread is left."""
    out = columns.astype(np.float64, copy=True)
    for g in np.unique(group):
        out[group == g] -= out[group == g].mean(0)
    spread = out.std(0)
    return np.asarray(out / np.where(spread > 0, spread, 1.0))


def _splines(x: FloatArray) -> FloatArray:
    """Natural cubic splines ``[n, d, number of knots - 1]``, the first column linear: so are they all in the tails."""
    knots = np.quantile(x, _KNOTS, axis=0)
    knots = knots + 1e-6 * (knots[-1] - knots[0] + 1e-12) * np.arange(len(_KNOTS))[:, None]  # ties
    u = (x - knots[0]) / (knots[-1] - knots[0])
    at = (knots - knots[0]) / (knots[-1] - knots[0])
    cubes = [np.maximum(u - k, 0) ** 3 for k in at]
    slopes = [(cube - cubes[-1]) / (at[-1] - k) for cube, k in zip(cubes[:-1], at[:-1], strict=True)]
    return np.stack([u, *(s - slopes[-1] for s in slopes[:-1])], -1)


# ---------------------------------------------------------------------- latents
def learn_latent_graph(
    cells: EnvironmentDataset,
    *,
    mechanism: str = "linear",
    most_parents: int | None = None,
    restarts: int = 4,
    resamples: int = 0,
    seed: int = 0,
) -> GraphPosterior:
    """The graph of the latents behind a linear decoder, from hard interventions on each.

    A latent is what an environment acts on: it has the name of that target, or of the environment where targets are not
    known; so there are as many latents as targets. Linear mechanisms: exact likelihood, exact search over graphs, exact
    edge probabilities of a quadratic expansion; up to 20 latents. Networks: causal order by likelihood, edges by BIC
    with everything else fitted anew; the probability of an edge is then conditional on the order and the other edges.
    Made for up to about 6 latents.

    Args:
        cells: continuous expression, with reference cells and, for each latent, an environment that acts on it alone.
        mechanism: ``"linear"`` or ``"network"``.
        most_parents: see `learn_graph`; of linear mechanisms.
        restarts: starts of the search for the latents; of networks, for the causal order half as many.
        resamples: bootstrap samples of the cells that edge probabilities are averaged over, each fitted from the
            start; of linear mechanisms.
        seed: of all that is random.

    Raises:
        DataError: no reference cells, an environment with too few cells, a latent without an environment of its own.
        ModelError: an unknown mechanism, or more than 20 latents.
    """
    _chosen("mechanism", mechanism, LATENT_MECHANISMS)
    x, env, targets, names = _screen(cells)
    if len(names) > orders.MOST_NODES:
        raise ModelError(f"{len(names)} latents: the exact search takes up to {orders.MOST_NODES}")
    most = _most(most_parents, len(names))
    with few_threads():
        space = signal(x, env, len(targets), len(names))
        if mechanism == "network":
            probabilities, graph, score, c = _network(space, env, targets, restarts, most, seed)
            effects = None
        else:
            fitted = _linear(space, targets, restarts, most, seed)
            graph, score, c, effects = fitted.graph, fitted.score, fitted.values(space.y), fitted.effects()

            def again(rows: IntArray) -> FloatArray:
                resampled = signal(x[rows], env[rows], len(targets), len(names))
                return orders.edge_probabilities(_linear(resampled, targets, restarts, most, seed).local)

            probabilities = _averaged(again, fitted.local, env, resamples, seed)
    design = Design(
        interventions="hard",
        targets="known" if all(label is not None for label in target_labels(cells.environments)) else "unknown",
        latents=len(names),
        environments=len(cells.present),
        hits=tuple(len(own) for own in hard_gaussian.single_targets(targets)),
        decoder="linear",
        mechanism=mechanism,
        scale=True,
    )
    return _posterior(names, probabilities, graph, score, design, c, None, effects)


@dataclass(frozen=True, eq=False)
class _Linear:
    """A fit of the linear model with given edges, its BIC, and what its expansion says of other edges."""

    model: hard_gaussian.HardGaussian
    parameters: FloatArray
    local: list[orders.Local]
    allowed: FloatArray
    score: float

    @property
    def graph(self) -> nx.DiGraph:
        return nx.from_numpy_array(self.allowed.T, create_using=nx.DiGraph)

    def values(self, y: FloatArray) -> FloatArray:
        found = self.model.unpack(self.parameters)
        return np.asarray((y - found.offset) @ found.unmixing().T)

    def effects(self) -> FloatArray:
        return self.model.unpack(self.parameters).matrix.T


def _linear(space: Signal, targets: FloatArray, restarts: int, most: int | None, seed: int) -> _Linear:
    """Fit, search, fit with the edges that were found, until they stay the same; the best BIC of the starts."""
    q = hard_gaussian.rotation(space, targets, restarts, seed)
    model = hard_gaussian.HardGaussian(space, targets)
    first = orders.best(hard_gaussian.ancestry(space, q, targets, most))
    reached = nx.transitive_closure_dag(first)
    fits: list[_Linear] = []
    starts = [nx.to_numpy_array(reached, nodelist=range(model.d), weight=None).T]
    if model.d <= _ALL_SETS:
        starts.append(hard_network.complete(list(nx.lexicographical_topological_sort(first))))
    for allowed in starts:
        p, _ = model.maximise(model.start(q, hard_gaussian.effects(space, q, targets, allowed)), allowed)
        for _ in range(_ROUNDS):
            found = orders.best(model.parents(p, allowed, most))
            new = nx.to_numpy_array(found, nodelist=range(model.d), weight=None).T
            if any(np.array_equal(new, fit.allowed) for fit in fits):
                break
            allowed = new
            p, value = model.maximise(p, allowed)
            price = 0.5 * float(allowed.sum()) * float(np.log(space.count.sum()))
            fits.append(_Linear(model, p, model.parents(p, allowed, most), allowed, value - price))
    return max(fits, key=lambda fit: fit.score)


def _network(
    space: Signal, env: IntArray, targets: FloatArray, restarts: int, most: int | None, seed: int
) -> tuple[FloatArray, nx.DiGraph, float, FloatArray]:
    """Edge probabilities, graph, log-likelihood and causal variables."""
    rng = np.random.default_rng(seed)
    q = hard_gaussian.rotation(space, targets, restarts, seed)
    model = hard_gaussian.HardGaussian(space, targets)
    first = orders.best(hard_gaussian.ancestry(space, q, targets, most))

    def unmixings(order: Sequence[int]) -> list[FloatArray]:
        allowed = hard_network.complete(order)
        p = model.start(q, hard_gaussian.effects(space, q, targets, allowed))
        return [model.unpack(model.maximise(p, allowed, 10)[0]).unmixing()]

    some = np.concatenate([rng.permutation(np.flatnonzero(env == e))[:_ORDER_CELLS] for e in range(len(targets))])
    small = hard_network.HardNetwork(space.y[some], env[some], targets, seed=seed)
    starts = [list(nx.lexicographical_topological_sort(first))]
    starts += [rng.permutation(model.d).tolist() for _ in range(max(restarts // 2, 1) - 1)]
    order, fit = hard_network.search_order(small, starts, unmixings, rng)
    whole = hard_network.HardNetwork(space.y, env, targets, seed=seed)
    fit = hard_network.drop_edges(whole, whole.maximise(fit, fit.allowed))
    gains = hard_network.edge_gains(whole, fit, order)
    probabilities = 1 / (1 + np.exp(-np.clip(gains, -500, 500)))
    graph = nx.from_numpy_array(fit.allowed.T, create_using=nx.DiGraph)
    return probabilities, graph, fit.value, space.y @ fit.unmixing.T


def _screen(cells: EnvironmentDataset) -> tuple[FloatArray, IntArray, FloatArray, list[Any]]:
    """x ``[n, G]``, env ``[n]`` with all references as 0, targets ``[E, d]`` and the names of the latents."""
    reference = np.asarray(cells.reference)
    if not reference[cells.present].any():
        raise DataError("the graph needs cells of the reference environment: give them too")
    asked = [int(e) for e in cells.present if not reference[e]]
    labels = target_labels(cells.environments)
    own = [labels[e] if labels[e] is not None else str(cells.environments.index[e]) for e in asked]
    empty = [e for e, label in zip(asked, own, strict=True) if not label]
    if empty:
        raise DataError(f"environment {cells.environments.index[empty[0]]!r} has no target and is no reference")
    names = sorted({part for label in own for part in str(label).split("+") if part}, key=_natural)
    table = target_table(["", *own], names).double().numpy()
    number = np.zeros(len(reference), np.int64)
    number[asked] = 1 + np.arange(len(asked))
    x = cells.batch().x
    assert x is not None
    return x.double().numpy(), number[cells.env], table, names


def _natural(name: str) -> tuple[int, int, str]:
    return (0, int(name), "") if name.isdigit() else (1, 0, name)


# ---------------------------------------------------------------------- both
def _posterior(
    names: Sequence[Any],
    probabilities: FloatArray,
    graph: nx.DiGraph,
    score: float,
    design: Design,
    values: FloatArray,
    index: Any,
    effects: FloatArray | None = None,
) -> GraphPosterior:
    def square(matrix: FloatArray) -> pd.DataFrame:
        return pd.DataFrame(matrix, pd.Index(names, name="parent"), pd.Index(names, name="child"))

    return GraphPosterior(
        edge_probabilities=square(probabilities),
        graph=_named(graph, names),
        score=score,
        claims=claims(design),
        design=design,
        values=pd.DataFrame(values, index=index, columns=list(names)),
        effects=None if effects is None else square(effects),
    )


def _named(graph: nx.DiGraph, names: Sequence[Any]) -> nx.DiGraph:
    """The graph over its variables' names, without weights."""
    named: nx.DiGraph = nx.DiGraph()
    named.add_nodes_from(names)
    named.add_edges_from((names[i], names[j]) for i, j in graph.edges)
    return named


def _averaged(
    probabilities: Any, local: Sequence[orders.Local], env: IntArray, resamples: int, seed: int
) -> FloatArray:
    """Edge probabilities of the cells, or their mean over bootstrap samples of each environment's cells."""
    if resamples == 0:
        return orders.edge_probabilities(local)
    rng = np.random.default_rng([seed, 1])
    groups = [np.flatnonzero(env == e) for e in np.unique(env)]
    total = [probabilities(np.concatenate([rng.choice(g, len(g)) for g in groups])) for _ in range(resamples)]
    return np.asarray(np.mean(total, 0))


def _total(local: Sequence[orders.Local], graph: nx.DiGraph) -> float:
    total = 0.0
    for j, own in enumerate(local):
        total += float(own.score[own.sets == sum(1 << i for i in graph.predecessors(j))][0])
    return total


def _most(most_parents: int | None, nodes: int) -> int | None:
    if most_parents is not None and most_parents < 0:
        raise ModelError(f"most_parents = {most_parents}: give 0 or more")
    return most_parents if most_parents is not None else None if nodes <= _ALL_SETS else _MOST_PARENTS


def _chosen(name: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise ModelError(f"unknown {name} {value!r}: use one of {', '.join(known)}")


def _check(x: FloatArray, env: IntArray, targets: FloatArray) -> None:
    if x.ndim != 2 or env.shape != x.shape[:1] or targets.ndim != 2 or targets.shape[1] != x.shape[1]:
        raise DataError(
            f"values have shape {x.shape}, env {env.shape}, targets {targets.shape}: expected (n, d), (n,) and (E, d)"
        )
    if not np.isfinite(x).all():
        raise DataError("values must be finite: leave out cells with missing ones")
    if env.min(initial=0) < 0 or env.max(initial=0) >= len(targets):
        raise DataError(f"env holds environment {env.max()}, targets has {len(targets)} rows: give one row for each")
    free = [int((targets[env, j] == 0).sum()) for j in range(x.shape[1])]
    if min(free) < 2 * x.shape[1]:
        j = int(np.argmin(free))
        raise DataError(f"variable {j} is left alone in {free[j]} cells: give at least {2 * x.shape[1]}")
