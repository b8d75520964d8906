"""Checks of a fitted model: each is shown a case that is right and one that is wrong in a known way."""

import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pytest
import torch
import xarray as xr
from numpy.typing import NDArray
from torch import nn

from pyro_scm import criticism
from pyro_scm.criticism import Check, Checks
from pyro_scm.criticism.ranks import distances
from pyro_scm.criticism.verdicts import graded, ks_band, skipped
from pyro_scm.data import synthetic
from pyro_scm.data.dataset import EnvironmentDataset
from pyro_scm.distributions import normal
from pyro_scm.errors import DataError
from pyro_scm.posterior import to_arviz, warnings_of_arviz
from pyro_scm.query import isolated
from tests.screens import cells, fitted

with warnings_of_arviz():
    import arviz as az

Array = NDArray[np.float64]


class Exact(nn.Module):
    """The posterior of a linear-Gaussian model with orthogonal columns, its scale and its means changed at will."""

    def __init__(self, model: Any, width: float = 1.0, shift: float = 0.0) -> None:
        super().__init__()
        self.model, self.width, self.shift = model, width, shift

    def forward(self, batch: Any) -> Any:
        likelihood = self.model.likelihoods[0]
        w, psi = likelihood.net.weight, likelihood.scale**2
        precision = 1 + (w**2 / psi[:, None]).sum(0)
        loc = (self.model.prior.loc[batch.env] + (batch.x / psi) @ w) / precision
        sd = precision.rsqrt()
        with batch.plate():
            return pyro.sample("z", normal(loc + self.shift * sd, (self.width * sd).expand_as(loc)))


@pytest.fixture(scope="module")
def world() -> tuple[Any, EnvironmentDataset]:
    """Three independent latents, ten genes, three environments of 100 cells that the model itself made."""
    adata = synthetic.simulate(
        latent=3, genes=10, environments=4, cells=100, graph="empty", decoder="linear", noise=1.0, strength=2.0
    )
    model: Any = synthetic.truth(adata)
    weight = np.linalg.qr(np.random.default_rng(0).normal(size=(10, 3)))[0] * 1.8
    with torch.no_grad():
        model.likelihoods[0].net.weight.copy_(torch.as_tensor(weight))
    cells = synthetic.dataset(adata)
    with isolated():
        torch.manual_seed(0)
        x = model(cells.batch().unobserved())["x"]
    return model, replace(cells, x=x.numpy())


@pytest.fixture(scope="module")
def draws(world: tuple[Any, EnvironmentDataset]) -> Callable[..., az.InferenceData]:
    """Draws of the truth with a guide that is right or changed; two members that are alike."""
    model, data = world

    def made(width: float = 1.0, shift: float = 0.0, cells: EnvironmentDataset | None = None) -> az.InferenceData:
        pair = (model, Exact(model, width, shift))
        return to_arviz([pair, pair], data if cells is None else cells, draws=200, particles=8)

    return made


@pytest.fixture(scope="module")
def right(draws: Callable[..., az.InferenceData]) -> az.InferenceData:
    return draws()


# ---------------------------------------------------------------------- the guide
def test_khat_and_the_gap_of_the_bound_are_good_for_the_exact_posterior(right: az.InferenceData) -> None:
    assert criticism.guide_khat(right).verdict == "good"
    gap = criticism.bound_gap(right)
    assert gap.verdict == "good"
    assert gap.value == pytest.approx(0, abs=1e-3)


def test_khat_sees_a_guide_that_is_too_narrow(draws: Callable[..., az.InferenceData]) -> None:
    assert criticism.guide_khat(draws(width=0.4)).verdict == "bad"
    assert criticism.guide_khat(draws(width=1.5)).verdict == "good"  # wide is safe


def test_a_tail_is_not_judged_by_a_handful_of_draws(right: az.InferenceData) -> None:
    few = right.isel(draw=slice(0, 10), chain=[0])
    assert [c.verdict for c in (criticism.guide_khat(few), criticism.loo(few))] == ["not applicable"] * 2
    assert "give more draws" in criticism.guide_khat(few).words


