"""The experiment on two latents: its data by hand, and its smallest run."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from experiments import launch, two_latents


def test_matrices_shifts_and_cells_are_those_of_the_setting() -> None:
    m = two_latents.matrix(3)
    assert m.shape == (10, 2)
    assert set(np.unique(m)) <= {-1.0, 0.0, 1.0}
    assert (np.abs(m).sum(1) >= 1).all()
    assert two_latents.shifts(6, 3.0) == [(0, 0), (3, 0), (0, 3), (-3, 0), (0, -3), (6, 0)]
    rng = np.random.default_rng(0)
    c = two_latents.latents(rng, (2.0, 0.5), 500, independent=False)
    assert np.allclose(c[:, 1] - c[:, 0], 0.5)
    assert c[:, 0].mean() == pytest.approx(2, abs=0.2)
    cells = two_latents.screen(3, [(0, 0), (5.0, 0)], 400, independent=True)
    moved = cells.x[400:].mean(0) - cells.x[:400].mean(0)
    assert np.allclose(moved, 5 * m[:, 0], atol=0.4)


def test_ways_of_training() -> None:
    assert two_latents.ways("vae", 9) == ("as published",)
    assert two_latents.ways("environment_vae", 1) == ("as published",)
    assert two_latents.ways("environment_vae", 2) == ("as published", "annealed")  # one shift cannot be unmixed
    assert two_latents.ways("environment_vae", 3)[-1] == "unmixed"


@pytest.mark.parametrize("name", two_latents.ENVIRONMENT_MODELS)
def test_unmixed_fits_lie_on_the_axes(name: str) -> None:
    cells = two_latents.screen(0, two_latents.shifts(5, 3.0), 200, independent=True)
    run = two_latents.train(name, cells, (0, 1), 160, "unmixed")
    for k in range(2):
        found = two_latents.angle_of(run.member(k)[0], 0)
        assert found["to_axis"] < 8
        assert found["distance"] < 0.1


def test_the_whole_experiment_at_its_smallest(tmp_path: Path) -> None:
    config, main = two_latents.TwoLatents, two_latents.main
    assert launch.launch(two_latents.__file__, config, main, ["--preset", "smoke", "--out", str(tmp_path)]) == 0
    (folder,) = (tmp_path / "two_latents").iterdir()
    many = pd.read_csv(folder / "many_environments.csv")
    assert set(many["model"]) == {"vae", *two_latents.ENVIRONMENT_MODELS}
    assert many["to_axis"].between(0, 45).all()
    assert len(many) == 2 * (1 + 4 + 1 + 4 * 3)  # seeds x (5 models with the reference alone; then three ways)
    chosen = pd.read_csv(folder / "restarts_by_loss.csv")
    assert (chosen["runs"] == 1).all()
    first = chosen.iloc[0]
    part = many[(many["environments"] == first["environments"]) & (many["model"] == first["model"])]
    part = part[part["way"] == first["way"]]
    assert first["median"] == pytest.approx(part.loc[part["loss"].idxmin(), "to_axis"])
    losses = pd.read_csv(folder / "losses.csv")
    assert np.isfinite(losses["loss"]).all()
    assert {p.name for p in folder.glob("*.png")} >= {"losses.png", "angles.png"}
