from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch

from pyro_scm.data import dataset, gct, splits, stored
from pyro_scm.data.dataset import EnvironmentDataset, read_h5ad
from pyro_scm.data.single_cell import highly_variable
from pyro_scm.data.stored import StoredMatrix
from pyro_scm.errors import DataError
from tests.data.gct_files import write_gctx
from tests.data.test_stored import write_zarr

COUNTS = np.array(
    [[4, 0, 6], [2, 2, 0], [0, 1, 4], [9, 0, 1], [1, 3, 1], [5, 5, 10], [0, 0, 5], [3, 3, 4]], dtype=np.float32
)
DRUGS = pd.DataFrame(
    {
        "drug": ["A", "DMSO", "B", "A", "DMSO", "B", "A", "A+B"],
        "dose": ["1", "0", "10", "1", "5", "10", "0.1", "1+10"],
        "hours": [24.0, 24.0, 24.0, 24.0, 6.0, 24.0, 24.0, 24.0],
        "line": ["PC3", "PC3", "PC3", "PC3", "PC3", "A549", "PC3", "PC3"],
        "smiles": ["CCO", "CS(C)=O", "CCN", "CCO", "", "CCN", "CCO", None],
        "gene": ["x", None, "y", "x", None, "y", "x", None],
        "batch": ["one", "two", "one", "two", "one", "two", "one", "two"],
        "total": [20, 8, 10, 20, 10, 40, 10, 20],
    },
    index=[f"c{i}" for i in range(8)],
)
COLUMNS = {"environment": "drug", "control": "DMSO", "dose": "dose", "time": "hours", "cell_line": "line"}
NAMES = [
    "DMSO 24 h PC3",
    "DMSO 6 h PC3",
    "A 1 uM 24 h PC3",
    "B 10 uM 24 h PC3",
    "B 10 uM 24 h A549",
    "A 0.1 uM 24 h PC3",
    "A+B 1+10 uM 24 h PC3",
]


def screen(x: Any = COUNTS, **columns: Any) -> anndata.AnnData:
    """Eight cells of a small drug screen; columns replace those of `DRUGS`."""
    obs = DRUGS.assign(**columns)
    var = pd.DataFrame({"chromosome": [1, 2, 3]}, index=["g0", "g1", "g2"])
    return anndata.AnnData(X=x.copy(), obs=obs, var=var)


def simple(x: Any = COUNTS, **options: Any) -> EnvironmentDataset:
    return EnvironmentDataset.from_anndata(screen(x), **{"environment": "drug", "control": "DMSO", **options})


# ---------------------------------------------------------------------- the environment table
def test_an_environment_is_a_distinct_perturbation_dose_time_and_cell_line() -> None:
    cells = EnvironmentDataset.from_anndata(screen(), **COLUMNS, smiles="smiles", targets="gene")
    table = cells.environments
    assert list(table.index) == NAMES
    assert table.index.name == "environment"
    assert list(table["perturbation"]) == ["DMSO", "DMSO", "A", "B", "B", "A", "A+B"]
    assert list(table["dose"]) == [0.0, 0.0, 1.0, 10.0, 10.0, 0.1, "1+10"]
    assert list(table["time"]) == [24, 6, 24, 24, 24, 24, 24]
    assert list(table["cell_line"]) == ["PC3", "PC3", "PC3", "PC3", "A549", "PC3", "PC3"]
    assert list(table["is_reference"]) == [True, True] + [False] * 5
    assert cells.env.tolist() == [2, 0, 3, 2, 1, 4, 5, 6]
    assert cells.reference.tolist() == [True, True] + [False] * 5


def test_molecules_and_targets_are_none_where_blank_and_for_references() -> None:
    table = EnvironmentDataset.from_anndata(screen(), **COLUMNS, smiles="smiles", targets="gene").environments
    assert list(table["smiles"]) == [None, None, "CCO", "CCN", "CCN", "CCO", None]
    assert list(table["targets"]) == [None, None, "x", "y", "y", "x", None]


def test_names_say_only_what_tells_environments_apart() -> None:
    assert list(simple().environments.index) == ["DMSO", "A", "B", "A+B"]
    assert list(simple(time="hours").environments.index) == ["DMSO 24 h", "DMSO 6 h", "A 24 h", "B 24 h", "A+B 24 h"]
    same = EnvironmentDataset.from_anndata(screen(hours=24), environment="drug", control="DMSO", time="hours")
    assert list(same.environments.index) == ["DMSO", "A", "B", "A+B"]
    assert set(same.environments["time"]) == {24}


def test_columns_that_are_not_named_stay_unknown() -> None:
    table = simple().environments
    assert list(table.columns) == ["perturbation", "dose", "time", "cell_line", "smiles", "targets", "is_reference"]
    assert table[["dose", "time"]].isna().all(axis=None)
    assert table[["cell_line", "smiles", "targets"]].isna().all(axis=None)


def test_unknown_doses_and_times_have_an_environment_of_their_own() -> None:
    adata = screen(dose=[1, 0, 10, np.nan, 0, 10, 1, 10], hours=[24, 24, 24, 24, 24, np.nan, 24, 24])
    cells = EnvironmentDataset.from_anndata(adata, environment="drug", control="DMSO", dose="dose", time="hours")
    assert list(cells.environments.index) == [
        "DMSO 24 h",
        "A 1 uM 24 h",
        "B 10 uM 24 h",
        "A ? uM 24 h",
        "B 10 uM ? h",
        "A+B 10 uM 24 h",
    ]


def test_several_controls_are_several_references() -> None:
    cells = simple(control=["DMSO", "A"])
    assert list(cells.environments.index[cells.reference]) == ["A", "DMSO"]
    assert not simple(control=None).reference.any()


def test_categorical_and_numeric_columns_read_alike() -> None:
    plain = EnvironmentDataset.from_anndata(screen(), **COLUMNS)
    adata = screen(**{c: pd.Categorical(DRUGS[c].astype(str)) for c in ("drug", "dose", "hours", "line")})
    coded = EnvironmentDataset.from_anndata(adata, **COLUMNS)
    pd.testing.assert_frame_equal(plain.environments, coded.environments)
    assert plain.env.tolist() == coded.env.tolist()


