import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pytest
import torch
from numpy.typing import NDArray
from scipy import stats

from guides import amortise
from pyro_scm import posterior
from pyro_scm.data.dataset import EnvironmentDataset
from pyro_scm.errors import DataError
from pyro_scm.infer import fit
from pyro_scm.posterior import to_arviz, warnings_of_arviz
from tests.screens import cells, fitted, hierarchical, train

with warnings_of_arviz():
    import arviz as az

ROWS = np.arange(0, 100, 9)


def some(kind: str = "gaussian") -> EnvironmentDataset:
    return cells(kind).subset(ROWS)


@pytest.fixture(scope="module")
def data() -> az.InferenceData:
    return to_arviz(fitted(), some(), draws=20)


# ---------------------------------------------------------------------- what it holds
def test_groups_dimensions_and_names(data: az.InferenceData) -> None:
    assert set(data.groups()) == {
        "posterior", "posterior_predictive", "log_likelihood", "sample_stats", "observed_data", "constant_data"
    }  # fmt: skip
    per_cell, per_node, per_gene = (("chain", "draw", "cell", *rest) for rest in ((), ("node",), ("gene",)))
    found = {
        (group, name): variable.dims for group in data.groups() for name, variable in data[group].data_vars.items()
    }
    assert found == {
        ("posterior", "z"): per_node,
        ("posterior", "c"): per_node,
        ("posterior_predictive", "x"): per_gene,
        ("log_likelihood", "x"): per_cell,
        ("sample_stats", "lp"): per_cell,
        ("sample_stats", "log_q"): per_cell,
        ("observed_data", "x"): ("cell", "gene"),
        ("constant_data", "environment"): ("cell",),
    }
    assert dict(data.posterior.sizes) == {"chain": 2, "draw": 20, "cell": 12, "node": 3}
    assert list(data.posterior["cell"].values) == [f"cell_{i}" for i in ROWS]
    assert list(data.posterior["node"].values) == ["0", "1", "2"]
    assert list(data.posterior_predictive["gene"].values) == [f"gene_{g}" for g in range(8)]


def test_observations_are_the_cells_own(data: az.InferenceData) -> None:
    np.testing.assert_array_equal(data.observed_data["x"].values, cells().x[ROWS])
    expected = [cells().environments.index[e] for e in cells().env[ROWS]]
    assert list(data.constant_data["environment"].values) == expected
    one = data.posterior["c"].sel(cell="cell_9", node="1")
    np.testing.assert_array_equal(one.values, data.posterior["c"].values[:, :, 1, 1])


def test_chains_are_members_with_noise_of_their_own(data: az.InferenceData) -> None:
    batch = some().batch()
    for k in (0, 1):
        model, guide = fitted().member(k)
        with torch.no_grad():
            q = guide.local["z"](batch).base_dist  # type: ignore[union-attr,index,operator]
            z = torch.as_tensor(data.posterior["z"].values[k])
            c = model.scm.solve(z)  # type: ignore[union-attr,operator]
        np.testing.assert_allclose(data.posterior["c"].values[k], c.numpy(), rtol=1e-5, atol=1e-6)
        standardised = ((z - q.loc) / q.scale).numpy()
        assert abs(standardised.mean()) < 5 / standardised.size**0.5
        assert standardised.std() == pytest.approx(1.0, abs=0.15)
    model, guide = fitted().member(0)
    twins = to_arviz([(model, guide), (model, guide)], some(), draws=3).posterior["z"].values
    assert (twins[0] != twins[1]).all()


def normal(value: Any, loc: Any, scale: Any) -> NDArray[np.float64]:
    """Log-density of independent normals over the last dimension."""
    result: NDArray[np.float64] = stats.norm.logpdf(value, loc, scale).sum(-1)
    return result


