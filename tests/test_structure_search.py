"""Exact search over graphs, the latents' own likelihood, and what both recover of screens whose truth is known."""

import itertools

import networkx as nx
import numpy as np
import pandas as pd
import pytest

from pyro_scm import hard_gaussian, hard_network, linear_gaussian, metrics, orders
from pyro_scm.data import synthetic
from pyro_scm.data.dataset import EnvironmentDataset
from pyro_scm.errors import DataError, ModelError
from pyro_scm.identify import Design, claims
from pyro_scm.signal_space import Signal, anchored, signal
from pyro_scm.structure_search import GraphPosterior, learn_graph, learn_latent_graph, regression_scores


def random_scores(d: int, most: int | None = None) -> list[orders.Local]:
    rng = np.random.default_rng(d)
    sets = [orders.parent_sets(j, d, most) for j in range(d)]
    return [orders.collect(d, [(s, 2 * rng.normal(size=len(s))) for s in own]) for own in sets]


def all_graphs(d: int) -> list[nx.DiGraph]:
    pairs = list(itertools.permutations(range(d), 2))
    graphs = []
    for on in itertools.product((False, True), repeat=len(pairs)):
        graph = nx.DiGraph(p for p, o in zip(pairs, on, strict=True) if o)
        graph.add_nodes_from(range(d))
        if nx.is_directed_acyclic_graph(graph):
            graphs.append(graph)
    return graphs


def value(local: list[orders.Local], graph: nx.DiGraph) -> float:
    chosen = [sum(1 << i for i in graph.predecessors(j)) for j in range(len(local))]
    found = [own.score[own.sets == bits] for own, bits in zip(local, chosen, strict=True)]
    return sum(float(f[0]) if len(f) else -np.inf for f in found)


# ---------------------------------------------------------------------- exact search
@pytest.mark.parametrize(("d", "most"), [(1, None), (2, None), (3, None), (4, None), (4, 1)])
def test_the_search_finds_what_enumeration_finds(d: int, most: int | None) -> None:
    local = random_scores(d, most)
    values = {graph: value(local, graph) for graph in all_graphs(d)}
    best = max(values, key=lambda g: values[g])
    assert set(orders.best(local).edges) == set(best.edges)
    weights = {g: np.exp(v) * sum(1 for _ in nx.all_topological_sorts(g)) for g, v in values.items()}
    expected = np.zeros((d, d))
    for graph, weight in weights.items():
        for i, j in graph.edges:
            expected[i, j] += weight / sum(weights.values())
    assert orders.edge_probabilities(local) == pytest.approx(expected, abs=1e-10)


def test_each_number_of_parents_is_as_likely_a_priori() -> None:
    local = orders.collect(4, [(s, np.zeros(len(s))) for s in orders.parent_sets(1, 4)])
    size = np.array([int(s).bit_count() for s in local.sets])
    prior = np.exp(local.score)
    assert [prior[size == k].sum() for k in range(4)] == pytest.approx([1, 1, 1, 1])
    assert not (local.sets & 0b10).any()  # none is its own parent


def test_scores_of_a_quadratic_likelihood_are_its_integrals() -> None:
    precision, linear = np.array([[4.0, 1.0], [1.0, 2.0]]), np.array([3.0, -1.0])
    local = orders.parent_scores(0, precision, linear)
    grid = np.linspace(-8, 8, 1601)
    step = grid[1] - grid[0]
    prior = np.exp(-(grid**2) / 2) / np.sqrt(2 * np.pi)
    alone = np.log((np.exp(3 * grid - 2 * grid**2) * prior).sum() * step)
    a, b = np.meshgrid(grid, grid, indexing="ij")
    exponent = 3 * a - b - (4 * a * a + 2 * a * b + 2 * b * b) / 2
    both = np.log((np.exp(exponent) * prior[:, None] * prior).sum() * step**2)
    found = dict(zip(local.sets.tolist(), local.score, strict=True))
    assert found[0] == 0
    assert found[0b010] == pytest.approx(alone - np.log(2), abs=1e-6)
    assert found[0b110] == pytest.approx(both, abs=1e-6)


def test_too_many_nodes_are_refused() -> None:
    empty = [orders.Local(np.zeros(1, np.int64), np.zeros(1))] * 21
    with pytest.raises(ModelError, match="21 nodes: the exact search takes 1 to 20"):
        orders.best(empty)


