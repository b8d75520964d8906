"""Tables of the suite on genetic screens and interferon: their parts on known truths, and their smallest sizes."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData

from experiments import kang_ifnb, launch, norman_pairs, papalexi_thp1
from experiments.tables import protocol, questions, reports
from experiments.tables.models import FEW, MANY, suite
from experiments.tables.protocol import Sizes
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


def test_questions_score_what_compare_scores() -> None:
    split = splits.by_environment(screen(1.0), held_out=["P0", "P3"])
    question = questions.asked(split)
    none = evaluation.evaluate({}, split, baselines=("no_change", "training_mean"), degs=0).scores
    own = protocol.compared(question, [], Sizes(), {}, recentre=()).comparison.scores
    for name in ("no_change", "training_mean"):
        both = none[none["model"] == name].merge(own[own["model"] == name], on=["environment", "metric"]).dropna()
        assert {"rmse", "mae", "delta_r2", "rank"} <= set(both["metric"])
        assert np.allclose(both["value_x"], both["value_y"])


def test_the_ceiling_falls_with_the_noise_of_the_cells() -> None:
    def of(noise: float) -> float:
        question = questions.asked(splits.by_environment(screen(noise), held_out=["P0", "P3"]))
        assert question.other is not None
        return question.pearson(question.other)

    assert of(0.01) > 0.999
    assert of(0.01) > of(3.0) > of(30.0)


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
    (verdict,) = reports.judged(comparison, ["m3"])["verdict"]
    assert verdict == "better than every simple baseline"


def test_suite_gives_each_model_the_options_it_has() -> None:
    schema = screen(1.0, cells=2).schema
    for every in (FEW, MANY):
        made = suite(every, covariates=("batch",), shortcut=True)
        assert list(made) == list(every)
        for name, options in made.items():
            assert ("covariates" in options) == ("covariates" in recipes.recipe(name).options)
            if name != "chemcpa":  # which wants molecules
                recipes.make(name, schema, **{k: v for k, v in options.items() if k != "covariates"})


def test_a_constant_tells_what_all_knock_outs_have_in_common() -> None:
    found = papalexi_thp1.described(pd.DataFrame({"s": [0.5, -0.5]}, index=["A", "B"]))
    assert found.to_numpy().tolist() == [[1.0, 0.5], [1.0, -0.5]]


@pytest.mark.parametrize(
    ("module", "config", "table"),
    [(kang_ifnb, kang_ifnb.Kang, "types"), (norman_pairs, norman_pairs.Norman, "combinations")],
)
def test_scripts_run_small(module: Any, config: Any, table: str, data_folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("scanpy")
    assert launch.launch(module.__file__, config, module.main, ["--preset", "smoke", "--out", str(tmp_path)]) == 0
    (folder,) = (tmp_path / Path(module.__file__).stem).iterdir()
    scores = pd.read_csv(folder / f"{table}_scores.csv")
    assert set(scores["kind"]) == {"baseline", "model", "ceiling"}
    found = scores[scores["metric"] == "delta_pearson"].groupby("model")["value"].mean()
    assert found[protocol.CEILING] > found["training_mean"] > 0
    assert protocol.CHAMPION in found


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


def test_choices_are_made_on_what_is_not_held_out(data_folder: Path) -> None:
    cells = norman_pairs.read("combinations")
    split = next(iter(norman_pairs.parts_held_out(cells, "combinations", 1)))
    question = questions.asked(split)
    (inside,) = norman_pairs.choosing(question, "combinations", 1)
    assert set(inside.names) == set(norman_pairs.PAIRS) - {"KLF1+MAP2K6"}
    present = {str(cells.environments.index[e]) for e in inside.train.present}
    assert not present & set(norman_pairs.PAIRS)


def test_folds_hold_every_name_once() -> None:
    names = [f"g{i}" for i in range(11)]
    folds = papalexi_thp1.in_folds(names, 4)
    assert sorted(n for fold in folds for n in fold) == sorted(names)
    assert len(papalexi_thp1.in_folds(names, 1)) == 1
    assert len(papalexi_thp1.in_folds(names, 1)[0]) == 3


def test_profiles_bring_types_of_one_lineage_together(data_folder: Path) -> None:
    rows = kang_ifnb.profiles(kang_ifnb.held_out(kang_ifnb.read(), "CD14+Mono", 200).train)
    table = rows.filter(like="profile")
    table = table[[n.startswith("control") for n in table.index]]
    away = ((table - table.loc["control CD14+Mono"]) ** 2).sum(axis=1).drop("control CD14+Mono")
    assert away.idxmin() in ("control FCGR3A+Mono", "control Dendritic")
