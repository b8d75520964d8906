"""`pyro-scm counterfactual`: laws, noise, effects with intervals, mediation, and what is said of extrapolation."""

from argparse import ArgumentTypeError
from collections.abc import Callable
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
import torch

import pyro_scm as ps
from pyro_scm.cli.counterfactual import action
from pyro_scm.data import synthetic
from pyro_scm.query import mediate

Works = Callable[..., str]


@pytest.fixture(scope="module")
def cells(screen: Path) -> ps.EnvironmentDataset:
    return synthetic.dataset(anndata.read_h5ad(screen), "descriptors")


def test_laws_are_read() -> None:
    name, law = action("c_3~normal(1, 0.5)")
    assert name == "c_3"
    assert isinstance(law, torch.distributions.Normal)
    assert (float(law.loc), float(law.scale)) == (1.0, 0.5)
    name, law = action("c_0 ~ uniform(-1,2)")
    assert name == "c_0"
    assert isinstance(law, torch.distributions.Uniform)
    assert (float(law.low), float(law.high)) == (-1.0, 2.0)


@pytest.mark.parametrize(
    "text", ["c_3~", "c_3~normal", "c_3~normal(1)", "~normal(0,1)", "c_3~normal(0,0)", "c_3~uniform(1,1)",
             "c_3~gamma(1,1)", "c_3~normal(0,1", "c_3~normal(0,inf)", "c_3~normal(a,b)"],
)  # fmt: skip
def test_words_that_are_no_laws(text: str) -> None:
    with pytest.raises(ArgumentTypeError, match=r"is neither c_J~normal\(MEAN,SD\) nor c_J~uniform\(LOW,HIGH\)"):
        action(text)


def test_a_value_nobody_has_is_warned_of_and_marked(
    works: Works, run: Path, screen: Path, cells: ps.EnvironmentDataset, tmp_path: Path
) -> None:
    out, table = tmp_path / "cf.h5ad", tmp_path / "effects.csv"
    text = works("counterfactual", run, screen, "--do", "c_1=1000", "--out", out, "--effects", table)
    assert "warning: c_1: 100% of the cells are brought beyond where 99 % of 144 reference cells are" in text
    found = anndata.read_h5ad(out)
    fitted = ps.load(run)
    expected = ps.counterfactual(fitted.member(fitted.best), cells, do={"c_1": 1000.0}).support
    assert expected is not None
    np.testing.assert_allclose(found.obs["extrapolation"], expected.distance[0], rtol=1e-3)
    assert bool(found.uns["support"]["extrapolates"].iloc[0])
    assert pd.read_csv(table)["extrapolates"].all()
    text = works("counterfactual", run, screen, "--do", "c_1+=0", "--out", out, "--effects", table)
    assert "warning" not in text
    assert not pd.read_csv(table)["extrapolates"].any()


def test_noise_and_laws_are_asked_of_the_best_member(works: Works, run: Path, screen: Path, tmp_path: Path) -> None:
    out = tmp_path / "cf.h5ad"
    text = works("counterfactual", run, screen, "--noise", "c_0=1", "--do", "c_1~normal(0,0.1)", "--out", out)
    found = anndata.read_h5ad(out)
    assert "best of 2 members" in text
    np.testing.assert_allclose(found.obsm["c"][:, 0], 1.0, atol=1e-6)  # an Environment VAE has c = z
    assert 0 < found.obsm["c"][:, 1].std() < 0.2
    np.testing.assert_array_equal(found.obsm["c"][:, 2], found.obsm["c_factual"][:, 2])


def test_effects_are_averages_by_group_with_intervals(
    works: Works, run: Path, screen: Path, cells: ps.EnvironmentDataset, tmp_path: Path
) -> None:
    out, file = tmp_path / "cf.h5ad", tmp_path / "effects.csv"
    words = ["counterfactual", run, screen, "--environment", "env_2", "--draws", "4", "--out", out]
    works(*words, "--effects", file, "--by", "perturbation", "--level", "0.5")
    expected = ps.effect(ps.load(run), cells, environment="env_2", draws=4).by("perturbation", 0.5)
    found = pd.read_csv(file, index_col=["perturbation", "gene"])
    assert (found["kind"] == "total").all()
    np.testing.assert_allclose(
        found.loc[expected.index, list(expected.columns)].to_numpy(), expected.to_numpy(), atol=1e-5
    )
    assert set(found.columns) == {"kind", "effect", "sd", "low", "high", "cells", "outside", "extrapolates"}


def test_effects_may_be_split_at_mediators(
    works: Works, run: Path, screen: Path, cells: ps.EnvironmentDataset, tmp_path: Path
) -> None:
    out, file = tmp_path / "cf.h5ad", tmp_path / "effects.csv"
    words = ["counterfactual", run, screen, "--environment", "env_2", "--through", "c_0,c_1", "--out", out]
    text = works(*words, "--effects", file)
    assert "best of 2 members" in text
    fitted = ps.load(run)
    expected = mediate(fitted.member(fitted.best), cells, ["c_0", "c_1"], environment="env_2").summary()
    found = pd.read_csv(file, index_col=["kind", "gene"])
    assert sorted(set(found.index.get_level_values("kind"))) == sorted(set(expected.index.get_level_values("kind")))
    np.testing.assert_allclose(found["effect"].to_numpy(), expected["effect"].to_numpy(), atol=1e-5)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--do", "c_1=1", "--by", "perturbation"), "--by and --through are of the table of effects"),
        (("--do", "c_1=1", "--through", "c_2"), "--by and --through are of the table of effects"),
        (("--noise", "c_1=1", "--noise", "c_1=2"), "--noise c_1 is given twice"),
        (("--do", "c_1=1", "--effects", "OUT/e.csv", "--by", "nothing"), "no column 'nothing' of obs"),
        (("--do", "c_1=1", "--effects", "OUT/e.csv", "--through", "c_1"), "that the actions do not set themselves"),
        (("--do", "c_1=1", "--effects", "OUT/e.txt"), "give a name that ends in .csv"),
    ],
)
def test_questions_without_sense_are_refused(
    fails: Works, run: Path, screen: Path, tmp_path: Path, words: tuple[str, ...], message: str
) -> None:
    given = [word.replace("OUT", str(tmp_path)) for word in words]
    assert message in fails("counterfactual", run, screen, *given, "--out", tmp_path / "c.h5ad")
