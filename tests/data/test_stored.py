import copy
import gc
import os
import pickle
import warnings
from pathlib import Path
from typing import Any

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from pyro_scm.data import gct, stored
from pyro_scm.data.stored import StoredCells, StoredMatrix
from pyro_scm.errors import DataError
from tests.data.gct_files import VALUES, write_gctx

CELLS, GENES = 60, 7
RNG = np.random.default_rng(0)
X = (RNG.poisson(1.0, (CELLS, GENES)) * (RNG.random((CELLS, GENES)) < 0.6)).astype(np.float32)
X[7] = 0  # a row without values
KINDS = ("h5ad-sparse", "h5ad-dense", "h5ad-integers", "h5ad-packed", "h5ad-layer", "zarr-2", "zarr-3", "zarr-dense",
         "gctx", "gctx-chunks")  # fmt: skip


def table(x: Any = X) -> anndata.AnnData:
    obs = pd.DataFrame({"drug": ["A", "B"] * (x.shape[0] // 2)}, index=[f"c{i}" for i in range(x.shape[0])])
    return anndata.AnnData(x, obs=obs, var=pd.DataFrame(index=[f"g{j}" for j in range(x.shape[1])]))


def write_zarr(adata: anndata.AnnData, path: Path, version: int) -> None:
    pytest.importorskip("zarr")
    before = anndata.settings.zarr_write_format
    with warnings.catch_warnings():  # what AnnData says about its own future defaults
        warnings.simplefilter("ignore")
        anndata.settings.zarr_write_format = version
        adata.write_zarr(path)
        anndata.settings.zarr_write_format = before


def matrix(kind: str, folder: Path, x: Any = X) -> StoredMatrix:
    """A matrix stored in one of the ways."""
    form, _, how = kind.partition("-")
    if form == "gctx":
        path = write_gctx(
            folder,
            x.T,
            genes=[f"g{j}" for j in range(x.shape[1])],
            samples=[f"c{i}" for i in range(x.shape[0])],
            chunks=(16, 3) if how else None,
        )
        return found(path)
    values = x if "dense" in how else sp.csr_matrix(x.astype(np.int64) if how == "integers" else x)
    path = folder / f"cells.{form}"
    if form == "zarr":
        write_zarr(table(values), path, 2 if how == "2" else 3)
        return found(path)
    adata = table(values)
    if how == "layer":
        adata.X, adata.layers["raw"] = np.zeros(x.shape), values
    adata.write_h5ad(path, compression="gzip" if how == "packed" else None)
    return StoredCells(path).layers["raw"] if how == "layer" else found(path)


def found(path: Path) -> StoredMatrix:
    x = StoredCells(path).X
    assert x is not None
    return x


def dense(values: Any) -> list[list[float]]:
    return (values.toarray() if sp.issparse(values) else np.asarray(values)).tolist()


class Counting:
    """An array on disk that notes what is read of it."""

    def __init__(self, array: Any) -> None:
        self.array, self.dtype, self.slices = array, array.dtype, []

    def __getitem__(self, key: Any) -> Any:
        rows = key[0] if isinstance(key, tuple) else key
        self.slices.append((int(rows.start), int(rows.stop)))
        return self.array[key]


def watch(x: StoredMatrix) -> list[tuple[int, int]]:
    """Slices of the first array that are read from now on."""
    counting = [Counting(array) for array in x._source.arrays]
    x._source._opened = (os.getpid(), tuple(counting))
    return counting[0].slices


# ---------------------------------------------------------------------- the same values
@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_those_that_were_written(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x = matrix(kind, tmp_path)
    assert x.shape == (CELLS, GENES)
    rows = RNG.permutation(np.append(np.arange(CELLS), [3, 3, 59]))
    for run, gap in ((1024, 16), (5, 2), (1, 0)):
        monkeypatch.setattr(stored, "_RUN", run)
        monkeypatch.setattr(stored, "_GAP", gap)
        assert dense(x.read(rows)) == X[rows].tolist()
        assert dense(x.read(np.array([0, 4, 6, 50]))) == X[[0, 4, 6, 50]].tolist()
    assert x.read(np.array([], np.int64)).shape == (0, GENES)
    sparse = "dense" not in kind and "gctx" not in kind
    assert sp.issparse(x.read(rows)) == sparse
    assert x.read(rows).dtype == x.dtype == (np.int64 if kind == "h5ad-integers" else np.float32)
    assert x.toarray().dtype == np.float32
    assert x.toarray().tolist() == np.asarray(x).tolist() == dense(x.load()) == X.tolist()
    np.testing.assert_array_equal(np.concatenate([x, x[:3]]), np.concatenate([X, X[:3]]))


@pytest.mark.parametrize("kind", ["h5ad-sparse", "h5ad-dense"])
@pytest.mark.parametrize(
    "key",
    [
        np.array([5, 2, 2, 40]),
        [-1, 0, -60],
        np.arange(CELLS) % 7 == 0,
        slice(10, 30, 3),
        (slice(None), [6, 0, 3]),
        (slice(3, 9), np.arange(GENES) > 4),
        np.array([], np.int64),
    ],
    ids=["numbers", "from the end", "mask", "slice", "columns", "both", "none"],
)
def test_a_part_is_the_same_part_and_reads_nothing_until_it_is_read(
    kind: str, key: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = matrix(kind, tmp_path)
    seen = watch(x)
    part = x[key]
    assert part.shape == X[key].shape
    assert seen == []
    assert dense(part.load()) == X[key].tolist()
    monkeypatch.setattr(stored, "_RUN", 4)
    assert [start for start, _ in part.blocks(2)] == list(range(0, len(X[key]), 2))
    assert [row for _, block in part.blocks(2) for row in dense(block)] == X[key].tolist()


def test_a_part_of_a_part_is_that_part(tmp_path: Path) -> None:
    x = matrix("h5ad-sparse", tmp_path)
    part = x[np.arange(50, 0, -1)][:, [6, 5, 1]][[3, -1]][:, [2, 0]]
    assert dense(part.load()) == X[[47, 1]][:, [1, 6]].tolist()
    with pytest.raises(IndexError):
        x[[CELLS]]
    with pytest.raises(IndexError, match="rows -1 to 3 of a matrix of 60"):
        x.read(np.array([3, -1]))


def test_blocks_are_cut_alike_on_disk_and_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored, "_BLOCK_VALUES", 100)
    x = matrix("h5ad-sparse", tmp_path)
    for (start, block), (other, expected) in zip(stored.blocks(x), stored.blocks(X), strict=True):
        assert start == other
        assert dense(block) == expected.tolist()
    assert expected.shape == (4, GENES)  # 14 rows at a time


@pytest.mark.parametrize("kind", ["h5ad-dense", "gctx"])
def test_nearby_rows_are_one_slice_and_distant_ones_are_not_read(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = matrix(kind, tmp_path)
    seen = watch(x)
    monkeypatch.setattr(stored, "_GAP", 3)
    x.read(np.array([40, 0, 1, 4, 8, 39]))
    assert seen == [(0, 5), (8, 9), (39, 41)]
    seen.clear()
    monkeypatch.setattr(stored, "_RUN", 25)
    x.read(np.arange(CELLS))
    assert seen == [(0, 25), (25, 50), (50, 60)]


def test_a_gctx_has_the_values_and_annotation_that_it_has_in_memory(tmp_path: Path) -> None:
    values = VALUES.copy()
    values[1, 2] = -666
    path = write_gctx(
        tmp_path,
        values,
        row={"pr_gene_symbol": ["PSME1", "ATF1", "RHEB"]},
        column={"pert_iname": ["DMSO", "DMSO", "drug A", "89671"], "pert_dose": [-666.0, -666.0, 10.0, 0.5]},
    )
    cells, expected = StoredCells(path), gct.read_gctx(path)
    pd.testing.assert_frame_equal(cells.obs, expected.obs)
    pd.testing.assert_frame_equal(cells.var, expected.var)
    np.testing.assert_array_equal(found(path).toarray(), expected.X)
    assert np.isnan(found(path)[[2]][:, [1]].toarray()).all()
    assert cells.uns == cells.layers == cells.obsm == {}


# ---------------------------------------------------------------------- files and processes
def test_copies_share_the_file_and_a_pickle_holds_no_handle(tmp_path: Path) -> None:
    x = matrix("h5ad-sparse", tmp_path)
    x.read(np.array([1]))
    assert copy.deepcopy({"x": x})["x"] is x
    assert x._source._opened is not None
    other = pickle.loads(pickle.dumps(x[[5, 4]]))
    assert other._source._opened is None
    assert dense(other.load()) == X[[5, 4]].tolist()


def test_another_process_opens_the_file_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x = matrix("h5ad-sparse", tmp_path)
    arrays = x._source.arrays
    assert x._source.arrays is arrays
    monkeypatch.setattr(os, "getpid", lambda: -1)
    assert x._source.arrays is not arrays
    assert dense(x.read(np.array([2]))) == X[[2]].tolist()


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="open files are listed in /proc only on Linux")
def test_the_file_is_closed_when_nothing_needs_it(tmp_path: Path) -> None:
    def is_open() -> bool:
        names = [os.path.realpath(f"/proc/self/fd/{n}") for n in os.listdir("/proc/self/fd")]
        return str((tmp_path / "cells.h5ad").resolve()) in names

    x: Any = matrix("h5ad-sparse", tmp_path)
    part: Any = x[[1, 2]]
    part.load()
    del x
    gc.collect()
    assert is_open()
    del part
    gc.collect()
    assert not is_open()


# ---------------------------------------------------------------------- what cannot be read
def test_a_matrix_stored_gene_by_gene_is_refused_with_a_way_out(tmp_path: Path) -> None:
    table(sp.csc_matrix(X)).write_h5ad(tmp_path / "cells.h5ad")
    with pytest.raises(DataError, match=r"cells\.h5ad: X is stored gene by gene \(CSC\).* X\.tocsr\(\)"):
        StoredCells(tmp_path / "cells.h5ad").X


def test_a_gene_by_gene_layer_does_not_stand_in_the_way_of_x(tmp_path: Path) -> None:
    adata = table(sp.csr_matrix(X))
    adata.layers["other"] = sp.csc_matrix(X)
    adata.write_h5ad(tmp_path / "cells.h5ad")
    cells = StoredCells(tmp_path / "cells.h5ad")
    assert dense(cells.X.load()) == X.tolist()  # type: ignore[union-attr]
    with pytest.raises(DataError, match=r"layers/other is stored gene by gene"):
        cells.layers["other"]
    assert set(cells.layers) == {"other"}
    assert "missing" not in cells.layers


def test_a_truncated_file_is_named(tmp_path: Path) -> None:
    matrix("h5ad-sparse", tmp_path)
    path = tmp_path / "cells.h5ad"
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(DataError, match=r"^\S*cells\.h5ad: the file cannot be read \(OSError.*truncated"):
        StoredCells(path)


@pytest.mark.parametrize("change", ["longer", "newer", "gone"])
def test_a_file_that_changes_is_not_read_on(change: str, tmp_path: Path) -> None:
    x = matrix("h5ad-dense", tmp_path)
    x.read(np.array([0]))
    path = tmp_path / "cells.h5ad"
    if change == "longer":
        with path.open("ab") as file:
            file.write(b"0")
    elif change == "newer":
        os.utime(path, ns=(0, 1))
    else:
        path.unlink()
    message = "cannot be read .FileNotFoundError" if change == "gone" else "has changed since it was opened: open it"
    with pytest.raises(DataError, match=rf"^\S*cells\.h5ad.* {message}"):
        x.read(np.array([0]))


def test_a_zarr_folder_that_is_written_anew_or_damaged_is_named(tmp_path: Path) -> None:
    x = matrix("zarr-3", tmp_path)
    chunk = next(p for p in (tmp_path / "cells.zarr" / "X" / "data").rglob("*") if p.is_file() and p.name == "0")
    chunk.write_bytes(chunk.read_bytes()[:10])
    with pytest.raises(DataError, match=r"cells\.zarr: X cannot be read"):
        x.load()
    os.utime(tmp_path / "cells.zarr" / "X" / "data" / "zarr.json", ns=(0, 1))
    with pytest.raises(DataError, match=r"cells\.zarr has changed since it was opened"):
        x.load()


def test_row_starts_and_columns_that_cannot_be_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "cells.h5ad"
    matrix("h5ad-sparse", tmp_path)
    with h5py.File(path, "r+") as file:
        file["X/indices"][100] = GENES
    with pytest.raises(DataError, match=r"X is damaged: a value of cells 0 to 59 is in column 7 of 7"):
        found(path).load()
    with h5py.File(path, "r+") as file:
        file["X/indices"][100] = 0
        file["X/indptr"][3] = 10**6
    with pytest.raises(DataError, match=r"X is damaged: 61 row starts up to 1000000 for 60 cells with \d+ values"):
        found(path)
    with h5py.File(path, "r+") as file:
        del file["X/indices"]
    with pytest.raises(DataError, match=r"X cannot be read \(KeyError"):
        found(path)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.full((CELLS, GENES), b"x"), r"X has dtype \|S1: expression must be numbers"),
        (np.zeros(CELLS), r"X has shape \(60,\): expected cells x genes"),
        (np.zeros((CELLS, 3)), "X has 60 rows and 3 columns for 60 cells and 7 genes"),
    ],
)
def test_what_is_no_matrix_of_these_cells_is_refused(value: Any, message: str, tmp_path: Path) -> None:
    matrix("h5ad-dense", tmp_path)
    with h5py.File(tmp_path / "cells.h5ad", "r+") as file:
        del file["X"]
        file["X"] = value
    with pytest.raises(DataError, match=rf"^\S*cells\.h5ad: {message}"):
        StoredCells(tmp_path / "cells.h5ad").X


def test_a_group_that_is_no_matrix_is_refused(tmp_path: Path) -> None:
    table().write_h5ad(tmp_path / "cells.h5ad")
    with h5py.File(tmp_path / "cells.h5ad", "r+") as file:
        del file["X"]
        file["X/data"] = X
    with pytest.raises(DataError, match="X holds 'nothing known': expected a dense or a CSR matrix"):
        StoredCells(tmp_path / "cells.h5ad").X


def test_files_of_other_kinds_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nothing\.h5ad: no such file: give the path of an \.h5ad file, a zarr"):
        StoredCells(tmp_path / "nothing.h5ad")
    (tmp_path / "cells.csv").write_text("a,b")
    with pytest.raises(DataError, match=r"cells\.csv: the file cannot be read \(OSError"):
        StoredCells(tmp_path / "cells.csv")
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["a"] = 1
    with pytest.raises(DataError, match=r"other\.h5 has neither obs and var nor 0/DATA/0/matrix"):
        StoredCells(tmp_path / "other.h5")
    (tmp_path / "empty.zarr").mkdir()
    with pytest.raises(DataError, match=r"empty\.zarr: the file cannot be read"):
        StoredCells(tmp_path / "empty.zarr")


def test_a_file_without_expression_has_none(tmp_path: Path) -> None:
    anndata.AnnData(obs=table().obs, var=table().var).write_h5ad(tmp_path / "cells.h5ad")
    cells = StoredCells(tmp_path / "cells.h5ad")
    assert cells.X is None
    assert dict(cells.layers) == {}


def test_matrices_of_the_oldest_files_are_read(tmp_path: Path) -> None:
    x = matrix("h5ad-sparse", tmp_path)
    with h5py.File(tmp_path / "cells.h5ad", "r+") as file:
        attributes = file["X"].attrs
        attributes["h5sparse_format"], attributes["h5sparse_shape"] = "csr", attributes["shape"]
        for name in ("encoding-type", "encoding-version", "shape"):
            del attributes[name]
    del x
    assert dense(found(tmp_path / "cells.h5ad").load()) == X.tolist()


def test_zarr_is_asked_for_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    matrix("zarr-3", tmp_path)
    monkeypatch.setitem(__import__("sys").modules, "zarr", None)
    with pytest.raises(DataError, match=r"cells\.zarr: zarr cannot be imported .*: install pyro-scm\[zarr\]"):
        StoredCells(tmp_path / "cells.zarr")