def test_an_exponent_is_a_number_and_not_a_combination() -> None:
    adata = screen(dose=["1e+3", "0", "1", "1e+3", "0", "1", "1", "1"])
    table = EnvironmentDataset.from_anndata(adata, environment="drug", control="DMSO", dose="dose").environments
    assert table.loc["A 1000 uM", "dose"] == 1000.0
    assert table["dose"].dtype == float


def test_combinations_with_another_separator() -> None:
    adata = screen(drug=["A", "DMSO", "B", "A", "DMSO", "B", "A", "A|B"], dose=["1", "0", "9"] + ["1"] * 4 + ["1|9"])
    options = {"environment": "drug", "control": "DMSO", "dose": "dose", "separator": "|"}
    cells = EnvironmentDataset.from_anndata(adata, **options, representation="multi-hot")
    both = cells.environment_index("A|B 1|9 uM")[0]
    np.testing.assert_allclose(cells.representation[both], [np.log10(2), 1])


# ---------------------------------------------------------------------- the cells
def test_counts_are_told_from_continuous_values() -> None:
    assert simple().counts
    assert simple().size.tolist() == [10, 4, 5, 10, 5, 20, 5, 10]
    continuous = simple(np.log1p(COUNTS))
    assert not continuous.counts
    assert continuous.size.tolist() == [1] * 8
    assert not simple(counts=False).counts
    assert simple(COUNTS.astype(np.int64)).counts


def test_a_library_size_of_ones_own_allows_cells_without_a_count() -> None:
    x = COUNTS.copy()
    x[0] = 0
    cells = simple(x, size="total")
    assert cells.size.tolist() == DRUGS["total"].tolist()
    with pytest.raises(DataError, match="X: 1 cells have no count"):
        simple(x)


@pytest.mark.parametrize("form", [sp.csr_matrix, sp.csc_matrix, sp.csr_array])
def test_sparse_expression_stays_sparse(form: Callable[[Any], Any]) -> None:
    cells = simple(form(COUNTS))
    assert sp.issparse(cells.x)
    assert cells.x.format == "csr"
    assert sp.issparse(cells.normalised())
    assert sp.issparse(cells.subset(np.array([1, 2])).x)
    assert cells.batch().x is not None
    assert cells.batch().x.tolist() == COUNTS.tolist()


def test_a_layer_can_be_read_instead() -> None:
    adata = screen(np.log1p(COUNTS))
    adata.layers["raw"] = COUNTS
    cells = EnvironmentDataset.from_anndata(adata, environment="drug", layer="raw")
    assert cells.counts
    assert cells.x.tolist() == COUNTS.tolist()


def test_covariates_are_codes_and_categories() -> None:
    cells = simple(covariates=["batch", "hours"])
    assert cells.covariates["batch"].tolist() == [0, 1, 0, 1, 0, 1, 0, 1]
    assert cells.categories == {"batch": ("one", "two"), "hours": ("6.0", "24.0")}


def test_proteins_come_with_or_without_names() -> None:
    adata = screen()
    adata.obsm["named"] = pd.DataFrame(COUNTS[:, :2], index=adata.obs_names, columns=["CD3", "CD4/CD8"])
    adata.obsm["plain"] = sp.csr_matrix(COUNTS)
    named = EnvironmentDataset.from_anndata(adata, environment="drug", proteins="named")
    plain = EnvironmentDataset.from_anndata(adata, environment="drug", proteins="plain")
    assert named.proteins == ("CD3", "CD4/CD8")
    assert plain.proteins == ("protein 0", "protein 1", "protein 2")
    assert named.y is not None
    assert plain.y is not None
    assert named.y.tolist() == COUNTS[:, :2].tolist()
    assert plain.y.tolist() == COUNTS.tolist()
    batch = plain.batch(np.array([5]))
    assert batch.y is not None
    assert batch.y.tolist() == [[5, 5, 10]]


# ---------------------------------------------------------------------- there and back
@pytest.mark.parametrize("form", [np.asarray, sp.csr_matrix])
@pytest.mark.parametrize("values", [COUNTS, np.log1p(COUNTS)])
def test_a_file_gives_back_the_same_cells(form: Callable[[Any], Any], values: Any, tmp_path: Path) -> None:
    adata = screen(form(values))
    adata.obsm["surface"] = pd.DataFrame(COUNTS, index=adata.obs_names, columns=["CD3", "CD4/CD8", "CD19"])
    options = {**COLUMNS, "smiles": "smiles", "targets": "gene", "covariates": ["batch"], "proteins": "surface"}
    before = EnvironmentDataset.from_anndata(adata, **options, representation=["multi-hot", "time", "cell_line"])
    before.to_anndata().write_h5ad(tmp_path / "cells.h5ad")
    after = EnvironmentDataset.read(tmp_path / "cells.h5ad")

    assert after.environments.map(str).equals(before.environments.map(str))
    assert list(after.environments["dose"]) == [0.0, 0.0, 1.0, 10.0, 10.0, 0.1, "1+10"]
    assert after.reference.tolist() == before.reference.tolist()
    assert after.env.tolist() == before.env.tolist()
    assert sp.issparse(after.x) == sp.issparse(before.x)
    assert after.batch().x.tolist() == before.batch().x.tolist()  # type: ignore[union-attr]
    assert after.representation.tolist() == before.representation.tolist()
    assert after.schema == before.schema
    assert after.size.tolist() == before.size.tolist()
    assert after.covariates["batch"].tolist() == before.covariates["batch"].tolist()
    assert after.y is not None
    assert before.y is not None
    assert after.y.tolist() == before.y.tolist()
    assert list(after.var["chromosome"]) == [1, 2, 3]
    assert list(after.obs["line"]) == list(before.obs["line"])


