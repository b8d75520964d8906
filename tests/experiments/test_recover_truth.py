"""The experiment on recovery: its scores by hand, and its smallest run."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from experiments import launch, recover_truth


def test_calibration_error_by_hand() -> None:
    truth = np.array([True, True, False, False])
    assert recover_truth.calibration_error(truth, np.array([1.0, 1.0, 0.0, 0.0])) == 0
    assert recover_truth.calibration_error(truth, np.full(4, 0.5)) == 0
    assert recover_truth.calibration_error(truth, np.full(4, 0.9)) == pytest.approx(0.4)
    assert recover_truth.calibration_error(truth, np.array([0.0, 0.0, 1.0, 1.0])) == 1


def test_latents_that_match_nothing_are_targets_of_nothing() -> None:
    truth = np.array([[True, False]])
    found = np.array([[0.1, 0.9, 0.8]])
    padded, columns = recover_truth.aligned(truth, found, np.array([1, 0]))
    assert padded.tolist() == [[True, False, False]]
    assert columns.tolist() == [[0.9, 0.1, 0.8]]


def test_smallest_run_scores_every_way(tmp_path: Path) -> None:
    config, main = recover_truth.RecoverTruth, recover_truth.main
    assert launch.launch(recover_truth.__file__, config, main, ["--preset", "smoke", "--out", str(tmp_path)]) == 0
    (folder,) = (tmp_path / "recover_truth").iterdir()
    scores = pd.read_csv(folder / "scores.csv").set_index("way")
    assert list(scores.index) == ["spike-slab", "softmax", "dense", "unmixed", "refined"]
    assert scores["mcc_z"].between(0, 1).all()
    assert scores["calibration error"].between(0, 1).all()
    # turning latents leaves their span as it was
    assert scores.loc["unmixed", "linear_r2_z"] == pytest.approx(scores.loc["dense", "linear_r2_z"], abs=1e-3)
