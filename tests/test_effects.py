"""What a run says its environments do: shifts, and the probability that an environment moves a latent."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

import pyro_scm as ps
from guides import amortise
from pyro_scm import effects
from pyro_scm.data import synthetic
from pyro_scm.data.dataset import EnvironmentDataset
from pyro_scm.errors import DataError, ModelError
from pyro_scm.run import Environments, Run


@pytest.fixture(scope="module")
def cells() -> EnvironmentDataset:
    return synthetic.dataset(synthetic.simulate(latent=2, genes=8, environments=9, cells=20))


def run_of(cells: EnvironmentDataset, name: str = "translation_vae") -> Run:
    model = getattr(ps.models, name)(cells.schema, latent=2)
    return ps.fit(model, amortise(model, cells), cells, seeds=(0, 1), epochs=1, progress=False)


def test_shifts_are_those_of_the_program(cells: EnvironmentDataset) -> None:
    run = run_of(cells)
    table = effects.shifts(run)
    model, _ = run.member(1)
    rows = np.array([np.flatnonzero(cells.env == e)[0] for e in range(9)])
    direct = model.shift(cells.batch(rows)).detach().numpy()  # type: ignore[union-attr, operator]
    assert np.allclose(table.loc[1], direct, atol=1e-6)
    assert (table.loc[1].loc["control"] == 0).all()
    with pytest.raises(ModelError, match="environments move no latents"):
        effects.shifts(run_of(cells, "vae"))


def planted(monkeypatch: pytest.MonkeyPatch, run: Run, values: np.ndarray) -> pd.DataFrame:
    """Inclusion probabilities of given shifts."""
    names = ["control", *(f"e{i}" for i in range(len(values)))]
    table = pd.DataFrame({"is_reference": [n == "control" for n in names], "trained": True}, index=names)
    index = pd.MultiIndex.from_product([[0], names], names=["member", "environment"])
    shifted = pd.DataFrame(np.concatenate([np.zeros((1, values.shape[1])), values]), index=index)
    monkeypatch.setattr(effects, "shifts", lambda _: shifted)
    environments = Environments(table, np.zeros((len(names), 1), np.float32))
    found = effects.inclusion(replace(run, environments=environments, seeds=(0,)))
    return found.loc[0].loc[names[1:]]


def test_probabilities_are_calibrated(cells: EnvironmentDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    on = rng.random((100, 15)) < 0.14
    # sizes overlap with the noise: many entries cannot be told for sure
    values = on * rng.normal(0, 1.5, on.shape) + rng.normal(0, 0.4, on.shape)
    found = planted(monkeypatch, run_of(cells), values).to_numpy()
    edges = np.linspace(0, 1, 11)
    bins = np.clip(np.digitize(found, edges) - 1, 0, 9)
    error = sum(abs(found[bins == b].mean() - on[bins == b].mean()) * (bins == b).mean() for b in np.unique(bins))
    assert error < 0.04
    assert ((found > 0.05) & (found < 0.95)).mean() > 0.1  # it is not sure of everything
    assert on[found > 0.95].mean() > 0.9


def test_sizes_around_one_value_are_told_from_leaks(cells: EnvironmentDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(2)
    on = rng.random((100, 15)) < 0.14
    values = on * rng.choice([-1, 1], on.shape) * rng.normal(5, 0.5, on.shape) + rng.normal(0, 0.7, on.shape)
    found = planted(monkeypatch, run_of(cells), values).to_numpy() > 0.5
    precision, recall = on[found].mean(), found[on].mean()
    assert min(precision, recall) > 0.98


def test_large_effects_are_certain_and_references_out(
    cells: EnvironmentDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(1)
    values = rng.normal(0, 0.05, (30, 2))
    values[:5, 0] = 5.0
    values[7:9, 1] = -4.0
    found = planted(monkeypatch, run_of(cells), values).to_numpy()
    assert (found[:5, 0] > 0.999).all()
    assert (found[7:9, 1] > 0.99).all()
    assert found[5:, 0].max() < 0.2


def test_a_run_of_its_own_has_probabilities(cells: EnvironmentDataset) -> None:
    table = effects.inclusion(run_of(cells))
    assert table.index.names == ["member", "environment"]
    assert table.to_numpy().min() >= 0
    assert table.to_numpy().max() <= 1
    assert (table.xs("control", level="environment") == 0).all().all()
    few = cells.subset(cells.env < 3)
    with pytest.raises(DataError, match="2 perturbed environments: give at least 4"):
        effects.inclusion(run_of(few))