# ---------------------------------------------------------------------- observed variables
def chain(
    n: int = 400, shift: bool = False, seed: int = 0, power: int = 1
) -> tuple[pd.DataFrame, np.ndarray, np.ndarray]:
    """a -> b -> c, an environment on each; hard, or a shift that leaves parents."""
    rng = np.random.default_rng(seed)
    env = np.repeat(np.arange(4), n)
    targets = np.concatenate([np.zeros((1, 3)), np.eye(3)])
    x = np.zeros((4 * n, 3))
    for j in range(3):
        acted = targets[env, j] > 0
        parent = 0 if j == 0 else np.sign(x[:, j - 1]) * np.abs(x[:, j - 1]) ** power
        x[:, j] = np.where(acted & (not shift), 0, parent) + rng.normal(size=4 * n) + 2 * acted
    return pd.DataFrame(x, columns=["a", "b", "c"]), env, targets


@pytest.mark.parametrize("kind", ["hard", "shift"])
@pytest.mark.parametrize("mechanism", ["linear", "additive"])
def test_the_chain_of_measured_variables_is_found(kind: str, mechanism: str) -> None:
    found = learn_graph(*chain(shift=kind == "shift"), mechanism=mechanism, interventions=kind)
    assert set(found.graph.edges) == {("a", "b"), ("b", "c")}
    p = found.edge_probabilities
    assert p.loc["a", "b"] > 0.99
    assert p.loc["b", "a"] < 0.01
    assert found.edges().iloc[0]["probability"] == p.to_numpy().max()
    assert found.identifiability().loc["graph", "holds"]
    assert "a" in str(found)


def test_without_interventions_linear_probabilities_leave_the_direction_open() -> None:
    x, env, targets = chain()
    found = learn_graph(x[env == 0], env[env == 0], targets[:1])
    p = found.edge_probabilities
    assert 0.2 < p.loc["a", "b"] < 0.8
    assert p.loc["a", "b"] + p.loc["b", "a"] > 0.99
    assert not found.identifiability().loc["graph", "holds"]


def test_batches_take_away_what_environments_share_by_chance() -> None:
    x, env, targets = chain()
    unrelated = x.assign(b=np.random.default_rng(1).normal(size=len(x)), c=np.random.default_rng(2).normal(size=len(x)))
    moved = unrelated + 3 * np.random.default_rng(3).normal(size=(4, 1))[env]  # a day effect on all
    assert learn_graph(moved, env, targets, batches=True).graph.number_of_edges() == 0
    assert learn_graph(moved, env, targets).graph.number_of_edges() > 0


def test_splines_see_what_a_line_does_not() -> None:
    rng = np.random.default_rng(0)
    a = rng.normal(size=600)
    x = np.stack([a, a**2 + rng.normal(size=600)], 1)
    env, targets = np.zeros(600, np.int64), np.zeros((1, 2))
    gains = {}
    for mechanism in ("linear", "additive"):
        own = regression_scores(x, env, targets, mechanism=mechanism)[1]
        gains[mechanism] = own.score[own.sets == 1][0] - own.score[own.sets == 0][0]
    assert gains["linear"] < 5
    assert gains["additive"] > 100


def test_resamples_spread_probabilities_and_are_repeatable() -> None:
    x, env, targets = chain(n=20)
    one = learn_graph(x, env, targets, resamples=5, seed=3).edge_probabilities
    assert one.equals(learn_graph(x, env, targets, resamples=5, seed=3).edge_probabilities)
    assert not one.equals(learn_graph(x, env, targets).edge_probabilities)


def test_wrong_tables_are_refused() -> None:
    x, env, targets = chain(n=20)
    with pytest.raises(DataError, match=r"expected \(n, d\), \(n,\) and \(E, d\)"):
        learn_graph(x, env, targets[:, :2])
    with pytest.raises(DataError, match="env holds environment 3, targets has 2 rows"):
        learn_graph(x, env, targets[:2])
    with pytest.raises(DataError, match="values must be finite"):
        learn_graph(x.assign(a=np.nan), env, targets)
    with pytest.raises(DataError, match="variable 0 is left alone in 0 cells"):
        learn_graph(x, env, np.ones((4, 3)))
    with pytest.raises(ModelError, match="unknown mechanism 'tree': use one of linear, additive"):
        learn_graph(x, env, targets, mechanism="tree")
    with pytest.raises(ModelError, match="unknown interventions 'soft'"):
        learn_graph(x, env, targets, interventions="soft")
    with pytest.raises(ModelError, match="most_parents = -1"):
        learn_graph(x, env, targets, most_parents=-1)


# ---------------------------------------------------------------------- latents
EDGES = [[0, 1], [1, 2], [0, 3]]


def screen(cells: int = 400, **options: object) -> tuple[EnvironmentDataset, "object"]:
    given = {"latent": 4, "genes": 16, "environments": 5, "graph": EDGES, "decoder": "linear", **options}
    adata = synthetic.simulate(cells=cells, interventions=("hard",), strength=3.0, constant=True, **given)  # type: ignore[arg-type]
    return synthetic.dataset(adata), adata


