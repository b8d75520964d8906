"""The scores are those of the field's own tools, where these are installed (cell-eval, pertpy); else by their numbers.

The constants were computed with cell-eval 0.8.2 and pertpy 1.0.3 on the table of `example`.
"""

import numpy as np
import pytest

from pyro_scm import metrics

GENES = 6
KINDS = ("g0", "g3", "drug_a", "drug_b", "drug_c")


def example():
    """Control, true and predicted cells of five conditions, 6 genes; two conditions are named for their target."""
    rng = np.random.default_rng(5)
    control = rng.normal(2, 1, size=(8, GENES))
    effects = rng.normal(size=(len(KINDS), GENES))
    true = {k: rng.normal(2 + e, 1, size=(7, GENES)) for k, e in zip(KINDS, effects, strict=True)}
    told = 0.5 * effects + rng.normal(size=effects.shape)
    predicted = {k: rng.normal(2 + e, 0.8, size=(9, GENES)) for k, e in zip(KINDS, told, strict=True)}
    return control, true, predicted


def changes():
    control, true, predicted = example()
    return tuple(np.stack([cells[k].mean(0) - control.mean(0) for k in KINDS]) for cells in (true, predicted))


TARGETS = np.array([0, 3, -1, -1, -1])
PEARSON_DELTA = [0.1988964126, 0.2758393517, 0.6034391508, 0.687261885, 0.6126936553]
MAE = [0.6923972908, 1.1876270372, 0.6490928746, 0.7282946892, 1.0234748763]
DISCRIMINATION = [0.8, 0.6, 1.0, 1.0, 1.0]
E_DISTANCE = 1.3499836861115977
MMD_RBF = 0.28279512228318804
R2_DISTANCE = 0.9795385028437716


def test_changes_errors_and_discrimination_are_those_of_cell_eval():
    true, predicted = changes()
    found = [metrics.pearson(t, p) for t, p in zip(true, predicted, strict=True)]
    assert found == pytest.approx(PEARSON_DELTA, abs=1e-6)
    assert [metrics.mae(t, p) for t, p in zip(true, predicted, strict=True)] == pytest.approx(MAE, abs=1e-6)
    assert metrics.discrimination(true, predicted, target_genes=TARGETS) == pytest.approx(DISCRIMINATION)


def test_distances_are_those_of_pertpy():
    _, true, predicted = example()
    x, y = true["drug_a"], predicted["drug_a"]
    assert metrics.energy_distance(x, y) == pytest.approx(E_DISTANCE)
    assert metrics.mmd(x, y, [np.sqrt(1 / (2 * 0.1))]) == pytest.approx(MMD_RBF)  # its gamma is 1 / (2 s^2)
    assert 1 - metrics.r2(x.mean(0), y.mean(0)) == pytest.approx(R2_DISTANCE)


def test_cell_eval_itself():
    pytest.importorskip("cell_eval", reason="cell-eval is not installed: its numbers are pinned above")
    import warnings

    import anndata
    import pandas as pd

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import polars as pl
        from cell_eval._types import PerturbationAnndataPair, initialize_de_comparison
        from cell_eval.metrics._anndata import discrimination_score, mae, pearson_delta
        from cell_eval.metrics._de import DESigGenesRecall

    control, true, predicted = example()

    def data(cells):
        x = np.concatenate([control, *(cells[k] for k in KINDS)])
        labels = np.repeat(["ctrl", *KINDS], [len(control), *(len(cells[k]) for k in KINDS)])
        obs = pd.DataFrame({"p": labels}, index=[str(i) for i in range(len(x))])
        return anndata.AnnData(x, obs=obs, var=pd.DataFrame(index=[f"g{i}" for i in range(GENES)]))

    pair = PerturbationAnndataPair(real=data(true), pred=data(predicted), pert_col="p", control_pert="ctrl")
    for function, expected in ((pearson_delta, PEARSON_DELTA), (mae, MAE), (discrimination_score, DISCRIMINATION)):
        found = function(pair)
        assert [found[k] for k in KINDS] == pytest.approx(expected, abs=1e-6), function

    rng = np.random.default_rng(1)
    tables = [
        pd.DataFrame(
            [
                (k, f"g{i}", rng.normal(), rng.uniform(), rng.uniform(0, 0.1), 1.0)
                for k in KINDS
                for i in range(40)
            ],
            columns=["target", "feature", "log2_fold_change", "p_value", "fdr", "fold_change"],
        )
        for _ in range(2)
    ]  # fmt: skip
    compared = initialize_de_comparison(*(pl.from_pandas(table) for table in tables))

    def ranked(table, kind):
        own = table[(table["target"] == kind) & (table["fdr"] < 0.05)]
        return own.iloc[np.argsort(-own["log2_fold_change"].abs().to_numpy())]["feature"].tolist()

    recall = DESigGenesRecall()(compared)
    for n in (None, 5, 50):
        overlap = compared.compute_overlap(k=n, metric="overlap", fdr_threshold=0.05)
        for kind in KINDS:
            real, told = (ranked(table, kind) for table in tables)
            assert metrics.degs_overlap(real, told, n) == pytest.approx(overlap[kind])
            assert metrics.degs_recall(real, told) == pytest.approx(recall[kind])


def test_pertpy_itself():
    pytest.importorskip("pertpy", reason="pertpy is not installed: its numbers are pinned above")
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from pertpy.tools import Distance

        _, true, predicted = example()
        x, y = true["drug_a"], predicted["drug_a"]
        assert Distance("edistance")(x, y) == pytest.approx(E_DISTANCE)
        assert Distance("mmd")(x, y, kernel="rbf", gamma=0.1) == pytest.approx(MMD_RBF)
        assert Distance("r2_distance")(x, y) == pytest.approx(R2_DISTANCE)
