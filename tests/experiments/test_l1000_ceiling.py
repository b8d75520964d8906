"""The experiment on the ceiling of L1000: its parts on panels whose truth is known, and its smallest size."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData

from experiments import l1000_ceiling as ceiling
from experiments import launch
from pyro_scm.data.dataset import EnvironmentDataset

CONFIG = ceiling.Ceiling(sizes=(10, 40, 120), splits=3, model_splits=0)


SMILES = ["C" * n + end for n in range(1, 21) for end in ("O", "N")]


def known(
    slope: float, seed: int = 0, drugs: int = 160, genes: int = 50, wells: int = 3, spread: float = 0.0
) -> ceiling.Panel:
    """Changes that are a common part, `slope` times a linear map of 12 features, `spread` times noise of the drug."""
    rng = np.random.default_rng(seed)
    features = (rng.random((drugs, 12)) < 0.5).astype(float)
    effect = (
        1
        + slope * 2 * (features - 0.5) @ rng.standard_normal((12, genes)) / 12**0.5
        + spread * rng.standard_normal((drugs, genes))
    )
    names = np.array([f"d{i}" for i in range(drugs)])
    who = np.repeat(np.arange(drugs), wells)
    x = np.vstack([effect[who] + rng.standard_normal((len(who), genes)), np.zeros((2, genes))])
    labels = [*names[who], ceiling.CONTROL, ceiling.CONTROL]
    rows = {**dict(zip(names, features, strict=True)), ceiling.CONTROL: np.zeros(12)}
    adata = AnnData(
        X=x.astype(np.float32),
        obs=pd.DataFrame({"drug": labels}, index=[f"w{i}" for i in range(len(x))]),
        var=pd.DataFrame(index=[f"g{i}" for i in range(genes)]),
    )
    cells = EnvironmentDataset.from_anndata(
        adata, environment="drug", control=ceiling.CONTROL, representation=rows, counts=False
    )
    return ceiling.Panel(cells, x, np.full(len(x), "plate"))


def test_spearman_brown_by_hand() -> None:
    assert ceiling.spearman_brown(0.5, 2) == pytest.approx(2 / 3)
    assert ceiling.spearman_brown(0.3, 1) == pytest.approx(0.3)
    assert ceiling.spearman_brown(-0.2, 3) == 0


def test_replicates_find_the_share_of_signal_and_who_responds() -> None:
    table, threshold = ceiling.replicates(known(0.0, genes=400, drugs=40, spread=1.0), centred=True)
    assert table["r"].mean() == pytest.approx(0.5, abs=0.05)  # signal 1, noise 1
    assert table["reliability"].mean() == pytest.approx(0.75, abs=0.05)
    assert table["responds"].all()
    nothing, _ = ceiling.replicates(known(0.0, genes=400, drugs=40), centred=True)
    assert abs(nothing["r"].mean()) < 0.05
    assert nothing["responds"].mean() < 0.2
    common, _ = ceiling.replicates(known(0.0, genes=400, drugs=40), centred=False)
    assert abs(common["r"].mean()) < 0.05  # the same shift of every gene is no correlation
    assert 0 < threshold < 0.2


def test_ridge_gains_where_features_tell_and_not_where_they_do_not() -> None:
    scores = ceiling.learning_curve("known", known(1.0), CONFIG)
    curve = ceiling.curve_table(scores, {}).set_index(["predictor", "size"])
    assert curve.loc[("ridge", 120), "specific"] > 0.7
    assert curve.loc[("ridge", 120), "specific"] > curve.loc[("ridge", 10), "specific"] + 0.2
    assert (curve.loc["training mean", "specific"] == 0).all()
    gain = ceiling.differences(scores, {}).set_index(["predictor", "size"]).loc[("ridge", 120)]
    assert gain["gain low"] > 0.2
    blind = ceiling.learning_curve("blind", known(0.0, spread=1.0), CONFIG)
    gain = ceiling.differences(blind, {}).set_index(["predictor", "size"]).loc[("ridge", 120)]
    assert gain["gain"] < 0.05
    assert ceiling.curve_table(blind, {}).set_index(["predictor", "size"]).loc[("ridge", 120), "specific"] < 0.1


def test_responding_compounds_are_a_group_of_their_own() -> None:
    scores = pd.DataFrame(
        [
            {"panel": "p", "split": s, "size": 5, "predictor": k, "compound": c, "delta": v + s, "specific": 0.0}
            for s in (0, 1)
            for k, c, v in [
                ("training mean", "a", 0.1),
                ("ridge", "a", 0.3),
                ("training mean", "b", 0),
                ("ridge", "b", 0),
            ]
        ]
    )
    gains = ceiling.differences(scores, {"p": {"a"}}).set_index("compounds")["gain"]
    assert gains["all"] == pytest.approx(0.1)
    assert gains["responding"] == pytest.approx(0.2)
    curve = ceiling.curve_table(scores, {"p": {"a"}}).set_index(["compounds", "predictor"])
    assert curve.loc[("responding", "ridge"), "delta"] == pytest.approx(0.8)
    assert curve.loc[("all", "ridge"), "n"] == 2


def test_the_noise_of_shared_controls_is_not_scored() -> None:
    rng = np.random.default_rng(0)
    smiles = [None] * 4 + SMILES
    obs = pd.DataFrame(
        {
            "plate": "p",
            "control": [s is None for s in smiles],
            "smiles": smiles,
            "perturbation": [str(s) for s in smiles],
        },
        index=[f"w{i}" for i in range(len(smiles))],
    )
    x = rng.standard_normal((len(smiles), 300)).astype(np.float32)
    data = ceiling.panel(AnnData(X=x, obs=obs, var=pd.DataFrame(index=[f"g{i}" for i in range(300)])), bits=64)
    assert len(data.compounds) == 40
    scores = ceiling.learning_curve("noise", data, CONFIG)
    mean = scores[(scores["predictor"] == "training mean")].groupby("size")["delta"].mean()
    assert mean.max() < 0.1  # 0.58 if both were compared with the same two vehicle wells


def test_predicting_no_change_is_not_specific() -> None:
    data = known(0.0, drugs=60, genes=400, spread=0.3)
    data.truth[:] += np.random.default_rng(1).standard_normal(400) * (data.compound != ceiling.CONTROL)[:, None]
    cells = replace(data.cells, x=data.truth.astype(np.float32))
    data = ceiling.Panel(cells, data.truth, data.plate)
    train = np.isin(data.compound, [f"d{i}" for i in range(5)] + [ceiling.CONTROL])
    test = [f"d{i}" for i in range(20, 60)]
    rows = ceiling.score(data, train, test, np.zeros((40, 400)), np.zeros(40))
    assert abs(np.mean([row["specific"] for row in rows])) < 0.05  # 0.10 if training wells centred the truth


def test_similarity_to_the_nearest_training_compound() -> None:
    data = known(0.0, drugs=4)
    prints = np.array([[1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 1, 1], [1, 1, 1, 0], [0, 0, 0, 0]], np.float32)
    order = [
        data.cells.environments["perturbation"].tolist().index(n) for n in ("d0", "d1", "d2", "d3", ceiling.CONTROL)
    ]
    rows = np.empty_like(prints)
    rows[order] = prints
    cells = replace(data.cells, representation=rows, features=tuple("abcd"))
    assert ceiling.similarity(cells, ["d0", "d2"], ["d1", "d3"]).tolist() == pytest.approx([1 / 2, 2 / 3])
    near = {"predictor": "ridge", "panel": "p", "size": 5, "delta": 0.0}
    scores = pd.DataFrame(
        [
            {**near, "compound": "a", "specific": 0.1, "nearest similarity": 0.2},
            {**near, "compound": "b", "specific": 0.5, "nearest similarity": 0.9},
            {**near, "size": 1, "compound": "b", "specific": 9.0, "nearest similarity": 0.9},
        ]
    )
    assert ceiling.by_similarity(scores)["specific"].tolist() == pytest.approx([0.1, 0.5])


def test_compounds_on_two_plates() -> None:
    data = known(0.0, drugs=6, spread=3.0, wells=4)
    plate = np.where(np.arange(len(data.plate)) % 2 == 0, "a", "b")
    shared = ceiling.across_plates(ceiling.Panel(data.cells, data.truth, plate), centred=False)
    assert shared["same"].sum() == 6
    assert len(shared) == 36
    assert shared.loc[shared["same"], "r"].min() > 0.8 > shared.loc[~shared["same"], "r"].max()


def test_names_salts_and_stereochemistry_are_one_compound() -> None:
    assert ceiling.compound_key("CCN.Cl", "salt") == ceiling.compound_key("CCN", "base")


@pytest.mark.parametrize("name", ["24h", "6h", "consensus"])
def test_panels_of_the_real_data(data_folder: Path, name: str) -> None:
    data = ceiling.read(name, ceiling.Ceiling.preset("smoke"))
    assert len(data.compounds) > {"24h": 100, "6h": 300, "consensus": 600}[name]
    assert data.truth.shape == data.cells.x.shape == (len(data.plate), 978)
    assert data.cells.reference[data.cells.env].sum() >= 2


def test_it_runs_small(data_folder: Path, tmp_path: Path) -> None:
    config, main = ceiling.Ceiling, ceiling.main
    assert launch.launch(ceiling.__file__, config, main, ["--preset", "smoke", "--out", str(tmp_path)]) == 0
    (folder,) = (tmp_path / "l1000_ceiling").iterdir()
    table = pd.read_csv(folder / "ceiling.csv")
    assert table["ceiling"].between(0.3, 1).all()
    curve = pd.read_csv(folder / "curve.csv")
    assert (curve.loc[curve["predictor"] == "best match", "delta"] > 0.3).all()
    assert (folder / "learning_curve.png").is_file()


def test_a_recentred_model_has_the_training_mean() -> None:
    data = known(1.0, drugs=12, genes=8)
    train = data.cells.subset(np.isin(data.compound, [f"d{i}" for i in range(9)] + [ceiling.CONTROL]))
    config = ceiling.Ceiling(epochs=2, latent=2, hidden=4)
    one = ceiling.predictions(train, ["d10"], ["environment_vae"], config, 0)
    assert set(one) == {"training mean", "ridge", "nearest", "environment_vae", "environment_vae, recentred"}
    seen = ceiling.predictions(train, [f"d{i}" for i in range(9)], ["environment_vae"], config, 0)
    mean = seen["environment_vae, recentred"].mean(0)
    assert np.allclose(mean, seen["training mean"][0], atol=1e-5)
    assert not np.allclose(seen["environment_vae"].mean(0), mean, atol=1e-2)
