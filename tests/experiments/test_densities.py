"""The experiment on interventional densities at its smallest size, and what it measures where the answer is known."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from experiments import densities, launch
from experiments.densities import ACTIONS, FLOOR, NOTHING, VALUES, Densities, I, T, Units
from pyro_scm import query
from pyro_scm.data import synthetic

LINEAR = "linear mechanisms, linear decoder"


def test_the_structural_model_finds_the_interventional_densities_and_a_vae_does_not(tmp_path: Path) -> None:
    argv = ["--preset", "smoke", "--out", str(tmp_path)]
    assert launch.launch(densities.__file__, Densities, densities.main, argv) == 0
    (folder,) = (tmp_path / "densities").iterdir()
    scores = pd.read_csv(folder / "scores.csv")
    assert set(scores["model"]) == {FLOOR, NOTHING, *densities.MODELS}
    assert set(scores["action"]) == set(ACTIONS)
    asked = scores[scores["action"] == "do(t := t + 1)"].set_index("model")
    structural, vae = asked.loc[["structured_environment_vae"]], asked.loc[["vae"]]
    assert (structural["unexplained effect on genes"] < 0.2).all()
    assert (vae["unexplained effect on genes"] > 0.3).all()
    assert (structural["rmse trajectory"] < vae["rmse trajectory"].min()).all()
    assert structural["energy genes"].max() < asked.loc[NOTHING, "energy genes"] / 2
    assert asked.loc[FLOOR, "energy genes"] < asked.loc[NOTHING, "energy genes"] / 2
    assert len(list(folder.glob("*.png"))) == 3
    summary = pd.read_csv(folder / "summary.csv").set_index(["model", "action"])
    assert summary.loc[("vae", "observed"), "fits"] == 1


@pytest.fixture(scope="module")
def linear() -> tuple[Any, Any, Any]:
    """A screen, its control cells, and the truth of them as a fitted model."""
    adata = densities.simulated(LINEAR, 0, Densities(cells=60, genes=8))
    cells = synthetic.dataset(adata)
    return adata, cells, synthetic.known(adata, cells)


def test_units_undo_order_sign_scale_and_offset() -> None:
    rng = np.random.default_rng(0)
    true = rng.normal(size=(500, 3)) * [1.0, 2.0, 0.5] + 1.0
    learnt = np.stack([-3 * true[:, 2] + 1, 0.5 * true[:, 0], 7 * true[:, 1] - 2], 1)
    units = Units.of(true, learnt)
    assert units.order.tolist() == [1, 2, 0]
    assert units.slope == pytest.approx([0.5, 7.0, -3.0])
    assert units.offset == pytest.approx([0.0, -2.0, 1.0], abs=1e-9)
    assert np.allclose(units.true(learnt), true)
    assert units.learnt(2, [0.0, 1.0]) == pytest.approx([1.0, -2.0])
    (site,) = units.action(2.0)
    assert site == "c_1"
    assert units.action(2.0)[site](10.0) == pytest.approx(11.0)  # type: ignore[arg-type]
    assert units.action(0.0) == {}


def test_a_step_of_t_moves_i_by_the_weight_of_its_edge(linear: tuple[Any, Any, Any]) -> None:
    _, cells, (model, _) = linear
    weight = float(model.scm.matrix[I, T])
    assert abs(weight) == 1.0
    batch, same = densities.control(cells, 50), Units.same(3)
    assert float(batch.perturbed[batch.row].sum()) == 0
    before, after = (densities.draw(model, batch, same.action(step), seed=5) for step in (0.0, 2.0))
    assert np.allclose((after[0] - before[0])[:, [T, I]], [2.0, 2.0 * weight], atol=1e-5)
    other = densities.draw(model, batch, {}, seed=6)
    assert not np.allclose(other[0], before[0])


def test_the_truth_has_no_error_and_no_effect_counts_one(linear: tuple[Any, Any, Any]) -> None:
    _, cells, truth = linear
    some, same = cells.subset(np.arange(30)), Units.same(3)
    known = (truth[0], truth[1])
    errors = densities.counterfactual_errors(known, same, known, some, 1.0)
    assert all(value == pytest.approx(0.0, abs=1e-6) for value in errors.values())
    effect = np.ones((4, 2))
    assert densities.unexplained(effect, 0 * effect) == 1.0
    assert densities.unexplained(effect, 1.5 * effect) == pytest.approx(0.25)


def test_trajectories_are_the_mechanism_of_i_at_each_cells_noise(linear: tuple[Any, Any, Any]) -> None:
    _, cells, truth = linear
    some = cells.subset(np.arange(20))
    lines = densities.trajectories(truth, Units.same(3), some)
    z = query.embed(truth, some)["z"][0]
    weight = float(truth[0].scm.matrix[I, T])
    assert np.allclose(lines, z[:, I] + weight * VALUES[:, None], atol=1e-5)
    stretched = Units(np.array([0, 1, 2]), np.array([2.0, 4.0, 1.0]), np.array([1.0, 0.0, 0.0]), 1.0)
    # of a model whose units differ: v becomes 1 + 2 v, and i is read off divided by 4
    assert np.allclose(
        densities.trajectories(truth, stretched, some), (z[:, I] + weight * (1 + 2 * VALUES[:, None])) / 4, atol=1e-5
    )


def test_distances_are_zero_for_the_same_sample_and_see_only_the_pair(linear: tuple[Any, Any, Any]) -> None:
    rng = np.random.default_rng(1)
    c, x = rng.normal(size=(60, 3)), rng.normal(size=(60, 5))
    assert all(v == pytest.approx(0.0, abs=1e-9) for v in densities.distances((c, x), (c, x)).values())
    third = densities.distances((c, x), (c + np.array([0.0, 0.0, 9.0]), x))
    assert third["energy pair"] == pytest.approx(0.0, abs=1e-9)
    both = densities.distances((c, x), (c + np.array([0.0, 2.0, 0.0]), x + 1.0))
    assert both["energy pair"] > 0.5
    assert both["mmd genes"] > 0.1


def test_shares_are_of_doing_nothing_on_the_same_screen() -> None:
    asked = {"design": "d", "action": "do(t := t + 1)", "seed": 0, "mmd pair": 0.0, "mmd genes": 0.0}
    rows = [
        {**asked, "screen": screen, "model": model, "energy pair": energy, "energy genes": 2 * energy}
        for screen, unit in ((0, 1.0), (1, 10.0))
        for model, energy in ((NOTHING, unit), ("vae", 0.5 * unit), (FLOOR, 0.1 * unit))
    ]
    observed = {**asked, "action": "observed", "screen": 0, "model": "vae", "energy pair": 1.0, "energy genes": 1.0}
    table = densities.summary(pd.DataFrame([*rows, observed]))
    vae = table.loc[("d", "vae", "do(t := t + 1)")]
    assert (vae["share pair"], vae["share genes"], vae["fits"]) == (0.5, 0.5, 2)
    assert (vae["energy pair"], vae["lowest pair"], vae["highest genes"]) == (2.75, 0.5, 10.0)
    assert table.loc[("d", FLOOR, "do(t := t + 1)"), "share genes"] == pytest.approx(0.1)
    assert np.isnan(table.loc[("d", "vae", "observed"), "share pair"])
