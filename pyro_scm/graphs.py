"""Directed acyclic graphs over latent nodes 0..d-1, as networkx graphs."""

from collections.abc import Hashable, Iterable
from itertools import pairwise
from typing import Any

import networkx as nx
import numpy as np
from numpy.typing import NDArray

from pyro_scm.errors import ModelError

__all__ = [
    "checked",
    "from_edges",
    "full",
    "growing",
    "independent",
    "layered",
    "layers_of",
    "multi_growing",
    "strongest",
]


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
    """`depth` layers of equal width, each fully connected to the next and to no other (seed section 4.9).

    Widths differ by one at most where depth does not divide nodes, the wider layers first. A DAG is held, with weights
    of 0 on the edges that it lacks, exactly if each of its nodes can be given a layer so that every edge goes from a
    layer to the next and no layer gets more nodes than it has; `layers_of` finds them. All directed paths between two
    nodes must then be of equal length.

    So these are not all DAGs of depth n and width k, as the seed asks with a question mark: a shortcut i -> k beside
    i -> j -> k has no place at any depth and width, nor can a spare node relay it, since that has noise of its own.
    ``nx.transitive_closure(layered(n * k, n))``, given to a model as its ``graph=``, does hold all DAGs whose longest
    path has at most n nodes and of whose nodes at most k are without a path between any two of them.

    Args:
        nodes: d.
        depth: number of layers n.

    Raises:
        ModelError: more layers than nodes, or none.
    """
    if not 1 <= depth <= nodes:
        raise ModelError(f"{depth} layers for {nodes} nodes: choose a depth between 1 and the number of nodes")
    graph = independent(nodes)
    layers = [[int(i) for i in part] for part in np.array_split(np.arange(nodes), depth)]
    for above, below in pairwise(layers):
        graph.add_edges_from((i, j) for i in above for j in below)
    return graph


def layers_of(graph: nx.DiGraph, depth: int, width: int) -> dict[Hashable, int] | None:
    """A layer 0..depth-1 for each node of a DAG, at most `width` nodes a layer, every edge from a layer to the next.

    It exists exactly for the DAGs whose nodes can be placed into those of ``layered(depth * width, depth)`` with all
    edges kept. Two directed paths between the same nodes must be of equal length, so that a layer is a matter of where
    each connected component starts; a shortcut i -> k beside i -> j -> k makes it impossible at any depth. Widths
    are a packing problem: the search goes through the components' first layers.

    Args:
        graph: a DAG.
        depth: number of layers.
        width: nodes of the widest.

    Returns:
        node -> layer, or None where there is no such placing.
    """
    checked(graph)
    components = []
    for nodes in nx.weakly_connected_components(graph):
        place = _heights(graph.subgraph(nodes))
        if place is None or max(place.values()) >= depth:
            return None
        components.append(place)
    components.sort(key=len, reverse=True)

    def fit(rest: list[dict[Hashable, int]], room: list[int]) -> dict[Hashable, int] | None:
        if not rest:
            return {}
        place, *others = rest
        tried = set()
        for start in range(depth - max(place.values())):
            left = list(room)
            for layer in place.values():
                left[start + layer] -= 1
            if min(left) >= 0 and tuple(left) not in tried:
                tried.add(tuple(left))
                found = fit(others, left)
                if found is not None:
                    return {**{node: start + layer for node, layer in place.items()}, **found}
        return None

    return fit(components, [width] * depth)


def _heights(component: nx.DiGraph) -> dict[Hashable, int] | None:
    """Layers of a connected DAG, the first 0; None if an edge would have to skip or stay within one."""
    first = next(iter(component))
    place: dict[Hashable, int] = {first: 0}
    queue = [first]
    while queue:
        node = queue.pop()
        steps = [(n, 1) for n in component.successors(node)] + [(n, -1) for n in component.predecessors(node)]
        for other, step in steps:
            if other not in place:
                place[other] = place[node] + step
                queue.append(other)
            elif place[other] != place[node] + step:
                return None
    lowest = min(place.values())
    return {node: layer - lowest for node, layer in place.items()}


def strongest(strength: NDArray[Any], nodes: Iterable[Hashable], cut: float = 0.0) -> nx.DiGraph:
    """The DAG of the strongest edges: added from the strongest on, those that would close a cycle left out.

    Args:
        strength: ``[d, d]``, entry [j, i] of the edge i -> j.
        nodes: d labels.
        cut: edges not stronger than this are left out.
    """
    names = list(nodes)
    graph: nx.DiGraph = nx.DiGraph()
    graph.add_nodes_from(names)
    for flat in np.argsort(-strength, axis=None, kind="stable"):
        j, i = divmod(int(flat), len(names))
        if strength[j, i] <= cut:
            break
        if not nx.has_path(graph, names[j], names[i]):
            graph.add_edge(names[i], names[j])
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
