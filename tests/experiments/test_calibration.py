"""The experiment on calibration: its exact posterior by another route, and its smallest size."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from experiments import calibration, launch
from pyro_scm.linear_gaussian import LinearGaussian
from pyro_scm.metrics import coverage


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("calibration")
    words = ["--preset", "smoke", "--out", str(out)]
    assert launch.launch("calibration.py", calibration.Calibration, calibration.main, words) == 0
    (found,) = (out / "calibration").iterdir()
    return found


@pytest.mark.parametrize("decoder", calibration.DECODERS)
def test_the_exact_posterior_is_the_closed_form_of_the_linear_gaussian_model(decoder: str) -> None:
    import torch

    config = calibration.Calibration.preset("smoke")
    model, cells = calibration.known_screen(decoder, config)
    mean, covariance = calibration.exact(model, cells)
    d, e = config.latent, len(cells.environments)
    likelihood, prior = model.likelihoods[0], model.prior
    zeros = torch.zeros(1, e, d, dtype=torch.float64)
    closed = LinearGaussian(
        mixing=likelihood.net.weight.double()[None],
        offset=likelihood.net.bias.double()[None],
        psi=likelihood.scale.double().square()[None],
        matrix=torch.zeros(1, d, d, dtype=torch.float64),
        loc=prior.loc.double()[None],
        log_scale=zeros,
        gain=zeros + 1,
        targets=zeros,
        log_likelihood=np.zeros(1),
    )
    np.testing.assert_allclose(mean, closed.noise(cells.x, cells.env), atol=1e-5)
    independent = np.abs(covariance - np.diag(np.diag(covariance))).max() < 1e-6
    assert independent == (decoder == "orthogonal")


def test_the_true_latents_lie_in_the_exact_posteriors_intervals() -> None:
    config = replace(calibration.Calibration.preset("smoke"), cells=200)
    model, cells = calibration.known_screen("random", config)
    mean, covariance = calibration.exact(model, cells)
    from pyro_scm.chance import forked
    from pyro_scm.query import isolated

    with isolated(), forked():
        import torch
        from pyro import poutine

        torch.manual_seed(5)
        trace = poutine.trace(model).get_trace(cells.batch().unobserved())
    z, again = trace.nodes["z"]["value"].numpy(), replace(cells, x=trace.nodes["x"]["value"].numpy())
    mean, covariance = calibration.exact(model, again)
    half = 1.96 * np.sqrt(np.diag(covariance))
    assert [coverage(z[:, j], mean[:, j] - half[j], mean[:, j] + half[j]) for j in range(4)] == pytest.approx(
        [0.95] * 4, abs=0.02
    )


def test_guides_are_near_an_exact_posterior_that_they_can_be_and_not_near_another(folder: Path) -> None:
    table = pd.read_csv(folder / "exact.csv").set_index("decoder")
    near, far = table.loc["orthogonal"], table.loc["random"]
    assert (near["error of means, sd"] < 0.15).all()
    assert (near["error of log scales"] < 0.06).all()
    assert (far["narrower by"] > 0.08).all()
    assert far["sbc distance"].mean() > near["sbc distance"].mean()
    assert (far["sbc distance"] > far["sbc band"]).any()


def test_every_kind_of_interval_is_scored(folder: Path) -> None:
    table = pd.read_csv(folder / "counterfactual.csv").set_index(["environments", "expression", "members", "level"])
    assert len(table) == 2 * 2 * 2 * 3
    assert table["mean"].between(0, 1).all()
    assert 0.85 < table.loc[("seen", "measured", "all", 0.95), "mean"] <= 1  # type: ignore[index]
    held = pd.read_csv(folder / "held_out.csv").set_index("level")
    assert set(held.columns) == {"observation", "coverage", "coverage_conformal", "width", "width_conformal"}
    assert "95 % intervals of measured counterfactual expression" in (folder / "summary.txt").read_text()
