"""Kinds of actions, observation noise shared between worlds, simulated twin worlds, and distance from what was seen."""

from typing import Any

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from scipy.stats import nbinom

from pyro_scm.couplings import coupled
from pyro_scm.data import synthetic
from pyro_scm.distributions import NegativeBinomial, TwoNegativeBinomials, normal
from pyro_scm.errors import DataError, InterventionError
from pyro_scm.query import counterfactual, do, intervene, noise, predict
from tests.screens import cells, fitted, make, train
from tests.test_query import Screen, close, values


@pytest.fixture(scope="module")
def linear() -> Screen:
    return Screen("shift", "scale")


# ---------------------------------------------------------------------- laws as values of do
@pytest.mark.parametrize("law", [dist.Normal(5.0, 0.5), torch.distributions.Normal(5.0, 0.5)])
def test_a_stochastic_intervention_draws_each_cell_anew_and_cuts_the_parents(linear: Screen, law: Any) -> None:
    worlds = counterfactual(linear.fitted, linear.cells, do={"c_1": law}, draws=200)
    drawn = worlds.c[0, ..., 1]
    assert len(np.unique(drawn)) > 7000
    assert abs(drawn.mean() - 5) < 5 * 0.5 / drawn.size**0.5
    assert drawn.std() == pytest.approx(0.5, rel=0.05)
    parent = worlds.c[0, 0, :, 0]
    assert abs(np.corrcoef(np.tile(parent, 200), drawn.ravel())[0, 1]) < 0.06
    close(worlds.c[0, 3], linear.solve(linear.z, actions={1: drawn[3]}))  # what follows from it follows


def test_a_law_may_depend_on_the_natural_value(linear: Screen) -> None:
    worlds = counterfactual(linear.fitted, linear.cells, do={"c_1": lambda c: dist.Normal(c + 3, 0.01)}, draws=5)
    moved = worlds.c[0, ..., 1] - linear.solve(linear.z)[:, 1]
    assert 0 < moved.std() < 0.02
    assert moved.mean() == pytest.approx(3.0, abs=0.01)


def test_programs_take_laws(linear: Screen) -> None:
    batch = linear.cells.batch()
    c = values(do(linear.truth, {"c_0": dist.Delta(torch.tensor(2.0)), "c_1": dist.Exponential(1.0)}), batch)
    assert c[:, 0].tolist() == [2.0] * 40
    assert (c[:, 1] > 0).all()
    assert len(c[:, 1].unique()) == 40


@pytest.mark.parametrize("law", [dist.Normal(torch.zeros(40), 1.0), dist.Dirichlet(torch.ones(3))])
def test_laws_of_several_numbers_are_refused(linear: Screen, law: Any) -> None:
    with pytest.raises(InterventionError, match=r"do\(c_0 := .*\): give a distribution of one number"):
        counterfactual(linear.fitted, linear.cells, do={"c_0": law})


# ---------------------------------------------------------------------- noise as a value, combined actions
@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        (2.0, lambda z: 2.0),
        (np.arange(40) / 10, lambda z: np.arange(40) / 10),
        (lambda z: z + 1, lambda z: z + 1),
        (lambda z: dist.Delta(-z), lambda z: -z),
    ],
)
def test_noise_may_be_set_to_values_while_mechanisms_stay(linear: Screen, asked: Any, expected: Any) -> None:
    worlds = counterfactual(linear.fitted, linear.cells, noise={"c_1": asked}, draws=2)
    z = linear.z.copy()
    z[:, 1] = expected(z[:, 1])
    close(worlds.c[0, 0], linear.solve(z))
    close(worlds.c[0, 1], linear.solve(z))
    close(worlds.factual_c[0, 0], linear.solve(linear.z))


def test_everything_can_be_asked_at_once(linear: Screen) -> None:
    worlds = counterfactual(
        linear.fitted,
        linear.cells,
        environment="env_1",
        noise={"c_0": lambda z: z + 1, "c_2": dist.Delta(torch.tensor(3.0))},
        do={"c_1": lambda c: 2 * c},
    )
    epsilon = (linear.z - linear.loc[linear.cells.env]) / np.exp(linear.log_scale[linear.cells.env])
    z = linear.loc[1] + np.exp(linear.log_scale[1]) * epsilon
    z[:, 0] += 1
    z[:, 2] = 3.0
    env = np.full(40, 1)
    natural = linear.solve(z, env)[:, 1]
    close(worlds.c[0, 0], linear.solve(z, env, {1: 2 * natural}))


