"""Hill curves of many perturbations, from means over cells: what is recovered, and how sure it is."""

import functools

import numpy as np
import pandas as pd
import pyro
import pytest
import torch

from pyro_scm.errors import DataError, ModelError
from pyro_scm.hill import HillPosterior, _exactly, curve, fit_hill

DOSES = 10 ** np.arange(-2, 1.01, 0.5)


def screen(seed: int = 0, perturbations: int = 8, cells: int = 200) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Points of simulated perturbations, the last of which does nothing, and the truth; cells have sd 1."""
    rng = np.random.default_rng(seed)
    rows, truth = [], []
    for m in range(perturbations):
        log_ec50, slope = rng.uniform(-1.5, 0.5), np.exp(0.3 * rng.normal())
        emax = 0.0 if m == perturbations - 1 else rng.choice([-1, 1]) * rng.uniform(0.5, 3)
        truth.append((f"d{m}", log_ec50, slope, emax))
        for dose in (0.0, *DOSES):
            rising = dose**slope / (dose**slope + 10 ** (log_ec50 * slope))
            x = 5.0 + emax * rising + rng.normal(size=cells)
            rows.append((f"d{m}", dose, x.mean(), x.std(ddof=1) / np.sqrt(cells)))
    points = pd.DataFrame(rows, columns=["perturbation", "dose", "mean", "error"])
    return points, pd.DataFrame(truth, columns=["perturbation", "log_ec50", "slope", "emax"]).set_index("perturbation")


@functools.cache
def fitted() -> HillPosterior:
    return fit_hill(screen()[0], draws=500)


def test_the_curve_is_half_at_its_ec50_and_0_without_a_dose() -> None:
    dose = torch.tensor([0.0, 0.1, 1.0, 10.0])
    found = curve(dose, torch.tensor(0.0), torch.tensor(2.0))
    torch.testing.assert_close(found, torch.tensor([0.0, 0.01 / 1.01, 0.5, 100 / 101]))


def test_curves_are_recovered_within_their_intervals() -> None:
    _, truth = screen()
    found = fitted().summary(level=0.95)
    acting = truth.index[:-1]
    error = (found["log_ec50"] - truth["log_ec50"])[acting].abs()
    assert error.median() < 0.15
    for name in ("log_ec50", "emax", "slope"):
        inside = (found[f"{name}_low"] <= truth[name]) & (truth[name] <= found[f"{name}_high"])
        assert inside[acting].sum() >= 5, name
    assert (found["emax"] - truth["emax"]).abs().max() < 0.6
    assert (found["outside"] >= 0).all()


def test_of_a_perturbation_that_does_nothing_nothing_is_claimed() -> None:
    found = fitted().summary()
    nothing = found.iloc[-1]
    assert nothing["emax_low"] < 0 < nothing["emax_high"]
    width = found["log_ec50_high"] - found["log_ec50_low"]
    assert width.iloc[-1] > 2 * width.iloc[:-1].median()


def test_bands_hold_the_true_curve_and_the_control() -> None:
    _, truth = screen()
    table = fitted().curves([0.0, *DOSES], level=0.98)
    own = truth.loc[table["perturbation"]].reset_index(drop=True)
    power = table["dose"] ** own["slope"]
    expected = 5.0 + own["emax"] * power / (power + 10 ** (own["log_ec50"] * own["slope"]))
    inside = (table["low"] <= expected) & (expected <= table["high"])
    assert inside.mean() > 0.8
    assert (table["value"] - expected).abs().max() < 0.3
    controls = table[table["dose"] == 0]
    assert controls["value"].between(4.7, 5.3).all()


def test_the_unit_of_the_readout_does_not_matter() -> None:
    points, _ = screen(perturbations=3)
    scaled = points.assign(mean=1e4 * points["mean"] - 7e4, error=1e4 * points["error"])
    one, other = fit_hill(points, draws=200).summary(), fit_hill(scaled, draws=200).summary()
    np.testing.assert_allclose(other["log_ec50"], one["log_ec50"], atol=1e-4)
    np.testing.assert_allclose(other["emax"], 1e4 * one["emax"], rtol=1e-3)


def test_a_fit_leaves_no_trace_and_can_be_repeated() -> None:
    points, _ = screen(perturbations=2)
    before = torch.random.get_rng_state()
    one = fit_hill(points, draws=50, seed=3)
    assert (torch.random.get_rng_state() == before).all()
    assert list(pyro.get_param_store().keys()) == []
    other = fit_hill(points, draws=50, seed=3)
    np.testing.assert_array_equal(one.samples["log_ec50"], other.samples["log_ec50"])


def test_it_goes_to_arviz_with_names() -> None:
    idata = fitted().to_arviz()
    assert dict(idata.posterior.sizes) == {"chain": 1, "draw": 500, "perturbation": 8}
    assert idata.posterior["wells"].shape == (1, 500)
    assert list(idata.posterior["perturbation"].values)[:2] == ["d0", "d1"]
    assert float(idata.posterior["slope"].min()) > 0


@pytest.mark.slow
def test_hamiltonian_monte_carlo_agrees() -> None:
    points, _ = screen(perturbations=8)
    one, other = fit_hill(points, draws=400).summary(), fit_hill(points, method="nuts", draws=200).summary()
    acting = one.index[:-1]
    assert (one["log_ec50"] - other["log_ec50"])[acting].abs().max() < 0.1
    ratio = (one["log_ec50_high"] - one["log_ec50_low"]) / (other["log_ec50_high"] - other["log_ec50_low"])
    assert ratio[acting].between(0.6, 1.6).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p.drop(columns="error"), "no column 'error'"),
        (lambda p: p.assign(error=0.0), "error above 0"),
        (lambda p: p[p["dose"] > 0], "no point of dose 0 for 'd0'"),
        (lambda p: p[p["dose"] < 0.04], "fewer than 3 doses of 'd0'"),
        (lambda p: p.assign(mean=np.nan), "dose, mean and error are numbers"),
    ],
)
def test_points_that_cannot_be_used_are_refused(change: object, message: str) -> None:
    points, _ = screen(perturbations=1)
    with pytest.raises(DataError, match=message):
        fit_hill(change(points))  # type: ignore[operator]


def test_unknown_methods_and_no_draws_are_refused() -> None:
    points, _ = screen(perturbations=1)
    with pytest.raises(ModelError, match="unknown method 'gibbs': use one of svi, nuts"):
        fit_hill(points, method="gibbs")
    with pytest.raises(DataError, match="draws = 0"):
        fit_hill(points, draws=0)


def laws(draws: int, **changes: float) -> dict[str, np.ndarray]:
    values = {"ec50_centre": -0.5, "ec50_spread": 0.4, "slope_centre": 0.1, "slope_spread": 0.2, "emax_size": 0.7}
    return {name: np.full(draws, value) for name, value in {**values, "wells": 1e-3, **changes}.items()}


def drawn(error: float) -> dict[str, np.ndarray]:
    """Draws of a curve with EC50 1, slope 1.2 and Emax 0.8, in units of which its points are known within an error."""
    dose = np.r_[0.0, DOSES]
    mean = 0.1 + 0.8 * dose**1.2 / (dose**1.2 + 1.0)
    code = np.zeros(len(dose), np.int64)
    rng = np.random.default_rng(0)
    return _exactly(dose, mean, np.full(len(dose), error), code, (-2.0, 1.0), laws(50), 4000, rng)


def test_points_without_information_leave_a_curve_to_its_laws() -> None:
    found = drawn(1e4)
    expected = {"base": (0, 2.0), "emax": (0, 0.7), "log_ec50": (-0.5, 0.4), "log_slope": (0.1, 0.2)}
    for name, (mean, sd) in expected.items():
        assert found[name].mean() == pytest.approx(mean, abs=4 * sd / np.sqrt(4000) + 1e-3), name
        assert found[name].std() == pytest.approx(sd, rel=0.06), name


def test_exact_points_determine_a_curve() -> None:
    found = drawn(1e-3)
    expected = {"base": 0.1, "emax": 0.8, "log_ec50": 0.0, "log_slope": np.log(1.2)}
    for name, truth in expected.items():
        assert found[name].shape == (4000, 1)
        assert found[name].mean() == pytest.approx(truth, abs=0.06), name
        assert found[name].std() < 0.06, name
