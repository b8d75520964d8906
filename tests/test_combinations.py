"""Combinations against the sum of their parts: definitions, predictions of known models, observed cells."""

import functools
from dataclasses import replace
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest
import torch

from pyro_scm import recipes
from pyro_scm.combinations import interactions, scores
from pyro_scm.data.dataset import EnvironmentDataset
from pyro_scm.errors import DataError
from pyro_scm.infer import fit
from pyro_scm.run import Run
from tests.compositions import cells

PAIR = "A+B 10+10 uM"


def moments(combination: np.ndarray, *parts: np.ndarray) -> np.ndarray:
    both = np.stack([combination, *parts])
    return both @ both.T


def test_scores_of_known_changes() -> None:
    a, b = np.array([3.0, 0, 0]), np.array([0, 4.0, 0])
    additive = scores(moments(a + b, a, b))
    assert {k: round(float(v), 9) for k, v in additive.items()} == {"synergy": 0, "deviation": 0, "weight": 1, "fit": 1}
    assert scores(moments(1.5 * (a + b), a, b))["synergy"] == pytest.approx(0.5)
    assert scores(moments(0 * a, a, b))["synergy"] == pytest.approx(-1)
    new = scores(moments(a + b + np.array([0, 0, 5.0]), a, b))  # elsewhere: no synergy along the sum
    assert new["synergy"] == pytest.approx(0)
    assert new["deviation"] == pytest.approx(1)
    assert new["fit"] == pytest.approx(0.5)
    only = scores(moments(2 * a, a, b))
    assert only["weight"] == pytest.approx(np.sqrt(2))  # of weights 2 and 0
    assert np.isnan(scores(moments(a, 0 * a, 0 * a))["synergy"])


@functools.cache
def fitted(name: str, representation: str, **options: Any) -> Run:
    screen = cells(representation)
    training = screen.subset(screen.env != screen.environment_index(PAIR)[0])
    torch.manual_seed(0)
    model, guide = recipes.make(name, training.schema, latent=3, guide_hidden=(8,), **options)
    return fit(model, guide, training, seeds=(0, 1), epochs=3, lr=0.02, batch_size=90, progress=False)


@pytest.mark.parametrize(
    ("name", "representation"), [("cpa", "multi-dose"), ("chemcpa", "molecules"), ("sams_vae", "multi-hot")]
)
def test_additive_latents_and_a_linear_decoder_have_no_interactions(name: str, representation: str) -> None:
    run = fitted(name, representation, hidden=())
    own = interactions(run, cells(representation)).scores.loc[PAIR]
    assert own[["synergy", "synergy_low", "synergy_high"]].abs().max() < 1e-4
    assert own["deviation"] < 1e-4
    assert own["weight"] == pytest.approx(1, abs=1e-3)
    assert not own["trained"]


def test_a_network_may_have_interactions_and_members_may_differ() -> None:
    run = fitted("cpa", "multi-dose", hidden=(16,))
    own = interactions(run, cells("multi-dose")).scores.loc[PAIR]
    assert own["deviation"] > 1e-3
    assert own["synergy_low"] < own["synergy"] < own["synergy_high"]


def pair_cells(factor: float, seed: int = 0, number: int = 150) -> EnvironmentDataset:
    """A and B alone and together, the pair's change `factor` times the sum."""
    rng = np.random.default_rng(seed)
    changes = {"DMSO": np.zeros(10), "A": np.r_[np.ones(5), np.zeros(5)], "B": np.r_[np.zeros(5), np.ones(5)]}
    changes["A+B"] = factor * (changes["A"] + changes["B"])
    x = np.concatenate([c + rng.normal(size=(number, 10)) for c in changes.values()])
    obs = pd.DataFrame({"p": np.repeat(list(changes), number)}, index=[f"c{i}" for i in range(len(x))])
    adata = anndata.AnnData(x.astype(np.float32), obs=obs, var=pd.DataFrame(index=[f"g{i}" for i in range(10)]))
    return EnvironmentDataset.from_anndata(adata, environment="p", control="DMSO", representation="multi-hot")


@functools.cache
def quick(factor: float, seed: int = 0) -> tuple[Run, EnvironmentDataset]:
    screen = pair_cells(factor, seed)
    torch.manual_seed(0)
    model, guide = recipes.make("cpa", screen.schema, latent=2, hidden=(), guide_hidden=(4,))
    return fit(model, guide, screen, epochs=1, progress=False), screen


