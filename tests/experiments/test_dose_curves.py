"""The experiment on dose-response curves at its smallest size, and its simulated screens."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from experiments import dose_curves, launch
from experiments.dose_curves import ALONE, DOSES, KNOWN, MODEL, POOLED, DoseCurves


def test_ec50s_are_found(tmp_path: Path) -> None:
    argv = ["--preset", "smoke", "--out", str(tmp_path)]
    assert launch.launch(dose_curves.__file__, DoseCurves, dose_curves.main, argv) == 0
    (folder,) = (tmp_path / "dose_curves").iterdir()
    drugs = pd.read_csv(folder / "drugs.csv")
    assert set(drugs["method"]) == {POOLED, KNOWN, ALONE, MODEL}
    own = drugs[drugs["method"] == POOLED]
    assert len(own) == 5
    assert own["error"].median() < 0.3
    assert own["inside"].mean() >= 0.6
    assert (folder / "ec50.png").is_file()


def test_screens_are_what_they_are_said_to_be() -> None:
    config = DoseCurves(drugs=3, cells=400, genes=20)
    adata, truth, _ = dose_curves.simulated(config, 0.0, 0)
    assert adata.n_obs == 400 * (1 + 3 * len(DOSES))
    x = pd.DataFrame(np.asarray(adata.X)).groupby([adata.obs["drug"].to_numpy(), adata.obs["dose"].to_numpy()]).mean()
    for drug, own in truth.iterrows():
        change = x.loc[drug] - x.loc[("DMSO", 0.0)]
        top = change.loc[10.0]
        # the largest dose is above EC50, so that at least half of Emax is reached, and noise is 20 genes' of 400 cells
        assert 0.4 * own["emax"] < np.linalg.norm(top) < own["emax"] + 0.5


def test_one_curve_alone_is_found_exactly_without_noise() -> None:
    dose = np.r_[0.0, DOSES]
    mean = 2.0 * dose**1.5 / (dose**1.5 + 0.3**1.5)
    points = pd.DataFrame({"perturbation": "a", "dose": dose, "mean": mean, "error": 0.1})
    assert dose_curves.alone(points)["a"] == pytest.approx(np.log10(0.3), abs=1e-4)
