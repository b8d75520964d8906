"""Scores of graphs by hand and against networkx."""

import itertools
import math

import numpy as np
import pytest
import sklearn.metrics

from pyro_scm import metrics
from pyro_scm.errors import DataError

NAN = float("nan")


def graph(d: int, *edges: tuple[int, int]) -> np.ndarray:
    """Adjacency matrix with weights 0.5."""
    adjacency = np.zeros((d, d))
    for source, target in edges:
        adjacency[source, target] = 0.5
    return adjacency


CHAIN = graph(4, (0, 1), (1, 2), (2, 3))


@pytest.mark.parametrize(
    ("learnt", "distance", "precision", "recall", "violations"),
    [
        (CHAIN, 0, 1.0, 1.0, 0),
        (graph(4), 3, NAN, 0.0, 0),
        (CHAIN.T, 3, 0.0, 0.0, 6),
        (graph(4, (0, 1), (2, 1), (2, 3)), 1, 2 / 3, 2 / 3, 1),  # 1 -> 2 reversed
        (graph(4, (0, 1), (1, 2)), 1, 1.0, 2 / 3, 0),  # 2 -> 3 missing
        (graph(4, (0, 1), (1, 2), (2, 3), (0, 3)), 1, 3 / 4, 1.0, 0),  # an extra edge along the order
        (graph(4, (0, 1), (1, 2), (2, 3), (3, 0)), 1, 3 / 4, 1.0, 6),  # an extra edge that closes a cycle
        (graph(4, (3, 0)), 4, 0.0, 0.0, 1),  # no true edge is touched, yet the order of 0 and 3 is wrong
        (graph(4, (0, 1), (1, 0), (1, 2), (2, 3)), 1, 3 / 4, 1.0, 1),  # both directions of one edge
    ],
)
def test_graph_scores_by_hand(learnt, distance, precision, recall, violations):
    assert metrics.shd(CHAIN, learnt) == distance
    scores = metrics.edge_scores(CHAIN, learnt)
    assert scores.precision == pytest.approx(precision, nan_ok=True)
    assert scores.recall == pytest.approx(recall)
    assert scores.f1 == pytest.approx(0.0 if not recall else 2 * precision * recall / (precision + recall))
    assert metrics.ancestral_violations(CHAIN, learnt) == violations


def test_graph_scores_against_networkx(rng):
    networkx = pytest.importorskip("networkx")
    for _ in range(10):
        true, learnt = np.triu(rng.random((6, 6)) < 0.4, 1), np.triu(rng.random((6, 6)) < 0.4, 1)
        order = rng.permutation(6)
        learnt = learnt[np.ix_(order, order)]
        truth, found = (networkx.DiGraph(a.astype(int)) for a in (true, learnt))
        states = [
            {(g.has_edge(i, j), g.has_edge(j, i)) for g in (truth, found)}
            for i, j in itertools.combinations(range(6), 2)
        ]
        assert metrics.shd(true, learnt) == sum(len(s) > 1 for s in states)
        reversed_pairs = sum(
            j in networkx.ancestors(truth, i) and i in networkx.ancestors(found, j)
            for i, j in itertools.permutations(range(6), 2)
        )
        assert metrics.ancestral_violations(true, learnt) == reversed_pairs
        reference = sklearn.metrics.f1_score(true.ravel(), learnt.ravel())
        assert metrics.edge_scores(true, learnt).f1 == pytest.approx(reference)


def test_graph_scores_of_two_empty_graphs():
    assert metrics.shd(graph(3), graph(3)) == 0
    assert math.isnan(metrics.edge_scores(graph(3), graph(3)).f1)


@pytest.mark.parametrize("score", [metrics.shd, metrics.edge_scores, metrics.ancestral_violations])
def test_graph_scores_refuse_bad_input(score):
    with pytest.raises(DataError, match=r"adjacency has shape \(2, 3\): expected a square adjacency matrix"):
        score(graph(3), np.zeros((2, 3)))
    with pytest.raises(DataError, match=r"true_adjacency has 3 nodes and adjacency 4: .* Matching\.permutation"):
        score(graph(3), graph(4))
    with pytest.raises(DataError, match="adjacency has self-loops at nodes 1, 2: expected zeros on the diagonal"):
        score(graph(3), graph(3, (1, 1), (2, 2)))


def test_ancestral_violations_need_an_acyclic_truth():
    with pytest.raises(DataError, match="true_adjacency has a cycle through nodes 0, 1: expected an acyclic graph"):
        metrics.ancestral_violations(graph(3, (0, 1), (1, 0)), graph(3))
