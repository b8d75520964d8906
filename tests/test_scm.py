from collections.abc import Callable, Mapping
from typing import Any

import networkx as nx
import pyro
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pyro import poutine
from pyro.infer import Predictive
from torch import Tensor

from pyro_scm import graphs
from pyro_scm.batch import Batch, Schema
from pyro_scm.errors import ModelError
from pyro_scm.handlers import Expose
from pyro_scm.likelihoods import Gaussian
from pyro_scm.model import LatentModel
from pyro_scm.nn import MaskedMLP, mlp
from pyro_scm.priors import StandardPrior
from pyro_scm.scm import IndependentSCM, LatentSCM, LinearSCM, MechanismSCM, OrderFreeSCM

NAN = float("nan")


# ---------------------------------------------------------------------- the textbook: one node after the other
def equation(scm: LatentSCM, j: int, values: list[Tensor]) -> Tensor | float:
    """f_j of the parents of node j, which the graph names; `values` are those of the nodes before it."""
    parents = sorted(scm.nodes.index(p) for p in scm.graph.predecessors(scm.nodes[j]))
    if not parents:
        return 0.0
    if isinstance(scm, LinearSCM):
        return sum((scm.weight[j, i] * values[i] for i in parents), torch.zeros(()))
    assert isinstance(scm, MechanismSCM)
    generations = list(nx.topological_generations(scm.graph))
    level = next(g for g, nodes in enumerate(generations) if scm.nodes[j] in nodes)
    net = scm.mechanisms[level - 1]
    assert isinstance(net, MaskedMLP)
    row = j - sum(len(nodes) for nodes in generations[:level])
    units = [
        sum((net.first[row, h, i] * values[i] for i in parents), net.offset[row, h]).clamp(min=0)
        for h in range(net.first.shape[1])
    ]
    return sum((net.second[row, h] * unit for h, unit in enumerate(units)), torch.zeros(()))


def textbook(
    scm: LatentSCM, z: Tensor, gain: Tensor | None = None, do: Mapping[int, Tensor | float] | None = None
) -> Tensor:
    """c by a loop over nodes: c_j = v where do(c_j := v), else g_j f_j(PA_j) + z_j."""
    values: list[Tensor] = []
    for j in range(scm.latent):
        if do and j in do:
            values.append(torch.as_tensor(do[j], dtype=z.dtype).expand(z.shape[:-1]))
        else:
            g = 1.0 if gain is None else gain[..., j]
            values.append((g * equation(scm, j, values) + z[..., j]).expand(z.shape[:-1]))
    return torch.stack(values, -1)


def labelled(seed: int) -> nx.DiGraph:
    """A random DAG over strings whose alphabetical order is not a topological one."""
    names = ["theta", "alpha", "zeta", "beta", "mu", "eta"]
    return nx.relabel_nodes(graphs.multi_growing(6, seed), dict(enumerate(names)))


def graph_of(kind: str, seed: int) -> nx.DiGraph:
    return {
        "growing": lambda: graphs.growing(6, seed),
        "multi-growing": lambda: graphs.multi_growing(7, seed),
        "layered": lambda: graphs.layered(7, 3),
        "full": lambda: graphs.full(5),
        "empty": lambda: graphs.independent(4),
        "strings": lambda: labelled(seed),
    }[kind]()


KINDS = ("growing", "multi-growing", "layered", "full", "empty", "strings")
LAYERS: dict[str, Callable[[nx.DiGraph], LatentSCM]] = {"linear": LinearSCM, "network": MechanismSCM}


def layer(mechanism: str, graph: nx.DiGraph, seed: int = 0) -> LatentSCM:
    """A causal layer in double precision with weights of size one."""
    torch.manual_seed(seed)
    scm = LAYERS[mechanism](graph).double()
    with torch.no_grad():
        for p in scm.parameters():
            p.normal_()
    return scm