def test_a_subset_keeps_its_whole_table_through_a_file(tmp_path: Path) -> None:
    before = simple(covariates=["batch"]).of("A")
    before.to_anndata().write_h5ad(tmp_path / "cells.h5ad")
    after = EnvironmentDataset.read(tmp_path / "cells.h5ad")
    assert list(after.environments.index) == ["DMSO", "A", "B", "A+B"]
    assert after.env.tolist() == [1, 1, 1]
    assert after.categories == {"batch": ("one", "two")}
    assert after.environments["dose"].isna().all()


def test_numeric_doses_stay_numeric_through_a_file(tmp_path: Path) -> None:
    adata = screen(dose=[1, 0, 10, 1, 0, 10, np.nan, 2])
    before = EnvironmentDataset.from_anndata(adata, environment="drug", control="DMSO", dose="dose")
    before.to_anndata().write_h5ad(tmp_path / "cells.h5ad")
    after = EnvironmentDataset.read(tmp_path / "cells.h5ad")
    assert after.environments["dose"].dtype == float
    pd.testing.assert_series_equal(after.environments["dose"], before.environments["dose"])


def test_writing_does_not_change_the_cells() -> None:
    cells = simple(covariates=["batch"])
    adata = cells.to_anndata()
    adata.X[:] = 0
    adata.obs["batch"] = "other"
    assert cells.x.tolist() == COUNTS.tolist()
    assert list(cells.obs["batch"]) == list(DRUGS["batch"])
    assert "environment" not in cells.obs


def test_what_to_anndata_wrote_must_not_have_been_changed() -> None:
    adata = simple(covariates=["batch"]).to_anndata()
    adata.obs["environment"] = ["C"] + ["A"] * 7
    with pytest.raises(DataError, match="obs column 'environment' holds 'C', which to_anndata did not write: read the"):
        EnvironmentDataset.from_anndata(adata)
    adata = simple(covariates=["batch"]).to_anndata()
    del adata.obs["batch"]
    with pytest.raises(DataError, match="no obs column 'batch', which to_anndata wrote"):
        EnvironmentDataset.from_anndata(adata)
    adata = simple().to_anndata()
    adata.X[3, 1] = -1
    with pytest.raises(DataError, match=r"-1\.0 in cell 'c3', gene 'g1', is negative"):
        EnvironmentDataset.from_anndata(adata)


# ---------------------------------------------------------------------- mini-batches
def test_a_batch_has_the_cells_asked_for() -> None:
    cells = simple(covariates=["batch"])
    batch = cells.batch(torch.tensor([7, 0, 0]))
    assert batch.index.tolist() == [7, 0, 0]
    assert batch.env.tolist() == [3, 1, 1]
    assert batch.x is not None
    assert batch.x.tolist() == COUNTS[[7, 0, 0]].tolist()
    assert batch.x.dtype == torch.float32
    assert batch.size is not None
    assert batch.size.tolist() == [10, 10, 10]
    assert batch.covariates["batch"].tolist() == [1, 0, 0]
    assert batch.total == 8
    assert batch.e.tolist() == cells.representation[[3, 1, 1]].tolist()
    assert simple(np.log1p(COUNTS)).batch().size is None


def test_indexing_takes_rows_slices_and_masks() -> None:
    cells = simple()
    assert cells[3].index.tolist() == [3]
    assert cells[-1].index.tolist() == [7]
    assert cells[2:5].index.tolist() == [2, 3, 4]
    assert cells[np.arange(8) % 4 == 1].index.tolist() == [1, 5]
    assert cells[[6, 1]].index.tolist() == [6, 1]


@pytest.mark.parametrize("environments", [3, 200])
@pytest.mark.parametrize("rows", [1, 2, 150])
def test_each_cell_points_to_its_environment_in_small_and_large_tables(environments: int, rows: int) -> None:
    rng = np.random.default_rng(0)
    env = rng.permutation(np.arange(400) % environments)
    obs = pd.DataFrame({"drug": [f"d{e:03d}" for e in env]}, index=[str(i) for i in range(400)])
    adata = anndata.AnnData(X=np.ones((400, 1), np.float32), obs=obs)
    cells = EnvironmentDataset.from_anndata(adata, environment="drug", control="d000")
    r = rng.normal(size=(environments, 5)).astype(np.float32)
    cells = cells.with_representation(r)
    index = rng.permutation(400)[:rows]
    batch = cells.batch(index)
    np.testing.assert_array_equal(batch.r[batch.row], r[cells.env[index]])
    assert len(batch.r) <= max(environments, 1)
    assert len(np.unique(np.asarray(batch.r), axis=0)) == len(batch.r)
    expected = np.array([obs["drug"].iloc[i] != "d000" for i in index], float)
    np.testing.assert_array_equal(batch.perturbed[batch.row], expected)
    if environments > max(rows, 64):
        assert len(batch.r) == len(set(cells.env[index].tolist()))


def test_batches_cover_every_cell_in_the_given_order() -> None:
    order = np.array([5, 3, 1, 7, 0, 2, 4, 6])
    parts = list(simple().batches(3, order))
    assert [part.index.tolist() for part in parts] == [[5, 3, 1], [7, 0, 2], [4, 6]]
    assert {part.total for part in parts} == {8}
    assert [part.index.tolist() for part in simple().batches(5)] == [[0, 1, 2, 3, 4], [5, 6, 7]]


def test_a_batch_shares_no_memory_with_the_index_or_the_cells() -> None:
    cells, rows = simple(), np.arange(8)
    rows.flags.writeable = False
    batch = cells.batch(rows)
    assert batch.x is not None
    batch.index[:] = 0
    batch.x[:] = 0
    batch.r[:] = 7
    assert rows.tolist() == list(range(8))
    assert cells.x.tolist() == COUNTS.tolist()
    assert not (cells.representation == 7).any()


# ---------------------------------------------------------------------- normalisation and statistics
@pytest.mark.parametrize("depth", [None, 100.0])
def test_dense_and_sparse_normalise_alike(depth: float | None) -> None:
    dense, sparse = simple().normalised(depth), simple(sp.csr_matrix(COUNTS)).normalised(depth)
    used = depth or 7.5  # the median of 10, 4, 5, 10, 5, 20, 5, 10
    expected = np.log1p(COUNTS / COUNTS.sum(1, keepdims=True) * used)
    np.testing.assert_allclose(dense, expected, rtol=1e-6)
    np.testing.assert_allclose(sparse.toarray(), expected, rtol=1e-6)
    assert dense.dtype == sparse.dtype == np.float32


