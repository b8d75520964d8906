"""The experiment on latent graphs at its smallest size."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from experiments import latent_graphs, launch
from pyro_scm.data import synthetic


def test_graphs_are_found_where_they_can_be_and_lost_where_not(tmp_path: Path) -> None:
    config, main = latent_graphs.LatentGraphs, latent_graphs.main
    assert launch.launch(latent_graphs.__file__, config, main, ["--preset", "smoke", "--out", str(tmp_path)]) == 0
    (folder,) = (tmp_path / "latent_graphs").iterdir()
    linear = pd.read_csv(folder / "linear.csv")
    assert linear[linear["way"] == "exact search"]["shd worst"].max() <= 1
    masks = pd.read_csv(folder / "masks.csv").set_index(["mechanism", "way"])
    assert masks.loc[("linear", "mask known"), "shd worst"] <= 1
    assert masks.loc[("linear", "no mask"), "shd worst"] >= 2
    assert masks.loc[("linear", "mask known"), "lowest r of c"] > 0.98
    calibration = pd.read_csv(folder / "calibration.csv")
    assert (calibration["calibration error"] < 0.35).all()
    assert (folder / "reliability.png").is_file()


def test_calibration_by_hand() -> None:
    said = [0.0, 0.0, 0.25, 0.25, 0.85, 0.85]
    rows = pd.DataFrame({"way": "w", "cells": 5, "probability": said, "edge": [False, False, True, False, True, True]})
    found = latent_graphs.calibration(rows).loc[("w", 5)]
    assert found["calibration error"] == pytest.approx((2 * 0.25 + 2 * 0.15) / 6)
    assert found["share unsure (5 to 95 %)"] == pytest.approx(4 / 6)
    assert found["mean probability of these"] == pytest.approx(0.55)
    assert found["share of edges among these"] == pytest.approx(0.75)


def test_weak_screens_are_of_the_graph_and_not_of_its_usual_weights() -> None:
    adata = latent_graphs.weak_screen(2000, 1)
    truth, names = latent_graphs.truth_of(adata)
    c, z = adata.obsm["c"], adata.obsm["z"]
    acted = adata.uns["truth"]["targets"]
    env = adata.obs["perturbation"].cat.codes.to_numpy()
    assert names == [str(n) for n in adata.uns["truth"]["nodes"]]
    for j in range(len(names)):
        natural = ~acted[env, j]
        effects = np.linalg.lstsq(c[natural], (c - z)[natural, j], rcond=None)[0]
        assert ((np.abs(effects) > 1e-3) <= (truth[:, j] > 0)).all()
    weights = np.abs(np.linalg.lstsq(c[env == 0], (c - z)[env == 0], rcond=None)[0][truth > 0])
    assert not np.allclose(weights, 1, atol=0.05)


@pytest.mark.parametrize("name", list(latent_graphs.NETWORKS))
def test_screens_of_networks_have_five_latents_and_nonlinear_mechanisms(name: str) -> None:
    adata = latent_graphs.network_screen(name, 5, 0)
    assert adata.obsm["z"].shape[1] == 5
    model = synthetic.truth(adata)
    assert type(model.scm).__name__ == "MechanismSCM"
    assert (model.regime is None) == ("shifts" in name)