def test_the_gap_of_the_bound_is_the_kl_of_a_guide_that_is_off(draws: Callable[..., az.InferenceData]) -> None:
    """Three latents 0.5 sd off: 3 x 0.5^2 / 2 nats."""
    gap = criticism.bound_gap(draws(shift=0.5))
    assert gap.value == pytest.approx(3 * 0.125, abs=0.03)
    assert gap.verdict == "look"
    assert gap.detail is not None
    assert gap.detail["nats per cell"].is_monotonic_increasing


@pytest.mark.parametrize(
    ("width", "shift", "verdict", "said"),
    [
        (1.0, 0.0, "good", ""),
        (0.5, 0.0, "bad", "too narrow"),
        (2.0, 0.0, "bad", "too wide"),
        (1.0, 0.5, "bad", "too low"),
    ],
)
def test_calibration_by_simulation_finds_what_is_wrong_with_a_guide(
    world: tuple[Any, EnvironmentDataset], width: float, shift: float, verdict: str, said: str
) -> None:
    model, data = world
    latents, _ = criticism.sbc((model, Exact(model, width, shift)), data, draws=99, most_cells=400)
    assert latents.verdict == verdict
    assert said in latents.words


def test_calibration_of_predictions_is_of_expected_expression(world: tuple[Any, EnvironmentDataset]) -> None:
    model, data = world
    assert criticism.sbc((model, Exact(model)), data, most_cells=400)[1].verdict == "good"
    assert criticism.sbc((model, Exact(model, 0.4)), data, most_cells=400)[1].verdict == "bad"


def test_ranks_are_uniform_for_counts_and_models_with_proteins_run() -> None:
    from tests.screens import train

    data = cells("negative-binomial")
    found = criticism.sbc_ranks(train("multicpa", data, epochs=1), data, draws=9, most_cells=30)
    assert found is not None
    z, x, nodes, genes = found
    assert (z.shape, x.shape, len(nodes), len(genes)) == ((30, 3), (30, 8), 3, 8)
    assert ((z > 0) & (z < 1)).all()


# ---------------------------------------------------------------------- the model
def test_expression_of_the_model_itself_passes_all_predictive_checks(right: az.InferenceData) -> None:
    for replicates in ("new", "same"):
        mean, variance, dropout = criticism.predictive_checks(right, replicates)
        assert (mean.verdict, variance.verdict, dropout.verdict) == ("good", "good", "not applicable")
    assert criticism.loo_pit(right).verdict == "good"
    assert criticism.loo(right).verdict == "good"


def test_the_picture_of_replicates_shows_the_observed_cells_among_them(right: az.InferenceData) -> None:
    figure = criticism.ppc_figure(right, genes=2)
    for ax, gene in zip(figure.axes, (0, 1), strict=True):
        (drawn,) = [line for line in ax.lines if line.get_color() == "k"]
        observed = right.observed_data["x"].values[:, gene]
        assert np.ptp(drawn.get_xdata()) == pytest.approx(np.ptp(observed), rel=0.1)


def changed(data: az.InferenceData, change: Callable[[Any], Any]) -> az.InferenceData:
    """The same draws beside other observations."""
    other = data.copy()
    other.observed_data = other.observed_data.assign(x=change(other.observed_data["x"]).transpose("cell", "gene"))
    return other


def test_predictive_checks_find_the_statistic_that_is_wrong(right: az.InferenceData) -> None:
    shifted = criticism.predictive_checks(changed(right, lambda x: x + 0.5))
    assert [c.verdict for c in shifted[:2]] == ["bad", "good"]
    spread = criticism.predictive_checks(changed(right, lambda x: x.mean("cell") + 1.3 * (x - x.mean("cell"))))
    assert [c.verdict for c in spread[:2]] == ["good", "bad"]
    rows = xr.DataArray(np.arange(400) % 2 == 0, dims="cell")
    empty = criticism.predictive_checks(changed(right, lambda x: x.where(rows, 0)))
    assert empty[2].verdict == "bad"
    assert "dropout" in empty[2].words


def test_loo_pit_says_how_predictions_are_wrong(right: az.InferenceData) -> None:
    found = criticism.loo_pit(changed(right, lambda x: x + 1))
    assert found.verdict == "bad"
    assert "too high" in found.words
    assert "too narrow" in criticism.loo_pit(changed(right, lambda x: 2 * x)).words


