"""Recovery of a graph: structural Hamming distance, directed edges, causal order.

An adjacency matrix is square without self-loops, and its entry [i, j] is non-zero for the edge i -> j.
"""

import numpy as np
from numpy.typing import ArrayLike

from pyro_scm.errors import DataError, listing
from pyro_scm.metrics.arguments import BoolArray, finite
from pyro_scm.metrics.recovery import Detection, detection


def _graph(adjacency: ArrayLike, name: str) -> BoolArray:
    """A square adjacency matrix without self-loops, as booleans."""
    array = finite(adjacency, name, 2)
    if array.shape[0] != array.shape[1]:
        raise DataError(f"{name} has shape {array.shape}: expected a square adjacency matrix")
    loops = np.flatnonzero(np.diag(array))
    if loops.size:
        raise DataError(f"{name} has self-loops at nodes {listing(loops.tolist())}: expected zeros on the diagonal")
    edges: BoolArray = array != 0
    return edges


def _graphs(true_adjacency: ArrayLike, adjacency: ArrayLike) -> tuple[BoolArray, BoolArray]:
    """Two adjacency matrices over the same nodes."""
    true, found = _graph(true_adjacency, "true_adjacency"), _graph(adjacency, "adjacency")
    if true.shape != found.shape:
        raise DataError(
            f"true_adjacency has {len(true)} nodes and adjacency {len(found)}: expected the same nodes, "
            "reorder the learnt graph with Matching.permutation"
        )
    return true, found


def shd(true_adjacency: ArrayLike, adjacency: ArrayLike) -> int:
    """Structural Hamming distance: number of node pairs {i, j} whose edges differ; a reversed edge counts once.

    Range 0 to d (d - 1) / 2, lower is better. Its reference points are the number of true edges (the score of the empty
    graph) and the score of a random graph of the same density.

    Args:
        true_adjacency: True graph, shape [d, d], entry [i, j] non-zero for i -> j.
        adjacency: Learnt graph in the same order of nodes, shape [d, d]; cut small weights to 0 first.

    Returns:
        The number of missing, extra and reversed edges.

    Source: Tsamardinos, Brown and Aliferis, Mach. Learn. 2006.
    """
    true, found = _graphs(true_adjacency, adjacency)
    differs = true != found
    return int(np.sum(np.triu(differs | differs.T, 1)))


def edge_scores(true_adjacency: ArrayLike, adjacency: ArrayLike) -> Detection:
    """Precision, recall and F1 of the directed edges; a reversed edge is one false and one missed edge.

    Args: those of `shd`. Returns: the three scores, each in [0, 1] or NaN, higher is better.
    """
    return detection(*_graphs(true_adjacency, adjacency))


def _descendants(adjacency: BoolArray) -> BoolArray:
    """Entry [i, j]: a directed path of one edge or more leads from i to j."""
    reach = adjacency.copy()
    for middle in range(len(reach)):
        reach |= reach[:, middle, None] & reach[None, middle, :]
    return reach


def ancestral_violations(true_adjacency: ArrayLike, adjacency: ArrayLike) -> int:
    """Number of ordered pairs (i, j), i an ancestor of j in truth, for which the learnt graph makes j an ancestor of i.

    Range 0 to d (d - 1) / 2, lower is better. It measures the causal order alone, which soft interventions can identify
    when single edges cannot; the empty graph scores 0, so read it beside the recall of `edge_scores`.

    Args: those of `shd`, the true graph acyclic; cycles of the learnt one are allowed and violate the order.
    Returns: the number of reversed ancestor relations.

    Source: the order that is identifiable under soft interventions: Squires et al., ICML 2023.
    """
    true, found = _graphs(true_adjacency, adjacency)
    truth = _descendants(true)
    cyclic = np.flatnonzero(np.diag(truth))
    if cyclic.size:
        raise DataError(
            f"true_adjacency has a cycle through nodes {listing(cyclic.tolist())}: expected an acyclic graph"
        )
    return int(np.sum(truth & _descendants(found).T))