def test_continuous_values_are_not_normalised() -> None:
    x = np.log1p(COUNTS)
    assert simple(x).normalised().tolist() == x.tolist()


@pytest.mark.parametrize("form", [np.asarray, sp.csr_matrix])
def test_statistics_of_counts(form: Callable[[Any], Any]) -> None:
    summary = simple(form(COUNTS)).schema.summary
    normalised = np.log1p(COUNTS / COUNTS.sum(1, keepdims=True) * 7.5)
    assert summary.depth == 7.5
    np.testing.assert_allclose(summary.mean, normalised.mean(0), rtol=1e-5)
    np.testing.assert_allclose(summary.scale, normalised.std(0), rtol=1e-5)
    totals = COUNTS.sum(0) + 1  # 24, 14, 31
    np.testing.assert_allclose(summary.proportion, totals / totals.sum(), rtol=1e-6)


@pytest.mark.parametrize("form", [np.asarray, sp.csr_matrix])
def test_statistics_of_continuous_values(form: Callable[[Any], Any]) -> None:
    x = np.random.default_rng(0).normal(3, 2, (8, 3)).astype(np.float32)
    summary = simple(form(x)).schema.summary
    np.testing.assert_allclose(summary.mean, x.mean(0), rtol=1e-5)
    np.testing.assert_allclose(summary.scale, x.std(0), rtol=1e-5)
    assert summary.proportion.tolist() == [0, 0, 0]
    assert summary.depth == 1


@pytest.mark.parametrize("form", [np.asarray, sp.csr_matrix])
@pytest.mark.parametrize("level", [0.1, 3.3, 1234.5])
def test_a_constant_gene_has_scale_one(form: Callable[[Any], Any], level: float) -> None:
    x = np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32)
    x[:, 1] = level
    scale = simple(form(x)).schema.summary.scale
    assert scale[1] == 1
    assert (scale[[0, 2]] != 1).all()


def test_the_schema_names_everything() -> None:
    schema = simple(covariates=["batch"]).schema
    assert schema.genes == ("g0", "g1", "g2")
    assert schema.environments == ("DMSO", "A", "B", "A+B")
    assert schema.features == ("perturbation=A", "perturbation=A+B", "perturbation=B")
    assert schema.covariates == {"batch": ("one", "two")}
    assert schema.counts
    assert schema.cells == 8


def test_mean_expression_of_each_environment_with_cells() -> None:
    for x in (COUNTS, sp.csr_matrix(COUNTS)):
        mean = simple(x).subset(np.array([0, 3, 1])).mean_expression(10.0)
        assert list(mean.index) == ["DMSO", "A"]
        assert list(mean.columns) == ["g0", "g1", "g2"]
        np.testing.assert_allclose(mean.loc["A"], np.log1p([[4, 0, 6], [9, 0, 1]]).mean(0), rtol=1e-6)
        np.testing.assert_allclose(mean.loc["DMSO"], np.log1p([5, 5, 0]), rtol=1e-6)


# ---------------------------------------------------------------------- other data sets from one
def test_a_subset_keeps_the_table_and_knows_where_its_cells_came_from() -> None:
    cells = simple(covariates=["batch"])
    part = cells.subset(np.array([7, 2, 5])).subset(np.array([True, False, True]))
    assert part.cells == ("c7", "c5")
    assert part.x.tolist() == COUNTS[[7, 5]].tolist()
    assert part.env.tolist() == [3, 2]
    assert part.size.tolist() == [10, 20]
    assert part.covariates["batch"].tolist() == [1, 1]
    assert part.origin is not None
    assert part.origin.tolist() == [7, 5]
    assert len(part.environments) == 4
    assert part.present.tolist() == [2, 3]
    assert len(part) == part.batch().total == part.schema.cells == 2


def test_the_statistics_of_a_subset_are_its_own() -> None:
    cells = simple()
    assert cells.schema.summary.depth == 7.5
    assert cells.subset(np.array([1])).schema.summary.depth == 4


def test_a_mask_of_another_length_is_refused() -> None:
    with pytest.raises(DataError, match=r"a mask of shape \(3,\) for 8 cells: give one value for each"):
        simple().subset(np.array([True, False, True]))


def test_cells_of_named_environments() -> None:
    assert simple().of("A+B", "DMSO").cells == ("c1", "c4", "c7")
    with pytest.raises(DataError, match="no environment 'DMS': did you mean one of 'DMSO'"):
        simple().of("DMS")
    with pytest.raises(DataError, match="no environment 'qqq': did you mean one of 'DMSO', 'A', 'B'"):
        simple().environment_index("A", "qqq")
    assert simple().environment_index("B", "A").tolist() == [2, 1]


def test_another_representation_of_the_same_cells() -> None:
    cells = simple(smiles="smiles", representation="one-hot")
    other = cells.with_representation("multi-hot")
    assert other.features == ("perturbation=A", "perturbation=B")
    assert other.representation.tolist() == [[0, 0], [1, 0], [0, 1], [1, 1]]
    assert other.x is cells.x
    assert cells.features == ("perturbation=A", "perturbation=A+B", "perturbation=B")
    assert other.schema.features == other.features


# ---------------------------------------------------------------------- expression on disk
def opened(adata: anndata.AnnData, folder: Path, **options: Any) -> EnvironmentDataset:
    adata.write_h5ad(folder / "cells.h5ad")
    return EnvironmentDataset.open(folder / "cells.h5ad", **{"environment": "drug", "control": "DMSO", **options})