@settings(derandomize=True, max_examples=60, deadline=None)
@given(
    mechanism=st.sampled_from(sorted(LAYERS)),
    kind=st.sampled_from(KINDS),
    shape=st.sampled_from([(), (5,), (2, 5)]),
    gain_shape=st.sampled_from([None, (), (5,)]),
    clamp=st.sampled_from(["none", "scalar", "per cell"]),
    seed=st.integers(0, 50),
)
def test_the_solution_is_that_of_the_textbook(
    mechanism: str, kind: str, shape: tuple[int, ...], gain_shape: tuple[int, ...] | None, clamp: str, seed: int
) -> None:
    scm = layer(mechanism, graph_of(kind, seed), seed)
    d = scm.latent
    z = torch.randn(*shape, d, dtype=torch.float64)
    gain = None
    if gain_shape is not None and len(gain_shape) <= len(shape):
        gain = torch.tensor([0.0, 1.0, -1.0, 0.5]).double()[torch.randint(4, (*gain_shape, d))]
    do, values = None, {}
    if clamp != "none":
        nodes = torch.randperm(d)[: int(torch.randint(1, d + 1, ()))].tolist()
        batch = shape if clamp == "per cell" else ()
        do = torch.full((*batch, d), NAN, dtype=torch.float64)
        for j in nodes:
            values[j] = torch.randn(batch, dtype=torch.float64)
            do[..., j] = values[j]
    found = scm.solve(z, gain, do)
    assert found.shape == (*shape, d)
    torch.testing.assert_close(found, textbook(scm, z, gain, values), rtol=1e-9, atol=1e-9)


def test_independent_noise_is_its_own_solution() -> None:
    scm = IndependentSCM(3)
    assert scm.nodes == (0, 1, 2)
    assert scm.sites == ("c_0", "c_1", "c_2")
    assert list(scm.parameters()) == []
    z = torch.randn(2, 4, 3)
    assert torch.equal(scm.solve(z), z)
    assert torch.equal(scm.solve(z, torch.zeros(3)), z)
    do = torch.tensor([NAN, 7.0, NAN])
    expected = z.clone()
    expected[..., 1] = 7
    assert torch.equal(scm.solve(z, None, do), expected)


def test_three_nodes_by_hand() -> None:
    """c_0 = z_0; c_1 = 2 c_0 + z_1; c_2 = -c_0 + c_1 / 2 + z_2."""
    scm = LinearSCM(graphs.full(3))
    with torch.no_grad():
        scm.weight.copy_(torch.tensor([[9.0, 9.0, 9.0], [2.0, 9.0, 9.0], [-1.0, 0.5, 9.0]]))  # 9: no edge, not read
    z = torch.ones(3)
    assert scm.matrix.tolist() == [[0, 0, 0], [2, 0, 0], [-1, 0.5, 0]]
    assert scm.solve(z).tolist() == [1, 3, 1.5]
    assert scm.solve(z, do=torch.tensor([NAN, 10.0, NAN])).tolist() == [1, 10, 5]
    assert scm.solve(z, do=torch.tensor([4.0, NAN, NAN])).tolist() == [4, 9, 1.5]
    assert scm.solve(z, do=torch.tensor([4.0, NAN, 0.0])).tolist() == [4, 9, 0]
    assert scm.solve(z, torch.tensor([1.0, 0.0, 1.0])).tolist() == [1, 1, 0.5]
    assert scm.solve(z, torch.tensor([1.0, -1.0, 1.0])).tolist() == [1, -1, -0.5]
    assert scm.solve(z, torch.tensor([1.0, -1.0, 0.0]), torch.tensor([2.0, NAN, NAN])).tolist() == [2, -3, 1]


def test_three_nodes_of_networks_by_hand() -> None:
    """0 -> 1 -> 2 with f_1(c) = 2 relu(c - 1), f_2(c) = -relu(c): one hidden unit each."""
    scm = MechanismSCM(graphs.layered(3, 3), hidden=1)
    with torch.no_grad():
        for net, (first, offset, second) in zip(scm.mechanisms, [(1.0, -1.0, 2.0), (1.0, 0.0, -1.0)], strict=True):
            assert isinstance(net, MaskedMLP)
            net.first.fill_(first)
            net.offset.fill_(offset)
            net.second.fill_(second)
    z = torch.tensor([[3.0, 0.5, 0.0], [0.0, -2.0, 1.0]])
    assert scm.solve(z).tolist() == [[3, 4.5, -4.5], [0, -2, 1]]
    assert scm.solve(z, do=torch.tensor([NAN, 1.0, NAN])).tolist() == [[3, 1, -1], [0, 1, 0]]


