"""The experiment on exploding losses: its parts, and its smallest size."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pyro
import pytest
import torch

from experiments import l1000_explosion as explosion
from experiments import launch
from guides.encoders import GaussianEncoder
from pyro_scm import infer, recipes

SMALL = explosion.Explosion.preset("smoke")


def test_the_published_encoder_overflows_where_the_suites_own_does_not() -> None:
    cells, _ = explosion.stand_in(SMALL)
    batch = cells.batch()
    far = batch.with_tensors({"x": 1e6 * batch.x})
    torch.manual_seed(0)
    published = explosion.PublishedEncoder(cells.schema, 4, ("x",), (8,))
    own = GaussianEncoder(cells.schema, 4, ("x",), (8,))
    own.load_state_dict(published.state_dict())
    with pyro.validation_enabled(False), torch.no_grad():
        assert torch.isinf(published(far).base_dist.scale).any()
        assert own(far).base_dist.scale.max() < 100


def test_each_arm_differs_from_its_start_in_one_remedy() -> None:
    arms = explosion.arms()
    seed, everything = arms[explosion.PUBLISHED], arms["all remedies"]
    assert seed == explosion.Arm()
    assert len(arms) == 2 + 2 * len(explosion.REMEDIES)
    for name, given in explosion.REMEDIES.items():
        for arm, start in ((arms[f"+ {name}"], seed), (arms[f"all - {name}"], everything)):
            changed = {k for k in vars(arm) if getattr(arm, k) != getattr(start, k)}
            assert changed == set(given)


def test_an_arm_is_what_it_says() -> None:
    cells, _ = explosion.stand_in(SMALL)
    for name, arm in explosion.arms().items():
        model, guide = explosion.compose("vae", arm, cells.schema, 4, (8,))
        likelihood = model.likelihoods[0]
        assert isinstance(guide.local["z"], explosion.PublishedEncoder) is not arm.bounded, name
        assert hasattr(likelihood, "raw_scale") is arm.learnt
        assert torch.equal(likelihood.spread, torch.ones(SMALL.genes)) is not arm.standardised


def test_rise_and_its_summary_by_hand() -> None:
    row = explosion.rise(np.array([2, 4, 6, 8]), np.array([3.0, 2.0, 2.5, 2.4]))
    assert row == {"minimum": 2.0, "epoch": 4, "later": 1.2, "ratio": 1.2, "lasted": 2.0}
    row = explosion.rise(np.array([1, 2, 3, 4]), np.array([2.0, 3.0, 2.2, 9.0]))
    assert (row["later"], row["ratio"], row["lasted"]) == (1.1, 4.5, 4)
    curve = pd.DataFrame(
        {
            "seed": [0, 0, 0, 1, 1, 1],
            "epoch": [1, 2, 3, 1, 2, 3],
            "mean": [2.0, 2.1, 2.04, 4.0, 3.0, math.inf],
        }
    )
    found = explosion.describe(curve)
    assert found["minimum"] == 2.5
    assert (found["lost"], found["ran 3x"], found["of these <= 1.05"]) == (1, 1, 1)
    assert found["largest last"] == math.inf
    kept = pd.DataFrame({"seed": [0, 1], "epoch": [1, 1], "mean": [2.0, 4.0], "kept": True})
    found = explosion.describe(pd.concat([curve.assign(kept=False), kept]))
    assert found["largest kept"] == pytest.approx(4 / 3)


def test_watching_changes_nothing_of_a_training() -> None:
    cells, unseen = explosion.stand_in(SMALL)
    build = {"latent": 3, "hidden": (8,), "guide_hidden": (8,)}
    model, guide = recipes.make("vae", cells.schema, **build)
    curve = explosion.watch(model, guide, cells, unseen, (7,), epochs=3)
    watched = [p.detach().clone() for p in (*model.parameters(), *guide.parameters())]
    model, guide = recipes.make("vae", cells.schema, **build)
    infer.fit(model, guide, cells, seeds=(7,), epochs=3, progress=False, device="cpu")
    fitted = [p.detach() for p in (*model.parameters(), *guide.parameters())]
    assert curve["epoch"].tolist() == [1, 2, 3]
    assert curve.iloc[-1]["mean"] == explosion.errors(model, guide, unseen.batch())["mean"]
    assert all(torch.equal(a, b) for a, b in zip(watched, fitted, strict=True))


def test_a_training_that_fails_is_infinite_from_there_on_and_ends_no_other() -> None:
    cells, unseen = explosion.stand_in(SMALL)
    way = explosion.Arm(lr=10.0)
    model, guide = explosion.compose("vae", way, cells.schema, 4, (16,))
    curve = explosion.watch(model, guide, cells, unseen, (0, 1), epochs=6, every=2, lr=way.lr, clip=None, batch_size=8)
    assert curve.groupby("seed")["epoch"].max().tolist() == [6, 6]
    assert not curve["epoch"].duplicated().iloc[:3].any()
    assert np.isinf(curve.groupby("seed")["sampled"].last()).all()


def test_unseen_environments_of_the_stand_in_are_stronger_and_unseen() -> None:
    cells, unseen = explosion.stand_in(replace(SMALL, trained=40, unseen=40))
    assert not set(cells.env) & set(unseen.env)
    assert cells.reference[cells.present].any()
    assert (len(np.unique(unseen.env)), len(unseen)) == (40, 40 * SMALL.samples)
    treated = ~cells.reference[cells.env]
    assert np.square(unseen.x).mean() > 1.2 * np.square(cells.x[treated]).mean()
    assert np.abs(unseen.x).max() <= 10


def test_held_out_compounds_are_whole() -> None:
    cells, _ = explosion.stand_in(SMALL)
    train, held = explosion._held_out(cells)
    assert len(train) + len(held) == len(cells)
    assert not set(train.env) & set(held.env)
    assert not held.reference[held.env].any()


def test_it_runs_small(tmp_path: Path) -> None:
    script, config, main = explosion.__file__, explosion.Explosion, explosion.main
    assert launch.launch(script, config, main, ["--preset", "smoke", "--out", str(tmp_path)]) == 0
    (folder,) = (tmp_path / "l1000_explosion").iterdir()
    curves = pd.read_csv(folder / "curves.csv")
    assert set(curves.loc[curves["part"] == "figure 10", "model"]) == set(explosion.MODELS)
    assert set(curves.loc[curves["part"] == "ablation", "arm"]) | {explosion.PUBLISHED} == set(explosion.arms())
    own = curves[curves["part"] == "defaults"]
    assert np.isfinite(own["sampled"]).all()
    first, last = own[own["epoch"] == 1], own[own["epoch"] == 2]
    assert last["mean"].mean() < first["mean"].mean()  # it learns
    assert (folder / "figure_10.png").is_file()


def test_compounds_of_the_plates_are_unseen(data_folder: Path) -> None:
    cells, unseen = explosion.plates(explosion.Explosion.preset("paper"))
    assert not set(cells.obs["drug"]) & set(unseen.obs["drug"])
    seen = {row.tobytes() for row in cells.representation[np.unique(cells.env), :1024]}
    assert not seen & {row.tobytes() for row in unseen.representation[np.unique(unseen.env), :1024]}
    assert np.abs(unseen.x).max() == 10
    assert len(unseen) > 300