@pytest.mark.parametrize("factor", [0.5, 1.0, 1.5])
def test_observed_synergy_is_that_of_the_cells(factor: float) -> None:
    own = interactions(*quick(factor), level=0.98).scores.loc["A+B"]
    assert own["observed_synergy_low"] < factor - 1 < own["observed_synergy_high"]
    assert own["observed_synergy"] == pytest.approx(factor - 1, abs=0.15)
    assert own["observed_synergy_high"] - own["observed_synergy_low"] < 0.5


def test_the_cells_noise_is_no_deviation() -> None:
    """150 cells of sd 1: uncorrected, deviations of additive pairs would all be near 0.16."""
    found = [
        interactions(*quick(1.0, seed), bootstraps=100).scores.loc["A+B", "observed_deviation"] for seed in range(4)
    ]
    assert np.median(found) < 0.1


def test_of_one_gene_the_difference_is_in_its_unit() -> None:
    own = interactions(*quick(1.5), gene="g2").scores
    assert own["observed_synergy"].loc["A+B"] == pytest.approx(0.5, abs=0.3)
    assert "deviation" not in own
    with pytest.raises(DataError, match="no gene 'g77': did you mean"):
        interactions(*quick(1.5), gene="g77")


def test_every_pair_can_be_asked_for() -> None:
    run, screen = fitted("cpa", "multi-dose", hidden=(16,)), cells("multi-dose")
    found = interactions(run, screen, "all", amounts={"A": 10.0, "B": 10.0})
    assert list(found.scores["parts"]) == ["A+B"]
    own = interactions(run, screen).scores
    assert found.scores["synergy"].iloc[0] == pytest.approx(own["synergy"].loc[PAIR], rel=1e-4)
    every = interactions(run, screen, "all")
    assert sorted(every.scores["parts"]) == ["A+B", "A+C", "B+C"]
    assert every.scores["observed_synergy"].isna().all()
    far = interactions(run, screen, "all", amounts={"A": 500.0, "B": 10.0}).scores["warning"].iloc[0]
    assert "dose of A 500 is outside the 1 to 10 of training" in far
    with pytest.raises(DataError, match="there is no 'D'"):
        interactions(run, screen, "all", amounts={"D": 1.0})


def test_the_matrix_is_symmetric_and_the_figure_shows_both() -> None:
    run, screen = fitted("cpa", "multi-dose", hidden=(16,)), cells("multi-dose")
    found = interactions(run, screen)
    matrix = found.matrix()
    assert matrix.loc["A", "B"] == matrix.loc["B", "A"] == found.scores["synergy"].iloc[0]
    assert np.isnan(matrix.loc["A", "A"])
    figure = found.figure()
    shown = figure.axes[0].images[0].get_array()
    assert shown[0, 1] == pytest.approx(matrix.loc["A", "B"])
    assert shown[1, 0] == pytest.approx(found.matrix(observed=True).loc["A", "B"])
    assert figure.axes[1].get_xlabel() == "observed synergy" or figure.axes[2].get_xlabel() == "observed synergy"
    with pytest.raises(DataError, match="no measure 'bliss': there are 'synergy'"):
        found.matrix("bliss")


def test_what_is_no_combination_is_refused() -> None:
    run, screen = fitted("cpa", "multi-dose", hidden=(16,)), cells("multi-dose")
    with pytest.raises(DataError, match="'A 10 uM' is no combination"):
        interactions(run, screen, "A 10 uM")
    with pytest.raises(DataError, match="give 1 or more of each"):
        interactions(run, screen, draws=0)


def test_parts_that_do_nothing_have_no_observed_synergy() -> None:
    screen = pair_cells(1.0)
    rng = np.random.default_rng(1)
    nothing = replace(screen, x=rng.normal(size=screen.x.shape).astype(np.float32))
    own = interactions(quick(1.0)[0], nothing).scores.loc["A+B"]
    assert np.isnan(own["observed_synergy"])
    assert np.isfinite(own["synergy"])


def test_parts_that_were_only_seen_together_are_named() -> None:
    screen = pair_cells(1.0)
    training = screen.subset(screen.env != screen.environment_index("B")[0])
    torch.manual_seed(0)
    model, guide = recipes.make("cpa", training.schema, latent=2, hidden=(), guide_hidden=(4,))
    run = fit(model, guide, training, epochs=1, progress=False)
    assert interactions(run, screen).scores["warning"].loc["A+B"] == "never trained on alone: 'B'"