@pytest.mark.parametrize("kind", KINDS)
def test_the_matrix_is_nilpotent(kind: str) -> None:
    scm = layer("linear", graph_of(kind, 1))
    assert isinstance(scm, LinearSCM)
    a = scm.matrix.detach()
    assert torch.equal(a, a.tril(-1))
    longest = nx.dag_longest_path_length(scm.graph)
    assert (torch.linalg.matrix_power(a, longest + 1) == 0).all()
    assert longest == 0 or (torch.linalg.matrix_power(a, longest) != 0).any()
    z = torch.randn(4, scm.latent, dtype=torch.float64)
    c = scm.solve(z).detach()
    torch.testing.assert_close(c - c @ a.T, z)


def test_the_adjacency_is_that_of_the_graph_in_the_order_of_the_nodes() -> None:
    for mechanism in LAYERS:
        scm = layer(mechanism, labelled(3))
        assert set(scm.nodes) == set(scm.graph.nodes)
        assert scm.sites == tuple(f"c_{n}" for n in scm.nodes)
        edges = {(scm.nodes[int(i)], scm.nodes[int(j)]) for j, i in scm.adjacency().nonzero().tolist()}
        assert edges == set(scm.graph.edges)
        assert torch.equal(scm.adjacency(), scm.adjacency().tril(-1))


def test_nodes_are_in_lexicographic_topological_order() -> None:
    assert LinearSCM(graphs.from_edges([(10, 2), (9, 2)])).nodes == (9, 10, 2)
    assert LinearSCM(graphs.from_edges([("b", "a")], ["c"])).nodes == ("b", "a", "c")
    assert MechanismSCM(graphs.growing(5, 3)).nodes == (0, 1, 3, 4, 2)  # generation by generation


def test_labels_that_read_the_same_are_refused() -> None:
    with pytest.raises(ModelError, match=r"nodes 1, '1' share the site 'c_1': give each another label"):
        LinearSCM(graphs.from_edges([(1, "1")]))


@pytest.mark.parametrize("build", [*LAYERS.values(), LatentSCM])
def test_a_cycle_makes_no_layer(build: Callable[[nx.DiGraph], LatentSCM]) -> None:
    with pytest.raises(ModelError, match="the latent graph has a cycle"):
        build(nx.DiGraph([(0, 1), (1, 0)]))


# ---------------------------------------------------------------------- laws of interventions
@pytest.mark.parametrize("mechanism", sorted(LAYERS))
@settings(derandomize=True, max_examples=12, deadline=None)
@given(kind=st.sampled_from(KINDS), seed=st.integers(0, 20))
def test_do_moves_descendants_and_nothing_else(mechanism: str, kind: str, seed: int) -> None:
    scm = layer(mechanism, graph_of(kind, seed), seed)
    if isinstance(scm, MechanismSCM):
        with torch.no_grad():  # every hidden unit active: no effect is lost in a ReLU's flat half
            for net in scm.mechanisms:
                assert isinstance(net, MaskedMLP)
                net.first.abs_()
                net.second.abs_()
                net.offset.fill_(50.0)
    z = torch.randn(3, scm.latent, dtype=torch.float64)
    before = scm.solve(z).detach()
    for j, node in enumerate(scm.nodes):
        do = torch.full((scm.latent,), NAN, dtype=torch.float64)
        do[j] = float(before[:, j].abs().max()) + 1
        after = scm.solve(z, do=do).detach()
        moved = {scm.nodes[i] for i in range(scm.latent) if ((after - before)[:, i].abs() > 1e-9).any()}
        assert moved == nx.descendants(scm.graph, node) | {node}
        assert (after[:, j] == do[j]).all()


