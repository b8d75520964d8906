"""Directed acyclic graphs over latent nodes 0..d-1, as networkx graphs."""

from collections.abc import Hashable, Iterable
from itertools import pairwise

import networkx as nx
import numpy as np

from pyro_scm.errors import ModelError

__all__ = ["checked", "from_edges", "full", "growing", "independent", "layered", "multi_growing"]


def independent(nodes: int) -> nx.DiGraph:
    """No edges: every latent is its own noise."""
    graph: nx.DiGraph = nx.DiGraph()
    graph.add_nodes_from(range(nodes))
    return graph


def full(nodes: int) -> nx.DiGraph:
    """Every edge i -> j with i < j: the autoregressive model of the seed's section 4.9."""
    graph = independent(nodes)
    graph.add_edges_from((i, j) for j in range(nodes) for i in range(j))
    return graph


def layered(nodes: int, depth: int) -> nx.DiGraph:
    """`depth` layers of equal width, each fully connected to the next ("depth n, width k", seed section 4.9).

    It holds every DAG that has a layering of at most `depth` layers of at most ceil(nodes / depth) nodes in which each
    edge joins neighbouring layers.
    """
    if not 1 <= depth <= nodes:
        raise ModelError(f"{depth} layers for {nodes} nodes: choose a depth between 1 and the number of nodes")
    graph = independent(nodes)
    layers = [[int(i) for i in part] for part in np.array_split(np.arange(nodes), depth)]
    for above, below in pairwise(layers):
        graph.add_edges_from((i, j) for i in above for j in below)
    return graph


def growing(nodes: int, seed: int = 0) -> nx.DiGraph:
    """Growing network: node j hangs from one earlier node chosen at random (seed section 5.1); a tree."""
    rng = np.random.default_rng(seed)
    graph = independent(nodes)
    graph.add_edges_from((int(rng.integers(j)), j) for j in range(1, nodes))
    return graph


def multi_growing(nodes: int, seed: int = 0, parents: int = 3) -> nx.DiGraph:
    """Growing network in which node j has 0 to `parents` earlier nodes as parents, chosen at random."""
    rng = np.random.default_rng(seed)
    graph = independent(nodes)
    for j in range(1, nodes):
        number = int(rng.integers(0, min(parents, j) + 1))
        graph.add_edges_from((int(i), j) for i in rng.choice(j, size=number, replace=False))
    return graph


def from_edges(edges: Iterable[tuple[Hashable, Hashable]], nodes: Iterable[Hashable] = ()) -> nx.DiGraph:
    """A graph from its edges parent -> child, and nodes that may have none."""
    graph: nx.DiGraph = nx.DiGraph()
    graph.add_nodes_from(nodes)
    graph.add_edges_from(edges)
    return checked(graph)


def checked(graph: nx.DiGraph) -> nx.DiGraph:
    """The graph itself.

    Raises:
        ModelError: it has a cycle (which is named) or no nodes.
    """
    if not graph:
        raise ModelError("the latent graph has no nodes: give at least one")
    if not nx.is_directed_acyclic_graph(graph):
        cycle = " -> ".join(str(a) for a, *_ in nx.find_cycle(graph))
        raise ModelError(f"the latent graph has a cycle ({cycle} -> ...): an SCM needs a directed acyclic graph")
    return graph
