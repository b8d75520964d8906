"""Mediated and path-specific effects, against products of coefficients and against equations written out by hand."""

import itertools
from typing import Any

import networkx as nx
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from pyro_scm.data import synthetic
from pyro_scm.data.dataset import EnvironmentDataset
from pyro_scm.errors import InterventionError
from pyro_scm.query import Action, counterfactual, effect, mediate, path_effect
from tests.screens import cells, fitted

DIAMOND = [[0, 1], [0, 2], [1, 3], [2, 3], [1, 2]]
Array = NDArray[np.float64]


class Known:
    """A screen over a diamond of five edges whose truth answers, and its equations as plain functions."""

    def __init__(self, mechanism: str, decoder: str, *interventions: str) -> None:
        self.adata = synthetic.simulate(
            latent=4, genes=6, environments=4, cells=9, graph=DIAMOND, mechanism=mechanism, decoder=decoder, noise=0.3,
            interventions=interventions or ("shift",), attachment=0.7, seed=3,
        )  # fmt: skip
        self.cells: EnvironmentDataset = synthetic.dataset(self.adata)
        self.pair: Any = synthetic.known(self.adata, self.cells)
        self.model: Any = self.pair[0]
        self.z = np.asarray(self.adata.obsm["z"], np.float64)
        table = self.adata.uns["truth"]["parameters"].get("regime.gain")
        self.gain = np.ones((36, 4)) if table is None else table.astype(np.float64)[self.cells.env]

    def f(self, j: int, c: Array) -> Array:
        """f_j(PA_j), from the stored weights."""
        state = {name: value.double().numpy() for name, value in self.model.scm.state_dict().items()}
        if "weight" in state:
            return np.asarray(c @ (state["weight"] * state["mask"])[j])
        start = self.model.scm.widths[0]
        for g, width in enumerate(self.model.scm.widths[1:]):
            if start <= j < start + width:
                mask, first, second, offset = (
                    state[f"mechanisms.{g}.{name}"][j - start] for name in ("mask", "first", "second", "offset")
                )
                units = np.maximum(c[:, : len(mask)] @ (first * mask).T + offset, 0)
                return np.asarray(units @ second)
            start += width
        return np.zeros(len(c))

    def solve(self, given: dict[int, Any]) -> Array:
        """c with some variables set."""
        c = np.zeros_like(self.z)
        for j in range(4):
            c[:, j] = given[j] if j in given else self.z[:, j] + self.gain[:, j] * self.f(j, c)
        return c

    def decode(self, c: Array) -> Array:
        with torch.no_grad():
            found: Array = (
                self.model.likelihoods[0].mean(torch.as_tensor(c, dtype=torch.float32), None).double().numpy()
            )
        return found


@pytest.fixture(scope="module")
def linear() -> Known:
    return Known("linear", "linear")


@pytest.fixture(scope="module")
def curved() -> Known:
    return Known("network", "network", "shift", "mechanism", "hard")


def close(found: Any, expected: Any) -> None:
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------------- natural direct and indirect effects
def test_linear_effects_are_products_of_coefficients(linear: Known) -> None:
    """c_0 -> {c_1, c_2} -> c_3 with c_1 -> c_2; mediator c_1."""
    a = linear.adata.uns["truth"]["parameters"]["scm.weight"] * linear.adata.uns["truth"]["parameters"]["scm.mask"]
    b = linear.adata.uns["truth"]["parameters"]["likelihoods.0.net.weight"]
    step = 1.5
    found = mediate(linear.pair, linear.cells, ["c_1"], do={"c_0": lambda c: c + step})
    # through c_1: its own effect on genes, and that by c_2 and c_3
    by_1 = a[1, 0] * (b[:, 1] + a[2, 1] * (b[:, 2] + a[3, 2] * b[:, 3]) + a[3, 1] * b[:, 3])
    past_1 = b[:, 0] + a[2, 0] * (b[:, 2] + a[3, 2] * b[:, 3])
    assert np.abs(by_1).max() > 0.5
    assert np.abs(past_1).max() > 0.5
    for values, slope in ((found.indirect, by_1), (found.direct, past_1), (found.total, by_1 + past_1)):
        close(values.values, np.broadcast_to(step * slope, (1, 1, 36, 6)))
    close(found.total_indirect.values, found.indirect.values)  # no interaction in a linear model
    close(found.total_direct.values, found.direct.values)