@pytest.mark.parametrize("mechanism", sorted(LAYERS))
def test_a_hard_intervention_is_do_with_the_node_s_own_noise(mechanism: str) -> None:
    scm = layer(mechanism, graphs.multi_growing(7, 2))
    z = torch.randn(4, 7, dtype=torch.float64)
    for j in range(7):
        gain, do = torch.ones(7).double(), torch.full((4, 7), NAN).double()
        gain[j], do[:, j] = 0, z[:, j]
        torch.testing.assert_close(scm.solve(z, gain), scm.solve(z, None, do))


@pytest.mark.parametrize("mechanism", sorted(LAYERS))
def test_setting_nodes_to_what_they_are_changes_nothing(mechanism: str) -> None:
    scm = layer(mechanism, graphs.full(5))
    z = torch.randn(4, 5, dtype=torch.float64)
    c = scm.solve(z)
    torch.testing.assert_close(scm.solve(z, do=c.detach()), c)  # composition, all nodes at once
    do = torch.full((4, 5), NAN, dtype=torch.float64)
    do[:, 2] = c[:, 2].detach()
    torch.testing.assert_close(scm.solve(z, do=do), c)


def test_many_interventions_are_solved_in_one_call() -> None:
    scm = layer("linear", graphs.multi_growing(6, 4))
    z = torch.randn(5, 6, dtype=torch.float64)
    clamp = torch.full((6, 2, 1, 6), NAN, dtype=torch.float64)
    for j in range(6):
        clamp[j, :, 0, j] = torch.tensor([-1.0, 2.0])
    found = scm.solve(z, None, clamp)
    assert found.shape == (6, 2, 5, 6)
    for j in range(6):
        for v, value in enumerate((-1.0, 2.0)):
            torch.testing.assert_close(found[j, v], textbook(scm, z, None, {j: value}))


@pytest.mark.parametrize("mechanism", sorted(LAYERS))
def test_gradients_reach_the_weights_that_have_an_edge_and_stop_at_an_intervention(mechanism: str) -> None:
    scm = layer(mechanism, graphs.layered(4, 2))
    z = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    scm.solve(z).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in scm.parameters())
    do = torch.tensor([1.0, NAN, NAN, NAN], dtype=torch.float64)
    (gradient,) = torch.autograd.grad(scm.solve(z, None, do).sum(), z)
    assert (gradient[:, 0] == 0).all()
    assert (gradient[:, 1] != 0).any()


def test_initial_effects_are_small_and_drawn_anew() -> None:
    torch.manual_seed(0)
    scm = LinearSCM(graphs.full(60))
    assert float(scm.matrix.detach()[scm.mask > 0].std()) == pytest.approx(0.1, rel=0.05)
    before = scm.weight.detach().clone()
    scm.reset_parameters()
    assert (scm.weight[scm.mask > 0] != before[scm.mask > 0]).all()
    assert float(LinearSCM(graphs.full(60), initial=2.0).matrix.detach().abs().max()) > 2


# ---------------------------------------------------------------------- the Pyro program
SCHEMA = Schema(genes=tuple("abcd"), environments=("control",), features=("f",), counts=False, cells=5)


def model_of(mechanism: str) -> LatentModel:
    torch.manual_seed(3)
    graph = graphs.from_edges([(0, 1), (0, 3), (1, 3), (3, 4)], range(5))
    scm = LAYERS[mechanism](graph)
    with torch.no_grad():
        for p in scm.parameters():
            p.normal_()
    return LatentModel(StandardPrior(5), Gaussian(mlp(5, (8,), 4), SCHEMA), scm=scm)


def unobserved() -> Batch:
    return Batch.example(SCHEMA, 5).unobserved()


