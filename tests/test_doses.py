"""Predicted curves over doses, observed points and Hill curves, of one readout."""

import functools
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest
import torch

from pyro_scm import recipes
from pyro_scm.conditions import at_dose
from pyro_scm.data.dataset import EnvironmentDataset
from pyro_scm.doses import DoseResponse, dose_response
from pyro_scm.errors import DataError, ModelError
from pyro_scm.infer import fit
from pyro_scm.query import counterfactual
from pyro_scm.run import Run
from tests.compositions import cells

DOSES = (0.03, 0.1, 0.3, 1.0, 3.0)
LOG_EC50 = {"A": -1.0, "B": 0.0}


@functools.cache
def fitted(name: str = "cpa", representation: str = "multi-dose", counts: bool = False, **options: Any) -> Run:
    screen = cells(representation, counts)
    training = screen.subset(screen.env != screen.environment_index("A 1 uM")[0])
    torch.manual_seed(0)
    own = {"hidden": (8,), "guide_hidden": (8,), **options}
    model, guide = recipes.make(name, training.schema, latent=3, **own)
    return fit(model, guide, training, seeds=(0, 1), epochs=3, lr=0.02, batch_size=90, progress=False)


@functools.cache
def hill_screen() -> EnvironmentDataset:
    """Counts-free cells of two drugs at five doses, 100 of each, with known EC50s; drug B lowers what A raises."""
    rng = np.random.default_rng(0)
    direction = np.r_[np.ones(4), np.zeros(4)]
    rows, x = [], []
    for drug, sign in (("DMSO", 0), ("A", 1), ("B", -1)):
        for dose in (0.0,) if drug == "DMSO" else DOSES:
            rise = dose / (dose + 10 ** LOG_EC50[drug]) if sign else 0.0
            x.append(sign * 2 * rise * direction + rng.normal(size=(100, 8)))
            rows += [(drug, dose)] * 100
    obs = pd.DataFrame(rows, columns=["drug", "dose"], index=[f"c{i}" for i in range(len(rows))])
    adata = anndata.AnnData(np.concatenate(x).astype(np.float32), obs, pd.DataFrame(index=[f"g{i}" for i in range(8)]))
    return EnvironmentDataset.from_anndata(
        adata, environment="drug", control="DMSO", dose="dose", representation="multi-dose"
    )


@functools.cache
def hill_response() -> DoseResponse:
    screen = hill_screen()
    torch.manual_seed(0)
    model, guide = recipes.make("cpa", screen.schema, latent=2, hidden=(), guide_hidden=(8,), doser="hill")
    run = fit(model, guide, screen, seeds=(0, 1), epochs=15, lr=0.03, batch_size=100, progress=False)
    return dose_response(run, screen)


def test_curves_are_the_runs_predictions() -> None:
    run, screen = fitted(), cells("multi-dose")
    found = dose_response(run, screen, ["A"], readout="g3", doses=[0.0, 2.0, 10.0], references=1000, hill=None)
    controls = screen.of("DMSO")
    for dose, value in zip(found.curves["dose"], found.curves["value"], strict=True):
        there = at_dose(run, "A 10 uM", dose)  # type: ignore[arg-type]
        effect = counterfactual(run, controls, environment=there, draws=20).effect  # the decoder is a network
        assert value == pytest.approx(effect[..., 3].mean(), abs=0.05)
    assert found.curves["value"].iloc[0] == 0
    assert found.members["A"].shape == (2, 3)


@pytest.mark.parametrize("representation", ["multi-dose", "molecules", "multi-hot"])
def test_every_representation_of_doses_is_asked(representation: str) -> None:
    found = dose_response(fitted("translation_vae", representation), cells(representation), hill=None)
    assert sorted(set(found.curves["perturbation"])) == ["A", "B", "C"]
    assert np.isfinite(found.curves["value"]).all()
    moving = found.curves[found.curves["perturbation"] == "A"]["value"]
    assert moving.nunique() > 5


def test_additive_models_have_the_curves_of_their_dosers() -> None:
    run = fitted(hidden=())  # linear dosers, linear decoder
    for readout in ("effect", "latent", "g0"):
        found = dose_response(run, cells("multi-dose"), ["A"], readout=readout, doses=[0, 1, 5, 10], hill=None)
        values = found.members["A"]
        np.testing.assert_allclose(values, values[:, [3]] * np.array([0, 0.1, 0.5, 1.0]), rtol=1e-3, atol=1e-6)
        assert found.table().loc["A", "half"] == pytest.approx(5, rel=0.2)


