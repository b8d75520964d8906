"""The experiment on the Adversarial Prior autoencoder at its smallest size, and its logic on a known truth."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from experiments import adversarial_prior, launch
from pyro_scm import metrics
from pyro_scm.data import synthetic


def test_attention_hides_the_environment_at_its_smallest_size(tmp_path: Path) -> None:
    config, main = adversarial_prior.AdversarialPrior, adversarial_prior.main
    assert launch.launch(adversarial_prior.__file__, config, main, ["--preset", "smoke", "--out", str(tmp_path)]) == 0
    (folder,) = (tmp_path / "adversarial_prior").iterdir()
    attention = pd.read_csv(folder / "attention.csv").set_index("choice")
    assert attention.loc["restarts", "mean"] >= 0.5
    assert attention.loc["restarts", "adversary's loss"] >= attention.loc["single", "adversary's loss"]
    probe = pd.read_csv(folder / "probe.csv").set_index(["code", "probe"])["accuracy mean"]
    for kind in ("linear", "network"):
        assert probe.loc[("z_count", kind)] < probe.loc[("z", kind)] - 0.1
    counted = (
        pd.read_csv(folder / "counterfactuals.csv").set_index("cells from").groupby(level=0).mean(numeric_only=True)
    )
    # the code is nearer to both counterfactuals than the cells as they are, and (i) and (ii) are one distribution
    for number in ("rmse (ii)", "energy (i)", "energy (ii)"):
        assert counted.loc["z_count", number] < counted.loc["z (nothing done)", number]
    assert abs(counted.loc["true (ii)", "energy (i)"]) < 0.2
    assert (folder / "attention.png").is_file()


def test_true_worlds_differ_in_the_targets_noise_alone() -> None:
    adata = synthetic.simulate(
        latent=2, genes=6, environments=3, cells=300, graph="empty", decoder="linear", strength=5.0, constant=True
    )
    cells = synthetic.dataset(adata)
    some = cells.subset(np.flatnonzero(cells.env == 1))
    target = int(adata.uns["truth"]["targets"][1].argmax())
    draw = np.random.default_rng(0).normal(size=300).astype(np.float32)
    true = adversarial_prior.worlds(adata, some, target, draw, 0)
    z = adata.obsm["z"][cells.env == 1].copy()
    weight = adata.uns["truth"]["parameters"]["likelihoods.0.net.weight"]
    shift = adata.uns["truth"]["shift"][1]
    np.testing.assert_allclose(true["abducted"], (z - shift) @ weight.T, atol=1e-4)
    z[:, target] = draw
    np.testing.assert_allclose(true["same"], z @ weight.T, atol=1e-4)
    # another draw: the same distribution, other cells
    assert abs(metrics.energy_distance(true["other"], true["same"], unbiased=True)) < 0.1
    scale = np.sqrt(2 * np.mean(weight[:, target] ** 2))
    assert adversarial_prior._rmse(true["other"], true["same"]) == pytest.approx(scale, rel=0.15)
    assert adversarial_prior._rmse(true["abducted"], true["same"]) == pytest.approx(scale, rel=0.15)


def test_of_each_group_of_restarts_the_best_hidden_is_kept() -> None:
    assert adversarial_prior.chosen(np.array([1.0, 3.0, 2.0, 0.5, 0.1, 0.4]), 3) == [1, 3]
    assert adversarial_prior.chosen(np.array([1.0, 3.0]), 1) == [0, 1]


def test_the_attention_is_matched_to_true_latents() -> None:
    adata = synthetic.simulate(
        latent=3, genes=6, environments=4, cells=50, graph="empty", decoder="linear", strength=5.0, constant=True
    )
    cells = synthetic.dataset(adata)
    order = [2, 0, 1]
    z = -adata.obsm["z"][:, order]  # learnt latents: true ones in another order and sign
    targets = adata.uns["truth"]["targets"][1:].argmax(1)
    alpha = np.zeros((1, 4, 3))
    for e, t in enumerate(targets):
        alpha[0, e + 1, order.index(t)] = 1
    matching = metrics.mcc(adata.obsm["z"], z)
    fit = adversarial_prior.Fit(adata, cells, None, z[None], alpha, np.zeros(1), [matching])  # type: ignore[arg-type]
    assert fit.hits(0).tolist() == [True, True, True]
    alpha[0, 1] = np.roll(alpha[0, 1], 1)
    assert fit.hits(0).tolist() == [False, True, True]


def test_every_variant_differs_from_the_base() -> None:
    base = adversarial_prior.VARIANTS["base"]
    assert all(v != base for name, v in adversarial_prior.VARIANTS.items() if name != "base")