def test_densities_of_expression_are_the_formulas(data: az.InferenceData) -> None:
    """log p(x | z), log p(x, z) and log q(z | x), with scipy's normal density and the members' own parameters."""
    batch = some().batch()
    for k in (0, 1):
        model, guide = fitted().member(k)
        with torch.no_grad():
            z, c = (torch.as_tensor(data.posterior[name].values[k]) for name in ("z", "c"))
            likelihood = model.likelihoods[0]  # type: ignore[index,union-attr]
            loc = likelihood.centre + likelihood.spread * likelihood.net(c)
            scale = likelihood.spread * (0.05 + torch.nn.functional.softplus(likelihood.raw_scale))
            moments = [m[batch.row] for m in model.prior.moments(batch.r, batch.perturbed)]  # type: ignore[union-attr,operator]
            q = guide.local["z"](batch).base_dist  # type: ignore[union-attr,index,operator]
        log_x, log_z, log_q = normal(batch.x, loc, scale), normal(z, *moments), normal(z, q.loc, q.scale)
        np.testing.assert_allclose(data.log_likelihood["x"].values[k], log_x, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(data.sample_stats["lp"].values[k], log_x + log_z, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(data.sample_stats["log_q"].values[k], log_q, rtol=1e-4, atol=1e-4)


def test_densities_of_counts_are_the_negative_binomials() -> None:
    run = train("vae", cells("negative-binomial"), epochs=1)
    data, batch = to_arviz(run, some("negative-binomial"), draws=4), some("negative-binomial").batch()
    assert batch.size is not None
    with torch.no_grad():
        likelihood = run.model.likelihoods[0]  # type: ignore[index,union-attr]
        logits = likelihood.log_proportion + likelihood.net(torch.as_tensor(data.posterior["c"].values[0]))
        mean = (batch.size[:, None] * torch.softmax(logits, -1)).double().numpy()
        theta = (8 * torch.tanh(likelihood.raw_dispersion / 8)).exp().double().numpy()
    expected = stats.nbinom.logpmf(batch.x, theta, theta / (theta + mean)).sum(-1)
    np.testing.assert_allclose(data.log_likelihood["x"].values[0], expected, rtol=1e-4)
    drawn = data.posterior_predictive["x"].values
    assert (drawn == np.round(drawn)).all()


def test_replicated_expression_scatters_about_its_mean_as_the_likelihood_says() -> None:
    run = fitted("environment_vae")
    data = to_arviz(run, some(), draws=400)
    for k in (0, 1):
        model, _ = run.member(k)
        with torch.no_grad():
            likelihood = model.likelihoods[0]  # type: ignore[index,union-attr]
            mean = likelihood.mean(torch.as_tensor(data.posterior["c"].values[k]), some().batch()).numpy()
            scale = likelihood.scale.numpy()
        residual = (data.posterior_predictive["x"].values[k] - mean) / scale
        assert abs(residual.mean()) < 5 / residual.size**0.5
        assert residual.std() == pytest.approx(1.0, abs=0.02)


def test_an_autoencoders_draws_are_one_point_and_have_no_prior() -> None:
    data = to_arviz(fitted("ae"), some(), draws=3)
    z = data.posterior["z"].values
    np.testing.assert_array_equal(z, np.repeat(z[:, :1], 3, axis=1))
    np.testing.assert_array_equal(data.sample_stats["lp"].values, data.log_likelihood["x"].values)
    assert not data.sample_stats["log_q"].values.any()


def test_the_bound_is_the_mean_of_lp_minus_log_q() -> None:
    """-ELBO per cell, estimated from the exported densities, against the objective's closed form."""
    from pyro_scm.objectives import Objective

    run = fitted("vae")
    model, guide = run.member(0)
    data = to_arviz((model, guide), some(), draws=2000)
    gap = (data.sample_stats["lp"] - data.sample_stats["log_q"]).values[0].mean(1)
    torch.manual_seed(0)
    expected = -Objective(particles=500).loss(model.forward, guide.forward, some().batch()) / len(ROWS)
    error = float(gap.std()) * (1 / 2000 + 1 / 500) ** 0.5
    assert float(gap.mean()) == pytest.approx(expected, abs=5 * error)
    assert error < 0.05


def test_models_with_global_latents_are_exported() -> None:
    model = hierarchical()
    run = fit(model, amortise(model, cells()), cells(), epochs=1, progress=False)
    data = to_arviz(run, some(), draws=5)
    assert data.sample_stats["lp"].shape == (1, 5, 12)
    assert bool(np.isfinite(data.sample_stats["lp"].values).all())


# ---------------------------------------------------------------------- reproducible, harmless
def test_draws_repeat_with_their_seed_and_leave_torchs_generator_alone() -> None:
    before = torch.get_rng_state()
    one, same, other = (to_arviz(fitted(), some(), draws=2, seed=s).posterior["z"].values for s in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    np.testing.assert_array_equal(one, same)
    assert (one != other).all()
    assert len(pyro.get_param_store()) == 0


def test_a_single_model_is_one_chain() -> None:
    assert to_arviz(fitted().member(1), some(), draws=2).posterior.sizes["chain"] == 1


def test_arviz_is_imported_without_a_word() -> None:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        to_arviz(fitted(), some(), draws=1)  # fewer draws than members, too
    assert [str(w.message) for w in said] == []


def test_an_answer_too_large_for_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(posterior, "_LARGEST", 2 * 5 * 12 * 8 * 8 - 1)
    with pytest.raises(DataError, match=r"2 x 5 draws of 12 cells x 8 genes take 0\.0 GiB: ask for fewer draws"):
        to_arviz(fitted(), some(), draws=5)
    to_arviz(fitted(), some(), draws=4)


# ---------------------------------------------------------------------- what ArviZ makes of it
def test_it_is_written_to_netcdf_and_read_back(data: az.InferenceData, tmp_path: Path) -> None:
    data.to_netcdf(str(tmp_path / "posterior.nc"))
    again = az.from_netcdf(str(tmp_path / "posterior.nc"))
    assert set(again.groups()) == set(data.groups())
    for group in data.groups():
        for name, variable in data[group].data_vars.items():
            np.testing.assert_array_equal(again[group][name].values, variable.values)
    assert list(again.posterior["node"].values) == ["0", "1", "2"]


def test_arviz_summarises_it(data: az.InferenceData) -> None:
    table = az.summary(data, var_names=["c"])
    assert len(table) == 12 * 3
    draws = data.posterior["c"].sel(cell="cell_0", node="2").values
    assert table.loc["c[cell_0, 2]", "mean"] == pytest.approx(draws.mean(), abs=1e-3)
    assert table.loc["c[cell_0, 2]", "sd"] == pytest.approx(draws.std(ddof=1), abs=2e-2)
    assert (table["r_hat"] > 0.9).all()


def test_arviz_cross_validates_it(data: az.InferenceData) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # forty draws make poor importance weights
        loo = az.loo(data, pointwise=True)
    assert loo.n_data_points == 12
    assert loo.loo_i.dims == ("cell",)
    log_likelihood = data.log_likelihood["x"].values.reshape(40, 12)
    in_sample = (np.logaddexp.reduce(log_likelihood, 0) - np.log(40)).sum()
    assert loo.elpd_loo < in_sample
    assert loo.elpd_loo == pytest.approx(in_sample, rel=0.2)
