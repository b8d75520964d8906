"""Recentred predictions: what all environments have in common is measured, the rest is the model's."""

from typing import Any

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from torch import nn

from pyro_scm import recipes
from pyro_scm.baselines import BASELINES, Additive, MeanAlike, Ridge, TrainingMean
from pyro_scm.data import splits
from pyro_scm.data.dataset import EnvironmentDataset
from pyro_scm.errors import DataError
from pyro_scm.evaluation import compare
from pyro_scm.mean_predictions import predict_means, recentring

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


def test_the_mean_of_those_that_agree_in_columns_by_hand(split: splits.Split) -> None:
    train, names = split.train, list(split.held_out)
    mean, table = TrainingMean().fit(train), train.environments
    trained = table.iloc[mean.trained]
    for columns in (("time",), ("dose",), ("time", "dose")):
        found = MeanAlike(columns).fit(train).predict(names)
        for row, name in zip(found, names, strict=True):
            agree = np.all([trained[c] == table.loc[name, c] for c in columns], axis=0)
            e = int(table.index.get_loc(name))  # type: ignore[arg-type]
            np.testing.assert_allclose(row, mean.control[e] + mean.changes[agree].mean(0))
    # no training environment has the perturbation of an unseen drug: the column is passed over
    both = (MeanAlike(columns).fit(train).predict(names) for columns in (("perturbation", "dose"), ("dose",)))
    np.testing.assert_array_equal(*both)
    with pytest.raises(DataError, match="no 'Dose'"):
        MeanAlike(("Dose",)).fit(train)


@pytest.mark.parametrize("recentre", [True, ("time", "dose")])
def test_recentred_predictions_agree_on_average_with_what_was_seen(split: splits.Split, recentre: Any) -> None:
    program, train = untrained(split), split.train
    mean = TrainingMean().fit(train)
    seen = mean.trained_names
    plain, found = (predict_means(program, train, seen, cells=40, recentre=r)[0] for r in (False, recentre))
    truth = mean.changes + mean.control[mean.trained]
    columns = ["time"] if recentre is True else list(recentre)
    groups = train.environments.loc[seen].reset_index(drop=True).groupby(columns).groups
    assert len(groups) > 1
    for members in groups.values():
        i = np.asarray(members)
        assert np.abs((plain - truth)[i].mean(0)).max() > 0.1
        np.testing.assert_allclose(found[i].mean(0), truth[i].mean(0), atol=1e-6)
        # what the model says beyond its own mean is unchanged
        np.testing.assert_allclose(found[i] - found[i].mean(0), plain[i] - plain[i].mean(0), atol=1e-6)


@pytest.mark.parametrize("name", list(BASELINES))
def test_a_model_that_knows_nothing_is_recentred_to_the_baseline(split: splits.Split, name: str) -> None:
    program = recipes.make("vae", split.train.schema, latent=3)
    found = predict_means(program, split.train, split.held_out, cells=20, recentre=name)[0]
    np.testing.assert_allclose(found, BASELINES[name]().fit(split.train).predict(split.held_out), atol=1e-5)


@pytest.mark.parametrize("name", list(BASELINES))
def test_what_a_baseline_says_itself_is_left_as_it_is(split: splits.Split, name: str) -> None:
    """A baseline told what it missed itself, of linear baselines with nothing to choose: twice is once, and no more."""
    train, names = split.train, list(split.held_out)
    baseline = BASELINES[name]().fit(train)
    rest = baseline.of_rest(baseline.predict(baseline.trained_names), names)
    if name in ("additive", "nearest", "training_mean"):
        np.testing.assert_allclose(rest, 0, atol=1e-9)
    measured = baseline.changes + baseline.control[baseline.trained]
    np.testing.assert_allclose(baseline.of_rest(measured, names), 0, atol=1e-9)  # nothing was missed


def test_an_interaction_stands_on_the_sum_of_its_parts() -> None:
    """Recentred on additive: the measured sum of the parts, and of the model only what it adds to its own sum."""
    rng = np.random.default_rng(3)
    names = ["ctrl"] * 6 + ["A"] * 6 + ["B"] * 6 + ["A+B"] * 6
    obs = pd.DataFrame({"p": names}, index=[f"c{i}" for i in range(24)])
    adata = AnnData(rng.normal(size=(24, 5)).astype(np.float32), obs, pd.DataFrame(index=list("vwxyz")))
    cells = EnvironmentDataset.from_anndata(
        adata, environment="p", control="ctrl", representation="multi-hot", counts=False
    )
    split = splits.by_environment(cells, held_out=["A+B"])
    program = untrained(split)
    (pair, a, b, none) = predict_means(program, split.train, ["A+B", "A", "B", "ctrl"], cells=6)[0]
    found = predict_means(program, split.train, ["A+B"], cells=6, recentre="additive")[0, 0]
    expected = Additive().fit(split.train).predict(["A+B"])[0] + (pair - a - b + none)
    assert np.abs(pair - a - b + none).max() > 1e-3
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_unknown_baselines_and_wrong_shapes_are_refused(split: splits.Split) -> None:
    with pytest.raises(DataError, match="'ridges': use one of 'no_change'"):
        recentring("ridges")
    with pytest.raises(DataError, match="one row for each of trained_names"):
        Ridge().fit(split.train).of_rest(np.zeros((2, 12)), list(split.held_out))


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
