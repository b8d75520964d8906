"""chemCPA's published files: both layouts mean the same, and what cannot be used is named."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData

from pyro_scm.data import chemcpa_files
from pyro_scm.errors import DataError


def sciplex() -> AnnData:
    """Two drugs at two doses and vehicle, in two lines."""
    obs = pd.DataFrame(
        {
            "condition": ["control", "JQ1", "JQ1", "Dacinostat", "control", "Dacinostat"],
            "dose": [10000.0, 10.0, 10000.0, 1000.0, 10000.0, 10000.0],
            "dose_val": [1.0, 0.001, 1.0, 0.1, 1.0, 1.0],
            "cell_type": ["A549", "A549", "K562", "A549", "K562", "K562"],
            "SMILES": ["", "CCO", "CCO", "CCN", "", "CCN"],
            "control": [1, 0, 0, 0, 1, 0],
            "split_ood_finetuning": ["train", "train", "test", "ood", "train", "ood"],
        },
        index=[f"c{i}" for i in range(6)],
    )
    var = pd.DataFrame({"gene_id": ["ENSG1.4", "ENSG2.1", "ENSG3"]}, index=["A", "B", "C"])
    return AnnData(np.arange(18, dtype=np.float32).reshape(6, 3), obs, var)


def lincs() -> AnnData:
    """The same wells in the other layout."""
    adata = sciplex()
    obs = adata.obs
    obs["condition"] = obs["condition"].replace({"control": "DMSO"})
    obs["pert_dose"] = obs.pop("dose") / 1000
    obs["canonical_smiles"] = obs.pop("SMILES")
    obs["split"] = obs.pop("split_ood_finetuning")
    return adata


def test_both_layouts_mean_the_same() -> None:
    columns = ["drug", "dose", "cell_line", "smiles", "control"]
    one, two = (chemcpa_files.standardise(adata) for adata in (sciplex(), lincs()))
    pd.testing.assert_frame_equal(one.obs[columns], two.obs[columns])
    assert one.obs["dose"].tolist() == [0.0, 0.01, 10.0, 1.0, 0.0, 10.0]
    assert one.obs["drug"].tolist() == ["control", "JQ1", "JQ1", "Dacinostat", "control", "Dacinostat"]
    assert one.obs["smiles"].tolist() == [None, "CCO", "CCO", "CCN", None, "CCN"]
    assert list(one.var_names) == ["ENSG1", "ENSG2", "ENSG3"]


def test_shares_of_the_largest_dose_need_its_unit() -> None:
    adata = sciplex()
    del adata.obs["dose"]
    with pytest.raises(DataError, match="largest dose in uM"):
        chemcpa_files.standardise(adata)
    assert chemcpa_files.standardise(adata, largest=10.0).obs["dose"].tolist() == [0.0, 0.01, 10.0, 1.0, 0.0, 10.0]


def test_a_product_name_is_read_up_to_its_first_blank() -> None:
    adata = sciplex()
    adata.obs["product_name"] = [f"{n} (LAQ824)" if n != "control" else "Vehicle" for n in adata.obs.pop("condition")]
    assert set(chemcpa_files.standardise(adata).obs["drug"]) == {"control", "JQ1", "Dacinostat"}


def test_sides_are_those_of_the_column() -> None:
    found = chemcpa_files.sides(sciplex(), "split_ood_finetuning")
    assert found.tolist() == ["train", "train", "validation", "test", "train", "test"]
    with pytest.raises(DataError, match="split_ood_finetuning"):
        chemcpa_files.sides(sciplex(), "split_random")
    other = sciplex()
    other.obs["split_ood_finetuning"] = "holdout"
    with pytest.raises(DataError, match="'holdout'"):
        chemcpa_files.sides(other, "split_ood_finetuning")


def test_genes_are_put_into_the_order_asked_for_and_missing_ones_are_named() -> None:
    adata = chemcpa_files.standardise(sciplex())
    turned = chemcpa_files.in_order(adata, ["ENSG3", "ENSG1"])
    np.testing.assert_array_equal(np.asarray(turned.X)[0], [2, 0])
    with pytest.raises(DataError, match=r"1 of 2 genes.*'ENSG9'"):
        chemcpa_files.in_order(adata, ["ENSG1", "ENSG9"])
    with pytest.raises(DataError, match="twice"):
        chemcpa_files.in_order(adata, ["ENSG1", "ENSG1"])


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("SMILES", ["", "CCO", "", "CCN", "", "CCN"], "no SMILES for 'JQ1'"),
        ("SMILES", ["", "CCO", "CCC", "CCN", "", "CCN"], "several SMILES for 'JQ1'"),
        ("control", [1, 0, 2, 0, 1, 0], "2 in row 'c2'"),
        ("control", [1, 1, 0, 0, 1, 0], "disagree for 'JQ1'"),
        ("condition", ["a"] * 6, "disagree|no control cells"),
        ("dose", [1, -5.0, 1, 1, 1, 1], "-5.0 in row 'c1'"),
    ],
)
def test_what_cannot_be_used_is_named(column: str, value: list[object], message: str) -> None:
    adata = sciplex()
    adata.obs[column] = value
    with pytest.raises(DataError, match=message):
        chemcpa_files.standardise(adata)


def test_missing_columns_files_and_double_genes_are_errors(tmp_path: Path) -> None:
    for column in ("cell_type", "SMILES", "condition"):
        adata = sciplex()
        del adata.obs[column]
        with pytest.raises(DataError, match="no obs column"):
            chemcpa_files.standardise(adata)
    double = sciplex()
    double.var["gene_id"] = ["ENSG1", "ENSG1.2", "ENSG3"]
    with pytest.raises(DataError, match="'ENSG1' occurs twice"):
        chemcpa_files.standardise(double)
    with pytest.raises(DataError, match="no such file"):
        chemcpa_files.read(tmp_path / "none.h5ad")
    (tmp_path / "broken.h5ad").write_text("no")
    with pytest.raises(DataError, match=r"broken\.h5ad: not a readable"):
        chemcpa_files.read(tmp_path / "broken.h5ad")
    bad = sciplex()
    del bad.obs["cell_type"]
    bad.write_h5ad(tmp_path / "bad.h5ad")
    with pytest.raises(DataError, match=r"bad\.h5ad: no obs column"):
        chemcpa_files.read(tmp_path / "bad.h5ad")
    sciplex().write_h5ad(tmp_path / "good.h5ad")
    assert chemcpa_files.read(tmp_path / "good.h5ad").n_obs == 6
