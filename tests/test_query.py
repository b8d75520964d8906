from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from numpy.typing import NDArray
from pyro import poutine
from pyro.infer import Predictive
from torch import Tensor, nn

from guides import amortise
from pyro_scm import abduction, query
from pyro_scm.batch import Batch
from pyro_scm.data import synthetic
from pyro_scm.errors import DataError, InterventionError, ModelError
from pyro_scm.infer import fit
from pyro_scm.model import LatentModel
from pyro_scm.models import environment_vae, translation_vae
from pyro_scm.objectives import Objective
from pyro_scm.query import Contrast, counterfactual, do, effect, embed, expose, noise, predict, sweep
from pyro_scm.recipes import RECIPES
from tests.screens import cells, fitted, hierarchical, make, train

EDGES = [[0, 1], [1, 2], [0, 2]]


class Exact(nn.Module):
    """A guide that knows the true noise of every cell."""

    def __init__(self, z: Any) -> None:
        super().__init__()
        self.register_buffer("z", torch.as_tensor(z))

    def forward(self, batch: Batch) -> None:
        with batch.plate():
            pyro.sample("z", dist.Delta(self.z[batch.index], event_dim=1))


class Screen:
    """A linear SCM over three latents, a linear decoder, its cells, and the equations written out by hand."""

    def __init__(self, *interventions: str, observation: str = "gaussian") -> None:
        self.adata = synthetic.simulate(
            latent=3, genes=6, environments=5, cells=8, graph=EDGES, decoder="linear", observation=observation,
            interventions=interventions, strength=2.0,
        )  # fmt: skip
        self.cells = synthetic.dataset(self.adata)
        self.truth = synthetic.truth(self.adata)
        self.z = self.adata.obsm["z"].astype(np.float64)
        self.fitted = (self.truth, Exact(self.adata.obsm["z"]))
        parameters = self.adata.uns["truth"]["parameters"]
        self.a = parameters["scm.weight"].astype(np.float64) * parameters["scm.mask"]
        self.gain = self.table("regime.gain", 1.0)
        self.loc, self.log_scale = self.table("prior.loc", 0.0), self.table("prior.log_scale", 0.0)

    def table(self, name: str, default: float) -> NDArray[np.float64]:
        """``[E, d]`` one number an environment and latent."""
        stored = self.adata.uns["truth"]["parameters"].get(name)
        return np.full((5, 3), default) if stored is None else stored.astype(np.float64)

    def solve(self, z: Any, env: Any = None, actions: Mapping[int, Any] | None = None) -> NDArray[np.float64]:
        """c_j = do_j, or g_j sum_i A_ji c_i + z_j, one node after the other."""
        env = self.cells.env if env is None else env
        c = np.zeros_like(z)
        for j in range(3):
            c[:, j] = z[:, j] + self.gain[env, j] * (c[:, :j] @ self.a[j, :j])
            if actions and j in actions:
                value = actions[j]
                c[:, j] = value(c[:, j]) if callable(value) else value
        return c

    def expression(self, c: Any) -> NDArray[np.float64]:
        """E[x | c] of the linear decoder."""
        result: NDArray[np.float64] = c @ self.adata.uns["truth"]["parameters"]["likelihoods.0.net.weight"].T
        return result


@pytest.fixture(scope="module")
def linear() -> Screen:
    return Screen("shift", "scale")


@pytest.fixture(scope="module")
def hard() -> Screen:
    return Screen("hard", "mechanism", "shift")


def close(found: Any, expected: Any) -> None:
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


ACTIONS: dict[str, tuple[dict[str, Any], dict[int, Any]]] = {
    "the root": ({"c_0": 1.5}, {0: 1.5}),
    "the middle": ({"c_1": -2.0}, {1: -2.0}),
    "the leaf": ({"c_2": 0.0}, {2: 0.0}),
    "two nodes": ({"c_0": 1.0, "c_2": 3.0}, {0: 1.0, 2: 3.0}),
    "two nodes, the later first": ({"c_2": 3.0, "c_1": 1.0}, {1: 1.0, 2: 3.0}),
    "all nodes": ({"c_0": 1.0, "c_1": 2.0, "c_2": 3.0}, {0: 1.0, 1: 2.0, 2: 3.0}),
    "an integer": ({"c_1": 4}, {1: 4.0}),
    "one value a cell": ({"c_1": np.arange(40) / 10}, {1: np.arange(40) / 10}),
    "a tensor": ({"c_0": torch.arange(40.0)}, {0: np.arange(40.0)}),
    "a list": ({"c_0": [0.5] * 40}, {0: 0.5}),
    "a function": ({"c_1": lambda c: 2 * c + 1}, {1: lambda c: 2 * c + 1}),
    "a function below another": ({"c_0": 1.0, "c_1": lambda c: c + 1}, {0: 1.0, 1: lambda c: c + 1}),
    "functions all along": (
        {"c_2": lambda c: -c, "c_0": lambda c: c.abs() if isinstance(c, Tensor) else np.abs(c), "c_1": lambda c: c - 1},
        {0: np.abs, 1: lambda c: c - 1, 2: lambda c: -c},
    ),
}