def test_points_are_means_with_standard_errors() -> None:
    run, screen = fitted(), cells("multi-dose")
    found = dose_response(run, screen, ["A"], readout="g0", hill=None).points
    assert list(found["dose"]) == [0, 1, 10]
    assert list(found["trained"]) == [True, False, True]
    x = {n: np.asarray(screen.of(n).x)[:, 0] for n in ("DMSO", "A 1 uM", "A 10 uM")}
    for name, mean, error in zip(x, found["mean"], found["error"], strict=True):
        assert mean == pytest.approx(x[name].mean() - x["DMSO"].mean(), abs=1e-5)
        assert error == pytest.approx(x[name].std(ddof=1) / np.sqrt(60), rel=1e-4)


def test_counts_are_read_in_log_normalised_units() -> None:
    screen = cells("multi-dose", counts=True)
    found = dose_response(fitted(counts=True), screen, ["A"], readout="g0", hill=None).points
    x = np.asarray(screen.normalised())[:, 0]
    expected = x[screen.env == screen.environment_index("A 10 uM")[0]].mean() - x[screen.env == 0].mean()
    assert found["mean"].iloc[-1] == pytest.approx(expected, rel=1e-4)


def test_the_cells_of_one_cell_type_have_curves_of_their_own() -> None:
    run, screen = fitted(), cells("multi-dose")
    t = dose_response(run, screen, ["A"], readout="g8", covariates={"cell_type": "T"}, hill=None)
    assert set(t.points["cells"]) == {30}
    with pytest.raises(DataError, match="no cells of cell_type = 'NK': there are 'B', 'T'"):
        dose_response(run, screen, covariates={"cell_type": "NK"})


def test_draws_widen_the_bands() -> None:
    run, screen = fitted("sams_vae", "multi-hot"), cells("multi-hot")
    one = dose_response(run, screen, ["A"], hill=None)
    several = dose_response(run, screen, ["A"], draws=3, hill=None)
    assert one.members["A"].shape == (2, 14)
    assert several.members["A"].shape == (6, 14)
    assert len(np.unique(several.members["A"][:, -1])) == 6


def test_hill_curves_and_model_agree_with_the_truth() -> None:
    found = hill_response()
    table = found.table()
    for name, truth in LOG_EC50.items():
        assert table.loc[name, "log_ec50_low"] < truth < table.loc[name, "log_ec50_high"]
        assert table.loc[name, "log_ec50"] == pytest.approx(truth, abs=0.3)
        assert table.loc[name, "emax"] == pytest.approx(4.0, abs=0.8)  # along its own direction both rise
    assert found.curves["hill"].notna().all()
    points = found.points.merge(found.curves, on=["perturbation", "dose"])
    assert len(points) == 2  # controls: measured doses need not be among those predicted


def test_doses_beyond_training_carry_a_warning() -> None:
    found = dose_response(fitted(), cells("multi-dose"), ["B"], doses=[1.0, 10.0, 40.0], hill=None).curves
    assert list(found["warning"] != "") == [False, False, True]
    assert "dose of B 40 is outside the 1 to 10 of training" in found["warning"].iloc[2]


def test_the_figure_has_a_panel_for_each_curve() -> None:
    figure = hill_response().figure()
    assert [a.get_title() for a in figure.axes] in (["A", "B"], ["B", "A"])
    labels = {text.get_text() for text in figure.legends[0].get_texts()}
    assert labels >= {"predicted", "Hill curve of the points", "observed, trained on"}
    assert len(hill_response().figure(number=1).axes) == 1


def test_what_cannot_be_asked_is_refused() -> None:
    run, screen = fitted(), cells("multi-dose")
    with pytest.raises(DataError, match="no gene 'g99': did you mean"):
        dose_response(run, screen, readout="g99")
    with pytest.raises(DataError, match="no doses of 'D' in the run's table"):
        dose_response(run, screen, ["D"])
    with pytest.raises(DataError, match="give 1 or more of each"):
        dose_response(run, screen, draws=0)
    with pytest.raises(ModelError, match="does not hold its dose"):
        dose_response(fitted("translation_vae", "one-hot"), cells("one-hot"))
