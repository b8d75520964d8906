"""The experiment on the choices in unmixing: its scores by hand, and its smallest run."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import pyro_scm as ps
from experiments import launch, unmixing_choices
from experiments.unmixing_choices import Case, UnmixingChoices
from pyro_scm.data import synthetic
from pyro_scm.metrics import mcc


@pytest.fixture(scope="module")
def own() -> Case:
    """A fit of two epochs."""
    return unmixing_choices.case("five-latents", 0, 5, UnmixingChoices.preset("smoke"))


def test_the_true_noise_and_targets_have_the_best_scores(own: Case) -> None:
    found = unmixing_choices.scores(own, own.z, own.targets.astype(float))
    assert found["mcc_z"] == pytest.approx(1)
    assert found["f1"] == found["precision"] == found["recall"] == 1
    assert found["calibration error"] == 0
    # a latent that is not there finds none of its targets, one too many finds wrong ones
    fewer = unmixing_choices.scores(own, own.z[:, 1:], own.targets[:, 1:].astype(float))
    assert fewer["precision"] == 1 > fewer["recall"]
    twice = [0, *range(5)]
    almost = own.z[:, twice] + 1e-3 * np.eye(6)[0] * np.random.default_rng(0).normal(size=(len(own.z), 1))
    more = unmixing_choices.scores(own, almost, own.targets[:, twice].astype(float))
    assert more["recall"] == 1 > more["precision"]


def test_fast_ica_finds_sparse_sources() -> None:
    rng = np.random.default_rng(0)
    truth = rng.normal(0, 3, (200, 4)) * (rng.random((200, 4)) < 0.2)
    basis = np.linalg.qr(rng.normal(size=(4, 4)))[0]
    m = unmixing_choices.fast_ica(truth @ basis.T)
    assert np.allclose(np.linalg.norm(m, axis=1), 1)
    assert mcc(truth, truth @ basis.T @ m.T).score > 0.98


def test_rules_choose_by_what_they_name() -> None:
    table = pd.DataFrame(
        {
            "screen": "s",
            "number": [0, 0, 1, 1],
            "loss": [1.0, 2.0, 2.0, 1.0],
            "contrast": [2.0, 1.0, 1.0, 2.0],
            "agreement": [0.1, 0.9, 0.1, 0.9],
            "mcc_z": [0.5, 0.7, 0.9, 0.6],
            "f1": [0.5, 0.7, 0.9, 0.6],
        }
    )
    found = unmixing_choices.chosen(table).loc["s"]["mcc_z"]
    assert found["lowest loss"] == pytest.approx(0.55)
    assert found["lowest contrast"] == pytest.approx(0.8)
    assert found["highest agreement"] == pytest.approx(0.65)
    assert found["best (needs the truth)"] == pytest.approx(0.8)
    assert found["mean of members"] == pytest.approx(0.675)


def test_a_fit_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cells = synthetic.dataset(ps.simulate("five-latents", cells=10))
    config = UnmixingChoices(restarts=1, epochs=0, fits=str(tmp_path))
    first = unmixing_choices.kept(config.fits, "one", cells, 5, config)
    monkeypatch.setattr(unmixing_choices, "fitted", lambda *_: pytest.fail("fitted again"))
    again = unmixing_choices.kept(config.fits, "one", cells, 5, config)
    assert again.losses == pytest.approx(first.losses)


def test_smallest_run_measures_every_part(tmp_path: Path) -> None:
    main = unmixing_choices.main
    assert launch.launch(unmixing_choices.__file__, UnmixingChoices, main,
                         ["--preset", "smoke", "--out", str(tmp_path)]) == 0  # fmt: skip
    (folder,) = (tmp_path / "unmixing_choices").iterdir()
    tables = {name: pd.read_csv(folder / f"{name}.csv") for name in unmixing_choices.SUMMARIES}
    assert {"as fitted", "FastICA", "log-cosh, rotation", "l1, oblique"} <= set(tables["contrasts"]["way"])
    assert list(tables["numbers"]["latent"])[:3] == [5, 7, 10]
    assert set(tables["priors"]["probability"]) == {"two groups", "its own"}
    taken = tables["offsets"][tables["offsets"]["taken off"]]
    assert taken["mcc_z"].std() < 1e-3 < tables["offsets"]["mcc_z"].std()  # whatever the offset's size
    # turning latents leaves their span as it was
    spans = tables["scales"].pivot(index="interventions", columns="way", values="linear_r2_z")
    assert np.allclose(spans["as fitted"], spans["means and covariances"], atol=1e-3)
    assert (folder / "stability.png").is_file()