# ---------------------------------------------------------------------- against the equations written out by hand
@pytest.mark.parametrize("kind", ["linear", "hard"])
@pytest.mark.parametrize("action", ACTIONS)
def test_counterfactuals_solve_the_equations_with_the_cells_own_noise(
    action: str, kind: str, request: pytest.FixtureRequest
) -> None:
    screen: Screen = request.getfixturevalue(kind)
    asked, imposed = ACTIONS[action]
    worlds = counterfactual(screen.fitted, screen.cells, do=asked)
    factual, expected = screen.solve(screen.z), screen.solve(screen.z, actions=imposed)
    close(screen.adata.obsm["c"], factual)
    close(worlds.z[0, 0], screen.z)
    close(worlds.factual_c[0, 0], factual)
    close(worlds.c[0, 0], expected)
    close(worlds.factual_x[0, 0], screen.expression(factual))
    close(worlds.x[0, 0], screen.expression(expected))
    close(worlds.effect, worlds.x - worlds.factual_x)
    first = min(imposed)
    np.testing.assert_array_equal(worlds.c[..., :first], worlds.factual_c[..., :first])  # ancestors do not move
    assert np.abs(expected - factual).max() > 0.1


def test_an_intervention_moves_descendants_and_nothing_else() -> None:
    adata = synthetic.simulate(latent=4, genes=5, environments=2, cells=6, graph=[[0, 2], [1, 2], [2, 3]])
    data, pair = synthetic.dataset(adata), (synthetic.truth(adata), Exact(adata.obsm["z"]))
    for node, moved in ((0, {0, 2, 3}), (1, {1, 2, 3}), (2, {2, 3}), (3, {3})):
        worlds = counterfactual(pair, data, do={f"c_{node}": 7.0})
        change = np.abs(worlds.c - worlds.factual_c)[0, 0].max(0)
        assert {j for j in range(4) if change[j] > 0} == moved
        np.testing.assert_array_equal(worlds.c[0, 0, :, node], 7.0)


def equation(model: Any, j: int) -> Callable[[Tensor], Tensor]:
    """f_j from the stored weights: c of the earlier nodes ``(n, p)`` -> ``(n,)``."""
    state = model.scm.state_dict()
    if "weight" in state:
        return lambda c: c @ (state["weight"] * state["mask"])[j, : c.shape[1]]
    start = model.scm.widths[0]
    for g, width in enumerate(model.scm.widths[1:]):
        if start <= j < start + width:
            mask, first, second = (state[f"mechanisms.{g}.{name}"][j - start] for name in ("mask", "first", "second"))
            return lambda c: torch.relu(c[:, : len(mask)] @ (first * mask).T) @ second
        start += width
    return lambda c: torch.zeros(len(c))


@pytest.mark.parametrize("mechanism", ["linear", "network"])
def test_they_equal_the_textbook_program_with_one_site_a_node(mechanism: str) -> None:
    adata = synthetic.simulate(latent=4, genes=5, environments=3, cells=5, graph="layered", mechanism=mechanism)
    data, model = synthetic.dataset(adata), synthetic.truth(adata)
    z = torch.as_tensor(adata.obsm["z"])
    order = list(model.scm.nodes)

    def textbook() -> Tensor:
        c = torch.zeros(len(z), 0)
        for j, node in enumerate(order):
            noise_j = pyro.sample(f"z_{node}", dist.Delta(z[:, j]).to_event(1))
            c_j = pyro.deterministic(f"c_{node}", equation(model, j)(c) + noise_j)
            c = torch.cat((c, c_j.expand(len(z))[:, None]), 1)
        return c

    close(textbook(), adata.obsm["c"])
    for asked in ({"c_0": 2.0}, {"c_1": torch.arange(15.0), "c_3": -1.0}, {"c_2": 0.5}):
        expected = poutine.do(textbook, data=dict(asked))()
        close(counterfactual((model, Exact(z)), data, do=asked).c[0, 0], expected)
        assert float((expected - textbook()).abs().max()) > 0.5


def test_a_guide_with_spread_gives_draws_each_with_its_own_noise(linear: Screen) -> None:
    model, guide = make("structured_environment_vae", linear.cells.schema)
    worlds = counterfactual((model, guide), linear.cells, do={"c_1": 1.0}, draws=5)
    assert worlds.z.shape == worlds.c.shape == worlds.factual_c.shape == (1, 5, 40, 3)
    assert worlds.x.shape == worlds.factual_x.shape == (1, 5, 40, 6)
    assert (worlds.z[0, 0] != worlds.z[0, 1]).all()
    with torch.no_grad():
        z = torch.as_tensor(worlds.z)
        clamp = torch.tensor([torch.nan, 1.0, torch.nan])
        close(worlds.factual_c, model.scm.solve(z))
        close(worlds.c, model.scm.solve(z, None, clamp))
        close(worlds.x, model.likelihoods[0].mean(torch.as_tensor(worlds.c), linear.cells.batch()))
    close(counterfactual((model, guide), linear.cells).z[0, 0], guide.local["z"](linear.cells.batch()).mean.detach())


def test_the_mean_of_many_draws_is_the_guides_mean() -> None:
    run, data = fitted(), cells().subset(np.arange(6))
    drawn, mean = counterfactual(run, data, draws=4000).z, counterfactual(run, data).z
    error = drawn.std(1, keepdims=True) / 4000**0.5
    assert (np.abs(drawn.mean(1, keepdims=True) - mean) < 5 * error).all()


# ---------------------------------------------------------------------- consistency
@pytest.mark.parametrize("draws", [None, 3])
@pytest.mark.parametrize("name", RECIPES)
def test_without_an_action_the_counterfactual_is_the_factual_reconstruction(name: str, draws: int | None) -> None:
    worlds = counterfactual(fitted(name), cells(), draws=draws)
    np.testing.assert_array_equal(worlds.c, worlds.factual_c)
    np.testing.assert_array_equal(worlds.x, worlds.factual_x)