def per_node(model: LatentModel) -> Callable[[Batch], Tensor]:
    """The same model as anyone would write it in Pyro: a deterministic site for each node, always."""

    def program(batch: Batch) -> Tensor:
        prior = model.prior(batch)
        with batch.plate():
            z = pyro.sample("z", prior)
            values: list[Tensor] = []
            for j, name in enumerate(model.sites):
                natural = equation(model.scm, j, values) + z[..., j]
                values.append(torch.as_tensor(pyro.deterministic(name, natural, event_dim=0)))
            wide = torch.broadcast_tensors(*values, z[..., 0])[:-1]
            c = pyro.deterministic("c", torch.stack(wide, -1), event_dim=1)
            x: Tensor = pyro.sample("x", model.likelihoods[0].distribution(c, batch), obs=batch.x)  # type: ignore
        return x

    return program


VALUES = torch.tensor([0.3, -1.0, 2.0, 0.0, 5.0])
INTERVENTIONS: dict[str, dict[str, Any]] = {
    "none": {},
    "one scalar": {"c_3": 2.0},
    "one integer": {"c_1": 2},
    "one per cell": {"c_1": VALUES},
    "two scalars": {"c_3": -1.0, "c_0": torch.tensor(0.7)},
    "two mixed": {"c_0": VALUES, "c_3": 1.5},
    "two unrelated": {"c_2": 4.0, "c_4": VALUES},
    "all": {f"c_{j}": float(j) for j in range(5)},
}


def run(program: Callable[..., Any], batch: Batch) -> Any:
    torch.manual_seed(11)
    return poutine.trace(program).get_trace(batch)


@pytest.mark.parametrize("mechanism", sorted(LAYERS))
@pytest.mark.parametrize("given_names", INTERVENTIONS)
def test_do_equals_the_per_node_program(mechanism: str, given_names: str) -> None:
    data = INTERVENTIONS[given_names]
    model = model_of(mechanism)
    found = run(poutine.do(model, data=data), unobserved())
    expected = run(poutine.do(per_node(model), data=data), unobserved())
    torch.testing.assert_close(found.nodes["z"]["value"], expected.nodes["z"]["value"])
    torch.testing.assert_close(found.nodes["c"]["value"], expected.nodes["c"]["value"])
    torch.testing.assert_close(found.nodes["x"]["value"], expected.nodes["x"]["value"])
    for name in data:
        natural = expected.nodes[name]["value"]
        torch.testing.assert_close(found.nodes[name]["value"], natural.expand(5))
    torch.testing.assert_close(found.log_prob_sum(), expected.log_prob_sum())


def test_c_is_after_the_intervention_and_the_node_s_site_before_it() -> None:
    model = model_of("linear")
    factual = run(model, unobserved()).nodes["c"]["value"]
    trace = run(poutine.do(model, data={"c_3": 2.0}), unobserved())
    assert (trace.nodes["c"]["value"][:, 3] == 2).all()
    torch.testing.assert_close(trace.nodes["c_3"]["value"], factual[:, 3])
    torch.testing.assert_close(trace.nodes["c"]["value"][:, :3], factual[:, :3])
    effect = float(model.scm.matrix[4, 3].detach())  # type: ignore
    torch.testing.assert_close(trace.nodes["c"]["value"][:, 4], factual[:, 4] + effect * (2 - factual[:, 3]))


def test_the_natural_value_of_a_descendant_is_under_the_interventions_before_it() -> None:
    model = model_of("linear")
    trace = run(poutine.do(model, data={"c_0": 1.0, "c_1": 5.0}), unobserved())
    z, a = trace.nodes["z"]["value"], model.scm.matrix.detach()  # type: ignore
    torch.testing.assert_close(trace.nodes["c_1"]["value"], a[1, 0] * 1.0 + z[:, 1])


def test_no_node_has_a_site_when_nobody_asks() -> None:
    model = model_of("network")
    trace = run(poutine.condition(poutine.do(model, data={}), data={"x": torch.zeros(5, 4)}), unobserved())
    assert [n for n in trace.nodes if n.startswith("c")] == ["c"]
    assert "c_3" in run(poutine.do(model, data={"c_3": 0.0}), unobserved()).nodes