def test_values_of_noise_are_checked(linear: Screen) -> None:
    with pytest.raises(InterventionError, match=r"noise\(c_1\): \(3,\) values for 40 cells"):
        counterfactual(linear.fitted, linear.cells, noise={"c_1": np.zeros(3)})
    with pytest.raises(InterventionError, match=r"noise\(c_1 := 'big'\): give a number"):
        counterfactual(linear.fitted, linear.cells, noise={"c_1": "big"})  # type: ignore[dict-item]


def test_programs_whose_noise_is_set_simulate_and_have_densities_where_these_are_known(linear: Screen) -> None:
    from pyro import poutine

    batch = linear.cells.batch().unobserved()
    trace = poutine.trace(noise(linear.truth, {"c_0": 2.0, "c_1": dist.Normal(1.0, 0.1)})).get_trace(batch)
    trace.compute_log_prob()
    assert (trace.nodes["z"]["value"][:, 0] == 2).all()
    assert torch.isfinite(trace.nodes["z"]["log_prob"]).all()
    trace = poutine.trace(noise(linear.truth, {"c_0": lambda z: z.abs()})).get_trace(batch)
    assert (trace.nodes["z"]["value"][:, 0] >= 0).all()
    with pytest.raises(InterventionError, match="z_0 is a function of its natural value: it can be drawn"):
        trace.compute_log_prob()


# ---------------------------------------------------------------------- observation noise
def test_what_was_measured_is_the_factual_world_and_its_residual_is_kept(linear: Screen) -> None:
    measured = counterfactual(linear.fitted, linear.cells, do={"c_0": 1.0}, measured=True, draws=2)
    expected = counterfactual(linear.fitted, linear.cells, do={"c_0": 1.0}, draws=2)
    x = linear.cells.batch().x.numpy()  # type: ignore[union-attr]
    np.testing.assert_array_equal(measured.factual_x, np.broadcast_to(x, (1, 2, 40, 6)))
    close(measured.effect, expected.effect)
    same = counterfactual(linear.fitted, linear.cells, measured=True)
    np.testing.assert_array_equal(same.x[0, 0], x)
    with pytest.raises(DataError, match="sample and measured exclude each other"):
        counterfactual(linear.fitted, linear.cells, measured=True, sample=True)


def test_new_noise_of_a_node_leaves_the_observation_noise_alone(linear: Screen) -> None:
    law = dist.Normal(0.0, 1.0)
    drawn = counterfactual(linear.fitted, linear.cells, noise={"c_0": law}, sample=True, draws=3)
    expected = counterfactual(linear.fitted, linear.cells, noise={"c_0": law}, draws=3)
    close(drawn.effect, expected.effect)
    assert np.abs(drawn.x - expected.x).max() > 0.05


def test_counts_are_carried_at_their_own_quantile() -> None:
    adata = synthetic.simulate(
        latent=2, genes=7, environments=3, cells=200, observation="negative-binomial", depth=300.0, seed=1
    )
    data = synthetic.dataset(adata)
    truth: Any = synthetic.known(adata, data)
    x = data.batch().x.numpy()  # type: ignore[union-attr]
    same = counterfactual(truth, data, measured=True)
    np.testing.assert_array_equal(same.x[0, 0], x)
    worlds = counterfactual(truth, data, do={"c_0": 3.0}, measured=True)
    np.testing.assert_array_equal(worlds.factual_x[0, 0], x)
    assert (worlds.x == worlds.x.round()).all()
    expected = counterfactual(truth, data, do={"c_0": 3.0})
    ratio = expected.x[0, 0] / expected.factual_x[0, 0]
    assert (worlds.x[0, 0][ratio > 1] >= x[ratio > 1]).all()  # quantiles are monotone in the mean
    assert (worlds.x[0, 0][ratio < 1] <= x[ratio < 1]).all()
    assert np.abs(np.log(ratio)).max() > 1
    assert worlds.x.mean() == pytest.approx(expected.x.mean(), rel=0.05)


@pytest.mark.parametrize("mean", [0.3, 4.0, 300.0])
def test_counts_carried_to_another_law_follow_it(mean: float) -> None:
    torch.manual_seed(0)
    before = NegativeBinomial(torch.full((20_000, 1), mean).log(), torch.zeros(1))
    after = NegativeBinomial(torch.full((20_000, 1), 2 * mean).log(), torch.tensor([1.0]))
    x = before.sample()
    moved = coupled(before, after, x, torch.Generator().manual_seed(1)).double().numpy()[:, 0]
    theta = float(np.e)
    grid = np.unique(nbinom.ppf([0.1, 0.3, 0.5, 0.7, 0.9, 0.99], theta, theta / (theta + 2 * mean)))
    expected = nbinom.cdf(grid, theta, theta / (theta + 2 * mean))
    found = np.array([(moved <= g).mean() for g in grid])
    assert (np.abs(found - expected) < 5 * np.sqrt(expected * (1 - expected) / 20_000) + 1e-9).all()
    back = coupled(after, before, coupled(before, after, x, torch.Generator()), torch.Generator())
    assert np.corrcoef(back[:, 0], x[:, 0])[0, 1] > 0.9 or mean < 1