@pytest.mark.parametrize("name", RECIPES)
def test_cells_put_where_they_are_stay_as_they_are(name: str) -> None:
    data = cells().of("env_2")
    worlds = counterfactual(fitted(name), data, environment="env_2", draws=2)
    close(worlds.c, worlds.factual_c)
    close(worlds.x, worlds.factual_x)


def test_what_a_node_is_anyway_can_be_imposed_without_effect(linear: Screen) -> None:
    natural = linear.solve(linear.z)[:, 1]
    worlds = counterfactual(linear.fitted, linear.cells, do={"c_1": natural})
    close(worlds.c, worlds.factual_c)


def test_cells_may_be_worked_through_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    run, values = fitted(), np.linspace(-1, 1, 100)
    whole = counterfactual(run, cells(), do={"c_1": values}, environment="env_1")
    monkeypatch.setattr(abduction, "_CHUNK", 7)
    parts = counterfactual(run, cells(), do={"c_1": values}, environment="env_1")
    for name in ("z", "factual_c", "c", "factual_x", "x"):
        np.testing.assert_allclose(getattr(parts, name), getattr(whole, name), rtol=1e-5, atol=1e-5)
    drawn = counterfactual(run, cells(), do={"c_1": values}, draws=3)
    assert drawn.c.shape == (2, 3, 100, 3)
    np.testing.assert_allclose(drawn.c[..., 1], np.broadcast_to(values, (2, 3, 100)), rtol=1e-6)


def test_answers_repeat_with_their_seed_and_leave_torchs_generator_alone() -> None:
    before = torch.get_rng_state()
    one, same, other = (counterfactual(fitted(), cells(), draws=2, seed=s).z for s in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), before)
    np.testing.assert_array_equal(one, same)
    assert (one != other).all()


def test_members_are_answered_for_in_their_order_with_noise_of_their_own() -> None:
    run = fitted()
    together = counterfactual(run, cells(), do={"c_0": 1.0})
    assert len(together.x) == 2
    for k in (0, 1):
        np.testing.assert_array_equal(counterfactual(run.member(k), cells(), do={"c_0": 1.0}).x[0], together.x[k])
    pairs = counterfactual([run.member(1), run.member(0)], cells(), do={"c_0": 1.0})
    np.testing.assert_array_equal(pairs.x, together.x[::-1])
    first, again = run.member(0), run.member(0)
    twice = counterfactual([first, again], cells(), draws=2).z
    assert (twice[0] != twice[1]).all()


def test_worlds_carry_names() -> None:
    worlds = counterfactual(fitted(), cells().subset(np.arange(3)))
    assert worlds.cells == ("cell_0", "cell_1", "cell_2")
    assert worlds.genes == tuple(f"gene_{g}" for g in range(8))
    assert worlds.nodes == ("0", "1", "2")


# ---------------------------------------------------------------------- expression as expectation or draw
def test_expression_may_be_drawn() -> None:
    run, data = fitted(), cells().subset(np.zeros(3000, dtype=int))
    drawn, mean = (counterfactual(run.member(0), data, do={"c_0": 1.0}, sample=s) for s in (True, False))
    scale = run.member(0)[0].likelihoods[0].scale.detach().numpy()  # type: ignore[index,union-attr]
    for name in ("x", "factual_x"):
        residual = (getattr(drawn, name) - getattr(mean, name))[0, 0]
        np.testing.assert_allclose(residual.std(0), scale, rtol=0.1)
        assert (np.abs(residual.mean(0)) < 5 * scale / 3000**0.5).all()


def test_drawn_counts_are_counts_at_the_cells_own_library_size() -> None:
    data = cells("negative-binomial")
    model, guide = make("vae", data.schema)
    drawn = counterfactual((model, guide), data, sample=True).x
    assert (drawn == np.round(drawn)).all()
    mean = counterfactual((model, guide), data).x[0, 0]
    np.testing.assert_allclose(mean.sum(1), data.size, rtol=1e-4)


# ---------------------------------------------------------------------- another environment
@pytest.mark.parametrize("target", ["control", "env_1", "env_2", "env_4"])
def test_another_environment_holds_the_standardised_noise(linear: Screen, target: str) -> None:
    worlds = counterfactual(linear.fitted, linear.cells, environment=target)
    e, env = list(linear.cells.environments.index).index(target), linear.cells.env
    epsilon = (linear.z - linear.loc[env]) / np.exp(linear.log_scale[env])
    z = linear.loc[e] + np.exp(linear.log_scale[e]) * epsilon
    close(worlds.factual_c[0, 0], linear.solve(linear.z))
    close(worlds.c[0, 0], linear.solve(z))
    close(worlds.x[0, 0], linear.expression(linear.solve(z)))


def test_another_environment_brings_its_own_mechanisms(hard: Screen) -> None:
    names, env = list(hard.cells.environments.index), hard.cells.env
    for e, name in enumerate(names):
        worlds = counterfactual(hard.fitted, hard.cells, environment=name, do={"c_0": 0.7})
        z = hard.loc[e] + (hard.z - hard.loc[env])
        close(worlds.c[0, 0], hard.solve(z, np.full(40, e), {0: 0.7}))
    assert (hard.gain != 1).any()