def test_training_solves_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("linear")
    calls: list[int] = []
    solve = model.scm._solve
    monkeypatch.setattr(model.scm, "_solve", lambda *given: calls.append(1) or solve(*given))
    run(model, unobserved())
    assert len(calls) == 1
    run(poutine.do(model, data={"c_3": 0.0, "c_4": 1.0}), unobserved())
    assert len(calls) == 1 + 3


def test_scalar_interventions_need_one_matrix_for_all_cells(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("linear")
    gains: list[Any] = []
    solve = model.scm._solve
    monkeypatch.setattr(model.scm, "_solve", lambda z, gain: gains.append(gain) or solve(z, gain))
    run(poutine.do(model, data={"c_3": 0.0, "c_4": torch.tensor(1.0)}), unobserved())
    assert [None if g is None else g.dim() for g in gains] == [None, 1, 1]
    gains.clear()
    run(poutine.do(model, data={"c_3": VALUES}), unobserved())
    assert [None if g is None else g.dim() for g in gains] == [None, 2]


@pytest.mark.parametrize("mechanism", sorted(LAYERS))
def test_do_with_z_conditioned_or_replayed(mechanism: str) -> None:
    model, z = model_of(mechanism), torch.randn(5, 5)
    data = {"c_1": VALUES, "c_3": 0.5}
    imposed = {model.sites.index("c_1"): VALUES, model.sites.index("c_3"): 0.5}
    expected = textbook(model.scm, z, None, imposed)
    inside = run(poutine.do(poutine.condition(model, data={"z": z}), data=data), unobserved())
    outside = run(poutine.condition(poutine.do(model, data=data), data={"z": z}), unobserved())
    factual = run(model, unobserved())
    factual.nodes["z"]["value"] = z
    replayed = run(poutine.do(poutine.replay(model, trace=factual), data=data), unobserved())
    for trace in (inside, outside, replayed):
        torch.testing.assert_close(trace.nodes["c"]["value"], expected)
    twice = run(poutine.do(poutine.do(model, data={"c_1": VALUES}), data={"c_3": 0.5}), unobserved())
    expected = textbook(model.scm, twice.nodes["z"]["value"], None, imposed)
    torch.testing.assert_close(twice.nodes["c"]["value"], expected)


def test_observed_cells_stay_observed_under_do() -> None:
    model = model_of("linear")
    batch = Batch.example(SCHEMA, 5)
    trace = run(poutine.do(model, data={"c_3": 2.0}), batch)
    assert trace.nodes["x"]["is_observed"]
    assert torch.equal(trace.nodes["x"]["value"], batch.x)


def test_conditioning_on_a_node_sets_it_for_its_descendants() -> None:
    model = model_of("network")
    found = run(poutine.condition(model, data={"c_1": VALUES}), unobserved())
    expected = run(poutine.condition(per_node(model), data={"c_1": VALUES}), unobserved())
    torch.testing.assert_close(found.nodes["c"]["value"], expected.nodes["c"]["value"])
    assert torch.equal(found.nodes["c_1"]["value"], VALUES)
    assert found.log_prob_sum().isfinite()


@pytest.mark.parametrize("mechanism", sorted(LAYERS))
@pytest.mark.parametrize("given_names", ["none", "one scalar", "one per cell", "two mixed"])
def test_predictive_in_parallel_equals_the_per_node_program(mechanism: str, given_names: str) -> None:
    data = INTERVENTIONS[given_names]
    model, answers = model_of(mechanism), []
    for program in (model, per_node(model)):
        torch.manual_seed(2)
        predictive = Predictive(
            poutine.do(program, data=data), num_samples=3, parallel=True, return_sites=("z", "c", "x", *data)
        )
        answers.append(predictive(unobserved()))
    found, expected = answers
    assert found["c"].shape == (3, 5, 5)
    for name in found:
        torch.testing.assert_close(
            found[name].reshape(3, 5, -1), expected[name].expand_as(found[name]).reshape(3, 5, -1)
        )


def test_predictive_with_given_noise_answers_each_draw() -> None:
    model, z = model_of("linear"), torch.randn(4, 5, 5)
    program = poutine.do(model, data={"c_1": VALUES, "c_3": 0.5})
    c = Predictive(program, posterior_samples={"z": z}, parallel=True, return_sites=("c",))(unobserved())["c"]
    torch.testing.assert_close(c, textbook(model.scm, z, None, {1: VALUES, 3: 0.5}))


def test_exposing_all_nodes_changes_no_value() -> None:
    for mechanism in LAYERS:
        model = model_of(mechanism)
        plain, exposed = run(model, unobserved()), run(Expose(model.sites)(model), unobserved())
        torch.testing.assert_close(exposed.nodes["c"]["value"], plain.nodes["c"]["value"])
        torch.testing.assert_close(exposed.nodes["x"]["value"], plain.nodes["x"]["value"])
        for j, name in enumerate(model.sites):
            torch.testing.assert_close(exposed.nodes[name]["value"], plain.nodes["c"]["value"][:, j])
        torch.testing.assert_close(exposed.log_prob_sum(), plain.log_prob_sum())


def test_nodes_with_names_are_addressed_by_them() -> None:
    graph = graphs.from_edges([("gata1", "klf1"), ("spi1", "klf1")])
    model = LatentModel(StandardPrior(3), Gaussian(mlp(3, (), 4), SCHEMA), scm=LinearSCM(graph, initial=1.0))
    assert model.sites == ("c_gata1", "c_spi1", "c_klf1")
    trace = run(poutine.do(model, data={"c_spi1": 3.0}), unobserved())
    z = trace.nodes["z"]["value"]
    torch.testing.assert_close(trace.nodes["c"]["value"], textbook(model.scm, z, None, {1: 3.0}))


@pytest.mark.parametrize("gained", [False, True])
def test_single_interventions_at_once_equal_the_general_solution(gained: bool) -> None:
    torch.manual_seed(5)
    scm = LinearSCM(graphs.multi_growing(7, seed=2))
    with torch.no_grad():
        scm.weight.normal_()
    z, values = torch.randn(11, 7), torch.tensor([-1.5, 0.0, 4.0])
    gain = torch.rand(11, 7) if gained else None
    found = scm.solve_each(z, [0, 3, 6], values, gain)
    assert found.shape == (3, 3, 11, 7)
    for row, j in zip(found, [0, 3, 6], strict=True):
        for c, value in zip(row, values, strict=True):
            clamp = torch.full((7,), torch.nan)
            clamp[j] = value
            assert torch.allclose(c, scm.solve(z, gain, clamp), atol=1e-4)
            assert torch.allclose(c[:, j], value, atol=1e-5)


# ---------------------------------------------------------------------- edges that are learnt
def test_an_edge_below_the_cut_is_absent_and_can_come_back() -> None:
    scm = LinearSCM(graphs.full(3), cut=0.2)
    with torch.no_grad():
        scm.weight.copy_(torch.tensor([[9.0, 9.0, 9.0], [0.1, 9.0, 9.0], [-0.5, 0.2, 9.0]]))
    assert torch.equal(scm.matrix, torch.tensor([[0.0, 0, 0], [0, 0, 0], [-0.5, 0, 0]]))
    assert list(scm.learnt().edges) == [(0, 2)]
    z = torch.randn(4, 3)
    assert torch.equal(scm.solve(z)[:, 1], z[:, 1])
    (slope,) = torch.autograd.grad(scm.solve(z)[:, 1].sum(), scm.weight)
    assert float(slope[1, 0]) == pytest.approx(float(z[:, 0].sum()), rel=1e-5)  # as if the gate were open


def test_a_gate_of_a_network_closes_what_cannot_matter() -> None:
    torch.manual_seed(0)
    scm = MechanismSCM(graphs.full(3), hidden=5, cut=0.3)
    last = scm.mechanisms[-1]
    with torch.no_grad():
        last.first[:, :, 0] *= 0.01  # type: ignore[index, operator]
    assert float(scm.strength()[2, 0].detach()) == 0
    assert (1, 2) in scm.learnt().edges
    assert (0, 2) not in scm.learnt().edges
    z = torch.randn(6, 3)
    cut = scm.solve(z, do=torch.tensor([5.0, 0.0, NAN]))
    assert torch.allclose(cut[:, 2], scm.solve(z, do=torch.tensor([-5.0, 0.0, NAN]))[:, 2])
    ungated = MechanismSCM(graphs.full(3), hidden=5)
    bound = ungated.strength().detach()
    for i in (0, 1):  # the strength bounds the slope
        step = torch.zeros(3)
        step[i] = 1e-2
        change = (ungated.effects(z + step) - ungated.effects(z)).abs().amax(0) / 1e-2
        assert bool((change <= bound[:, i] + 1e-3).all())


@settings(derandomize=True, max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000), gain_shape=st.sampled_from([None, (), (5,)]), clamp=st.booleans())
def test_an_order_free_layer_solves_any_order_and_cycles_too(
    seed: int, gain_shape: tuple[int, ...] | None, clamp: bool
) -> None:
    torch.manual_seed(seed)
    scm = OrderFreeSCM(4, initial=0.3, cut=0.0).double()
    with torch.no_grad():
        scm.weight.normal_().mul_(0.3)
    z = torch.randn(5, 4, dtype=torch.float64)
    gain = None if gain_shape is None else torch.randint(0, 2, (*gain_shape, 4)).double()
    do = torch.tensor([NAN, 2.0, NAN, NAN]).double() if clamp else None
    c = scm.solve(z, gain, do)
    expected = (1.0 if gain is None else gain) * (c @ scm.matrix.T) + z
    if clamp:
        expected[..., 1] = 2.0
    assert torch.allclose(c, expected)
    if not clamp:
        assert torch.allclose(scm.noise(c, gain), z)
    values = torch.tensor([-1.0, 3.0]).double()
    each = scm.solve_each(z, [0, 2], values)
    for a, j in enumerate((0, 2)):
        for b, value in enumerate(values):
            asked = torch.full((4,), NAN, dtype=torch.float64)
            asked[j] = value
            assert torch.allclose(each[a, b], scm.solve(z, None, asked))


