"""The screen with a known truth at its smallest size, and its questions and scores by hand."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from experiments import launch
from experiments import screen_with_truth as experiment
from pyro_scm.baselines import controls, environment_means
from pyro_scm.data import synthetic
from pyro_scm.data.synthetic import Screen

SMOKE = experiment.ScreenWithTruth.preset("smoke")


def test_recovery_pairs_and_counterfactuals_in_one_table(tmp_path: Path) -> None:
    config, main = experiment.ScreenWithTruth, experiment.main
    assert launch.launch(experiment.__file__, config, main, ["--preset", "smoke", "--out", str(tmp_path)]) == 0
    (folder,) = (tmp_path / "screen_with_truth").iterdir()
    table = pd.read_csv(folder / "summary.csv").set_index("model")
    # a VAE does not know the environment: nothing changes, and its intervals miss
    assert table.loc["vae", "cf pair"] == pytest.approx(0, abs=1e-6)
    assert np.isnan(table.loc["vae", "delta pearson"])
    sparse = table.loc["translation_vae, refined"]
    assert sparse["cf pair"] > 0.2
    assert sparse["delta pearson"] > 0.7
    assert sparse["covered 50"] > table.loc["vae", "covered 50"]
    # a mean change knows most of the effect, and of a cell's own part less than nothing
    assert table.loc["additive", "cf pair"] > 0.5
    assert table.loc["additive", "cf pair own"] < 0
    assert (folder / "scores.png").is_file()


def test_pairs_are_the_sum_of_their_singles_and_their_truth_is_known() -> None:
    screen = Screen(latent=3, genes=5, environments=7, cells=400, decoder="linear", graph="empty", strength=3.0)
    adata = experiment.with_pairs(screen, 2)
    names = [str(n) for n in adata.obs["perturbation"].cat.categories]
    stored = adata.uns["truth"]
    for row, name in enumerate(names[-2:], 5):
        parts = [names.index(p) for p in name.split("+")]
        np.testing.assert_allclose(stored["shift"][row], stored["shift"][parts].sum(0))
        drawn = adata.obsm["z"][(adata.obs["perturbation"] == name).to_numpy()]
        np.testing.assert_allclose(drawn.mean(0), stored["shift"][row], atol=0.3)
    cells = synthetic.dataset(adata, "multi-hot")
    assert [str(n) for n in cells.environments.index] == names
    # the truth answers as itself: a control cell put into a pair moves by the pair's shift through the linear genes
    control = cells.of("control")
    effect = experiment.effects(synthetic.known(adata, control), control, 1.0, environment=names[-1])[0]
    weight = stored["parameters"]["likelihoods.0.net.weight"]
    np.testing.assert_allclose(effect, np.tile(stored["shift"][-1] @ weight.T, (400, 1)), atol=1e-4)


def test_pairs_and_cells_kept_aside_are_not_trained_on() -> None:
    t = experiment.task("causal", SMOKE)
    assert not set(t.train.present) & set(t.pairs.present)
    assert not set(t.train.cells) & set(t.aside.cells)
    assert set(t.train.present) == set(t.aside.present)
    for _, cells, name in t.questions(3):
        assert not set(cells.cells) & set(t.train.cells)
        assert name != str(cells.environments.index[cells.env[0]])


def test_explained_is_of_no_effect_and_of_the_mean_effect() -> None:
    true = [np.array([[1.0, 0.0], [3.0, 0.0]])]
    assert experiment.explained(true, true) == (1, 1)
    assert experiment.explained(true, [np.zeros((2, 2))]) == (0, pytest.approx(1 - 10 / 2))
    mean = np.array([[2.0, 0.0], [2.0, 0.0]])
    assert experiment.explained(true, [mean]) == (pytest.approx(0.8), 0)


def test_true_means_score_perfectly() -> None:
    t = experiment.task("causal", SMOKE)
    assert set(experiment.true_answers(t, SMOKE)) == {"pair", "single"}
    means, _ = environment_means(t.pairs, 1.0)
    shift = controls(t.train, t.names, 1.0) - controls(t.aside, t.names, 1.0)
    assert experiment.delta_pearson(means[t.pairs.present] + shift, t) == pytest.approx(1)


def test_every_model_of_the_suite_is_asked() -> None:
    from pyro_scm.recipes import RECIPES

    assert {row.recipe for row in experiment.MODELS.values()} == set(RECIPES) - {"multicpa"}
