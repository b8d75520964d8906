from itertools import pairwise, permutations

import networkx as nx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyro_scm import graphs
from pyro_scm.errors import ModelError


def test_independent_nodes_have_no_edges() -> None:
    graph = graphs.independent(4)
    assert list(graph.nodes) == [0, 1, 2, 3]
    assert graph.number_of_edges() == 0


def test_the_full_graph_has_every_edge_to_a_later_node() -> None:
    graph = graphs.full(4)
    assert sorted(graph.edges) == [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]
    assert nx.dag_longest_path_length(graph) == 3


def test_layers_are_of_equal_width_and_fully_connected_to_the_next() -> None:
    graph = graphs.layered(5, 2)
    assert sorted(graph.edges) == [(0, 3), (0, 4), (1, 3), (1, 4), (2, 3), (2, 4)]
    assert graphs.layered(4, 1).number_of_edges() == 0
    assert sorted(graphs.layered(3, 3).edges) == [(0, 1), (1, 2)]


@settings(derandomize=True, max_examples=25, deadline=None)
@given(nodes=st.integers(1, 30), depth=st.integers(1, 30))
def test_a_layered_graph_is_as_deep_as_asked(nodes: int, depth: int) -> None:
    depth = min(depth, nodes)
    graph = graphs.layered(nodes, depth)
    assert list(graph.nodes) == list(range(nodes))
    assert nx.dag_longest_path_length(graph) == depth - 1
    widths = [len(g) for g in nx.topological_generations(graph)]
    assert max(widths) - min(widths) <= 1
    assert graph.number_of_edges() == sum(a * b for a, b in pairwise(widths))


@pytest.mark.parametrize("depth", [0, 4])
def test_a_depth_that_makes_no_layers_is_refused(depth: int) -> None:
    with pytest.raises(ModelError, match=f"{depth} layers for 3 nodes: choose a depth between 1 and"):
        graphs.layered(3, depth)


@settings(derandomize=True, max_examples=25, deadline=None)
@given(nodes=st.integers(1, 40), seed=st.integers(0, 1000))
def test_a_growing_network_is_a_tree_whose_nodes_hang_from_earlier_ones(nodes: int, seed: int) -> None:
    graph = graphs.growing(nodes, seed)
    assert list(graph.nodes) == list(range(nodes))
    assert [graph.in_degree(j) for j in range(nodes)] == [0] + [1] * (nodes - 1)
    assert all(i < j for i, j in graph.edges)
    assert nx.is_weakly_connected(graph)


@settings(derandomize=True, max_examples=25, deadline=None)
@given(nodes=st.integers(1, 40), seed=st.integers(0, 1000), parents=st.integers(0, 5))
def test_a_multi_growing_network_has_at_most_so_many_parents(nodes: int, seed: int, parents: int) -> None:
    graph = graphs.multi_growing(nodes, seed, parents)
    assert list(graph.nodes) == list(range(nodes))
    assert all(graph.in_degree(j) <= min(parents, j) for j in range(nodes))
    assert all(i < j for i, j in graph.edges)


def test_every_number_of_parents_occurs() -> None:
    graph = graphs.multi_growing(200, 0)
    counts = [sum(graph.in_degree(j) == k for j in range(3, 200)) for k in range(5)]
    assert counts[4] == 0
    assert all(30 < count < 70 for count in counts[:4])  # 197 / 4 each on average


def test_parents_of_a_growing_network_are_uniform() -> None:
    parents = [next(iter(graphs.growing(4, seed).predecessors(3))) for seed in range(600)]
    assert all(150 < parents.count(i) < 250 for i in range(3))


@pytest.mark.parametrize("build", [graphs.growing, graphs.multi_growing])
def test_random_graphs_are_those_of_their_seed(build: object) -> None:
    assert callable(build)
    assert sorted(build(20, 4).edges) == sorted(build(20, 4).edges)
    assert sorted(build(20, 4).edges) != sorted(build(20, 5).edges)


def test_a_graph_from_edges_keeps_labels_and_lonely_nodes() -> None:
    graph = graphs.from_edges([("gata1", "klf1"), ("gata1", "spi1")], ["lonely"])
    assert set(graph.nodes) == {"gata1", "klf1", "spi1", "lonely"}
    assert sorted(graph.edges) == [("gata1", "klf1"), ("gata1", "spi1")]


def test_a_cycle_is_named() -> None:
    with pytest.raises(ModelError, match=r"cycle \(.*\): an SCM needs a directed acyclic graph") as raised:
        graphs.from_edges([(0, 1), (1, 2), (2, 1)])
    assert "1 -> 2" in str(raised.value) or "2 -> 1" in str(raised.value)


def test_no_nodes_are_refused() -> None:
    with pytest.raises(ModelError, match="no nodes: give at least one"):
        graphs.checked(nx.DiGraph())


def test_a_sound_graph_is_returned_itself() -> None:
    graph = graphs.full(3)
    assert graphs.checked(graph) is graph


# ---------------------------------------------------------------------- what layers can hold
def holds(graph: nx.DiGraph, depth: int, width: int) -> bool:
    """By trying every injection of the nodes into the layers' places."""
    layers = graphs.layered(depth * width, depth)
    nodes = list(graph)
    return any(
        all(layers.has_edge(place[nodes.index(a)], place[nodes.index(b)]) for a, b in graph.edges)
        for place in permutations(layers.nodes, len(nodes))
    )


@settings(derandomize=True, max_examples=60, deadline=None)
@given(nodes=st.integers(1, 5), seed=st.integers(0, 10_000), depth=st.integers(1, 3), width=st.integers(1, 2))
def test_layers_of_finds_a_place_exactly_where_there_is_one(nodes: int, seed: int, depth: int, width: int) -> None:
    graph = graphs.multi_growing(nodes, seed, parents=2)
    found = graphs.layers_of(graph, depth, width)
    assert (found is not None) == (nodes <= depth * width and holds(graph, depth, width))
    if found is not None:
        assert set(found) == set(graph)
        assert all(found[b] == found[a] + 1 for a, b in graph.edges)
        assert max(list(found.values()).count(layer) for layer in range(depth)) <= width


def test_a_shortcut_fits_no_layers_and_a_chain_needs_its_length() -> None:
    assert graphs.layers_of(graphs.full(3), 9, 9) is None  # 0 -> 2 beside 0 -> 1 -> 2
    chain = graphs.from_edges([(0, 1), (1, 2)])
    assert graphs.layers_of(chain, 2, 3) is None
    assert graphs.layers_of(chain, 3, 1) == {0: 0, 1: 1, 2: 2}
    assert graphs.layers_of(graphs.independent(4), 2, 1) is None


def test_the_strongest_edges_are_kept_and_none_closes_a_cycle() -> None:
    strength = np.array([[0.0, 0.2, 0.5], [0.9, 0.0, 0.0], [0.0, 0.8, 0.0]])  # [j, i] of i -> j
    assert sorted(graphs.strongest(strength, "abc").edges) == [("a", "b"), ("b", "c")]
    assert sorted(graphs.strongest(strength, "abc", cut=0.8).edges) == [("a", "b")]
    assert list(graphs.strongest(0 * strength, "abc").nodes) == ["a", "b", "c"]