@pytest.mark.parametrize("mediators", [[1], [2], [3], [1, 2], [1, 3], [1, 2, 3]])
def test_nonlinear_effects_are_those_of_the_equations_written_out(curved: Known, mediators: list[int]) -> None:
    natural, act = curved.solve({}), {0: 2.0}
    moved = curved.solve(act)
    direct = curved.solve({**act, **{m: natural[:, m] for m in mediators}})
    indirect = curved.solve({m: moved[:, m] for m in mediators})
    found = mediate(curved.pair, curved.cells, [f"c_{m}" for m in mediators], do={"c_0": 2.0})
    x, base = curved.decode(moved), curved.decode(natural)
    close(found.total.values[0, 0], x - base)
    close(found.direct.values[0, 0], curved.decode(direct) - base)
    close(found.indirect.values[0, 0], curved.decode(indirect) - base)
    close(found.total_direct.values[0, 0], x - curved.decode(indirect))
    close(found.total_indirect.values[0, 0], x - curved.decode(direct))
    assert np.abs(found.indirect.values - found.total_indirect.values).max() > 0.1  # the equations do interact


def test_the_total_effect_is_direct_minus_the_indirect_effect_of_the_way_back(curved: Known) -> None:
    to, back = {"c_0": 2.0}, {"c_0": -1.0}
    there = mediate(curved.pair, curved.cells, ["c_2"], do=to, versus=back)
    reverse = mediate(curved.pair, curved.cells, ["c_2"], do=back, versus=to)
    close(there.total.values, there.direct.values - reverse.indirect.values)
    close(there.total.values, there.indirect.values - reverse.direct.values)
    close(there.total.values, effect(curved.pair, curved.cells, do=to, versus=back).values)
    assert np.abs(there.total.values - there.direct.values - there.indirect.values).max() > 0.1


def test_an_environment_works_through_the_nodes_that_it_shifts() -> None:
    known = Known("linear", "linear")
    e = 1
    targets = np.flatnonzero(known.adata.uns["truth"]["targets"][e])
    name = str(known.cells.environments.index[e])
    controls = known.cells.of("control")
    pair: Any = synthetic.known(known.adata, controls)
    through = [f"c_{j}" for j in range(4)]
    found = mediate(pair, controls, through, environment=name)
    assert not found.direct.values.any()  # expression hears of the environment by c alone
    close(found.indirect.values, counterfactual(pair, controls, environment=name).effect)
    others = [f"c_{j}" for j in range(targets[0])]  # not downstream of the target
    if others:
        assert not mediate(pair, controls, others, environment=name).indirect.values.any()


def test_actions_on_noise_and_laws_are_mediated_too(linear: Known) -> None:
    given = {"noise": {"c_0": lambda z: z + 1}, "versus": Action(noise={"c_0": lambda z: z - 1})}
    found = mediate(linear.pair, linear.cells, ["c_1", "c_2"], **given)  # type: ignore[arg-type]
    close(found.total.values, mediate(linear.pair, linear.cells, ["c_1"], **given).total.values)  # type: ignore[arg-type]
    close(found.total.values, found.direct.values + found.total_indirect.values)


def test_effects_of_runs_have_members_and_draws() -> None:
    found = mediate(fitted(), cells(), ["c_1"], do={"c_0": 1.0}, draws=3)
    assert found.total.values.shape == (2, 3, 100, 8)
    table = found.summary(level=0.8)
    assert list(table.columns) == ["effect", "sd", "low", "high"]
    assert set(table.index.get_level_values("kind")) == {
        "total", "direct", "indirect", "total_direct", "total_indirect",
    }  # fmt: skip
    parts = table["effect"].unstack("kind")
    np.testing.assert_allclose(parts["total"], parts["direct"] + parts["total_indirect"], atol=1e-5)
    assert len(found.direct.by("plate")) == 16


def test_mediators_that_make_no_sense_are_refused(linear: Known) -> None:
    for through in ([], ["c_0"], ["c_1", "c_0"]):
        with pytest.raises(InterventionError, match="name some nodes that the actions do not set themselves"):
            mediate(linear.pair, linear.cells, through, do={"c_0": 1.0})
    with pytest.raises(InterventionError, match="no causal variable 'c_9'"):
        mediate(linear.pair, linear.cells, ["c_9"], do={"c_0": 1.0})


