"""Which DAGs a layered graph holds: every small DAG, against the definitions tried out by brute force."""

from collections.abc import Iterator
from itertools import chain, combinations, permutations, product

import networkx as nx
import pytest
import torch

from pyro_scm import graphs
from pyro_scm.errors import ModelError
from pyro_scm.scm import LinearSCM, MechanismSCM

SHAPES = [(3, 1), (3, 2), (3, 3), (4, 2), (4, 3), (5, 2), (5, 3), (6, 2), (6, 3)]


def dags(nodes: int) -> Iterator[nx.DiGraph]:
    """Every DAG in one topological order of its nodes, so each at least once but for the names of its nodes."""
    pairs = [(i, j) for j in range(nodes) for i in range(j)]
    for edges in chain.from_iterable(combinations(pairs, k) for k in range(len(pairs) + 1)):
        yield graphs.from_edges(edges, range(nodes))


def holds(host: nx.DiGraph, graph: nx.DiGraph) -> dict[int, int] | None:
    """A place in the host for each node with every edge kept, by trying them all."""
    for places in permutations(host, len(graph)):
        if all(host.has_edge(places[a], places[b]) for a, b in graph.edges):
            return dict(zip(graph, places, strict=True))
    return None


def levels(graph: nx.DiGraph, widths: list[int], skip: bool) -> bool:
    """Whether nodes can be given layers: edges to the next one (with `skip` to any later one), no layer too full."""
    for layer in product(range(len(widths)), repeat=len(graph)):
        steps = [layer[b] - layer[a] for a, b in graph.edges]
        if all(s >= 1 if skip else s == 1 for s in steps) and all(
            layer.count(n) <= width for n, width in enumerate(widths)
        ):
            return True
    return False


def widths_of(host: nx.DiGraph, depth: int) -> list[int]:
    """By the rule that the documentation states: equal, the first ones a node wider where depth does not divide."""
    each, more = divmod(len(host), depth)
    return [each + 1] * more + [each] * (depth - more)


@pytest.mark.parametrize(("nodes", "depth"), SHAPES)
def test_layers_hold_exactly_the_dags_whose_edges_go_from_a_layer_to_the_next(nodes: int, depth: int) -> None:
    host = graphs.layered(nodes, depth)
    widths = widths_of(host, depth)
    for size in range(1, min(nodes, 4) + 1):
        for graph in dags(size):
            assert (holds(host, graph) is not None) == levels(graph, widths, skip=False)
            if nodes % depth == 0:
                assert (graphs.layers_of(graph, depth, nodes // depth) is not None) == levels(graph, widths, skip=False)


@pytest.mark.parametrize(("nodes", "depth"), SHAPES)
def test_with_edges_to_all_later_layers_they_hold_every_dag_of_that_depth_and_width(nodes: int, depth: int) -> None:
    host = nx.transitive_closure(graphs.layered(nodes, depth))
    widths = widths_of(host, depth)
    for size in range(1, min(nodes, 4) + 1):
        for graph in dags(size):
            held = holds(host, graph) is not None
            assert held == levels(graph, widths, skip=True)
            deep = nx.dag_longest_path_length(graph) + 1
            wide = max(len(a) for a in nx.antichains(graph))
            if deep <= depth and wide <= min(widths):
                assert held
            if deep > depth:
                assert not held


def test_about_half_of_the_dags_of_depth_3_and_width_2_fit_three_layers_of_two() -> None:
    """Of the 31 DAGs of four nodes, 17 have paths of three nodes at most and no three nodes without a path."""
    kinds: list[nx.DiGraph] = []
    for graph in dags(4):
        if not any(nx.is_isomorphic(graph, other) for other in kinds):
            kinds.append(graph)
    small = [g for g in kinds if nx.dag_longest_path_length(g) < 3 and max(map(len, nx.antichains(g))) <= 2]
    layers = graphs.layered(6, 3)
    assert (len(kinds), len(small)) == (31, 17)
    assert sum(holds(layers, g) is not None for g in small) == 9
    assert all(holds(nx.transitive_closure(layers), g) for g in small)


@pytest.mark.parametrize("relay", [False, True])
def test_a_shortcut_has_no_place_but_a_longer_way_round_it_has(relay: bool) -> None:
    edges = [(0, 1), (1, 2), (0, 3), (3, 2)] if relay else [(0, 1), (1, 2), (0, 2)]
    graph = graphs.from_edges(edges)
    assert (graphs.layers_of(graph, 3, 2) is not None) == relay
    assert (holds(graphs.layered(6, 3), graph) is not None) == relay


def test_a_relay_node_adds_noise_of_its_own() -> None:
    """The relayed shortcut is another model: with the relay's noise, c_2 given c_0 and c_1 varies more."""
    scm = LinearSCM(graphs.from_edges([(0, 1), (1, 2), (0, 3), (3, 2)]))
    with torch.no_grad():
        scm.weight.copy_(scm.mask)
    torch.manual_seed(0)
    z = torch.randn(4000, 4)
    c = scm.solve(z)[:, [scm.nodes.index(n) for n in range(3)]]
    residual = c[:, 2] - c[:, 1] - c[:, 0]
    assert float(residual.detach().var()) == pytest.approx(2.0, rel=0.1)  # 1 from z_2, 1 from the relay


def test_a_linear_layer_can_be_restricted_to_a_dag_that_is_held_and_to_no_other() -> None:
    layers = graphs.layered(6, 3)
    for graph in dags(3):
        place = holds(layers, graph) or {0: 0, 1: 2, 2: 4}
        placed = graphs.from_edges([(place[a], place[b]) for a, b in graph.edges], range(6))
        scm = LinearSCM(layers)
        if holds(layers, graph) is None:
            with pytest.raises(ModelError, match="edges that this layer never had"):
                scm.restrict(placed)
        else:
            scm.restrict(placed)
            assert int((scm.strength() > 0).sum()) == graph.number_of_edges()


def test_network_mechanisms_of_layers_read_the_layer_before_and_nothing_else() -> None:
    scm = MechanismSCM(graphs.layered(6, 3), hidden=4)
    strength = scm.strength().detach()
    assert bool(((strength > 0) == (scm.adjacency() > 0)).all())
    assert int((strength > 0).sum()) == 8
    c = torch.randn(1, 6)
    moved = c.clone()
    moved[:, :2] += 1.0  # the first layer
    effects, after = scm.effects(c), scm.effects(moved)
    assert bool((effects[:, 4:] == after[:, 4:]).all())  # says nothing to the last one directly
    assert not bool((effects[:, 2:4] == after[:, 2:4]).all())
