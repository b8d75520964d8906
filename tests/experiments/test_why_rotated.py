"""The experiment on remedies: its smallest run, and a reader that is shown the truth."""

from pathlib import Path

import pandas as pd
import pytest

import pyro_scm as ps
from experiments import launch, why_rotated


def test_a_network_that_is_shown_the_truth_reads_it() -> None:
    adata = ps.simulate("sams-vae", seed=3, cells=40)
    found = why_rotated.supervised(adata, 400)
    assert found["mcc_z"] > 0.8
    assert found["linear_r2_z"] > 0.6


def test_wider_decoders_leave_less_unexplained_and_never_less_than_noise() -> None:
    adata = ps.simulate("sams-vae", seed=3, cells=100)
    narrow, wide = (why_rotated.residual(adata, width, 600)["residual"] for width in (4, 128))
    assert 1.0 < wide < narrow


def test_smallest_run_scores_every_way(tmp_path: Path) -> None:
    config, main = why_rotated.WhyRotated, why_rotated.main
    assert launch.launch(why_rotated.__file__, config, main, ["--preset", "smoke", "--out", str(tmp_path)]) == 0
    (folder,) = (tmp_path / "why_rotated").iterdir()
    scores = pd.read_csv(folder / "scores.csv").set_index(["variant", "way"])
    assert len(scores) == 4 + 4 * len(why_rotated.VARIANTS)
    recipe = scores.loc["recipe"]
    # turning latents leaves their span and the lengths of effects as they were
    for column in ("linear_r2_z", "length"):
        assert recipe.loc["unmixed", column] == pytest.approx(recipe.loc["dense", column], abs=1e-3)
    assert scores.loc[("shown the truth", "network of x"), "mcc_z"] > recipe.loc["dense", "mcc_z"]
