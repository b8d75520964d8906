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
        "posterior", "posterior_predictive", "prior", "prior_predictive", "log_likelihood", "sample_stats",
        "observed_data", "constant_data",
    }  # fmt: skip
    per_cell, per_node, per_gene = (("chain", "draw", "cell", *rest) for rest in ((), ("node",), ("gene",)))
    found = {
        (group, name): variable.dims for group in data.groups() for name, variable in data[group].data_vars.items()
    }
    assert found == {
        ("posterior", "z"): per_node,
        ("posterior", "c"): per_node,
        ("posterior_predictive", "x"): per_gene,
        ("prior", "z"): per_node,
        ("prior", "c"): per_node,
        ("prior_predictive", "x"): per_gene,
        ("log_likelihood", "x"): per_cell,
        ("sample_stats", "log_px_z"): per_cell,
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
        np.testing.assert_allclose(data.sample_stats["log_px_z"].values[k], log_x, rtol=1e-4, atol=1e-4)
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
    np.testing.assert_allclose(data.sample_stats["log_px_z"].values[0], expected, rtol=1e-4)
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


def test_an_autoencoders_draws_are_one_point_and_groups_without_a_density_are_left_out() -> None:
    data = to_arviz(fitted("ae"), some(), draws=3)
    z = data.posterior["z"].values
    np.testing.assert_array_equal(z, np.repeat(z[:, :1], 3, axis=1))
    assert not {"log_likelihood", "prior", "prior_predictive"} & set(data.groups())
    assert list(data.sample_stats.data_vars) == ["log_px_z"]
    assert data.posterior.attrs["left_out"].startswith("an encoder that gives points has no density")
    assert to_arviz(fitted(), some(), draws=1).posterior.attrs["left_out"] == ""


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
    assert data.posterior["centre"].dims == ("chain", "draw", "centre_dim_0")
    assert data.posterior["spread"].dims == ("chain", "draw")
    assert len(np.unique(data.posterior["spread"].values)) == 5


def test_latents_that_cells_share_are_the_same_for_all_cells_however_they_are_divided(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each cell's prior draw is z = centre * share + spread * noise: residuals know the spread of their draw alone."""
    model = hierarchical()
    run = fit(model, amortise(model, cells()), cells(), epochs=1, progress=False)
    monkeypatch.setattr(posterior, "_CHUNK", (8 + 4) * 5 * 2 * 4)  # four cells at once
    data = to_arviz(run, cells(), draws=5, particles=2)
    shared = {name: data.posterior[name].values[0] for name in ("spread", "centre", "share")}
    noise = (data.prior["z"].values[0] - (shared["centre"] * shared["share"][:, None])[:, None]) / shared["spread"][
        :, None, None
    ]
    assert noise.std((1, 2)) == pytest.approx(np.ones(5), abs=0.2)  # 300 values each
    assert abs(noise.mean((1, 2))).max() < 5 / 300**0.5


# ---------------------------------------------------------------------- marginal likelihood, prior, proteins
def linear(guide_scale: float) -> tuple[Any, Any, NDArray[np.float64]]:
    """A linear model whose log p(x) is known, and a guide around the exact posterior, its scale off by a factor."""
    from pyro_scm import models
    from pyro_scm.distributions import normal

    torch.manual_seed(3)
    model = models.vae(cells().schema, latent=3, hidden=())
    likelihood = model.likelihoods[0]
    with torch.no_grad():
        w = (likelihood.spread.unsqueeze(-1) * likelihood.net[0].weight).double()  # type: ignore[union-attr,operator]
        b = (likelihood.centre + likelihood.spread * likelihood.net[0].bias).double()  # type: ignore[union-attr,operator]
        psi = likelihood.scale.double() ** 2  # type: ignore[union-attr,operator]
        q, _ = torch.linalg.qr(w / psi.sqrt().unsqueeze(-1))
        w = q * psi.sqrt().unsqueeze(-1)  # the posterior's precision is 2 in each latent, without correlations
        likelihood.net[0].weight.copy_(w / likelihood.spread.unsqueeze(-1))  # type: ignore[union-attr,operator]

    def guide(batch: Any) -> Any:
        loc = ((batch.x.double() - b) / psi) @ w / 2
        with batch.plate():
            return pyro.sample("z", normal(loc.float(), torch.full(loc.shape, guide_scale * 0.5**0.5)))

    covariance = (w @ w.T + torch.diag(psi)).numpy()
    log_p = stats.multivariate_normal(b.numpy(), covariance).logpdf(np.asarray(some().x, np.float64))
    return model, guide, log_p


class _Program(torch.nn.Module):
    def __init__(self, program: Any) -> None:
        super().__init__()
        self.program = program

    def forward(self, batch: Any) -> Any:
        return self.program(batch)


def test_the_log_likelihood_is_that_of_cells_with_their_latents_integrated_out() -> None:
    """Exact with the exact posterior and any number of particles; nearer with more where the guide is too wide."""
    model, guide, log_p = linear(1.0)
    found = to_arviz((model, _Program(guide)), some(), draws=3, particles=2).log_likelihood["x"].values[0]
    np.testing.assert_allclose(found, np.tile(log_p, (3, 1)), atol=2e-3)
    model, guide, log_p = linear(1.5)
    few, many = (
        to_arviz((model, _Program(guide)), some(), draws=20, particles=m).log_likelihood["x"].values[0] - log_p
        for m in (1, 100)
    )
    assert few.mean() == pytest.approx(-3 * (np.log(1 / 1.5) + 1.5**2 / 2 - 0.5), abs=0.35)  # -KL(q || p)
    assert abs(many.mean()) < 0.05
    assert many.std() < few.std() / 3


def test_loo_of_that_likelihood_is_the_marginal_one_where_members_agree() -> None:
    model, guide, log_p = linear(1.0)
    data = to_arviz([(model, _Program(guide))] * 2, some(), draws=50, particles=4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert az.loo(data, reff=1.0).elpd_loo == pytest.approx(log_p.sum(), abs=0.05)


def test_new_cells_have_the_laws_of_their_environments() -> None:
    run = fitted("environment_vae")
    data, batch = to_arviz(run, some(), draws=500, particles=0), some().batch()
    for k in (0, 1):
        model, _ = run.member(k)
        with torch.no_grad():
            loc, scale = (m[batch.row] for m in model.prior.moments(batch.r, batch.perturbed))  # type: ignore[union-attr,operator]
        standardised = (data.prior["z"].values[k] - loc.numpy()) / scale.numpy()
        assert abs(standardised.mean()) < 5 / standardised.size**0.5
        assert standardised.std() == pytest.approx(1.0, abs=0.02)
    assert "log_likelihood" not in data.groups()


def test_proteins_have_groups_of_their_own_and_count_in_the_likelihood() -> None:
    data_set = cells("negative-binomial")
    run = train("multicpa", data_set, epochs=1)
    data = to_arviz(run, data_set.subset(ROWS), draws=4, particles=3)
    assert data.posterior_predictive["y"].dims == ("chain", "draw", "cell", "protein")
    assert data.posterior["log_background"].dims == ("chain", "draw", "cell", "protein")
    assert list(data.observed_data["protein"].values) == ["CD3", "CD4", "CD8", "CD19"]
    assert list(data.log_likelihood.data_vars) == ["joint"]
    np.testing.assert_array_equal(data.observed_data["y"].values, data_set.y[ROWS])  # type: ignore[index]


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
    monkeypatch.setattr(posterior, "_LARGEST", 2 * 2 * 5 * 12 * (8 + 4) * 4 - 1)  # proteins too
    with pytest.raises(DataError, match=r"2 x 5 draws of 12 cells x 8 genes take 0\.0 GiB: give a file"):
        to_arviz(fitted(), some(), draws=5)
    to_arviz(fitted(), some(), draws=4)
    assert to_arviz(fitted(), some(), draws=5, genes=["gene_7", "gene_2"]).posterior_predictive.sizes["gene"] == 2


def test_a_file_holds_the_same_draws_piece_by_piece(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, data: az.InferenceData
) -> None:
    monkeypatch.setattr(posterior, "_LARGEST", 0)  # nothing fits into memory
    written = to_arviz(fitted(), some(), draws=20, path=tmp_path / "draws.nc")
    assert set(written.groups()) == set(data.groups())
    for group in data.groups():
        assert written[group].attrs["left_out"] == ""
        for name, variable in data[group].data_vars.items():
            assert written[group][name].dims == variable.dims
            np.testing.assert_array_equal(written[group][name].values, variable.values)
        for name, labels in data[group].coords.items():
            np.testing.assert_array_equal(written[group][name].values, labels.values)
    written.close()
    assert [f.name for f in tmp_path.iterdir()] == ["draws.nc"]


def test_no_more_than_a_piece_is_in_memory_while_a_file_is_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    sizes = []
    original = posterior.simulated

    def watched(*arguments: Any) -> Any:
        found = original(*arguments)
        sizes.append(found["prior_predictive", "x"].shape[1])
        return found

    monkeypatch.setattr(posterior, "simulated", watched)
    monkeypatch.setattr(posterior, "_CHUNK", (8 + 4) * 5 * 2 * 5)
    to_arviz(fitted(), some(), draws=5, particles=2, path=tmp_path / "draws.nc").close()
    assert sizes == [5, 5, 2] * 2


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"draws": 0}, "draws = 0"),
        ({"path": "draws.h5"}, r"path = 'draws.h5': the draws are written as netCDF"),
        ({"path": "no/such/folder/draws.nc"}, r"no/such/folder/draws.nc: cannot be written"),
        ({"genes": ["gene_1", "TP53"]}, r"genes = 'TP53': name some of the data set's 8 genes"),
        ({"genes": []}, "genes = none"),
    ],
)
def test_requests_that_cannot_be_answered_are_refused(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(DataError, match=said):
        to_arviz(fitted(), some(), **wrong)


def test_genes_that_are_kept_are_those_named_and_densities_are_of_all(data: az.InferenceData) -> None:
    two = to_arviz(fitted(), some(), draws=20, genes=["gene_7", "gene_2"])
    assert list(two.observed_data["gene"].values) == ["gene_7", "gene_2"]
    for group in ("posterior_predictive", "prior_predictive"):
        np.testing.assert_array_equal(two[group]["x"].values, data[group]["x"].values[..., [7, 2]])
    np.testing.assert_array_equal(two.log_likelihood["x"].values, data.log_likelihood["x"].values)


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
