"""Tables of the suite on genetic screens and interferon: their parts on known truths, and their smallest sizes."""

import importlib
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData

from experiments import kang_ifnb, launch, norman_pairs, papalexi_thp1, tables
from experiments.tables.models import MODELS, suite
from pyro_scm import evaluation, recipes
from pyro_scm.comparison import COLUMNS, Comparison
from pyro_scm.data import splits
from pyro_scm.data.dataset import EnvironmentDataset


def screen(noise: float, cells: int = 40, genes: int = 60) -> EnvironmentDataset:
    """Six perturbations whose changes are a common part and one of their own."""
    rng = np.random.default_rng(0)
    names = ["control", *(f"P{i}" for i in range(6))]
    effect = rng.normal(size=(7, genes)) + rng.normal(size=genes)
    effect[0] = 0
    label = np.repeat(names, cells)
    x = np.repeat(effect, cells, axis=0) + noise * rng.normal(size=(len(label), genes))
    obs = pd.DataFrame({"target": label}, [f"c{i}" for i in range(len(label))])
    adata = AnnData(X=x.astype(np.float32), obs=obs, var=pd.DataFrame(index=[f"g{i}" for i in range(genes)]))
    return EnvironmentDataset.from_anndata(adata, environment="target", control="control", counts=False)


def test_the_ceiling_is_scored_on_what_compare_scores() -> None:
    split = splits.by_environment(screen(1.0), held_out=["P0", "P3"])
    truth = tables._Truth(split, ["P0", "P3"], 0)
    none = evaluation.evaluate({}, split, baselines=("no_change", "training_mean"), degs=0).scores
    ours = pd.DataFrame(truth.rows("no_change", "baseline", -1, np.zeros_like(truth.truth)), columns=COLUMNS)
    both = none[none["model"] == "no_change"].merge(ours, on=["environment", "metric"]).dropna()
    assert {"rmse", "mae", "delta_r2"} <= set(both["metric"])
    assert np.allclose(both["value_x"], both["value_y"])


def test_the_ceiling_falls_with_the_noise_of_the_cells() -> None:
    def of(noise: float) -> float:
        truth = tables._Truth(splits.by_environment(screen(noise), held_out=["P0", "P3"]), ["P0", "P3"], 0)
        rows = truth.rows(tables.CEILING, "ceiling", -1, truth.other)
        return float(np.mean([value for *_, metric, value in rows if metric == "delta_pearson"]))

    assert of(0.01) > 0.999
    assert of(0.01) > of(3.0) > of(30.0)


def test_derived_predictions_are_the_mean_of_members_and_hold_the_training_mean() -> None:
    split = splits.by_environment(screen(0.5), held_out=["P0", "P3"])
    models = suite(("scgen",), latent=3, hidden=(8,), guide_hidden=(8,))
    found = tables.compared(split, models, seeds=(0, 1), epochs=1, degs=0, cells=20, progress=False)
    assert set(found.scores["kind"]) == {"baseline", "model", "derived", "ceiling"}
    truth = tables._Truth(split, ["P0", "P3"], 0)
    change, recentred = truth.predicted(found.runs["scgen"], 20)
    assert change.shape == recentred.shape == (2, 2, 60)
    # scGen knows nothing of an unseen name: recentred, it hardly moves from the training mean, which it had wrong
    own = found.scores[found.scores["metric"] == "delta_pearson"].groupby("model")["value"].mean()
    assert own["scgen, recentred"] == pytest.approx(own["training_mean"], abs=0.1)
    seconds = tables.seconds([found])
    assert seconds.loc["scgen", "members"] == 2
    assert seconds.loc["scgen", "seconds"] > 0


def test_a_verdict_of_one_chosen_model_needs_fewer_environments() -> None:
    names = [f"e{i}" for i in range(7)]
    rng = np.random.default_rng(1)
    base = rng.uniform(0.2, 0.8, 7)
    rows = [("mean", "baseline", -1, n, "delta_pearson", b) for n, b in zip(names, base, strict=True)]
    for model in (f"m{i}" for i in range(12)):
        more = 0.1 + 0.01 * rng.normal(size=7)
        rows += [(model, "model", 0, n, "delta_pearson", b) for n, b in zip(names, base + more, strict=True)]
    comparison = Comparison(pd.DataFrame(rows, columns=COLUMNS))
    assert set(comparison.gate()["verdict"]) == {"too few environments"}
    (verdict,) = tables.judged(comparison, ["m3"])["verdict"]
    assert verdict == "better than every simple baseline"


def test_suite_gives_each_model_the_options_it_has() -> None:
    made = suite(covariates=("batch",), latent=3, hidden=(8,), guide_hidden=(8,), shortcut=True)
    assert list(made) == list(MODELS)
    schema = screen(1.0, cells=2).schema
    for name, options in made.items():
        assert ("covariates" in options) == ("covariates" in recipes.recipe(name).options)
        recipes.make(name, schema, **{k: v for k, v in options.items() if k != "covariates"})


def test_at_most_keeps_references_whole() -> None:
    kept = papalexi_thp1.at_most(screen(1.0), 7)
    counts = np.bincount(kept.env)
    assert sorted(counts) == [7, 7, 7, 7, 7, 7, 40]
    assert counts[kept.reference] == 40


def test_a_constant_tells_what_all_knock_outs_have_in_common() -> None:
    found = papalexi_thp1.described(pd.DataFrame({"s": [0.5, -0.5]}, index=["A", "B"]))
    assert found.to_numpy().tolist() == [[1.0, 0.5], [1.0, -0.5]]


@pytest.mark.parametrize("script", ["kang_ifnb", "norman_pairs"])
def test_scripts_run_small(script: str, data_folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("scanpy")
    module = importlib.import_module(f"experiments.{script}")
    config = {"kang_ifnb": kang_ifnb.Kang, "norman_pairs": norman_pairs.Norman}[script]
    assert launch.launch(module.__file__, config, module.main, ["--preset", "smoke", "--out", str(tmp_path)]) == 0
    (folder,) = (tmp_path / script).iterdir()
    scores = pd.read_csv(folder / "scores.csv")
    assert set(scores["kind"]) == {"baseline", "model", "derived", "ceiling"}
    found = scores[scores["metric"] == "delta_pearson"].groupby("model")["value"].mean()
    assert found[tables.CEILING] > found["training_mean"] > 0


def test_combinations_are_held_out_once_and_never_with_what_tells_of_them(data_folder: Path) -> None:
    cells = norman_pairs.read("combinations")
    parts = list(norman_pairs.parts_held_out(cells, "combinations", 1))
    held_out = [name for split in parts for name in split.held_out]
    assert len(held_out) == len(set(held_out)) == 7
    for split in parts:
        trained = {str(cells.environments.index[e]) for e in split.train.present}
        seen = {p for n in trained for p in n.split("+")}
        # every held-out condition has a part in training, alone or in a pair
        assert all(seen & set(name.split("+")) for name in split.held_out)


def test_profiles_bring_types_of_one_lineage_together(data_folder: Path) -> None:
    rows = kang_ifnb.profiles(kang_ifnb.held_out(kang_ifnb.read(), "CD14+Mono", 200).train)
    table = rows.filter(like="profile")
    table = table[[n.startswith("control") for n in table.index]]
    away = ((table - table.loc["control CD14+Mono"]) ** 2).sum(axis=1).drop("control CD14+Mono")
    assert away.idxmin() in ("control FCGR3A+Mono", "control Dendritic")
