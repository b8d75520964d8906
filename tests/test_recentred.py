"""Recentred predictions: what all environments have in common is measured, the rest is the model's."""

from typing import Any

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from torch import nn

from pyro_scm import recipes
from pyro_scm.baselines import TrainingMean
from pyro_scm.data import splits
from pyro_scm.data.dataset import EnvironmentDataset
from pyro_scm.errors import DataError
from pyro_scm.evaluation import compare
from pyro_scm.mean_predictions import alike, predict_means

FAST: dict[str, Any] = {"epochs": 2, "seeds": (0, 1), "progress": False, "latent": 3, "cells": 30, "degs": 0}


@pytest.fixture(scope="module")
def cells() -> EnvironmentDataset:
    """Ten drugs at two doses, at 6 h and 24 h, four cells each; the change is of the dose and the drug."""
    rng = np.random.default_rng(0)
    common, own = rng.normal(size=(2, 12)), rng.normal(size=(10, 12))
    rows, x = [], []
    for time in (6, 24):
        rows += [("control", 0.0, time)] * 20
        x += [rng.normal(size=12) for _ in range(20)]
        for drug in range(10):
            for dose in (1.0, 10.0):
                rows += [(f"drug_{drug}", dose, time)] * 4
                x += [common[int(dose > 1)] * 2 + own[drug] + rng.normal(size=12) for _ in range(4)]
    obs = pd.DataFrame(rows, columns=["drug", "dose", "time"], index=[f"c{i}" for i in range(len(rows))])
    adata = AnnData(np.array(x, np.float32), obs, pd.DataFrame(index=[f"g{i}" for i in range(12)]))
    return EnvironmentDataset.from_anndata(
        adata,
        environment="drug",
        control="control",
        dose="dose",
        time="time",
        representation=("multi-hot", "time"),
        counts=False,
    )


@pytest.fixture(scope="module")
def split(cells: EnvironmentDataset) -> splits.Split:
    return splits.by_environment(cells, held_out=[f"drug_{i}" for i in range(7, 10)])


def untrained(split: splits.Split) -> tuple[nn.Module, nn.Module]:
    model, guide = recipes.make("environment_vae", split.train.schema, latent=3, hidden=())
    for part in (model, guide):
        for p in part.parameters():
            nn.init.normal_(p, std=0.2)
    return model, guide


def test_environments_are_like_those_of_their_time_and_of_their_dose_where_asked(split: splits.Split) -> None:
    train, names = split.train, list(split.held_out)
    table = train.environments
    trained = table.iloc[TrainingMean().fit(train).trained]
    for columns in ((), ("dose",)):
        for row, name in zip(alike(train, names, columns), names, strict=True):
            expected = trained["time"] == table.loc[name, "time"]
            if columns:
                expected &= trained["dose"] == table.loc[name, "dose"]
            np.testing.assert_allclose(row, expected / expected.sum())
    assert not alike(train, [str(table.index[train.reference][0])]).any()
    # no training environment has the perturbation of an unseen drug: the column is passed over
    np.testing.assert_array_equal(alike(train, names, ("perturbation",)), alike(train, names))
    with pytest.raises(DataError, match="no 'Dose'"):
        alike(train, names, ("Dose",))


@pytest.mark.parametrize("recentre", [True, ("dose",)])
def test_recentred_predictions_agree_on_average_with_what_was_seen(split: splits.Split, recentre: Any) -> None:
    program, train = untrained(split), split.train
    mean = TrainingMean().fit(train)
    seen = [str(train.environments.index[e]) for e in mean.trained]
    plain, found = (predict_means(program, train, seen, cells=40, recentre=r)[0] for r in (False, recentre))
    weights = alike(train, seen, () if recentre is True else recentre)
    truth = mean.changes + mean.control[mean.trained]
    assert np.abs(weights @ (plain - truth)).max() > 0.1
    np.testing.assert_allclose(weights @ found, weights @ truth, atol=1e-6)
    # what the model says beyond its own mean is unchanged
    np.testing.assert_allclose(found - weights @ found, plain - weights @ plain, atol=1e-6)


def test_a_model_that_knows_nothing_of_environments_is_recentred_to_the_training_mean(split: splits.Split) -> None:
    program = recipes.make("vae", split.train.schema, latent=3)
    found = predict_means(program, split.train, split.held_out, cells=20, recentre=True)[0]
    np.testing.assert_allclose(found, TrainingMean().fit(split.train).predict(split.held_out), atol=1e-5)


def test_references_stay_as_they_are_and_perturbed_cells_are_needed(split: splits.Split) -> None:
    program, train = untrained(split), split.train
    reference = str(train.environments.index[train.reference][0])
    plain, found = (predict_means(program, train, [reference], cells=40, recentre=r) for r in (False, True))
    np.testing.assert_allclose(plain, found, atol=1e-6)
    with pytest.raises(DataError, match="no perturbed training cells"):
        predict_means(program, train.subset(train.reference[train.env]), [reference], recentre=True)


def test_a_comparison_scores_models_plain_and_recentred(split: splits.Split) -> None:
    plain = compare(split, ["environment_vae"], **FAST)
    both = compare(split, ["environment_vae"], recentre=("dose",), **FAST)
    names = set(both.scores["model"]) - set(plain.scores["model"])
    assert names == {"environment_vae, recentred"}
    old = both.scores[both.scores["model"] != "environment_vae, recentred"].reset_index(drop=True)
    pd.testing.assert_frame_equal(old, plain.scores)
    new = both.scores[both.scores["model"] == "environment_vae, recentred"]
    assert set(new["kind"]) == {"model"}
    assert set(new["seed"]) == {0, 1}
    # nearly all of the change is common to a dose, and the model has seen two epochs
    summary = both.summary()["delta_pearson"]
    assert summary["environment_vae, recentred"] > summary["environment_vae"] + 0.2
    assert "environment_vae, recentred" in set(both.gate()["model"])