def test_residuals_scale_with_the_law() -> None:
    before, after = (
        normal(torch.zeros(3, 1), torch.ones(3, 1)),
        normal(torch.full((3, 1), 5.0), torch.full((3, 1), 2.0)),
    )
    x = torch.tensor([[-1.0], [0.0], [2.0]])
    assert coupled(before, after, x, torch.Generator()).tolist() == [[3.0], [5.0], [9.0]]
    t = dist.StudentT(torch.tensor(5.0), torch.tensor(1.0), torch.tensor(3.0))
    assert float(coupled(t, t, torch.tensor(7.3), torch.Generator())) == float(torch.tensor(7.3))


def test_laws_without_a_coupling_are_refused() -> None:
    zero = torch.zeros(2)
    law = TwoNegativeBinomials(zero, zero, zero, zero)
    with pytest.raises(InterventionError, match="the noise of TwoNegativeBinomials measurements cannot be carried"):
        coupled(law, law, zero, torch.Generator())


# ---------------------------------------------------------------------- simulated worlds
def test_simulated_twins_share_their_noise() -> None:
    run = fitted()
    worlds = intervene(run, "env_1", do={"c_1": 2.0}, cells=300, seed=4)
    assert worlds.x.shape == (2, 1, 300, 8)
    assert (worlds.c[..., 1] == 2).all()
    np.testing.assert_array_equal(worlds.c[..., 0], worlds.factual_c[..., 0])  # c_1 has no say in it
    for k in (0, 1):
        model: Any = run.member(k)[0]
        with torch.no_grad():
            clamp = torch.tensor([torch.nan, 2.0, torch.nan])
            z = torch.as_tensor(worlds.z[k, 0])
            close(worlds.c[k, 0], model.scm.solve(z, None, clamp))
            close(worlds.factual_c[k, 0], model.scm.solve(z))
            close(worlds.x[k, 0], model.likelihoods[0].mean(torch.as_tensor(worlds.c[k, 0]), None))
    assert worlds.support is not None
    again = intervene(run, "env_1", do={"c_1": 2.0}, cells=300, seed=4)
    np.testing.assert_array_equal(again.x, worlds.x)


def test_simulated_worlds_have_the_law_of_the_environment() -> None:
    run = fitted("environment_vae")
    twins, alone = intervene(run, "env_2", noise={"c_0": 0.0}, cells=4000), predict(run, "env_2", cells=4000, mean=True)
    error = alone.std(1) * (2 / 4000) ** 0.5
    assert (np.abs(twins.factual_x.mean((1, 2)) - alone.mean(1)) < 5 * error + 1e-6).all()


def test_predictions_may_be_under_interventions() -> None:
    run = fitted()
    twins = intervene(run, "env_1", do={"c_0": 3.0}, noise={"c_2": dist.Normal(1.0, 0.1)}, cells=4000)
    found = predict(run, "env_1", do={"c_0": 3.0}, noise={"c_2": dist.Normal(1.0, 0.1)}, cells=4000, mean=True)
    error = found.std(1) * (2 / 4000) ** 0.5
    assert (np.abs(found.mean(1) - twins.x.mean((1, 2))) < 5 * error + 1e-5).all()
    assert np.abs(found.mean(1) - predict(run, "env_1", cells=4000, mean=True).mean(1)).max() > 0.05


def test_simulations_without_sense_are_refused() -> None:
    run = fitted()
    with pytest.raises(InterventionError, match="say what is to be different"):
        intervene(run, "env_1")
    for ask in (intervene, predict):
        with pytest.raises(InterventionError, match="no causal variable 'c_9'"):
            ask(run, "env_1", do={"c_9": 1.0})  # type: ignore[operator]
        with pytest.raises(DataError, match="no environment 'env_8'"):
            ask(run, "env_8", do={"c_0": 1.0})  # type: ignore[operator]
        with pytest.raises(InterventionError, match=r"do\(c_0\): \(3,\) values for 500 cells"):
            ask(run, "env_1", do={"c_0": np.zeros(3)})  # type: ignore[operator]