def test_loo_distrusts_cells_about_which_members_disagree(right: az.InferenceData) -> None:
    wild = right.copy()
    noise = np.random.default_rng(0).standard_t(1, wild.log_likelihood["x"].shape) * 3
    wild.log_likelihood = wild.log_likelihood + noise
    assert criticism.loo(wild).verdict == "bad"


def test_loo_is_arvizs_and_its_weights_are_shares(draws: Callable[..., az.InferenceData]) -> None:
    data = draws(shift=0.5)
    found = criticism.loo(data)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = az.loo(data, reff=1.0)
    assert found.detail is not None
    ours = found.detail["nats per cell"] * 400
    assert ours[["elpd_loo", "se", "p_loo"]].tolist() == pytest.approx(
        [expected.elpd_loo, expected.se, expected.p_loo], rel=1e-6
    )


def test_unseen_cells_that_are_less_probable_are_seen(
    world: tuple[Any, EnvironmentDataset], draws: Callable[..., az.InferenceData], right: az.InferenceData
) -> None:
    _, data = world
    assert criticism.held_out_density(right, right).value == 0
    assert criticism.held_out_density(right, draws(cells=replace(data, x=1.6 * data.x))).verdict == "bad"


# ---------------------------------------------------------------------- the ensemble
def test_latents_that_say_nothing_are_counted(right: az.InferenceData) -> None:
    assert criticism.active_units(right).verdict == "good"
    one, none = right.copy(), right.copy()
    one.posterior = one.posterior.assign(z=one.posterior["z"].where(one.posterior["node"] != "1", 0))
    none.posterior = none.posterior.assign(z=0 * none.posterior["z"])
    assert criticism.active_units(one).value == pytest.approx(2 / 3)
    assert criticism.active_units(one).verdict == "look"
    assert criticism.active_units(none).verdict == "bad"


def test_members_that_agree_up_to_order_and_sign_are_told_from_rotated_ones(right: az.InferenceData) -> None:
    z = right.posterior["z"].values
    for turn, verdict in (
        (np.array([[0, -1, 0], [1, 0, 0], [0, 0, 1.0]]), "good"),
        (np.array([[1, 1, 1], [1, -1, 0], [1, 1, -2.0]]) / np.sqrt([[3], [2], [6]]), "look"),
        (np.ones((3, 3)) / 3, "bad"),
    ):
        turned = right.copy()
        turned.posterior = turned.posterior.assign(z=(("chain", "draw", "cell", "node"), np.stack([z[0], z[1] @ turn])))
        assert criticism.latents_agree(turned).verdict == verdict


def test_members_that_predict_alike_have_an_rhat_of_one(right: az.InferenceData) -> None:
    assert criticism.predictions_agree(right).verdict == "good"
    apart = right.copy()
    step = xr.DataArray([0.0, 3.0], dims="chain")
    apart.posterior_predictive = apart.posterior_predictive + step
    assert criticism.predictions_agree(apart).verdict == "bad"
    assert criticism.predictions_agree(right.isel(chain=[0])).verdict == "not applicable"


# ---------------------------------------------------------------------- coverage
def test_intervals_cover_the_models_own_cells(right: az.InferenceData) -> None:
    table = criticism.interval_coverage(right, conformal=True)
    mean = table.groupby(level="level").mean()
    assert mean["coverage"].to_numpy() == pytest.approx(list(criticism.LEVELS), abs=0.03)
    assert mean["coverage_conformal"].to_numpy() == pytest.approx(list(criticism.LEVELS), abs=0.04)
    assert len(table) == 4 * 3
    assert all(c.verdict == "good" for c in criticism.coverage(right))


def test_conformal_recalibration_mends_intervals_that_are_too_narrow(right: az.InferenceData) -> None:
    wide = changed(right, lambda x: 2 * x)
    before, after = (criticism.coverage(wide, conformal=on) for on in (False, True))
    assert [c.verdict for c in before] == ["bad"] * 3
    assert "too narrow" in before[2].words
    assert after[2].value == pytest.approx(0.95, abs=0.03)
    assert after[2].value > before[2].value + 0.1