def assert_same(a: EnvironmentDataset, b: EnvironmentDataset) -> None:
    """Everything but the form of x is equal, to the last bit."""
    pd.testing.assert_frame_equal(a.environments, b.environments)
    assert a.schema == b.schema
    for name in ("mean", "scale", "proportion"):
        assert torch.equal(getattr(a.schema.summary, name), getattr(b.schema.summary, name)), name
    assert a.schema.summary.depth == b.schema.summary.depth
    pd.testing.assert_frame_equal(a.mean_expression(), b.mean_expression())
    one, other = a.batch(), b.batch()
    for name in ("index", "env", "row", "r", "perturbed", "x"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name
    for name in ("size", "y"):
        assert (getattr(one, name) is None) == (getattr(other, name) is None)
        assert getattr(one, name) is None or torch.equal(getattr(one, name), getattr(other, name)), name
    assert {k: v.tolist() for k, v in one.covariates.items()} == {k: v.tolist() for k, v in other.covariates.items()}
    assert one.total == other.total


@pytest.fixture(params=[100, 6], ids=["one block", "blocks of two cells"])
def _blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored, "_BLOCK_VALUES", request.param)


@pytest.mark.usefixtures("_blocks")
@pytest.mark.parametrize("form", [np.asarray, sp.csr_matrix])
@pytest.mark.parametrize("values", [COUNTS, np.log1p(COUNTS), COUNTS.astype(np.int64)])
@pytest.mark.parametrize("layer", [None, "raw"])
def test_cells_on_disk_are_the_cells_in_memory(
    form: Callable[[Any], Any], values: Any, layer: str | None, tmp_path: Path
) -> None:
    adata = screen(form(values))
    adata.obsm["surface"] = pd.DataFrame(COUNTS[:, :2], index=adata.obs_names, columns=["CD3", "CD4"])
    if layer:
        adata.X, adata.layers[layer] = np.zeros_like(COUNTS), adata.X
    options = {**COLUMNS, "covariates": ["batch"], "proteins": "surface", "layer": layer, "targets": "gene"}
    resident, lazy = EnvironmentDataset.from_anndata(adata, **options), opened(adata, tmp_path, **options)
    assert isinstance(lazy.x, StoredMatrix)
    assert lazy.counts == bool((values == np.round(values)).all())
    assert_same(resident, lazy)
    assert_same(resident.of("A 1 uM 24 h PC3"), lazy.of("A 1 uM 24 h PC3"))
    part = np.array([7, 2, 5, 0])
    assert_same(resident.subset(part), lazy.subset(part))
    assert_same(resident.subset(np.arange(8) > 3), lazy.subset(np.arange(8) > 3))
    for a, b in zip(resident.batches(3, part), lazy.batches(3, part), strict=True):
        assert a.x is not None
        assert b.x is not None
        assert torch.equal(a.x, b.x)
    columns = np.array([2, 0])
    genes = [replace(c, x=c.x[:, columns], var=c.var.iloc[columns]) for c in (resident, lazy)]
    assert isinstance(genes[1].x, StoredMatrix)
    assert_same(genes[0], genes[1])
    loaded = lazy.load()
    assert type(loaded.x) is type(resident.x)
    assert loaded.load() is loaded
    assert_same(resident, loaded)


@pytest.mark.parametrize("kind", ["zarr-2", "zarr-3", "gctx"])
def test_other_files_are_opened_alike(kind: str, tmp_path: Path) -> None:
    if kind == "gctx":
        path = write_gctx(
            tmp_path,
            COUNTS.T,
            samples=list(DRUGS.index),
            genes=["g0", "g1", "g2"],
            column={"drug": list(DRUGS["drug"]), "pert_dose": [1.0, -666, 10, 1, -666, 10, 0.1, 2]},
        )
        resident = EnvironmentDataset.from_anndata(gct.read(path), environment="drug", control="DMSO")
    else:
        path, adata = tmp_path / "cells.zarr", screen(sp.csr_matrix(COUNTS))
        write_zarr(adata, path, int(kind[-1]))
        resident = EnvironmentDataset.from_anndata(adata, environment="drug", control="DMSO")
    lazy = EnvironmentDataset.open(path, environment="drug", control="DMSO")
    assert isinstance(lazy.x, StoredMatrix)
    assert_same(resident, lazy)
    assert list(lazy.obs["drug"]) == list(DRUGS["drug"])


def test_annotation_can_come_from_elsewhere(tmp_path: Path) -> None:
    path = write_gctx(tmp_path, COUNTS.T, samples=list(DRUGS.index), genes=["g0", "g1", "g2"])
    table = pd.concat([DRUGS.iloc[::-1], DRUGS.rename(index="other {}".format)])
    cells = EnvironmentDataset.open(path, obs=table, environment="drug", control="DMSO")
    assert_same(simple(), cells)
    with pytest.raises(DataError, match=r"plate\.gctx: obs has no row for 2 of its cells \('c0', 'c7'\): add them"):
        EnvironmentDataset.open(path, obs=DRUGS.iloc[1:7], environment="drug")
    with pytest.raises(DataError, match=r"plate\.gctx: obs names cells twice: 'c0'; each must appear once"):
        EnvironmentDataset.open(path, obs=pd.concat([DRUGS, DRUGS.iloc[:1]]), environment="drug")


def test_a_file_that_to_anndata_wrote_is_opened_without_options(tmp_path: Path) -> None:
    before = simple(sp.csr_matrix(COUNTS), covariates=["batch"], representation="multi-hot")
    before.to_anndata().write_h5ad(tmp_path / "cells.h5ad")
    cells = EnvironmentDataset.open(tmp_path / "cells.h5ad")
    assert isinstance(cells.x, StoredMatrix)
    assert_same(EnvironmentDataset.read(tmp_path / "cells.h5ad"), cells)
    again = cells.to_anndata()
    assert again.X.toarray().tolist() == COUNTS.tolist()  # type: ignore[union-attr]


@pytest.mark.usefixtures("_blocks")
@pytest.mark.parametrize("form", [np.asarray, sp.csr_matrix])
@pytest.mark.parametrize(
    ("value", "options"),
    [(np.nan, {}), (np.inf, {"counts": False}), (-2, {"counts": True}), (0.5, {"counts": True}), (0, {})],
)
def test_values_on_disk_are_checked_with_the_same_words(
    form: Callable[[Any], Any], value: float, options: dict[str, Any], tmp_path: Path
) -> None:
    x = COUNTS.copy()
    x[[3, 5], :] = value
    with pytest.raises(DataError) as expected:
        simple(form(x), **options)
    assert "'c3'" in str(expected.value)
    with pytest.raises(DataError) as error:
        opened(screen(form(x)), tmp_path, **options)
    assert str(error.value) == f"{tmp_path / 'cells.h5ad'}: {expected.value}"