def moments(adata: "object") -> tuple[Signal, np.ndarray, np.ndarray]:
    env = adata.obs["perturbation"].cat.codes.to_numpy().astype(np.int64)  # type: ignore[attr-defined]
    targets = np.asarray(adata.uns["truth"]["targets"], np.float64)  # type: ignore[attr-defined]
    return signal(np.asarray(adata.X, np.float64), env, len(targets), targets.shape[1]), env, targets  # type: ignore[attr-defined]


def test_the_signal_space_holds_the_latents_and_knows_its_error() -> None:
    _, adata = screen(noise=0.5)
    space, env, _ = moments(adata)
    c = adata.obsm["c"]  # type: ignore[attr-defined]
    both = np.column_stack([space.y, np.ones(len(c))])
    left = c - both @ np.linalg.lstsq(both, c, rcond=None)[0]
    assert (1 - left.var(0) / c.var(0)).min() > 0.9
    own = np.cov(space.y[env == 0].T, bias=True) - space.error
    assert own == pytest.approx(np.eye(4), abs=0.02)
    assert space.mean[0] == pytest.approx(np.zeros(4), abs=1e-9)


def test_scores_are_the_gradient_and_the_information_that_of_the_law() -> None:
    _, adata = screen(cells=100)
    space, _, targets = moments(adata)
    model = hard_gaussian.HardGaussian(space, targets)
    rng = np.random.default_rng(0)
    p = model.start(np.eye(4), np.eye(4)) + 0.1 * rng.normal(size=model.size)
    gradient, information = model.score(p)
    numeric = [
        (model.log_likelihood(p + 1e-5 * e) - model.log_likelihood(p - 1e-5 * e)) / 2e-5 for e in np.eye(model.size)
    ]
    assert gradient == pytest.approx(np.array(numeric), rel=1e-4, abs=1e-2)
    assert np.linalg.eigvalsh(information).min() > -1e-6 * np.abs(information).max()
    # where the moments are exactly those of the parameters, minus the Hessian is the information
    _, _, mixed, variance, _, mean = model._law(model.unpack(p))
    own = (mixed * variance[:, None, :]) @ mixed.transpose(0, 2, 1) + space.error
    exact = hard_gaussian.HardGaussian(Signal(space.y, space.error, space.loading, space.count, mean, own), targets)
    step = 1e-5
    columns = [(exact.score(p + step * e)[0] - exact.score(p - step * e)[0]) / (2 * step) for e in np.eye(model.size)]
    assert -np.array(columns) == pytest.approx(exact.score(p)[1], rel=1e-3, abs=0.05)


def named(posterior: GraphPosterior) -> set[tuple[int, int]]:
    return {(int(a), int(b)) for a, b in posterior.graph.edges}


def test_hard_interventions_give_latents_graph_and_effects() -> None:
    cells, adata = screen()
    found = learn_latent_graph(cells)
    assert named(found) == {tuple(e) for e in EDGES}
    c = adata.obsm["c"]  # type: ignore[attr-defined]
    assert min(abs(np.corrcoef(found.values.to_numpy()[:, j], c[:, j])[0, 1]) for j in range(4)) > 0.98
    assert found.effects is not None
    assert found.effects.abs().loc["0", "1"] == pytest.approx(1, abs=0.3)
    assert found.edge_probabilities.loc["0", "1"] > 0.95
    assert found.edge_probabilities.loc["1", "0"] < 0.05
    assert found.identifiability().loc["graph", "holds"]


def test_latents_without_known_targets_have_the_names_of_environments() -> None:
    _, adata = screen()
    adata.obs["targets"] = pd.Categorical([None] * len(adata.obs))  # type: ignore[attr-defined]
    cells = EnvironmentDataset.from_anndata(adata, environment="perturbation", control=synthetic.CONTROL)  # type: ignore[arg-type]
    found = learn_latent_graph(cells)
    acted = np.asarray(adata.uns["truth"]["targets"])  # type: ignore[attr-defined]
    label = {int(np.flatnonzero(acted[e])[0]): f"env_{e}" for e in range(1, 5)}
    assert set(found.graph.edges) == {(label[a], label[b]) for a, b in EDGES}
    assert found.design.targets == "unknown"


def test_probabilities_of_few_cells_are_less_sure() -> None:
    many, few = (learn_latent_graph(screen(cells=n, noise=0.5)[0], resamples=r) for n, r in ((400, 0), (15, 3)))

    def unsure(found: GraphPosterior) -> float:
        p = found.edge_probabilities.to_numpy()
        return float((p * (1 - p)).sum())

    assert unsure(few) > 2 * unsure(many)


