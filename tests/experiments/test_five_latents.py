"""The experiment on five latents: its smallest size, and each of its parts against something known."""

import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from experiments import five_latents, launch
from experiments.five_latents import Falling, Row
from pyro_scm import metrics
from pyro_scm.data import synthetic
from pyro_scm.data.dataset import EnvironmentDataset
from pyro_scm.run import Run


def test_smallest_size_leaves_every_table(tmp_path: Path) -> None:
    config, main = five_latents.FiveLatents, five_latents.main
    assert launch.launch(five_latents.__file__, config, main, ["--preset", "smoke", "--out", str(tmp_path)]) == 0
    (folder,) = (tmp_path / "five_latents").iterdir()
    unseen = pd.read_csv(folder / "unseen.csv")
    assert list(unseen["model"]) == list(five_latents.UNSEEN)
    assert np.isfinite(unseen.select_dtypes("number")).all().all()
    assert (unseen["lowest"] <= unseen["unseen"]).all()
    recovered = pd.read_csv(folder / "recovery.csv")
    assert set(recovered["row"]) == set(five_latents.RECOVERY)
    assert (recovered["mcc_z by truth"] >= recovered["mcc_z"] - 1e-12).all()
    assert set(pd.read_csv(folder / "limits.csv")["row"]) == set(five_latents.LIMITS)
    # a posterior mode is found without training, so even the smallest size reaches the ceiling
    assert pd.read_csv(folder / "ceilings.csv")["posterior mode"].item() > 0.99
    assert {p.name for p in folder.glob("*.png")} == {"unseen.png", "recovery.png"}


@pytest.fixture(scope="module")
def small() -> tuple[object, EnvironmentDataset]:
    adata = five_latents.screen(5, 12, seed=3)
    return adata, synthetic.dataset(adata)


def test_falling_ends_as_the_elbo() -> None:
    penalty = Falling(first=16.0, until=0.8)
    factors = []
    for done in (0.0, 0.4, 0.8, 0.95):
        penalty.at(done)
        factors.append(1 + float(penalty.extra))
    assert factors == pytest.approx([16.0, 4.0, 1.0, 1.0])


def test_a_falling_factor_holds_the_code_back_at_first(small: tuple[object, EnvironmentDataset]) -> None:
    _, cells = small
    row = Row("environment_vae", {"scale": False}, falling=100.0)
    history = five_latents.train(row, cells, [0], steps=20).history
    extra = history["falling"] / history["kl"]
    assert extra.iloc[0] == pytest.approx(99.0, rel=1e-4)
    assert history["falling"].iloc[-1] == 0.0
    assert history["loss"].iloc[-1] == pytest.approx(history["reconstruction"].iloc[-1] + history["kl"].iloc[-1])


def test_known_targets_move_nothing_else(small: tuple[object, EnvironmentDataset]) -> None:
    _, cells = small
    run = five_latents.train(five_latents.TOLD, cells, [0], steps=6)
    model = run.member(0)[0]
    with torch.no_grad():
        loc = model.prior(cells.batch()).base_dist.loc.numpy()
    moved = np.stack([loc[cells.env == e][0] != 0 for e in range(6)])
    assert moved.sum(axis=1).tolist() == [0, 1, 1, 1, 1, 1]
    labels = cells.environments["targets"].tolist()[1:]
    columns = moved[1:].argmax(axis=1)
    assert len(set(zip(labels, columns, strict=True))) == len(set(labels)) == len(set(columns))


def test_what_comes_after_a_fit_is_a_line_of_its_row(small: tuple[object, EnvironmentDataset]) -> None:
    _, cells = small
    seen = []

    def after(run: Run, given: EnvironmentDataset) -> Run:
        seen.append(given)
        return run

    run = five_latents.train(Row("vae", after=after), cells, [0, 1], steps=2)
    assert len(run) == 2
    assert seen == [cells]


def test_the_linear_path_is_trained_and_not_saved_by_name(small: tuple[object, EnvironmentDataset]) -> None:
    _, cells = small
    model = five_latents.train(Row("vae", linear_path=True), cells, [0], steps=4).member(0)[0]
    path = model.likelihoods[0].net
    c = torch.randn(3, five_latents.LATENT)
    with torch.no_grad():
        straight = path(c) - path.net(c)
        assert torch.allclose(straight, c @ path.line.weight.T + path.line.bias, atol=1e-5)
    assert path.line.weight.abs().max() > 0
    assert model.spec is None


def test_longer_rows_take_more_steps(small: tuple[object, EnvironmentDataset]) -> None:
    _, cells = small
    epochs = [five_latents.train(Row("vae", longer=k), cells, [0], steps=4).settings.epochs for k in (1, 3)]
    assert epochs == [4, 12]  # 72 cells are one batch


def test_squared_error_undoes_the_density() -> None:
    x, loc = torch.tensor([1.0, 2.0, 4.0]), torch.tensor([1.5, 2.0, 1.0])
    nats = -torch.distributions.Normal(loc, math.sqrt(0.5)).log_prob(x).sum()
    assert five_latents.squared_error(pd.Series([float(nats)]), 3).item() == pytest.approx(0.25 + 9, rel=1e-5)


def test_halves_share_no_environment_and_know_the_shift() -> None:
    adata = five_latents.screen(6, 4, seed=0)
    training, unseen = five_latents.halves(adata, 3)
    assert training.present.tolist() == [0, 1, 2, 3]
    assert unseen.present.tolist() == [4, 5, 6]
    assert np.allclose(training.representation, adata.uns["truth"]["shift"])


def test_ends_by_hand() -> None:
    curves = pd.DataFrame(
        {"seed": 0, "done": [0.5, 1.0, 0.25], "training": [5.0, 4.0, 9.0], "unseen": [2.0, 6.0, 8.0]}
    ).assign(model="vae", environments=5, screen=0)
    row = five_latents.ends(curves).iloc[0]
    assert (row["training"], row["unseen"], row["lowest"], row["rise"]) == (4.0, 6.0, 2.0, 3.0)


def test_the_restart_is_chosen_by_loss_and_not_by_truth() -> None:
    table = pd.DataFrame({"row": "a", "environments": 5, "screen": [0, 0, 1], "loss": [1.0, 2.0, 9.0]})
    table = table.assign(mcc_z=[0.6, 0.9, 0.8], linear_r2_z=1.0, target_f1=1.0, concentration=1.0)
    assert five_latents.kept(table)["mcc_z"].tolist() == [0.6, 0.8]
    row = five_latents.recovery_summary(table).loc[(5, "a")]
    assert row["mcc_z"] == pytest.approx(0.7)
    assert (row["mcc_z lowest"], row["mcc_z highest"]) == (0.6, 0.8)
    assert row["mcc_z by truth"] == pytest.approx(0.85)
    assert row["mcc_z of a restart"] == pytest.approx(0.775)


def test_the_posterior_mode_finds_the_noise_but_for_what_observation_hides() -> None:
    errors = {}
    for noise in (0.1, 2.0):
        adata = five_latents.screen(5, 10, seed=1, noise=noise)
        rows = np.arange(0, 60, 2)
        found = five_latents.posterior_mode(adata, rows)
        errors[noise] = np.sqrt(np.mean((found - adata.obsm["z"][rows]) ** 2))
        assert metrics.mcc(adata.obsm["z"][rows], found).permutation.tolist() == [0, 1, 2, 3, 4]
    assert errors[0.1] < 0.1 < errors[2.0] < 1  # the prior's own error is 1