def test_an_environment_vae_in_standardised_noise_is_a_translation_vae() -> None:
    schema, data = cells().schema, cells()
    options: dict[str, Any] = {"latent": 3, "hidden": (6,), "environment_hidden": (4,)}
    torch.manual_seed(0)
    centred = environment_vae(schema, scale=False, **options)
    shifted = translation_vae(schema, **options)
    shifted.likelihoods.load_state_dict(centred.likelihoods.state_dict())
    with torch.no_grad():
        own, other = centred.prior.net, shifted.shift.net  # type: ignore[union-attr]
        other[0].load_state_dict(own[0].state_dict())  # type: ignore[index,operator,union-attr]
        other[2].weight.copy_(own[2].weight[:3])  # type: ignore[index,operator,union-attr]
        other[2].bias.copy_(own[2].bias[:3])  # type: ignore[index,operator,union-attr]
        z = torch.randn(100, 3)
        mean = centred.prior(data.batch()).mean
    assert float(mean.abs().max()) > 0.1
    questions: list[dict[str, Any]] = [
        {}, {"environment": "env_3"}, {"environment": "control"}, {"environment": "env_1", "do": {"c_1": 2.0}}
    ]  # fmt: skip
    for asked in questions:
        one = counterfactual((centred, Exact(z)), data, **asked)
        two = counterfactual((shifted, Exact(z - mean)), data, **asked)
        for name in ("factual_c", "c", "factual_x", "x"):
            np.testing.assert_allclose(getattr(one, name), getattr(two, name), rtol=1e-4, atol=1e-5)
    assert np.abs(one.z - two.z).max() > 0.1


def test_environments_of_a_pair_are_those_of_the_cells(linear: Screen) -> None:
    data = linear.cells.subset(linear.cells.env != 2)  # its environment stays in the table
    assert counterfactual(linear.fitted, data, environment="env_2").x.shape == (1, 1, 32, 6)


def test_unknown_environments_are_refused() -> None:
    with pytest.raises(DataError, match=r"no environment 'env_9' in this run: did you mean one of 'env_3'"):
        counterfactual(fitted(), cells(), environment="env_9")
    with pytest.raises(DataError, match="no environment 'env_9'"):
        counterfactual(fitted().member(0), cells(), environment="env_9")


# ---------------------------------------------------------------------- noise interventions
def test_a_noise_intervention_replaces_one_component_and_what_descends_from_it(linear: Screen) -> None:
    worlds = counterfactual(linear.fitted, linear.cells, noise={"c_1": dist.Delta(torch.tensor(4.0))})
    z = linear.z.copy()
    z[:, 1] = 4.0  # mechanisms stay: c_1 still hears its parent
    close(worlds.c[0, 0], linear.solve(z))
    close(worlds.z[0, 0], linear.z)
    np.testing.assert_array_equal(worlds.c[..., 0], worlds.factual_c[..., 0])


def test_new_noise_is_drawn_from_its_law(linear: Screen) -> None:
    law = torch.distributions.Normal(5.0, 0.5)
    worlds = counterfactual(linear.fitted, linear.cells, noise={"c_0": law}, draws=200)
    drawn = worlds.c[..., 0].ravel()
    assert len(np.unique(drawn)) > 7000
    assert abs(drawn.mean() - 5.0) < 5 * 0.5 / len(drawn) ** 0.5
    assert drawn.std() == pytest.approx(0.5, rel=0.05)


def test_do_overrules_noise_and_environment(linear: Screen) -> None:
    law = dist.Delta(torch.tensor(9.0))
    both = counterfactual(
        linear.fitted, linear.cells, environment="env_1", noise={"c_0": law, "c_1": law}, do={"c_1": -1.0}
    )
    e = 1
    epsilon = (linear.z - linear.loc[linear.cells.env]) / np.exp(linear.log_scale[linear.cells.env])
    z = linear.loc[e] + np.exp(linear.log_scale[e]) * epsilon
    z[:, :2] = 9.0
    close(both.c[0, 0], linear.solve(z, actions={1: -1.0}))


def test_a_program_under_a_noise_intervention_simulates_with_it(linear: Screen) -> None:
    program = noise(linear.truth, {"c_1": dist.Delta(torch.tensor(3.0))})
    trace = poutine.trace(program).get_trace(linear.cells.batch().unobserved())
    z, c = trace.nodes["z"]["value"].numpy(), trace.nodes["c"]["value"].numpy()
    np.testing.assert_array_equal(z[:, 1], 3.0)
    assert len(np.unique(z[:, 0])) == 40
    close(c, linear.solve(z.astype(np.float64)))


@pytest.mark.parametrize(
    "law", [torch.distributions.Normal(torch.zeros(2), 1.0), dist.Normal(torch.zeros(2), 1.0).to_event(1)]
)
def test_noise_must_be_a_law_of_one_number(law: Any) -> None:
    with pytest.raises(InterventionError, match=r"noise\(c_1 := .*: give a distribution of one number, such"):
        counterfactual(fitted(), cells(), noise={"c_1": law})


# ---------------------------------------------------------------------- do as a program
def values(program: Callable[..., Any], batch: Batch) -> Tensor:
    torch.manual_seed(0)
    with torch.no_grad():
        result: Tensor = poutine.trace(program).get_trace(batch.unobserved()).nodes["c"]["value"]
    return result


def test_do_is_pyros_do(linear: Screen) -> None:
    batch = linear.cells.batch()
    for action in ({"c_0": torch.tensor(2.0)}, {"c_1": torch.arange(40.0), "c_2": torch.tensor(0.0)}):
        assert torch.equal(values(do(linear.truth, action), batch), values(poutine.do(linear.truth, action), batch))


