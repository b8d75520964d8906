"""Causal order by counting: in how many environments does the marginal of each variable change? (seed section 4.2).

An environment that acts on one variable changes that variable and its descendants. A descendant therefore changes in
every environment in which its ancestors do, and in those that act on itself: sorted by these counts the variables are
in a topological order. The first is a root, those that change with it are its descendants, and so on among those.

What this needs: the causal variables themselves (or a one-to-one map of each), every variable acted on by an
environment of its own, and faithfulness: an effect that reaches a descendant through several paths must not cancel, and
must be seen in its marginal. It holds for noise interventions as well as hard ones. Nothing of it can be more right
than the variables that it is given; those of a model are identified only where its own documentation says so.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import networkx as nx
import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from pyro_scm.errors import DataError, listing

__all__ = ["Changes", "Structure", "changes", "dag", "forest"]

BoolArray = NDArray[np.bool_]
FloatArray = NDArray[np.float64]

_FEWEST_CELLS = 3
CHANGES, UNCHANGED = "changes, but is no descendant of the target", "is the target or a descendant, but is unchanged"


@dataclass(frozen=True)
class Changes:
    """Which of d variables change in which of T environments.

    Args:
        p: ``[T, d]`` p-values, adjusted for all tests together.
        changed: ``[T, d]`` p below the level.
        environments: ``[T]`` numbers of the environments, which are those with cells that are no reference.
    """

    p: FloatArray
    changed: BoolArray
    environments: NDArray[np.int64]

    @property
    def counts(self) -> NDArray[np.int64]:
        """``[d]`` number of environments in which each variable changes."""
        return np.asarray(self.changed.sum(axis=0), np.int64)


@dataclass(frozen=True)
class Structure:
    """A graph over d variables that was read from changes.

    Args:
        graph: of nodes 0..d-1.
        order: a topological order, by increasing count.
        targets: ``[T]`` the variable that each environment acts on, -1 where nothing changes: given or found.
        undetermined: variables that no environment acts on alone, or that cannot be told from such: their place among
            each other, and what lies below them, is a guess.
        contradictions: one row for each environment and variable at odds with the graph.
    """

    graph: nx.DiGraph
    order: tuple[int, ...]
    targets: NDArray[np.int64]
    undetermined: tuple[int, ...]
    contradictions: pd.DataFrame

    @property
    def contradicted(self) -> bool:
        """Whether a variable changes that is no descendant of the target: with a forest, the data contradict a tree.

        If the truth is such a graph, all true changes were found and the tests control the family-wise error, this
        happens with at most the level's probability. Changes that were missed make it happen more often.
        """
        return bool((self.contradictions["finding"] == CHANGES).any())

    def adjacency(self) -> NDArray[np.int64]:
        """``[d, d]``, entry [i, j] is 1 for the edge i -> j, as `pyro_scm.metrics` has it."""
        matrix: NDArray[np.int64] = nx.to_numpy_array(self.graph, nodelist=range(len(self.graph)), dtype=np.int64)
        return matrix


# ---------------------------------------------------------------------- tests
def changes(
    c: ArrayLike,
    env: ArrayLike,
    reference: ArrayLike,
    *,
    test: str = "location-scale",
    correction: str = "holm",
    alpha: float = 0.01,
) -> Changes:
    """Test of each variable's marginal in each environment against the reference cells.

    Args:
        c: ``[n, d]`` causal variables of n cells, true or inferred (`pyro_scm.embed`, one member).
        env: ``[n]`` each cell's environment.
        reference: ``[E]`` True for reference environments; their cells are pooled.
        test: ``"location-scale"``: Mann-Whitney and Brown-Forsythe with Welch's t, the smaller p-value twice;
            ``"ks"``: Kolmogorov-Smirnov, for changes of any kind.
        correction: for all tests together: ``"holm"`` (family-wise error) or ``"bh"`` (false discovery rate).
        alpha: level. Each false change may misplace a variable, so that it should be small.

    Raises:
        DataError: arrays that do not fit together, no reference cells, an environment with fewer than 3 cells.

    Source: Brown and Forsythe, JASA 1974; Holm, Scand. J. Stat. 1979; Benjamini and Hochberg, JRSS B 1995.
    """
    values, rows, baseline = np.asarray(c, float), np.asarray(env), np.asarray(reference)
    if values.ndim != 2 or rows.shape != values.shape[:1] or baseline.ndim != 1 or baseline.dtype != bool:
        raise DataError(
            f"c has shape {values.shape}, env {rows.shape} and reference {baseline.shape} of {baseline.dtype}: "
            "expected (n, d), (n,) and booleans (E,)"
        )
    if not np.isfinite(values).all():
        raise DataError(f"c is not finite in row {np.flatnonzero(~np.isfinite(values).all(1))[0]}: drop such cells")
    if rows.size and (rows.min() < 0 or rows.max() >= len(baseline)):
        raise DataError(f"env goes from {rows.min()} to {rows.max()}: give numbers from 0 to {len(baseline) - 1}")
    tests = {"location-scale": _location_scale, "ks": _kolmogorov_smirnov}
    if test not in tests or correction not in ("holm", "bh"):
        raise DataError(f"test {test!r} with correction {correction!r}: use {' or '.join(tests)}, with 'holm' or 'bh'")
    number = np.bincount(rows, minlength=len(baseline))
    present = np.flatnonzero((number > 0) & ~baseline)
    few = [int(e) for e in present if number[e] < _FEWEST_CELLS]
    if few or number[baseline].sum() < _FEWEST_CELLS or not len(present):
        raise DataError(
            f"{number[baseline].sum()} reference cells, {len(present)} other environments, too few cells in "
            f"{listing(few) or 'none'}: give {_FEWEST_CELLS} or more reference cells and cells of each environment"
        )
    control = values[baseline[rows]]
    p = np.stack([tests[test](values[rows == e], control) for e in present])
    p = _adjusted(p, correction)
    return Changes(p, p < alpha, present.astype(np.int64))


def _location_scale(a: FloatArray, b: FloatArray) -> FloatArray:
    """P-values ``[d]`` of columns of a against those of b."""
    from scipy import stats

    with np.errstate(invalid="ignore", divide="ignore"):  # a constant column has no statistic, and has not changed
        location = stats.mannwhitneyu(a, b, axis=0, method="asymptotic").pvalue
        wide, narrow = (np.abs(x - np.median(x, axis=0)) for x in (a, b))
        scale = stats.ttest_ind_from_stats(
            wide.mean(0), wide.std(0, ddof=1), len(a), narrow.mean(0), narrow.std(0, ddof=1), len(b), equal_var=False
        ).pvalue
    smaller: FloatArray = np.minimum(np.nan_to_num(location, nan=1.0), np.nan_to_num(scale, nan=1.0))
    return np.minimum(1.0, 2 * smaller)


def _kolmogorov_smirnov(a: FloatArray, b: FloatArray) -> FloatArray:
    from scipy import stats

    return np.array([stats.ks_2samp(x, y, method="asymp").pvalue for x, y in zip(a.T, b.T, strict=True)])


def _adjusted(p: FloatArray, correction: str) -> FloatArray:
    from scipy import stats

    flat = p.ravel()
    if correction == "bh":
        return np.asarray(stats.false_discovery_control(flat)).reshape(p.shape)
    order = np.argsort(flat)
    steps = np.maximum.accumulate(flat[order] * np.arange(flat.size, 0, -1))
    result = np.empty_like(flat)
    result[order] = np.minimum(steps, 1.0)
    return result.reshape(p.shape)


# ---------------------------------------------------------------------- graphs
def forest(found: Changes, targets: Sequence[int] | None = None) -> Structure:
    """The tree or forest: the variable of lowest count is a root, what changes with it is below it; recursively.

    Args:
        found: from `changes`.
        targets: ``[T]`` the variable that each of its environments acts on; unknown by default, and then taken to be
            the variable of lowest count among those that change. Known targets also make up for changes that the tests
            miss in far descendants, as long as those in children are found.

    Raises:
        DataError: targets of another number, or no variables.

    Example:
        >>> import numpy as np
        >>> from pyro_scm.ordering import Changes, forest
        >>> changed = np.array([[1, 1, 1], [0, 1, 1], [0, 0, 1]], bool)  # of the chain 0 -> 1 -> 2
        >>> list(forest(Changes(1.0 - changed, changed, np.arange(3))).graph.edges)
        [(0, 1), (1, 2)]
    """
    targets_, order, votes = _read(found, targets)
    graph = _nodes(len(order))

    def place(nodes: list[int], above: int | None) -> None:
        while nodes:
            root, *others = nodes
            if above is not None:
                graph.add_edge(above, root)
            place([j for j in others if votes[root, j]], root)
            nodes = [j for j in others if not votes[root, j]]

    place(order, None)
    return _structure(found, graph, order, targets_, known=targets is not None)


def dag(found: Changes, targets: Sequence[int] | None = None) -> Structure:
    """The transitive reduction of a directed acyclic graph: each variable above all that change with it.

    An edge i -> j beside a path i -> ... -> j changes no marginal otherwise unchanged: it cannot be found this way.

    Args:
        found: from `changes`.
        targets: see `forest`.

    Raises:
        DataError: see `forest`.

    Source: Aho, Garey and Ullman, SIAM J. Comput. 1972 (transitive reduction).
    """
    targets_, order, votes = _read(found, targets)
    graph = _nodes(len(order))
    graph.add_edges_from((i, j) for rank, i in enumerate(order) for j in order[rank + 1 :] if votes[i, j])
    reduced = _nodes(len(order))
    reduced.add_edges_from(nx.transitive_reduction(graph).edges)
    return _structure(found, reduced, order, targets_, known=targets is not None)


def _nodes(d: int) -> nx.DiGraph:
    graph: nx.DiGraph = nx.DiGraph()
    graph.add_nodes_from(range(d))
    return graph


def _read(found: Changes, targets: Sequence[int] | None) -> tuple[NDArray[np.int64], list[int], BoolArray]:
    """Targets ``[T]``; the order; and entry [i, j]: does j change in half or more of the environments that act on i?

    Where targets are known, also: or is it below a variable that does? Environments are then counted by target.
    """
    changed = np.asarray(found.changed, bool)
    d = changed.shape[1]
    if not d:
        raise DataError("no variables: give at least one")
    if targets is None:
        by_count = np.argsort(changed.sum(0), kind="stable")
        first = by_count[np.argmax(changed[:, by_count], axis=1)]
        acted_on = np.where(changed.any(1), first, -1).astype(np.int64)
    else:
        acted_on = np.asarray(targets, np.int64)
        if acted_on.shape != (len(changed),) or (acted_on < -1).any() or (acted_on >= d).any():
            raise DataError(
                f"targets {listing(acted_on.tolist())} of {len(changed)} environments: give one of the {d} variables "
                "for each, or -1 where it is not known"
            )
    votes = np.eye(d, dtype=bool)
    for i in np.unique(acted_on[acted_on >= 0]):
        votes[i] |= changed[acted_on == i].mean(axis=0) >= 0.5
    counts = changed.sum(axis=0)
    if targets is not None:  # below what is below: effects fade on the way, and the far ones are missed first
        for middle in range(d):
            votes |= votes[:, middle, None] & votes[None, middle, :]
        counts = counts + (1 + len(changed)) * votes.sum(axis=0)
    return acted_on, [int(j) for j in np.argsort(counts, kind="stable")], votes


def _structure(
    found: Changes, graph: nx.DiGraph, order: list[int], targets: NDArray[np.int64], known: bool
) -> Structure:
    d = len(order)
    below = np.eye(d, dtype=bool)
    for i in order:
        below[i, list(nx.descendants(graph, i))] = True
    rows: list[dict[str, Any]] = []
    for e, target in enumerate(targets):
        if target >= 0:
            rows += [
                {
                    "environment": int(found.environments[e]),
                    "target": int(target),
                    "variable": int(j),
                    "finding": CHANGES if found.changed[e, j] else UNCHANGED,
                    "p": float(found.p[e, j]),
                }
                for j in np.flatnonzero(found.changed[e] != below[target])
            ]
    table = pd.DataFrame(rows, columns=["environment", "target", "variable", "finding", "p"])
    alone = set(targets.tolist())
    columns = [found.changed[:, j].tobytes() for j in range(d)]
    untold = {j for j in range(d) if j not in alone}
    # which of two variables that always change together an unknown target is, cannot be told
    twins = set() if known else {columns[j] for j in untold}
    undetermined = tuple(j for j in range(d) if j in untold or columns[j] in twins)
    return Structure(graph, tuple(order), targets, undetermined, table)