def test_a_file_that_cannot_be_opened_is_named_once(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"^\S*cells\.h5ad: no obs column 'nothing'"):
        opened(screen(), tmp_path, environment="nothing")
    with pytest.raises(DataError, match=r"^\S*cells\.h5ad: no layer 'nothing': this AnnData has none"):
        opened(screen(), tmp_path, layer="nothing")
    with pytest.raises(DataError, match=r"^\S*cells\.h5ad: X is empty"):
        opened(anndata.AnnData(obs=DRUGS, var=screen().var), tmp_path)
    with pytest.raises(DataError) as error:
        opened(screen(sp.csc_matrix(COUNTS)), tmp_path)
    assert str(error.value).count("cells.h5ad") == 1


def test_a_file_with_wrong_values_can_be_written_anew_while_the_error_is_at_hand(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"-1\.0 in cell") as error:
        opened(screen(COUNTS - 1), tmp_path, counts=True)
    assert opened(screen(), tmp_path, counts=True).counts
    assert error.tb is not None


def test_more_than_fits_is_normalised_in_blocks_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    resident, lazy = simple(), opened(screen(), tmp_path)
    np.testing.assert_array_equal(lazy.normalised(), resident.normalised())
    monkeypatch.setattr(dataset, "_LOADED_BYTES", 8 * 3 * 4 - 1)
    with pytest.raises(
        DataError, match=r"cells\.h5ad: 8 cells x 3 genes would take 0\.0 GB in memory: take fewer with"
    ):
        lazy.normalised()
    np.testing.assert_array_equal(lazy.subset(np.arange(7)).normalised(10.0), resident.normalised(10.0)[:7])
    monkeypatch.setattr(stored, "_BLOCK_VALUES", 9)
    parts = list(lazy.normalised_blocks(10.0))
    assert [start for start, _ in parts] == [0, 3, 6]
    np.testing.assert_array_equal(np.concatenate([x for _, x in parts]), resident.normalised(10.0))
    pd.testing.assert_frame_equal(lazy.mean_expression(), resident.mean_expression())


