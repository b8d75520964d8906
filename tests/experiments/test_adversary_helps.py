"""CPA's adversary at the smallest size, and the parts of its comparison by hand."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from experiments import adversary_helps as experiment
from experiments import launch


def test_what_basal_states_tell_and_what_is_predicted(tmp_path: Path) -> None:
    config, main = experiment.AdversaryHelps, experiment.main
    assert launch.launch(experiment.__file__, config, main, ["--preset", "smoke", "--out", str(tmp_path)]) == 0
    (folder,) = (tmp_path / "adversary_helps").iterdir()
    table = pd.read_csv(folder / "summary.csv").set_index(["form", "penalty"])
    assert table.loc[("baseline", "no change"), "delta r2"] <= 0
    # adversaries do what they are for: basal states tell less of the cell type, whatever it costs
    for form in experiment.FORMS:
        told = table.loc[form, "told cell type"]
        assert told["adversary 1"] < told["none"]
    assert table.loc[("variational", "none"), "delta pearson"] > 0.5
    found = pd.read_csv(folder / "differences.csv")
    assert set(found["penalty"]) == {"adversary 1"}
    assert (folder / "scores.png").is_file()


def test_a_combination_is_not_trained_on_though_its_parts_are() -> None:
    cells = experiment.read("simulated")
    first, second = experiment.tasks(cells, 2, 30)
    assert (first.condition, first.kind) != (second.condition, second.kind)
    code = cells.categories["cell_type"].index(first.kind)
    row = cells.environment_index(first.condition)[0]
    both = (first.train.env == row) & (first.train.covariates["cell_type"] == code)
    assert not both.any()
    assert (first.train.env == row).any()
    assert len(first.controls(first.train))
    assert len(first.controls(first.aside))
    assert not set(first.train.cells) & (set(first.aside.cells) | set(first.held_out.cells))
    assert len(first.train.genes) == 30
    assert first.train.genes == first.held_out.genes == first.aside.genes


def test_the_baseline_is_the_mean_change_of_the_other_types() -> None:
    (task,) = experiment.tasks(experiment.read("simulated"), 1, 50)
    change = experiment.others_change(task)
    x, train = np.asarray(task.train.x), task.train
    names = np.array(train.categories["cell_type"])[train.covariates["cell_type"]]
    row = train.environment_index(task.condition)[0]
    each = [
        x[(names == k) & (train.env == row)].mean(0) - x[(names == k) & train.reference[train.env]].mean(0)
        for k in train.categories["cell_type"]
        if k != task.kind
    ]
    np.testing.assert_allclose(change, np.mean(each, axis=0), atol=1e-5)


def test_differences_are_paired_over_combinations_and_seeds() -> None:
    rng = np.random.default_rng(0)
    base = rng.normal(size=6)
    scores = pd.DataFrame(
        {
            "data": "d", "form": "published",
            "held out": np.tile(["a", "b", "c"], 4), "seed": np.repeat([0, 1, 0, 1], 3),
            "penalty": np.repeat(["none", "HSIC"], 6), "delta pearson": np.concatenate([base, base + 0.5]),
            "delta r2": 0.0, "told perturbation": 0.0, "told cell type": 0.0,
        }
    )  # fmt: skip
    found = experiment.differences(scores, ("none", "HSIC")).loc[("d", "published", "HSIC", "delta pearson")]
    assert found["difference"] == pytest.approx(0.5)
    assert found["lower"] == pytest.approx(0.5)
    assert found["pairs"] == 6