def test_cutting_every_variable_leaves_the_noise_in_any_order() -> None:
    scm = OrderFreeSCM(3, initial=1.0, cut=0.0)
    z = torch.randn(6, 3)
    assert torch.allclose(scm.solve(z, torch.zeros(3)), z)


def test_an_order_free_layer_restricted_to_its_graph_is_the_linear_one() -> None:
    scm = OrderFreeSCM(3, cut=0.0)
    with torch.no_grad():
        scm.weight.copy_(torch.tensor([[0.0, 0.9, 0.1], [0.2, 0.0, 0.8], [0.0, 0.0, 0.0]]))
    graph = scm.learnt(0.05)
    assert sorted(graph.edges) == [(1, 0), (2, 0), (2, 1)]  # 0 -> 1 would close a cycle
    scm.restrict(graph)
    assert sorted(scm.learnt().edges) == sorted(graph.edges)
    linear = LinearSCM(graph)
    order = [scm.nodes.index(n) for n in linear.nodes]
    with torch.no_grad():
        linear.weight.copy_(scm.matrix[order][:, order])
    z = torch.randn(5, 3)
    assert torch.allclose(scm.solve(z)[:, order], linear.solve(z[:, order]))
    with pytest.raises(ModelError, match="edges that this layer never had"):
        scm.restrict(graphs.full(3))
    with pytest.raises(ModelError, match="give the same"):
        scm.restrict(graphs.full(4))


@pytest.mark.parametrize("layer", [LinearSCM, MechanismSCM])
def test_a_negative_cut_is_refused(layer: Any) -> None:
    with pytest.raises(ModelError, match="cut = -1: give the size below which an edge is absent"):
        layer(graphs.full(2), cut=-1)


def test_no_edges_have_no_strength() -> None:
    assert torch.equal(IndependentSCM(2).strength(), torch.zeros(2, 2))
    assert not IndependentSCM(2).learnt().edges