# ---------------------------------------------------------------------- paths
def every_path(source: str = "c_0") -> list[tuple[str, ...]]:
    graph = nx.DiGraph([(f"c_{a}", f"c_{b}") for a, b in DIAMOND] + [(f"c_{j}", "x") for j in range(4)])
    return [tuple(path) for path in nx.all_simple_paths(graph, source, "x")]


def test_a_linear_path_carries_the_product_of_its_coefficients(linear: Known) -> None:
    a = linear.adata.uns["truth"]["parameters"]["scm.weight"] * linear.adata.uns["truth"]["parameters"]["scm.mask"]
    b = linear.adata.uns["truth"]["parameters"]["likelihoods.0.net.weight"]
    total = np.zeros((1, 1, 36, 6))
    paths = every_path()
    assert len(paths) == 7
    for path in paths:
        nodes = [int(name[2:]) for name in path[:-1]]
        product = np.prod([a[j, i] for i, j in itertools.pairwise(nodes)]) * b[:, nodes[-1]]
        found = path_effect(linear.pair, linear.cells, [path], do={"c_0": lambda c: c + 2}).values
        close(found, np.broadcast_to(2 * product, found.shape))
        total += found
    close(total, effect(linear.pair, linear.cells, do={"c_0": lambda c: c + 2}).values)


@pytest.mark.parametrize("number", [1, 2, 3])
def test_nonlinear_path_effects_are_nested_counterfactuals(curved: Known, number: int) -> None:
    base = curved.solve({})

    def value(node: int, prefixes: list[tuple[str, ...]]) -> Array:
        """By enumeration: the node's own equation, told by each parent what the paths through it say."""
        if any(len(p) == 1 for p in prefixes):
            return np.full(36, 2.0)
        told = base.copy()
        for i in range(node):
            mine = [p[:-1] for p in prefixes if p[-2] == f"c_{i}"]
            if mine:
                told[:, i] = value(i, mine)
        return curved.z[:, node] + curved.gain[:, node] * curved.f(node, told)

    for chosen in list(itertools.combinations(every_path(), number))[:20]:
        told = base.copy()
        for i in range(4):
            mine = [p[:-1] for p in chosen if p[-2] == f"c_{i}"]
            if mine:
                told[:, i] = value(i, mine)
        expected = curved.decode(told) - curved.decode(base)
        found = path_effect(curved.pair, curved.cells, chosen, do={"c_0": 2.0}).values[0, 0]
        close(found, expected)


def test_all_paths_together_carry_the_whole_effect(curved: Known) -> None:
    found = path_effect(curved.pair, curved.cells, every_path(), do={"c_0": 2.0}, versus={"c_0": -1.0})
    close(found.values, effect(curved.pair, curved.cells, do={"c_0": 2.0}, versus={"c_0": -1.0}).values)
    through = [p for p in every_path() if "c_1" in p]
    mediated = mediate(curved.pair, curved.cells, ["c_1"], do={"c_0": 2.0}).indirect
    close(path_effect(curved.pair, curved.cells, through, do={"c_0": 2.0}).values, mediated.values)


def test_paths_of_members_with_draws() -> None:
    found = path_effect(fitted(), cells(), [("c_0", "x")], do={"c_0": 1.0}, draws=2)
    assert found.values.shape == (2, 2, 100, 8)


@pytest.mark.parametrize(
    ("paths", "why"),
    [
        ([], "no paths: name some"),
        ([("c_0", "c_3", "x")], "c_0 -> c_3 is no edge of the graph"),
        ([("c_0", "c_1")], "it has to go from a node that do sets to 'x'"),
        ([("c_1", "x")], "it has to go from a node that do sets to 'x'"),
        ([("x",)], "it has to go from a node that do sets to 'x'"),
        ([("c_0", "c_2", "x")], "do cuts it at c_2"),
        ([("c_0", "c_7", "x")], "no causal variable 'c_7'"),
    ],
)
def test_what_is_no_path_is_refused(linear: Known, paths: list[tuple[str, ...]], why: str) -> None:
    with pytest.raises(InterventionError, match=why):
        path_effect(linear.pair, linear.cells, paths, do={"c_0": 1.0, "c_2": 1.0})


def test_both_worlds_of_a_path_effect_act_on_the_same_nodes(linear: Known) -> None:
    with pytest.raises(InterventionError, match="versus sets 'c_1', do does not"):
        path_effect(linear.pair, linear.cells, [("c_0", "x")], do={"c_0": 1.0}, versus={"c_1": 1.0})
