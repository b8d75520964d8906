"""Contrasts: averages with intervals, groups of cells, single cells, other actions than do."""

from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from pyro_scm.data import synthetic
from pyro_scm.errors import DataError
from pyro_scm.query import Action, Contrast, counterfactual, effect, sweep
from tests.screens import cells, fitted, screen


def four_cells() -> Contrast:
    """Two members, two draws, four cells, two genes."""
    values = np.zeros((2, 2, 4, 2), np.float32)
    values[..., 0] = np.arange(4.0).reshape(2, 2, 1) + np.array([0.0, 10.0, 20.0, 30.0])
    values[..., 1] = -1.0
    obs = pd.DataFrame({"line": ["A", "B", "A", None], "score": [1.0, 2.0, 3.0, 4.0]}, index=list("abcd"))
    return Contrast(values, tuple("abcd"), ("g0", "g1"), obs)


def test_the_average_is_over_cells_and_the_interval_over_members_and_draws() -> None:
    table = four_cells().average(level=1.0)
    assert table.loc["g0"].to_dict() == pytest.approx({"effect": 16.5, "sd": 1.25**0.5, "low": 15.0, "high": 18.0})
    assert table.loc["g1"].to_dict() == pytest.approx({"effect": -1.0, "sd": 0.0, "low": -1.0, "high": -1.0})
    pd.testing.assert_frame_equal(four_cells().summary(level=0.5), four_cells().average(level=0.5))
    narrow = four_cells().average(level=0.5)
    assert narrow.loc["g0", ["low", "high"]].tolist() == pytest.approx([15.75, 17.25])


def test_groups_of_cells_have_averages_of_their_own() -> None:
    table = four_cells().by("line", level=1.0)
    assert table.index.names == ["line", "gene"]
    assert list(table.index) == [("A", "g0"), ("A", "g1"), ("B", "g0"), ("B", "g1")]  # no group of missing labels
    assert table.loc[("A", "g0")].to_dict() == pytest.approx(
        {"effect": 11.5, "sd": 1.25**0.5, "low": 10.0, "high": 13.0, "cells": 2}
    )
    assert table.loc[("B", "g0"), "effect"] == pytest.approx(11.5)
    given = four_cells().by(pd.cut(four_cells().obs["score"], [0, 2, 4]))  # type: ignore[index]
    assert given.index.names == ["group", "gene"]
    assert given["effect"].xs("g0", level="gene").tolist() == pytest.approx([6.5, 26.5])
    assert given["cells"].tolist() == [2, 2, 2, 2]


def test_groups_that_there_are_not_are_refused() -> None:
    with pytest.raises(DataError, match="no column 'dose' of obs: there are 'line', 'score'"):
        four_cells().by("dose")
    with pytest.raises(DataError, match="no column 'line' of obs: there are none"):
        Contrast(four_cells().values, tuple("abcd"), ("g0", "g1")).by("line")
    with pytest.raises(DataError, match="3 labels for 4 cells"):
        four_cells().by(["A", "B", "A"])
    with pytest.raises(DataError, match="no cell has a label in 'group'"):
        four_cells().by([None] * 4)
    with pytest.raises(DataError, match=r"level = 0: give the share of draws"):
        four_cells().average(0)


def test_single_cells_have_effects_with_intervals() -> None:
    tables = four_cells().per_cell(level=1.0)
    assert set(tables) == {"effect", "sd", "low", "high"}
    assert tables["effect"].loc["c", "g0"] == pytest.approx(21.5)
    assert tables["low"].loc["c", "g0"] == pytest.approx(20.0)
    assert tables["high"].loc["c", "g0"] == pytest.approx(23.0)
    assert tables["sd"]["g1"].tolist() == [0.0] * 4


def test_contrasts_know_the_annotation_of_their_cells_and_their_support() -> None:
    found = effect(fitted(), cells(), do={"c_0": 50.0}, versus={"c_0": 0.0}, draws=4)
    table = found.by("plate")
    assert set(table.index.get_level_values("plate")) == {"even", "odd"}
    assert (table["low"] <= table["effect"]).all()
    assert (table["effect"] <= table["high"]).all()
    assert (table["sd"] > 0).any()
    assert found.support is not None
    assert found.versus_support is not None
    assert found.support.extrapolates
    assert not found.versus_support.extrapolates


def test_the_true_average_lies_within_intervals_about_as_often_as_they_say() -> None:
    """Draws around the truth: the interval of an average covers it in 80 % of repetitions."""
    rng, covered = np.random.default_rng(0), []
    for _ in range(200):
        centre = rng.normal()  # the estimate is off by as much as its draws spread
        values = (centre + rng.normal(size=(1, 400, 1, 1))).astype(np.float32)
        row = Contrast(values, ("a",), ("g",)).average(0.8).loc["g"]
        covered.append(row["low"] <= 0 <= row["high"])
    assert 0.7 < np.mean(covered) < 0.9


def test_environments_may_be_contrasted_with_each_other() -> None:
    run, data = fitted(), cells().of("control")
    found = effect(run, data, environment="env_1", versus=Action(environment="env_2"))
    worlds = [counterfactual(run, data, environment=name).x for name in ("env_1", "env_2")]
    np.testing.assert_array_equal(found.values, worlds[0] - worlds[1])
    assert np.abs(found.values).max() > 0


def test_what_stochastic_actions_draw_does_not_move_the_noise_of_later_cells(monkeypatch: pytest.MonkeyPatch) -> None:
    from pyro_scm import abduction

    monkeypatch.setattr(abduction, "_CHUNK", 16)
    run = fitted()
    plain = counterfactual(run, cells(), draws=2)
    law = torch.distributions.Normal(0.0, 1.0)
    for asked in ({"do": {"c_2": law}}, {"noise": {"c_2": law}}):
        drawn = counterfactual(run, cells(), draws=2, **asked)  # type: ignore[arg-type]
        np.testing.assert_array_equal(drawn.z, plain.z)


def test_sweeps_say_how_usual_their_values_are() -> None:
    adata = screen()
    data = synthetic.dataset(adata)
    truth: Any = synthetic.known(adata, data)
    values = [-2.0, 0.0, 100.0]
    found = sweep(truth, data, values, ["c_2", "c_0"], expression=False)
    c = np.asarray(adata.obsm["c"], np.float64)[:, [2, 0]]
    distance = np.abs(np.array(values) - c.mean(0)[:, None]) / c.std(0)[:, None]
    np.testing.assert_allclose(found["distance"][0], distance, rtol=1e-4)
    np.testing.assert_allclose(found["quantile"][0], [[(c[:, j] <= v).mean() for v in values] for j in range(2)])
    some = sweep(fitted(), cells(), values, expression=False, reference=cells().of("control"))
    every = sweep(fitted(), cells(), values, expression=False)
    np.testing.assert_array_equal(some["c"], every["c"])
    assert not np.array_equal(some["quantile"], every["quantile"])
