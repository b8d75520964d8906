"""Which acyclic graph, out of all of them? Exact search and exact edge probabilities, by dynamic programming.

A score that is a sum over nodes, each a function of the node's parents alone, needs no walk through graphs: the best
graph has a last node in its causal order, and what comes before it is again a best graph. So all 2^d sets of nodes are
visited once, which is quick up to about 20 nodes. With sums in place of maxima the same recursion gives the posterior
probability of each edge.

Sources: Silander and Myllymäki, UAI 2006 (best graph); Koivisto and Sood, JMLR 2004, and Koivisto, UAI 2006 (edges).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations

import networkx as nx
import numpy as np
from numpy.typing import NDArray

from pyro_scm.errors import ModelError

__all__ = ["MOST_NODES", "Local", "best", "collect", "edge_probabilities", "parent_scores", "parent_sets"]

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
MOST_NODES = 20  # the tables have 2^d entries for each node


@dataclass(frozen=True)
class Local:
    """Scores of the parent sets of one node.

    Args:
        sets: ``[m]`` sets of parents, bit i for node i.
        score: ``[m]`` log score of each.
    """

    sets: IntArray
    score: FloatArray


def parent_sets(node: int, nodes: int, most: int | None = None) -> list[IntArray]:
    """Sets of parents that a node may have, ``[number of sets, size]`` for each size from 0 on.

    Args:
        node: whose parents.
        nodes: d.
        most: largest size; all by default.
    """
    others = [i for i in range(nodes) if i != node]
    sizes = range(min(len(others), len(others) if most is None else most) + 1)
    return [np.array(list(combinations(others, k)), np.int64).reshape(math.comb(len(others), k), k) for k in sizes]


def collect(nodes: int, scored: Sequence[tuple[IntArray, FloatArray]]) -> Local:
    """One table out of the log-likelihoods of parent sets of each size, with the prior added.

    A priori each number of parents is as likely as any other, and so is each set of a number.

    Args:
        nodes: d.
        scored: for each size the sets ``[m, size]`` and their log marginal likelihood ``[m]``.
    """
    sets = np.concatenate([(1 << rows).sum(1) if rows.shape[1] else np.zeros(1, np.int64) for rows, _ in scored])
    score = [values - math.log(math.comb(nodes - 1, rows.shape[1])) for rows, values in scored]
    return Local(sets.astype(np.int64), np.concatenate(score))


def parent_scores(node: int, precision: FloatArray, linear: FloatArray, most: int | None = None) -> Local:
    """Of a log-likelihood that is quadratic in a node's coefficients: linear' a - a' precision a / 2.

    The coefficients of parents are N(0, 1), in units in which the node's own noise has variance 1; all others are 0.

    Args:
        node: whose parents.
        precision: ``[d - 1, d - 1]``, of all other nodes in their order.
        linear: ``[d - 1]``.
        most: largest number of parents.
    """
    d = len(linear) + 1
    scored = []
    for sets in parent_sets(node, d, most):
        place = sets - (sets > node)
        k = sets.shape[1]
        inner = precision[place[:, :, None], place[:, None, :]] + np.eye(k)
        b = linear[place]
        gain = (b * np.linalg.solve(inner, b[:, :, None])[:, :, 0]).sum(1) - np.linalg.slogdet(inner)[1]
        scored.append((sets, gain / 2))
    return collect(d, scored)


def best(local: Sequence[Local]) -> nx.DiGraph:
    """The acyclic graph of the highest score.

    Args:
        local: scores of each node's parent sets.

    Raises:
        ModelError: more nodes than the tables can hold.
    """
    d = _checked(local)
    tables = [_over_subsets(t, d, np.maximum) for t in _tables(local)]
    total = _forward(tables, d, np.maximum)
    graph: nx.DiGraph = nx.DiGraph()
    graph.add_nodes_from(range(d))
    left = 2**d - 1
    while left:
        last = max(
            (j for j in range(d) if left >> j & 1), key=lambda j: total[left ^ 1 << j] + tables[j][left ^ 1 << j]
        )
        left ^= 1 << last
        own = local[last]
        allowed = np.where(own.sets & ~left == 0, own.score, -np.inf)
        parents = int(own.sets[int(np.argmax(allowed))])
        graph.add_edges_from((i, last) for i in range(d) if parents >> i & 1)
    return graph


def edge_probabilities(local: Sequence[Local]) -> FloatArray:
    """Posterior probability ``[d, d]`` of each edge i -> j, the weight of a graph being that of all its causal orders.

    Each order counts alike, so a graph with many causal orders counts for more than one with few: the usual price of
    an exact sum.

    Args:
        local: log scores of each node's parent sets, the log prior of the set included.

    Raises:
        ModelError: more nodes than the tables can hold.
    """
    d = _checked(local)
    tables = [_over_subsets(t, d, np.logaddexp) for t in _tables(local)]
    before, after = _forward(tables, d, np.logaddexp), _backward(tables, d)
    everything = np.arange(2**d)
    result = np.zeros((d, d))
    for j, own in enumerate(local):
        without = everything[everything >> j & 1 == 0]
        around = np.full(2**d, -np.inf)
        around[without] = before[without] + after[without | 1 << j]  # the nodes before j are exactly this set
        weight = np.exp(own.score + _over_supersets(around, d)[own.sets] - before[-1])
        for i in range(d):
            result[i, j] = weight[own.sets >> i & 1 == 1].sum()
    return np.clip(result, 0.0, 1.0)


def _checked(local: Sequence[Local]) -> int:
    if not 1 <= len(local) <= MOST_NODES:
        raise ModelError(f"{len(local)} nodes: the exact search takes 1 to {MOST_NODES}; choose the ones that matter")
    return len(local)


def _tables(local: Sequence[Local]) -> list[FloatArray]:
    tables = []
    for own in local:
        table = np.full(2 ** len(local), -np.inf)
        table[own.sets] = own.score
        tables.append(table)
    return tables


_Combine = Callable[[FloatArray, FloatArray], FloatArray]


def _over_subsets(table: FloatArray, d: int, combine: _Combine) -> FloatArray:
    """Entry S becomes the combination of the entries of all subsets of S."""

    def gather(pairs: FloatArray) -> None:
        pairs[:, 1] = combine(pairs[:, 1], pairs[:, 0])

    return _bit_by_bit(table, d, gather)


def _over_supersets(table: FloatArray, d: int) -> FloatArray:
    """Entry S becomes the log of the sum over all sets that hold S."""

    def gather(pairs: FloatArray) -> None:
        pairs[:, 0] = np.logaddexp(pairs[:, 0], pairs[:, 1])

    return _bit_by_bit(table, d, gather)


def _bit_by_bit(table: FloatArray, d: int, gather: Callable[[FloatArray], None]) -> FloatArray:
    """`gather` of the pairs ``[m, 2, k]`` of sets without and with each node, in long rows: low bits are transposed."""
    low = d // 2
    for bits in (d - low, low):
        for i in range(bits):
            gather(table.reshape(-1, 2, 2 ** (d - bits + i)))
        table = table.reshape(2**bits, -1).T.copy().reshape(-1)
    return table


@lru_cache(maxsize=2)
def _layers(d: int) -> list[IntArray]:
    """Sets by their size."""
    sets = np.arange(2**d)
    size = np.bitwise_count(sets) if hasattr(np, "bitwise_count") else sum(sets >> i & 1 for i in range(d))
    by_size = np.argsort(size, kind="stable")
    return np.split(by_size, np.cumsum(np.bincount(size, minlength=d + 1))[:-1])


def _forward(tables: Sequence[FloatArray], d: int, combine: _Combine) -> FloatArray:
    """``[2^d]`` score of all graphs over each set of nodes, parents from within."""
    total = np.full(2**d, -np.inf)
    total[0] = 0.0
    for layer in _layers(d)[1:]:
        for j, table in enumerate(tables):
            with_j = layer[layer >> j & 1 == 1]
            rest = with_j ^ 1 << j
            total[with_j] = combine(total[with_j], total[rest] + table[rest])
    return total


def _backward(tables: Sequence[FloatArray], d: int) -> FloatArray:
    """``[2^d]`` score of all nodes that are not in a set, which come after it."""
    total = np.full(2**d, -np.inf)
    total[-1] = 0.0
    for layer in _layers(d)[-2::-1]:
        for j, table in enumerate(tables):
            free = layer[layer >> j & 1 == 0]
            total[free] = np.logaddexp(total[free], table[free] + total[free | 1 << j])
    return total
