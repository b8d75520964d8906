"""Proteins of cells of which only RNA is shown, at the smallest size, and its folds, baselines and scores by hand."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from experiments import held_out_proteins as experiment
from experiments import launch


def test_proteins_are_predicted_from_rna(tmp_path: Path) -> None:
    config, main = experiment.HeldOutProteins, experiment.main
    assert launch.launch(experiment.__file__, config, main, ["--preset", "smoke", "--out", str(tmp_path)]) == 0
    (folder,) = (tmp_path / "held_out_proteins").iterdir()
    table = pd.read_csv(folder / "summary.csv").set_index(["shown", "method"])
    condition = table.loc[("RNA", "mean of the condition")]
    assert table.loc[("RNA", "ridge"), "r2"] > condition["r2"] + 0.2
    for family in experiment.FAMILIES:
        rna = table.loc[("RNA", f"{family}, also without proteins")]
        assert rna["correlation within"] > 0.5 > condition["correlation within"]
        # cells whose proteins are shown are reconstructed better than those that show RNA alone
        assert table.loc[("both", f"{family}, also without proteins"), "r2"] > rna["r2"]
        # were training too short, not even the means would be right
        asked = f"{family}, also the RNA asked about"
        assert table.loc[("RNA", asked), "r2"] > condition["r2"] + 0.2
        # an average of predictions has no more error than they have on average
        assert table.loc[("RNA", f"{asked}{experiment.MEAN}"), "r2"] > table.loc[("RNA", asked), "r2"]
    moved = pd.read_csv(folder / "counterfactual.csv").set_index(["what", "method"])
    assert (
        moved.loc[("proteins", "mean shift"), "energy distance"]
        < moved.loc[("proteins", "no change"), "energy distance"]
    )
    for family in experiment.FAMILIES:
        assert moved.loc[("proteins", f"{family}, also without proteins"), "delta pearson"] > 0.8
        # the RNA of the cells asked about is no truth for a model that was trained on it
        assert ("RNA", f"{family}, whole cells") in moved.index
        assert ("RNA", f"{family}, also the RNA asked about") not in moved.index
    assert (folder / "proteins.png").is_file()


def test_folds_hold_every_cell_once_and_every_condition() -> None:
    cells = experiment.read("simulated")
    fold = experiment.folds(cells, 3)
    assert set(fold) == {0, 1, 2}
    counts = np.array([np.bincount(fold[cells.env == e], minlength=3) for e in cells.present])
    assert counts.max() - counts.min() <= 1


def test_models_are_trained_on_no_protein_of_the_cells_asked_about() -> None:
    cells = experiment.read("simulated").subset(np.arange(8))
    assert cells.y is not None
    known = np.arange(8) < 5
    for trained, number in zip(experiment.TRAINED, (5, 10, 13), strict=True):
        found = experiment.training_cells(cells, known, trained)
        assert found.y is not None
        assert len(found) == len(set(found.cells)) == number
        np.testing.assert_array_equal(found.y[:5], cells.y[:5])
        assert np.isnan(found.y[5:]).all()
        np.testing.assert_array_equal(found.x, cells.x[[*range(5), *range(5), *range(5, 8)][:number]])
        np.testing.assert_array_equal(found.env, cells.env[[*range(5), *range(5), *range(5, 8)][:number]])
    # what is held out stays what it was
    assert not np.isnan(cells.y).any()
    assert np.isnan(experiment.without_proteins(cells).y).all()


def test_ridge_finds_a_line_and_is_not_fooled_by_noise() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(80, 100))
    y = np.column_stack([x[:, :3].sum(1), rng.normal(size=80)])
    new = rng.normal(size=(500, 100))
    found = experiment.ridge(x, y, new)
    assert np.corrcoef(found[:, 0], new[:, :3].sum(1))[0, 1] > 0.6
    assert found[:, 1].std() < 0.5
    # few columns: least squares
    exact = experiment.ridge(x[:, :3], y[:, :1], new[:, :3])
    np.testing.assert_allclose(exact[:, 0], new[:, :3].sum(1), rtol=0.1, atol=0.1)


def test_scores_of_a_protein() -> None:
    truth = np.array([[0.0], [1.0], [4.0], [5.0]])
    env = np.array([0, 0, 1, 1])
    centre = np.full((4, 1), 2.5)
    perfect = experiment.protein_scores(truth, truth, env, centre).iloc[0]
    assert (perfect == 1).all()
    means = np.array([[0.5], [0.5], [4.5], [4.5]])
    condition = experiment.protein_scores(truth, means, env, centre).iloc[0]
    assert condition["r2"] == pytest.approx(1 - 1 / 17)
    assert condition["correlation within"] == 0
