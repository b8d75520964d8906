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


def planted(
    monkeypatch: pytest.MonkeyPatch,
    run: Run,
    values: np.ndarray,
    offset: bool = False,
    number: np.ndarray | float = 1e6,
) -> pd.DataFrame:
    """Inclusion probabilities of given shifts, of environments of so many cells."""
    names = ["control", *(f"e{i}" for i in range(len(values)))]
    table = pd.DataFrame({"is_reference": [n == "control" for n in names], "trained": True}, index=names)
    table["cells"] = np.r_[1e6, np.broadcast_to(number, len(values))]
    index = pd.MultiIndex.from_product([[0], names], names=["member", "environment"])
    shifted = pd.DataFrame(np.concatenate([np.zeros((1, values.shape[1])), values]), index=index)
    monkeypatch.setattr(effects, "shifts", lambda _: shifted)
    environments = Environments(table, np.zeros((len(names), 1), np.float32))
    found = effects.inclusion(replace(run, environments=environments, seeds=(0,)), offset=offset)
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


def test_few_cells_are_no_evidence(cells: EnvironmentDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(5)
    number = np.where(np.arange(60) % 3 == 0, 10.0, 2000.0)
    values = rng.normal(0, 1, (60, 2)) / np.sqrt(number)[:, None]  # nothing is moved; few cells move far by chance
    values[1:8:3] = 3.0
    told = planted(monkeypatch, run_of(cells), values, number=number).to_numpy() > 0.5
    assert told[1:8:3].all()
    assert told.sum() == told[1:8:3].sum()
    untold = planted(monkeypatch, run_of(cells), values).to_numpy() > 0.5
    assert untold.sum() > told.sum() + 5


def test_shifts_that_a_prior_has_shrunk_are_not_taken_for_a_wide_gap(
    cells: EnvironmentDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(6)
    values = np.where(rng.random((60, 2)) < 0.5, 1e-4, 0.03) * rng.normal(size=(60, 2))
    values[:6] = 4.0
    found = planted(monkeypatch, run_of(cells), values, number=400.0).to_numpy() > 0.5
    assert found[:6].all()
    assert not found[6:].any()


def test_an_offset_that_all_share_moves_nothing(cells: EnvironmentDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(3)
    on = rng.random((60, 3)) < 0.2
    values = 2.0 + on * rng.choice([-1, 1], on.shape) * 3.0 + rng.normal(0, 0.3, on.shape)
    found = planted(monkeypatch, run_of(cells), values, offset=True).to_numpy() > 0.5
    assert (found == on).mean() > 0.98
    without = planted(monkeypatch, run_of(cells), values).to_numpy() > 0.5
    assert (without == on).mean() < 0.9


def test_the_groups_are_those_that_were_planted(cells: EnvironmentDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(4)
    run = run_of(cells)
    on = rng.random((1, 9, 2)) < 0.3
    on[:, 0] = False
    values = (on * rng.choice([-1, 1], on.shape) * 4 + rng.normal(0, 0.2, on.shape)).reshape(9, 2)
    shown = pd.DataFrame(np.concatenate([values, values]), index=effects.shifts(run).index)
    monkeypatch.setattr(effects, "shifts", lambda _: shown)
    found = effects.groups(run)
    assert set(found) == {"share", "spike", "size", "spread"}
    assert 0.05 < found["spike"] < 0.5
    assert np.hypot(found["size"], found["spread"]) > 1


def test_a_run_of_its_own_has_probabilities(cells: EnvironmentDataset) -> None:
    table = effects.inclusion(run_of(cells))
    assert table.index.names == ["member", "environment"]
    assert table.to_numpy().min() >= 0
    assert table.to_numpy().max() <= 1
    assert (table.xs("control", level="environment") == 0).all().all()
    few = cells.subset(cells.env < 3)
    with pytest.raises(DataError, match="2 perturbed environments: give at least 4"):
        effects.inclusion(run_of(few))