def test_nested_interventions_merge_and_the_later_wins(linear: Screen) -> None:
    batch = linear.cells.batch()
    first = do(linear.truth, {"c_0": 1.0, "c_1": 5.0})
    nested = do(do(first, {"c_1": 2.0}), {"c_2": 3.0})
    assert nested.sites == linear.truth.sites == ("c_0", "c_1", "c_2")
    assert values(nested, batch).unique(dim=0).tolist() == [[1, 2, 3]]
    at_once = do(linear.truth, {"c_0": 1.0, "c_1": 2.0, "c_2": 3.0})
    assert torch.equal(values(nested, batch), values(at_once, batch))
    assert values(first, batch)[:, :2].unique(dim=0).tolist() == [[1, 5]]  # left as it was


def test_a_program_can_be_run_twice_under_a_function(linear: Screen) -> None:
    program, batch = do(linear.truth, {"c_1": lambda c: c + 1}), linear.cells.batch()
    assert torch.equal(values(program, batch), values(program, batch))


def test_unknown_nodes_are_refused() -> None:
    model, _ = fitted().member(0)
    message = r"no causal variable 'c_7': this model has 'c_0', 'c_1', 'c_2'"
    with pytest.raises(InterventionError, match=message):
        do(model, {"c_7": 1.0})
    with pytest.raises(InterventionError, match=message):
        do(do(model, {"c_0": 1.0}), {"c_7": 1.0})
    with pytest.raises(InterventionError, match=message):
        noise(model, {"c_7": dist.Normal(0.0, 1.0)})
    with pytest.raises(InterventionError, match=message):
        counterfactual(fitted(), cells(), do={"c_7": 1.0})
    with pytest.raises(InterventionError, match=message):
        counterfactual(fitted(), cells(), noise={"c_7": dist.Normal(0.0, 1.0)})
    with pytest.raises(InterventionError, match=message):
        effect(fitted(), cells(), do={"c_0": 1.0}, versus={"c_7": 1.0})
    with pytest.raises(InterventionError, match=message):
        sweep(fitted(), cells(), [0.0], ["c_0", "c_7"])


@pytest.mark.parametrize("value", ["high", None, {"a": 1}])
def test_values_that_cannot_be_imposed_are_refused(value: Any) -> None:
    with pytest.raises(
        InterventionError, match=r"do\(c_0 := .*\): give a number, one value a cell, a distribution, or a function"
    ):
        do(fitted().member(0)[0], {"c_0": value})
    with pytest.raises(InterventionError, match=r"do\(c_0 := .*\): give a number"):
        counterfactual(fitted(), cells(), do={"c_0": value})


@pytest.mark.parametrize("value", [np.zeros(3), np.zeros((100, 1)), torch.zeros(101)])
def test_values_of_the_wrong_length_are_refused(value: Any) -> None:
    message = r"do\(c_0\): \(\d+, ?1?\) values for 100 cells: give a number or one value a cell"
    with pytest.raises(InterventionError, match=message):
        counterfactual(fitted(), cells(), do={"c_0": value})


def test_a_program_of_anyones_can_be_intervened_on() -> None:
    def program() -> Tensor:
        a = pyro.deterministic("a", torch.tensor(1.0))
        return a + 1

    assert float(do(program, {"a": 5.0})()) == 6.0


# ---------------------------------------------------------------------- effects
def test_an_effect_is_the_difference_of_two_worlds(linear: Screen) -> None:
    a, b, none = (linear.solve(linear.z, actions=v) for v in ({0: 1.0}, {0: -1.0}, {}))
    found = effect(linear.fitted, linear.cells, do={"c_0": 1.0}, versus={"c_0": -1.0})
    close(found.values[0, 0], linear.expression(a) - linear.expression(b))
    close(effect(linear.fitted, linear.cells, do={"c_0": 1.0}).values[0, 0], linear.expression(a - none))
    assert found.cells == linear.cells.cells
    assert found.genes == linear.cells.genes


def test_both_sides_of_a_contrast_share_their_noise() -> None:
    found = effect(fitted(), cells(), do={"c_0": 1.0}, versus={"c_0": 1.0}, draws=3)
    assert found.values.shape == (2, 3, 100, 8)
    assert not found.values.any()


def test_an_environment_may_be_part_of_the_action(linear: Screen) -> None:
    found = effect(linear.fitted, linear.cells, environment="env_1", do={"c_2": 1.0})
    worlds = counterfactual(linear.fitted, linear.cells, environment="env_1", do={"c_2": 1.0})
    np.testing.assert_array_equal(found.values, worlds.effect)


def test_the_summary_is_of_average_effects_over_members_and_draws() -> None:
    values = np.zeros((2, 2, 3, 2), np.float32)  # members, draws, cells, genes
    values[..., 0] = np.array([[[0, 1, 2], [1, 2, 3]], [[2, 3, 4], [3, 4, 5]]])  # averages over cells: 1, 2, 3, 4
    values[..., 1] = -1.0
    table = Contrast(values, ("a", "b", "c"), ("g0", "g1")).summary(level=0.5)
    assert list(table.index) == ["g0", "g1"]
    assert table.index.name == "gene"
    assert table.loc["g0"].to_dict() == pytest.approx({"effect": 2.5, "sd": 1.25**0.5, "low": 1.75, "high": 3.25})
    assert table.loc["g1"].to_dict() == pytest.approx({"effect": -1.0, "sd": 0.0, "low": -1.0, "high": -1.0})
    wide = Contrast(values, ("a", "b", "c"), ("g0", "g1")).summary(level=1.0)
    assert wide.loc["g0", ["low", "high"]].tolist() == [1.0, 4.0]