def test_coverage_of_counts_is_exact_in_spite_of_ties() -> None:
    rng = np.random.default_rng(0)
    values, drawn = rng.poisson(0.7, (3000, 2)), rng.poisson(0.7, (200, 3000, 2))
    ranks = criticism.pit(values, drawn)
    assert (np.abs(2 * ranks - 1) <= 0.8).mean() == pytest.approx(0.8, abs=0.02)
    assert distances(ranks).max() < ks_band(3000, 2)


def test_conformal_needs_environments_to_leave_out(right: az.InferenceData) -> None:
    one = right.isel(cell=slice(0, 100))
    with pytest.raises(DataError, match="hold out two or more"):
        criticism.interval_coverage(one, conformal=True)
    with pytest.raises(DataError, match=r"levels = \[1.0\]: give coverages between 0 and 1"):
        criticism.interval_coverage(one, levels=[1.0])


# ---------------------------------------------------------------------- numbers by hand
def test_ranks_by_hand() -> None:
    draws = np.array([1.0, 2.0, 3.0])[:, None, None]
    middle = criticism.pit(np.array([[2.5]]), draws)
    assert 2 / 4 <= middle[0, 0] <= 3 / 4
    weighted = criticism.pit(np.array([[2.5]]), draws, np.array([[0.0], [0.0], [1.0]]))
    assert 0 <= weighted[0, 0] <= 1 / 4
    assert distances(np.array([[0.1], [0.5], [0.9]]))[0] == pytest.approx(1 / 3 - 0.1)


def test_verdicts_by_hand() -> None:
    assert [graded(v, 0.1, 0.5) for v in (0.1, 0.3, 0.6, np.nan)] == ["good", "look", "bad", "bad"]
    assert [graded(v, 0.9, 0.5) for v in (0.95, 0.7, 0.4)] == ["good", "look", "bad"]
    assert ks_band(100) == pytest.approx(0.1358, abs=1e-4)


def test_the_band_holds_95_percent_of_uniform_samples() -> None:
    uniform = np.random.default_rng(0).random((100, 4000))
    assert (distances(uniform) <= ks_band(100)).mean() == pytest.approx(0.955, abs=0.012)


# ---------------------------------------------------------------------- all at once
@pytest.fixture(scope="module")
def found() -> Checks:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", ".*[Aa]r[Vv]i[Zz].*", FutureWarning)
        return criticism.checks(fitted(), cells(), cells().subset(np.arange(50, 100)), draws=40, particles=4)


def test_one_call_runs_every_check_and_says_what_each_means(found: Checks) -> None:
    assert len(found.table) == 19
    assert list(found.table.columns) == ["value", "threshold", "source", "verdict", "words"]
    assert set(found.table["verdict"]) <= {"good", "look", "bad", "not applicable"}
    assert found.table["words"].str.endswith(".").all()
    assert found["guide: PSIS k-hat"].value == found.table.loc["guide: PSIS k-hat", "value"]
    assert found.verdict == "bad"  # three epochs
    judged = found.table[found.table["verdict"] != "not applicable"]
    assert judged["value"].notna().all()


def test_the_page_holds_every_verdict_and_needs_no_other_file(found: Checks, tmp_path: Path) -> None:
    page = found.write(tmp_path / "checks.html", "My run", ["Two members."]).read_text()
    for check in found.checks:
        assert f"{check.name}: {check.verdict}" in page
    assert page.count("data:image/png") == len([c for c in found.checks if c.draw is not None])
    assert "http" not in page
    assert "Two members." in page


@pytest.mark.parametrize("name", ["ae", "adversarial_prior_ae"])
def test_checks_of_points_say_what_does_not_apply(name: str) -> None:
    table = criticism.checks(fitted(name), cells(), draws=10, particles=2, most_cells=20).table
    skipped = table[table["verdict"] == "not applicable"].index
    assert {"guide: PSIS k-hat", "guide: SBC of latents", "model: LOO", "model: mean of new cells"} <= set(skipped)
    assert "model: mean of same cells" not in skipped


def test_a_summary_names_what_is_bad(right: az.InferenceData) -> None:
    bad = Check("a", 1.0, "", "", "bad", "")
    summary = Checks([bad, skipped("b", "why")], right).summary()
    assert summary == "0 checks are good, 0 want a look, 1 are bad: a; 1 do not apply."