@pytest.mark.parametrize("form", [np.asarray, sp.csr_matrix])
def test_statistics_do_not_depend_on_how_the_cells_are_cut(
    form: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    x = rng.poisson(3.0, (500, 4)).astype(np.float32) + 1
    obs = pd.DataFrame({"drug": rng.choice(["A", "B", "DMSO"], 500)}, index=[str(i) for i in range(500)])
    cells = EnvironmentDataset.from_anndata(anndata.AnnData(form(x), obs=obs), environment="drug", control="DMSO")
    monkeypatch.setattr(stored, "_BLOCK_VALUES", 4 * 7)
    summary, mean = cells.schema.summary, cells.mean_expression()
    values = np.log1p(x.astype(np.float64) / x.sum(1, keepdims=True) * summary.depth)
    np.testing.assert_allclose(summary.mean, values.mean(0), rtol=1e-6)
    np.testing.assert_allclose(summary.scale, values.std(0), rtol=1e-6)
    np.testing.assert_allclose(summary.proportion, (x.sum(0) + 1) / (x.sum(0) + 1).sum(), rtol=1e-6)
    for name in mean.index:
        np.testing.assert_allclose(mean.loc[name], values[obs["drug"] == name].mean(0), rtol=1e-6)


def test_genes_are_chosen_and_cells_split_without_reading_them_all(tmp_path: Path) -> None:
    pytest.importorskip("scanpy")
    rng = np.random.default_rng(0)
    x = sp.csr_matrix(rng.poisson(rng.gamma(1.0, 2.0, (1, 60)), (90, 60)).astype(np.float32))
    obs = pd.DataFrame({"drug": ["A", "B", "C", "D", "DMSO"] * 18}, index=[f"c{i}" for i in range(90)])
    adata = anndata.AnnData(x, obs=obs, var=pd.DataFrame(index=[f"g{i}" for i in range(60)]))
    lazy = opened(adata, tmp_path)
    resident = EnvironmentDataset.from_anndata(adata, environment="drug", control="DMSO")
    parts = []
    for cells in (resident, lazy):
        split = splits.by_environment(cells, fraction=0.5, seed=1)
        parts.append([highly_variable(part, 20, chosen_on=split.train) for part in (split.train, split.test)])
    for a, b in zip(*parts, strict=True):
        assert isinstance(b.x, StoredMatrix)
        assert len(b.genes) == 20
        assert_same(a, b)


# ---------------------------------------------------------------------- what cannot be read
def test_the_environment_must_be_named() -> None:
    with pytest.raises(
        DataError, match=r"environment is missing: name the obs column .* this AnnData has 'drug', 'dose'"
    ):
        EnvironmentDataset.from_anndata(screen())


@pytest.mark.parametrize("argument", ["environment", "dose", "time", "cell_line", "smiles", "targets", "size"])
def test_an_obs_column_that_is_not_there_is_named(argument: str) -> None:
    with pytest.raises(DataError, match=r"no obs column 'nothing'.*: this AnnData has 'drug', 'dose'"):
        simple(**{argument: "nothing"})


def test_a_covariate_layer_or_obsm_entry_that_is_not_there_is_named() -> None:
    with pytest.raises(DataError, match="no obs column 'nothing' for a covariate: this AnnData has 'drug'"):
        simple(covariates=["nothing"])
    with pytest.raises(DataError, match="no layer 'nothing': this AnnData has none"):
        simple(layer="nothing")
    with pytest.raises(DataError, match="no obsm entry 'nothing' for proteins: this AnnData has none"):
        simple(proteins="nothing")


def test_an_unknown_control_is_named_with_the_values_there_are() -> None:
    message = r"control 'vehicle' is not in obs column 'drug': it has 'A', 'A\+B', 'B', 'DMSO'"
    with pytest.raises(DataError, match=message):
        simple(control=["DMSO", "vehicle"])


def test_cells_without_an_environment_cell_line_or_covariate_are_named() -> None:
    adata = screen(drug=["A", None, "B", "A", "DMSO", None, "A", "A"])
    with pytest.raises(DataError, match=r"obs column 'drug' is missing in 2 cells \('c1', 'c5'\): fill them or drop"):
        EnvironmentDataset.from_anndata(adata, environment="drug")
    adata = screen(line=["PC3"] * 7 + [None])
    with pytest.raises(DataError, match=r"obs column 'line' is missing in 1 cells \('c7'\)"):
        EnvironmentDataset.from_anndata(adata, environment="drug", cell_line="line")
    with pytest.raises(DataError, match="covariate 'gene' is missing in 'c1', 'c4', 'c7': fill or drop them"):
        simple(covariates=["gene"])


@pytest.mark.parametrize("value", ["high", "1+x", "1+-2", "inf", ""])
def test_a_dose_that_is_not_a_number_is_named(value: str) -> None:
    adata = screen(dose=["1", "0", value] + ["1"] * 5)
    with pytest.raises(DataError, match=r"dose column 'dose' holds '.*' \(cell 'c2'\): give numbers in uM"):
        EnvironmentDataset.from_anndata(adata, environment="drug", dose="dose")


def test_a_time_that_is_not_a_number_is_named() -> None:
    adata = screen(hours=["24", "24", "24 h"] + ["6"] * 5)
    with pytest.raises(DataError, match=r"time column 'hours' holds '24 h' \(cell 'c2'\): give numbers in h"):
        EnvironmentDataset.from_anndata(adata, environment="drug", time="hours")
    with pytest.raises(DataError, match=r"time column 'dose' holds '1\+10' \(cell 'c7'\)"):
        simple(time="dose")


def test_placeholders_for_unknown_numbers_are_refused() -> None:
    adata = screen(dose=[1, 0, -666, 1, 1, -666, 1, 1], hours=[-1.0] * 8)
    with pytest.raises(DataError, match=r"dose column 'dose' is negative in 'c2', 'c5': give uM, and NaN \(not -666\)"):
        EnvironmentDataset.from_anndata(adata, environment="drug", dose="dose")
    with pytest.raises(DataError, match=r"time column 'hours' is negative in 'c0'.*: give h"):
        EnvironmentDataset.from_anndata(adata, environment="drug", time="hours")


def test_an_environment_has_one_molecule() -> None:
    adata = screen(smiles=["CCO", None, "CCN", "CCC", None, "CCN", "CCO", "C"])
    with pytest.raises(DataError, match="environment 'A' has several values of 'smiles': 'CCO', 'CCC'; keep one"):
        EnvironmentDataset.from_anndata(adata, environment="drug", smiles="smiles")


def test_names_that_run_together_are_refused() -> None:
    adata = screen(drug=["A", "A B", "A", "A B", "A", "A B", "A", "A B"], line=["B C", "C"] * 4)
    with pytest.raises(DataError, match="two environments would be called 'A B C': rename perturbations or cell lines"):
        EnvironmentDataset.from_anndata(adata, environment="drug", cell_line="line")


@pytest.mark.parametrize("value", [0.0, -1.0, np.nan, np.inf, "many"])
def test_a_library_size_must_be_positive(value: object) -> None:
    adata = screen(total=[1, 1, value, 1, 1, 1, 1, 1])
    with pytest.raises(DataError, match=r"library size 'total' is not positive in 1 cells \('c2'\): filter them out"):
        EnvironmentDataset.from_anndata(adata, environment="drug", size="total")


def test_expression_must_be_there_and_be_numbers() -> None:
    adata = screen()
    adata.X = None
    with pytest.raises(DataError, match="X is empty: give an AnnData with expression in X, or name a layer"):
        EnvironmentDataset.from_anndata(adata, environment="drug")
    adata = screen()
    adata.layers["text"] = np.full((8, 3), "x")
    with pytest.raises(DataError, match="X has dtype <U1: expression must be numbers"):
        EnvironmentDataset.from_anndata(adata, environment="drug", layer="text")


def test_the_layer_is_named_where_its_values_are_wrong() -> None:
    adata = screen()
    adata.layers["raw"] = COUNTS + 0.5
    with pytest.raises(DataError, match=r"layer 'raw': 24 values: the first, 4\.5 in cell 'c0', gene 'g0'"):
        EnvironmentDataset.from_anndata(adata, environment="drug", layer="raw", counts=True)


def test_protein_counts_are_checked() -> None:
    adata = screen()
    adata.obsm["surface"] = pd.DataFrame(-COUNTS, index=adata.obs_names, columns=["CD3", "CD4", "CD8"])
    with pytest.raises(DataError, match=r"obsm 'surface': .* the first, -4\.0 in cell 'c0', gene 'CD3', is negative"):
        EnvironmentDataset.from_anndata(adata, environment="drug", proteins="surface")


@pytest.mark.filterwarnings("ignore:Observation names are not unique")
def test_duplicate_cells_are_refused() -> None:
    adata = screen()
    adata.obs_names = ["c0", *adata.obs_names[:-1]]
    with pytest.raises(DataError, match="duplicate cell names 'c0'"):
        EnvironmentDataset.from_anndata(adata, environment="drug")


def test_a_file_that_cannot_be_read_is_named_once(tmp_path: Path) -> None:
    missing, broken = tmp_path / "missing.h5ad", tmp_path / "broken.h5ad"
    broken.write_bytes(b"not HDF5")
    with pytest.raises(DataError, match=r"^\S*missing\.h5ad: no such file: give the path of an \.h5ad file"):
        EnvironmentDataset.read(missing, environment="drug")
    with pytest.raises(DataError, match=r"^\S*broken\.h5ad: not a readable \.h5ad file \(OSError"):
        read_h5ad(broken)
    screen().write_h5ad(tmp_path / "cells.h5ad")
    with pytest.raises(DataError, match=r"^\S*cells\.h5ad: no obs column 'nothing'"):
        EnvironmentDataset.read(tmp_path / "cells.h5ad", environment="nothing")


# ---------------------------------------------------------------------- real data
def test_a_crispr_screen_of_counts(data_folder: Path) -> None:
    cells = EnvironmentDataset.read(
        data_folder / "papalexi_thp1" / "papalexi_thp1_rep12_counts.h5ad",
        environment="grna_target",
        control="non-targeting",
        targets="grna_target",
        covariates=["bio_rep"],
    )
    assert (len(cells), len(cells.genes), len(cells.environments)) == (15429, 299, 26)
    assert cells.counts
    assert sp.issparse(cells.x)
    assert list(cells.environments.index[cells.reference]) == ["non-targeting"]
    assert cells.representation.sum() == 25
    assert cells.environments.loc["STAT1", "targets"] == "STAT1"
    assert cells.categories == {"bio_rep": ("rep_1", "rep_2")}
    summary = cells.schema.summary
    np.testing.assert_allclose(summary.proportion.sum(), 1, rtol=1e-5)
    values = cells.normalised(summary.depth).toarray().astype(np.float64)
    np.testing.assert_allclose(summary.mean, values.mean(0), rtol=1e-4)
    np.testing.assert_allclose(summary.scale, values.std(0), rtol=1e-4)
    mean = cells.mean_expression()
    assert mean.loc["IFNGR1", "PSMB9"] < mean.loc["non-targeting", "PSMB9"] - 0.3  # interferon's receptor is missing


def test_a_crispr_screen_of_pairs(data_folder: Path) -> None:
    cells = EnvironmentDataset.read(
        data_folder / "norman_k562" / "norman_k562_train_log1p.h5ad",
        environment="perturbation",
        control="control",
        dose="dose",
        representation="multi-hot",
    )
    assert not cells.counts
    assert len(cells.environments) == 29
    assert cells.environments.loc["KLF1+MAP2K6 1+1 uM", "dose"] == "1+1"
    both, first, second = cells.representation[
        cells.environment_index("KLF1+MAP2K6 1+1 uM", "KLF1 1 uM", "MAP2K6 1 uM")
    ]
    np.testing.assert_allclose(both, first + second)
    np.testing.assert_allclose(first.sum(), np.log10(2))


def test_stimulated_blood_cells(data_folder: Path) -> None:
    cells = EnvironmentDataset.read(
        data_folder / "kang_pbmc_ifnb" / "kang_pbmc_ifnb_log1p.h5ad",
        environment="condition",
        control="control",
        covariates=["cell_type"],
    )
    assert not cells.counts
    assert list(cells.environments.index) == ["control", "stimulated"]
    assert len(cells.categories["cell_type"]) == 7
    mean = cells.mean_expression()
    assert mean.loc["stimulated", "ISG15"] > mean.loc["control", "ISG15"] + 1  # an interferon-stimulated gene


def test_hepatocytes_with_doses_times_and_molecules(data_folder: Path) -> None:
    adata = read_h5ad(data_folder / "tggates_hepatocytes" / "tggates_hepatocytes_log2.h5ad")
    treated = adata.obs["dose_level"].astype(str) != "Control"
    adata.obs["drug"] = adata.obs["treatmentid"].astype(str).where(treated, "vehicle")
    cells = EnvironmentDataset.from_anndata(
        adata,
        environment="drug",
        control="vehicle",
        dose="concentration",
        time="duration",
        smiles="smiles",
        representation=["one-hot", "dose", "time"],
    )
    assert (len(cells), len(cells.environments)) == (1942, 700)
    assert list(cells.environments.index[cells.reference]) == ["vehicle 2 h", "vehicle 8 h", "vehicle 24 h"]
    assert cells.environments["smiles"].dropna().nunique() == 74
    row = cells.environments.loc["Rifampicin 70 uM 24 h"]
    assert (row["dose"], row["time"]) == (70.0, 24.0)
    assert row["smiles"].startswith("CO[C@H]1")
    r = cells.representation[cells.environment_index("Rifampicin 70 uM 24 h", "vehicle 8 h")]
    assert cells.features[-2:] == ("log10(1 + dose)", "time / 24 h")
    np.testing.assert_allclose(r[:, -2:], [[np.log10(71), 1], [0, 1 / 3]], rtol=1e-6)
    with pytest.raises(DataError, match="no SMILES for '1-Naphthyl isothiocyanate"):
        cells.with_representation("morgan")


def test_blood_cells_with_surface_proteins(data_folder: Path) -> None:
    cells = EnvironmentDataset.read(
        data_folder / "eccite_pbmc" / "eccite_pbmc_control_vs_ctcl_counts.h5ad",
        environment="condition",
        control="control",
        proteins="protein_expression",
    )
    assert (len(cells), len(cells.genes), len(cells.proteins)) == (301, 1215, 49)
    assert cells.counts
    batch = cells.batch(np.array([0, 300]))
    assert batch.y is not None
    assert batch.y.shape == (2, 49)
    assert cells.y is not None
    assert (cells.y == np.round(cells.y)).all()
    assert "CD3" in cells.proteins


def test_salts_and_synonyms_are_noted() -> None:
    adata = anndata.AnnData(
        X=np.arange(10.0).reshape(5, 2) + 0.5,
        obs=pd.DataFrame(
            {
                "drug": ["DMSO", "acetate", "acetic acid", "vinegar", "ethanol"],
                "smiles": [None, "CC(=O)[O-].[Na+]", "CC(=O)O", "OC(C)=O", "CCO"],
            },
            index=list("abcde"),
        ),
    )
    cells = EnvironmentDataset.from_anndata(adata, environment="drug", control="DMSO", smiles="smiles")
    noted = cells.same_compounds().set_index("name")["identical"]
    assert noted.to_dict() == {"acetate": False, "acetic acid": True, "vinegar": True}
    without = EnvironmentDataset.from_anndata(adata, environment="drug", control="DMSO")
    assert without.same_compounds().empty