# ---------------------------------------------------------------------- sweeps
@pytest.mark.parametrize("name", ["structured_environment_vae", "structured_translation_vae", "conditional_vae"])
def test_a_sweep_is_a_loop_of_counterfactuals(name: str) -> None:
    run, grid = fitted(name), [-1.0, 0.5, 2.0]
    found = sweep(run, cells(), grid)
    assert found["c"].shape == (2, 3, 3, 100, 3)
    assert found["x"].shape == (2, 3, 3, 8)
    for j in range(3):
        for v, value in enumerate(grid):
            worlds = counterfactual(run, cells(), do={f"c_{j}": value})
            close(found["c"][:, j, v], worlds.c[:, 0])
            close(found["x"][:, j, v], worlds.x[:, 0].mean(1))


def test_a_sweep_over_cut_and_changed_mechanisms(hard: Screen) -> None:
    found = sweep(hard.fitted, hard.cells, [0.0, 1.0], ["c_2", "c_0"])
    assert found["c"].shape == (1, 2, 2, 40, 3)
    for j, node in enumerate((2, 0)):
        for v, value in enumerate((0.0, 1.0)):
            expected = hard.solve(hard.z, actions={node: value})
            close(found["c"][0, j, v], expected)
            close(found["x"][0, j, v], hard.expression(expected).mean(0))


def test_a_sweep_of_counts_is_at_the_cells_library_sizes() -> None:
    data = cells("negative-binomial")
    pair = make("vae", data.schema)
    found = sweep(pair, data, [0.0], ["c_1"])
    close(found["x"][0, 0, 0], counterfactual(pair, data, do={"c_1": 0.0}).x[0, 0].mean(0))


# ---------------------------------------------------------------------- predictions
@pytest.mark.parametrize("environment", ["env_2", "control"])
def test_predictions_are_simulations_under_the_environments_prior(environment: str) -> None:
    run = fitted("environment_vae")
    e = run.environments.index(environment)
    found = predict(run, environment, cells=4000, mean=True)
    assert found.shape == (2, 4000, 8)
    for k in (0, 1):
        model, _ = run.member(k)
        with torch.no_grad():
            r = torch.as_tensor(run.environments.representation[e])[None]
            loc, scale = model.prior.moments(r, torch.tensor([float(environment != "control")]))  # type: ignore[union-attr,operator]
            z = loc + scale * torch.randn(40_000, 3)
            expected = model.likelihoods[0].mean(z, None).numpy()  # type: ignore[index,union-attr,operator]
        error = expected.std(0) * (1 / 4000 + 1 / 40_000) ** 0.5
        assert (np.abs(found[k].mean(0) - expected.mean(0)) < 5 * error + 1e-6).all()
        np.testing.assert_allclose(found[k].std(0), expected.std(0), rtol=0.1)


def test_a_representation_that_is_known_by_name_predicts_the_same() -> None:
    run = fitted("structured_translation_vae")
    by_name = predict(run, "env_1", cells=20, seed=3)
    np.testing.assert_array_equal(predict(run, run.environments.representation[1], cells=20, seed=3), by_name)
    np.testing.assert_array_equal(predict(run, list(run.environments.representation[1]), cells=20, seed=3), by_name)  # type: ignore[arg-type]
    assert not np.array_equal(predict(run, "env_1", cells=20, seed=4), by_name)
    assert not np.array_equal(by_name[0], by_name[1])


def test_an_environment_never_heard_of_can_be_predicted() -> None:
    run = fitted("environment_vae")
    new = run.environments.representation[1] + 0.7
    found, known = (predict(run, r, cells=500, mean=True).mean(1) for r in (new, "env_1"))
    assert np.isfinite(found).all()
    assert np.abs(found - known).max() > 0.01


def test_drawn_predictions_scatter_about_their_means() -> None:
    run = fitted("environment_vae")
    drawn, mean = (predict(run, "env_1", cells=3000, mean=m) for m in (False, True))
    for k in (0, 1):
        scale = run.member(k)[0].likelihoods[0].scale.detach().numpy()  # type: ignore[index,union-attr]
        np.testing.assert_allclose(drawn[k].var(0), mean[k].var(0) + scale**2, rtol=0.15)


def test_counts_are_predicted_at_the_median_library_size() -> None:
    data = cells("negative-binomial")
    run = train("translation_vae", data, epochs=1)
    found = predict(run, "env_1", cells=30, mean=True)
    np.testing.assert_allclose(found.sum(2), np.median(data.size), rtol=1e-4)
    drawn = predict(run, "env_1", cells=30)
    assert (drawn == np.round(drawn)).all()


def test_predictions_leave_torchs_generator_alone() -> None:
    before = torch.get_rng_state()
    predict(fitted(), "env_1", cells=3)
    assert torch.equal(torch.get_rng_state(), before)


def test_environments_that_cannot_be_predicted_are_refused(linear: Screen) -> None:
    run = fitted()
    with pytest.raises(DataError, match=r"no environment 'env_8' in this run"):
        predict(run, "env_8")
    with pytest.raises(DataError, match=r"represented by 5 features, got shape \(4,\): give a vector"):
        predict(run, np.zeros(4))
    model = LatentModel(linear.truth.prior, make("vae", cells().schema)[0].likelihoods[0])
    tables = replace(run, model=model, parameters={f"model.{n}": p[None] for n, p in model.named_parameters()})
    tables.guide, tables.seeds = nn.Module(), (0,)
    with pytest.raises(ModelError, match="keeps a table of environments and cannot answer for one outside it"):
        predict(tables, np.zeros(5))