def test_mechanisms_that_are_networks_bend_lines_and_are_found() -> None:
    edges = [[0, 1], [1, 2]]
    cells, adata = screen(latent=3, genes=12, environments=4, graph=edges, mechanism="network", seed=1)
    found = learn_latent_graph(cells, mechanism="network", restarts=1)
    truth = nx.to_numpy_array(nx.DiGraph(edges), nodelist=range(3))
    matrix = nx.to_numpy_array(found.graph, nodelist=["0", "1", "2"], weight=None)
    assert metrics.shd(truth, matrix) <= 1
    assert metrics.ancestral_violations(truth, matrix) == 0
    c = adata.obsm["c"]  # type: ignore[attr-defined]
    assert min(abs(np.corrcoef(found.values.to_numpy()[:, j], c[:, j])[0, 1]) for j in range(3)) > 0.97
    assert found.effects is None
    assert found.edge_probabilities.loc["0", "1"] > 0.9


def test_the_network_likelihood_does_not_depend_on_the_scale_of_latents() -> None:
    _, adata = screen(cells=60)
    space, env, targets = moments(adata)
    network = hard_network.HardNetwork(space.y, env, targets)
    fit = network.start(np.eye(4), np.zeros((4, 4)))
    again = hard_network.Fit(0.0, 3 * fit.unmixing, fit.weight, fit.bias, fit.allowed)
    assert network.value(again, fit.allowed) == pytest.approx(network.value(fit, fit.allowed), abs=0.5)
    more = network.maximise(fit, hard_network.complete(range(4)), steps=5)
    assert more.value > fit.value


def test_a_known_mask_gives_the_latents_without_any_intervention() -> None:
    _, adata = screen(attachment=0.4, genes=24)
    space, env, _ = moments(adata)
    stored = adata.uns["truth"]["parameters"]  # type: ignore[attr-defined]
    weight = next(v for v in stored.values() if np.shape(v) == (24, 4))
    c = anchored(space, np.asarray(weight) != 0)
    true = adata.obsm["c"]  # type: ignore[attr-defined]
    assert min(abs(np.corrcoef(c[:, j], true[:, j])[0, 1]) for j in range(4)) > 0.98
    assert c[env == 0].std(0) == pytest.approx(np.ones(4), abs=0.05)
    with pytest.raises(DataError, match="latent 0: 0 genes do not read it, at least 3 must"):
        anchored(space, np.ones((24, 4), bool))
    with pytest.raises(DataError, match=r"expected \(24, 4\), genes by latents"):
        anchored(space, np.ones((3, 4), bool))


def test_screens_that_cannot_tell_are_refused() -> None:
    cells, _ = screen(cells=30)
    with pytest.raises(DataError, match="the graph needs cells of the reference environment"):
        learn_latent_graph(cells.subset(cells.env > 0))
    with pytest.raises(ModelError, match="unknown mechanism 'additive': use one of linear, network"):
        learn_latent_graph(cells, mechanism="additive")
    small = screen(cells=4)[0]
    with pytest.raises(DataError, match="environment 0 has 4 cells: 4 latents need at least 6"):
        learn_latent_graph(small)
    targets = np.zeros((3, 2))
    targets[1] = 1
    with pytest.raises(DataError, match="latent 0 has no environment that acts on it alone"):
        hard_gaussian.single_targets(targets)


def test_the_start_in_closed_form_serves_the_continuous_search_too() -> None:
    _, adata = screen(cells=200)
    space, env, targets = moments(adata)
    q = hard_gaussian.rotation(space, targets, restarts=1)
    total = hard_gaussian.effects(space, q, targets, 1.0 - np.eye(4))
    x = np.asarray(adata.X, np.float64)  # type: ignore[attr-defined]
    start = (space.loading @ q.T, np.eye(4) - np.linalg.inv(total))
    near = linear_gaussian.maximise(x, env, targets, seeds=(0,), start=start, steps=40)
    far = linear_gaussian.maximise(x, env, targets, seeds=(0,), steps=1)
    assert near.log_likelihood[0] > far.log_likelihood[0]
    assert {(int(a), int(b)) for a, b in near.graph().edges} == {tuple(e) for e in EDGES}
    with pytest.raises(DataError, match=r"start has shapes .* expected \(16, 4\), \(4, 4\)"):
        linear_gaussian.maximise(x, env, targets, start=(np.eye(4), np.eye(4)))


@pytest.mark.parametrize(
    ("mechanism", "hits", "holds"),
    [
        ("linear", (1, 1, 1), True),
        ("linear", (1, 1, 0), True),
        ("linear", (1, 0, 0), False),
        ("network", (0, 0, 0), True),
    ],
)
def test_what_measured_variables_grant(mechanism: str, hits: tuple[int, ...], holds: bool) -> None:
    granted = {c.quantity: c for c in claims(Design("hard", "known", 3, 3, hits, "none", mechanism))}
    assert list(granted) == ["noise z", "targets", "causal order", "graph"]
    assert granted["graph"].holds is holds
    assert all(c.source and c.extent for c in granted.values())