# ---------------------------------------------------------------------- what was seen
def test_a_value_far_from_all_cells_is_said_to_be_so(linear: Screen) -> None:
    c = linear.solve(linear.z)
    far, near = c[:, 1].mean() + 8 * c[:, 1].std(), float(np.median(c[:, 1]))
    for value, flagged in ((far, True), (near, False)):
        support = counterfactual(linear.fitted, linear.cells, do={"c_1": value}).support
        assert support is not None
        row = support.table[support.table["name"] == "c_1"].iloc[0]
        assert row["distance"] == pytest.approx(abs(value - c[:, 1].mean()) / c[:, 1].std(), rel=1e-3)
        assert row["quantile_low"] == row["quantile_high"] == pytest.approx((c[:, 1] <= value).mean(), abs=0.03)
        assert row["extrapolates"] == flagged
        assert support.extrapolates == flagged or not flagged
        np.testing.assert_allclose(support.distance[0], row["distance"], rtol=1e-5)
        assert any("c_1: 100% of the cells are brought beyond" in text for text in support.warnings()) == flagged


def test_values_that_are_usual_each_may_be_unheard_of_together(linear: Screen) -> None:
    adata = synthetic.simulate(latent=2, genes=4, environments=2, cells=300, graph=[[0, 1]], strength=0.1, seed=2)
    adata.obsm["z"][:, 1] *= 0.1  # c_1 is c_0 or -c_0, nearly
    data = synthetic.dataset(adata)
    truth: Any = synthetic.known(adata, data)
    sign = float(truth[0].scm.matrix[1, 0].sign())
    asked = {"c_0": 1.5, "c_1": -1.5 * sign}
    support = counterfactual(truth, data, do=asked).support
    assert support is not None
    table = support.table.set_index("name")
    assert not table.loc["c_0", "extrapolates"]
    assert not table.loc["c_1", "extrapolates"]
    assert table.loc["c", "extrapolates"]
    along = counterfactual(truth, data, do={"c_0": 1.5, "c_1": 1.5 * sign}).support
    assert along is not None
    assert not along.extrapolates


def test_what_is_usual_may_be_said_by_other_cells() -> None:
    run, some = fitted(), cells().subset(np.arange(3))
    own = counterfactual(run, some, do={"c_0": 0.5}).support
    every = counterfactual(run, some, do={"c_0": 0.5}, reference=cells()).support
    assert own is not None
    assert every is not None
    assert own.table["reference"].tolist() == [3, 3]  # too few to say how they lie together
    assert every.table["reference"].tolist() == [100] * 4
    assert every.table["kind"].tolist() == ["do", "joint"] * 2


def test_environments_are_compared_with_those_of_the_training_cells() -> None:
    run = fitted()
    trained = counterfactual(run, cells(), environment="env_1").support
    assert trained is not None
    assert trained.table["name"].tolist() == ["env_1"]
    assert not trained.extrapolates
    assert counterfactual(run, cells()).support is None
    far = train("environment_vae", cells().subset(cells().env != 3), epochs=1)
    representation = far.environments.representation.copy()
    representation[3] *= 1000
    object.__setattr__(far.environments, "representation", representation)
    support = counterfactual(far, cells().of("control"), environment="env_3").support
    assert support is not None
    assert support.extrapolates
    assert support.warnings() == ["environment env_3 is far from those that the model was fitted to"]


def test_anndata_tells_how_far_each_cell_was_moved() -> None:
    data = cells().subset(np.arange(20))
    worlds = counterfactual(fitted(), data, do={"c_0": np.linspace(0, 30, 20)}, reference=cells())
    adata = worlds.to_anndata(data)
    assert worlds.support is not None
    np.testing.assert_array_equal(adata.obs["extrapolation"], worlds.support.distance[0])
    assert adata.obs["extrapolation"].is_monotonic_increasing or adata.obs["extrapolation"].iloc[-1] > 10
    assert list(adata.uns["support"]["kind"]) == ["do", "joint"] * 2
    assert "extrapolation" not in counterfactual(fitted(), data, environment="env_1").to_anndata(data).obs


def test_a_latent_that_a_model_does_not_use_is_usual_where_its_prior_is() -> None:
    """Posterior means of a collapsed latent do not vary; draws do, so that 1 is no extrapolation."""
    model, guide = make("vae", cells().schema)
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.zero_()
    support = counterfactual((model, guide), cells(), do={"c_0": 0.1}).support
    assert support is not None
    assert float(support.table["distance"].iloc[0]) < 2