# ---------------------------------------------------------------------- embeddings
def test_embeddings_are_posterior_means(linear: Screen) -> None:
    found = embed(linear.fitted, linear.cells)
    close(found["z"][0], linear.z)
    close(found["c"][0], linear.solve(linear.z))
    found = embed(fitted(), cells())
    assert found["z"].shape == found["c"].shape == (2, 100, 3)
    model, guide = fitted().member(1)
    with torch.no_grad():
        z = guide.local["z"](cells().batch()).mean  # type: ignore[union-attr,index,operator]
        close(found["z"][1], z)
        close(found["c"][1], model.scm.solve(z))  # type: ignore[union-attr,operator]


def test_embeddings_of_a_translation_hold_the_shift() -> None:
    run = fitted("translation_vae")
    model, _ = run.member(0)
    found = embed(run, cells())
    with torch.no_grad():
        close(found["c"][0] - found["z"][0], model.shift(cells().batch()))  # type: ignore[operator]


# ---------------------------------------------------------------------- sizes
def test_an_answer_too_large_for_memory_is_refused_before_it_is_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(abduction, "_LARGEST_ANSWER", 2 * 100 * 5 * 8 * 8 - 1)
    message = r"the answer would take 0\.0 GiB \(2 members x 500 cell draws x 8 genes\): ask for fewer draws, or"
    with pytest.raises(DataError, match=message):
        counterfactual(fitted(), cells(), draws=5)
    counterfactual(fitted(), cells(), draws=4)
    with pytest.raises(DataError, match="3 members x 500 cell draws"):
        counterfactual([fitted().member(0)] * 3, cells(), draws=5)
    counterfactual(fitted().member(0), cells(), draws=5)


def test_questions_about_nothing_are_refused() -> None:
    with pytest.raises(DataError, match="0 cells and draws = None: ask about some cells"):
        counterfactual(fitted(), cells().subset(np.zeros(100, dtype=bool)))
    with pytest.raises(DataError, match="100 cells and draws = 0: ask about some cells, with draws of 1 or more"):
        counterfactual(fitted(), cells(), draws=0)


# ---------------------------------------------------------------------- AnnData
def test_answers_come_as_anndata(tmp_path: Path) -> None:
    data = cells().subset(np.arange(6))
    worlds = counterfactual(fitted(), data, do={"c_0": 1.0}, draws=3)
    adata = worlds.to_anndata(data)
    np.testing.assert_allclose(adata.X, worlds.x.mean((0, 1)), rtol=1e-6)
    np.testing.assert_array_equal(adata.layers["counterfactual"], adata.X)
    np.testing.assert_allclose(adata.layers["factual"], worlds.factual_x.mean((0, 1)), rtol=1e-6)
    np.testing.assert_allclose(adata.layers["counterfactual_sd"], worlds.x.mean(1).std(0), rtol=1e-6)
    np.testing.assert_allclose(adata.obsm["c"][:, 0], 1.0)
    np.testing.assert_allclose(adata.obsm["c_factual"], worlds.factual_c[0].mean(0), rtol=1e-6)
    np.testing.assert_allclose(adata.obsm["z"], worlds.z[0].mean(0), rtol=1e-6)
    np.testing.assert_allclose(worlds.to_anndata(data, member=1).obsm["z"], worlds.z[1].mean(0), rtol=1e-6)
    assert list(adata.obs["perturbation"]) == ["control"] * 6
    assert list(adata.uns["nodes"]) == ["0", "1", "2"]
    adata.write_h5ad(tmp_path / "answer.h5ad")
    plain = counterfactual(fitted().member(0), data).to_anndata()
    assert list(plain.obs_names) == list(data.cells)
    assert list(plain.var_names) == list(data.genes)
    assert not plain.layers["counterfactual_sd"].any()


# ---------------------------------------------------------------------- Pyro's own tools on a fitted model
def test_pyros_do_and_predictive_work_on_a_fitted_model() -> None:
    run, batch = train("structured_environment_vae", epochs=1), cells()[:6]
    program = poutine.do(run.model, data={"c_1": torch.tensor(2.0)})
    with pyro.validation_enabled(True):
        found = Predictive(program, num_samples=7, return_sites=("z", "c", "x"))(batch.unobserved())
    assert found["c"].shape == (7, 6, 3)
    assert found["x"].shape == (7, 6, 8)
    assert bool((found["c"][..., 1] == 2.0).all())
    with torch.no_grad():
        clamp = torch.tensor([torch.nan, 2.0, torch.nan])
        torch.testing.assert_close(found["c"], run.model.scm.solve(found["z"], None, clamp))  # type: ignore[union-attr,operator]
    assert float(found["c"][..., 0].std()) > 0.1


def test_parallel_predictive_agrees_about_shapes_and_values() -> None:
    run, batch = fitted(), cells()[:6]
    model, guide = run.member(0)
    parallel = Predictive(
        poutine.do(model, data={"c_0": torch.tensor(-1.0)}), guide=lambda _: guide(batch), num_samples=5, parallel=True,
        return_sites=("c", "x"),
    )(batch.unobserved())  # fmt: skip
    assert parallel["c"].shape[0] == 5
    assert bool((parallel["c"][..., 0] == -1.0).all())


