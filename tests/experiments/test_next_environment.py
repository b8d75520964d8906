"""The experiment on the choice of environments: its smallest size, and its policies against choices known by hand."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import pyro_scm as ps
from experiments import launch, next_environment
from experiments.next_environment import NextEnvironment, choose, information, most_informative
from pyro_scm.data import synthetic
from pyro_scm.data.dataset import EnvironmentDataset
from pyro_scm.run import Run


def test_smallest_size_pairs_the_policies(tmp_path: Path) -> None:
    config, main = NextEnvironment, next_environment.main
    assert launch.launch(next_environment.__file__, config, main, ["--preset", "smoke", "--out", str(tmp_path)]) == 0
    (folder,) = (tmp_path / "next_environment").iterdir()
    rounds = pd.read_csv(folder / "rounds.csv")
    assert rounds.groupby(["seed", "policy"])["environments"].apply(list).map(tuple).unique().tolist() == [(2, 4, 6)]
    start = rounds[rounds["environments"] == 2].groupby("seed")["mcc_z"].nunique()
    assert (start == 1).all()  # the same fit for every policy
    assert rounds["mcc_z"].between(0, 1).all()
    table = pd.read_csv(folder / "comparison.csv", index_col=0)
    assert list(table.index) == list(next_environment.POLICIES)
    assert (table["reached"] <= 2).all()


def test_information_by_hand() -> None:
    a = np.array([[[2.0, 0.0], [-2.0, 0.0]]])
    assert information(a) == pytest.approx(0.5 * np.log(9.0))  # det(I + [[4, -4], [-4, 4]])
    assert information(np.concatenate([a, a])) == pytest.approx(0.5 * np.log(17.0))
    assert information(np.zeros((1, 3, 2))) == 0.0


def test_the_second_of_two_like_candidates_counts_little() -> None:
    spread = np.zeros((3, 3, 2))
    spread[0, :, 0] = spread[1, :, 0] = [3.0, -3.0, 0.0]
    spread[2, :, 1] = [1.0, 1.0, -2.0]  # weaker, but about another difference between the members
    assert most_informative(spread, [0, 1, 2], 2) == [0, 2]


def test_deviations_have_the_ensembles_covariance() -> None:
    rng = np.random.default_rng(0)
    means, error = rng.normal(size=(5, 2, 3)), np.array([1.0, 2.0, 0.5])
    found = next_environment.deviations(means, error)
    assert found.shape == (2, 5, 3)
    covariance = np.cov(means[:, 1], rowvar=False) / np.outer(error, error)
    assert np.allclose(found[1].T @ found[1], covariance)


def test_farthest_by_hand() -> None:
    r = np.array([[0.0], [1.0], [5.0], [5.2], [-3.0]])
    assert next_environment.farthest(r, [0, 1], [2, 3, 4], 2) == [3, 4]


@pytest.fixture(scope="module")
def fitted() -> tuple[EnvironmentDataset, Run, list[int]]:
    adata = ps.simulate(
        latent=next_environment.LATENT, genes=8, environments=7, cells=20, decoder="linear", descriptors=6, seed=0
    )
    cells = synthetic.dataset(adata, "descriptors")
    measured = [0, 1, 2]
    config = NextEnvironment.preset("smoke")
    return cells, next_environment.train(cells.subset(np.isin(cells.env, measured)), config), measured


@pytest.mark.parametrize("policy", next_environment.POLICIES)
def test_a_policy_looks_at_no_cell_that_was_not_measured(
    fitted: tuple[EnvironmentDataset, Run, list[int]], policy: str
) -> None:
    cells, run, measured = fitted
    hidden = np.asarray(cells.x).copy()
    hidden[~np.isin(cells.env, measured)] = np.nan
    given = [
        choose(policy, run, data, measured, 3, np.random.default_rng(5)) for data in (cells, replace(cells, x=hidden))
    ]
    assert given[0] == given[1]
    assert len(set(given[0])) == 3
    assert not set(given[0]) & set(measured)


def test_predictions_are_those_of_the_query(fitted: tuple[EnvironmentDataset, Run, list[int]]) -> None:
    cells, run, _ = fitted
    means = next_environment.predicted(run, cells)
    for e in (0, 1, 5):
        drawn = ps.predict(run, str(cells.environments.index[e]), cells=20_000, mean=True).mean(axis=1)
        spread = np.asarray(cells.x).std(axis=0)
        assert np.abs((means[:, e] - drawn) / spread).max() < 0.05


def test_level_and_environments_needed_by_hand() -> None:
    rows = [
        {"seed": seed, "policy": policy, "environments": n, "mcc_z": value}
        for seed, policy, values in [
            (0, "random", (0.5, 0.6, 0.8)),
            (0, "farthest", (0.5, 0.8, 0.7)),
            (0, "information", (0.5, 0.8, 0.8)),
            (1, "random", (0.4, 0.5, 0.6)),
            (1, "farthest", (0.4, 0.6, 0.8)),
            (1, "information", (0.4, 0.6, 0.8)),
        ]
        for n, value in zip((2, 4, 6), values, strict=True)
    ]
    table = pd.DataFrame(rows)
    reach = next_environment.level(table)
    assert reach == pytest.approx(0.8)
    counts = next_environment.needed(table, reach)
    assert counts.loc[0].tolist() == [6, 4, 4]
    assert counts.loc[1].tolist() == [np.inf, 6, 6]
    compared = next_environment.comparison(table, reach)
    assert compared.loc["information", "needed fewer"] == 2
    assert compared.loc["information", "difference"] == pytest.approx(((0.8 - 0.7) + (0.7 - 0.55)) / 2)
    assert compared.loc["random", "reached"] == 1
    assert np.isnan(compared.loc["random", "difference"])