def test_exposed_nodes_appear_in_traces_with_the_values_of_c(linear: Screen) -> None:
    batch = linear.cells.batch()
    plain = poutine.trace(linear.truth).get_trace(batch)
    assert not [name for name in plain.nodes if name.startswith("c_")]
    trace = poutine.trace(expose(linear.truth)).get_trace(batch)
    for j in range(3):
        close(trace.nodes[f"c_{j}"]["value"], trace.nodes["c"]["value"][:, j])
    close(values(expose(linear.truth), batch), values(linear.truth, batch))


def test_questions_leave_nothing_in_pyros_parameter_store_so_that_svi_trains_the_model_it_is_given() -> None:
    first, second = train("vae", epochs=1), train("vae", epochs=1, seeds=(1,))
    for run in (first, second):
        counterfactual(run, cells(), draws=2)
        predict(run, "env_1", cells=3)
        sweep(run, cells(), [0.0])
    assert len(pyro.get_param_store()) == 0
    before = [p.detach().clone() for p in second.model.parameters()]
    pyro.infer.SVI(second.model, second.guide, pyro.optim.Adam({"lr": 0.01}), Objective()).step(cells().batch())
    assert all(not torch.equal(p, b) for p, b in zip(second.model.parameters(), before, strict=True))


def test_models_with_frozen_parts_are_asked_without_a_word() -> None:
    model, guide = make("vae", cells().schema)
    model.likelihoods[0].requires_grad_(False)  # Pyro warns of it, and warnings are errors here
    guide = amortise(model, cells())
    run = fit(model, guide, cells(), epochs=1, progress=False)
    assert counterfactual(run, cells(), draws=2).x.shape == (1, 2, 100, 8)
    assert predict(run, "env_1", cells=2).shape == (1, 2, 8)


def test_what_is_in_pyros_parameter_store_survives_questions() -> None:
    mine = pyro.param("mine", torch.tensor(3.0))
    counterfactual(fitted(), cells().subset(np.arange(3)))
    assert list(pyro.get_param_store().keys()) == ["mine"]
    assert pyro.param("mine") is not None
    assert float(pyro.param("mine").detach()) == float(mine.detach()) == 3.0


# ---------------------------------------------------------------------- latent sites outside the plate
def test_models_with_global_latents_are_asked_like_any_other() -> None:
    model = hierarchical()
    run = fit(model, amortise(model, cells()), cells(), seeds=(0, 1), epochs=1, progress=False)
    plain = counterfactual(run, cells(), do={"c_0": 1.0})
    drawn = counterfactual(run, cells(), do={"c_0": 1.0}, draws=3)
    for worlds, draws in ((plain, 1), (drawn, 3)):
        assert worlds.c.shape == (2, draws, 100, 3)
        np.testing.assert_array_equal(worlds.c[..., 0], 1.0)
        np.testing.assert_array_equal(worlds.c[..., 1:], worlds.factual_c[..., 1:])
    assert predict(run, "env_1", cells=4).shape == (2, 4, 8)


def test_a_transformed_sites_centre_is_its_median() -> None:
    model = hierarchical()
    guide = amortise(model, cells())
    with torch.no_grad():
        latents = query.abduct(guide, cells()[:4])
    assert float(latents["spread"]) == pytest.approx(float(guide.outside["spread"].loc.detach().exp()))
    assert float(latents["share"]) == pytest.approx(float(guide.outside["share"].loc.detach().sigmoid()))
    assert torch.equal(latents["centre"], guide.outside["centre"].loc)


# ---------------------------------------------------------------------- several environments at once
def test_transport_gives_the_counterfactual_of_each_environment() -> None:
    run, data = fitted(), cells().of("env_1")
    model, guide = run.member(0)
    names = ["env_2", "control"]
    places = [lambda b, name=name: run.environments.place(b, name) for name in names]
    with query.isolated():
        factual, *others = query.transport(model, guide, data.batch(), places)
    close(factual.nodes["c"]["value"], counterfactual((model, guide), data).factual_c[0, 0])
    assert len(others) == 2
    for name, trace in zip(names, others, strict=True):
        worlds = counterfactual(run, data, environment=name)
        close(trace.nodes["c"]["value"], worlds.c[0, 0])
        close(trace.nodes["x"]["fn"].mean, worlds.x[0, 0])


def test_drawn_expression_shares_its_noise_between_worlds() -> None:
    adata = synthetic.simulate(latent=2, genes=6, environments=3, cells=20, noise=0.7)
    screen = synthetic.dataset(adata)
    truth = synthetic.known(adata, screen)
    same = counterfactual(truth, screen, sample=True, draws=3)
    assert np.array_equal(same.x, same.factual_x)
    assert not np.allclose(same.x[0, 0], same.x[0, 1])
    expected = counterfactual(truth, screen, draws=1)
    assert np.std(same.x - expected.factual_x) == pytest.approx(0.7, rel=0.1)


def test_a_sweep_of_a_wide_linear_scm_equals_the_loop_and_may_leave_expression_out() -> None:
    adata = synthetic.simulate(latent=6, genes=5, environments=3, cells=7, graph="multi-growing", decoder="linear")
    screen = synthetic.dataset(adata)
    truth = synthetic.known(adata, screen)
    found = sweep(truth, screen, [-1.0, 2.0], expression=False)
    assert set(found) == {"c", "distance", "quantile"}
    for j, site in enumerate(truth[0].sites):
        for v, value in enumerate((-1.0, 2.0)):
            alone = counterfactual(truth, screen, do={site: value}).c[:, 0]
            assert np.allclose(found["c"][:, j, v], alone, atol=1e-5)
