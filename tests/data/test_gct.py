"""GCT and GCTX files: what was written comes back, in whole or in part; malformed ones are named."""

import gzip
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
import pytest
from anndata import read_h5ad
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pyro_scm.data import gct, l1000
from pyro_scm.errors import DataError
from tests.data.gct_files import A375, GCT, GENES, SAMPLES, VALUES, write_gct, write_gctx


@pytest.fixture(params=["gct", "gct.gz", "gctx", "gctx chunked"])
def plate(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """The same plate in every format."""
    if request.param == "gct":
        return write_gct(tmp_path)
    if request.param == "gct.gz":
        path = tmp_path / "plate_level3.gct.gz"
        path.write_bytes(gzip.compress(GCT.encode()))
        return path
    row = {"pr_gene_symbol": ["PSME1", "ATF1", "RHEB"], "pr_is_lmark": np.array([1, 1, 0], np.float32)}
    column = {
        "pert_iname": ["DMSO", "DMSO", "drug A", "89671"],
        "pert_type": ["ctl_vehicle", "ctl_vehicle", "trt_cp", "trt_cp"],
        "pert_dose": np.array([-666, -666, 10, 500], np.float32),
        "pert_dose_unit": ["-666", "-666", "um", "nM"],
        "qc_slope": np.array([58, 57, -666, 60.5], np.float32),
        "canonical_smiles": ["-666", "restricted", "", "CCO"],
    }
    chunks = (2, 2) if request.param == "gctx chunked" else None
    return write_gctx(tmp_path, row=row, column=column, chunks=chunks, name="plate_level3.gctx")


def test_every_format_gives_samples_by_genes_with_typed_metadata(plate: Path) -> None:
    adata = gct.read(plate)
    assert adata.X.dtype == np.float32
    np.testing.assert_array_equal(adata.X, VALUES.T)
    assert list(adata.obs_names) == SAMPLES
    assert list(adata.var_names) == GENES
    assert list(adata.var["pr_gene_symbol"]) == ["PSME1", "ATF1", "RHEB"]
    np.testing.assert_array_equal(l1000.landmarks(adata.var), [True, True, False])
    np.testing.assert_array_equal(adata.obs["pert_dose"], [np.nan, np.nan, 10, 500])
    np.testing.assert_array_equal(adata.obs["qc_slope"], [58, 57, np.nan, 60.5])
    assert list(adata.obs["pert_iname"]) == ["DMSO", "DMSO", "drug A", "89671"]  # a name, though it looks like a number
    assert [s if isinstance(s, str) else None for s in adata.obs["canonical_smiles"]] == [None, None, None, "CCO"]
    assert adata.uns["l1000_level"] == 3


def test_what_was_read_can_be_stored_and_read_back(plate: Path, tmp_path: Path) -> None:
    adata = l1000.standardise(gct.read(plate))
    adata.write_h5ad(tmp_path / "plate.h5ad")
    back = read_h5ad(tmp_path / "plate.h5ad")
    np.testing.assert_array_equal(back.X, VALUES.T)
    np.testing.assert_array_equal(back.obs["dose"], [0, 0, 10, 0.5])
    assert list(back.obs["smiles"].isna()) == [True, True, True, False]


@pytest.mark.parametrize(
    ("rows", "columns", "genes", "samples"),
    [
        (["6009", "5720"], None, [2, 0], [0, 1, 2, 3]),
        (None, ["P1:A04", "P1:A01"], [0, 1, 2], [3, 0]),
        ([2, 0, 1], [1], [2, 0, 1], [1]),
        (np.array([False, True, True]), slice(1, None, 2), [1, 2], [1, 3]),
        (l1000.landmarks, lambda obs: obs["pert_type"] == "trt_cp", [0, 1], [2, 3]),
        (pd.Index(["466"]), pd.Series([True, False, False, True]), [1], [0, 3]),
        (lambda var: list(var.index[var["pr_gene_symbol"] == "ATF1"]), None, [1], [0, 1, 2, 3]),
    ],
)
def test_a_selection_by_id_position_mask_slice_or_function_keeps_its_order(
    plate: Path, rows: Any, columns: Any, genes: list[int], samples: list[int]
) -> None:
    adata = gct.read(plate, rows=rows, columns=columns)
    np.testing.assert_array_equal(adata.X, VALUES.T[np.ix_(samples, genes)])
    assert list(adata.obs_names) == [SAMPLES[i] for i in samples]
    assert list(adata.var_names) == [GENES[i] for i in genes]
    assert list(adata.var["pr_gene_symbol"]) == [["PSME1", "ATF1", "RHEB"][i] for i in genes]


@pytest.mark.parametrize(
    ("selection", "message"),
    [
        ({"rows": ["466", "7", "8"]}, r"rows: no id '7', '8'; the ids are '5720', '466', '6009'"),
        ({"columns": ["P9:A01"]}, r"columns: no id 'P9:A01'"),
        ({"rows": [0, 3]}, r"rows: position 3 is outside 0 to 2 \(integers are positions"),
        ({"rows": [-1]}, r"position -1 is outside"),
        ({"columns": [True, False]}, r"columns: a mask of 2 for 4"),
        ({"rows": ["466", "466"]}, r"rows: selected twice: '466'"),
        ({"rows": []}, r"rows: the selection is empty: it must keep at least one of the 3"),
        ({"rows": np.zeros(3, bool)}, r"rows: the selection is empty"),
        ({"rows": "466"}, r"rows: a selection is a list of ids, of positions or of booleans, not '466'"),
    ],
)
def test_a_selection_that_cannot_be_met_is_named(plate: Path, selection: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        gct.read(plate, **selection)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_both_formats_return_what_was_written_for_any_shape_and_selection(data: st.DataObject, tmp_path: Path) -> None:
    n_genes, n_samples = data.draw(st.integers(1, 7)), data.draw(st.integers(1, 9))
    numbers = st.floats(-100, 100, width=32)
    values = np.array(
        data.draw(st.lists(numbers, min_size=n_genes * n_samples, max_size=n_genes * n_samples)), np.float32
    ).reshape(n_genes, n_samples)
    genes, samples = [f"g{i}" for i in range(n_genes)], [f"s{i}" for i in range(n_samples)]
    chunks = data.draw(st.none() | st.tuples(st.integers(1, n_samples), st.integers(1, n_genes)))
    rows = data.draw(st.lists(st.integers(0, n_genes - 1), min_size=1, unique=True))
    columns = data.draw(st.lists(st.integers(0, n_samples - 1), min_size=1, unique=True))

    lines = ["#1.3", f"{n_genes}\t{n_samples}\t0\t0", "\t".join(["id", *samples])]
    lines += ["\t".join([g, *(repr(float(v)) for v in line)]) for g, line in zip(genes, values, strict=True)]
    paths = (
        write_gct(tmp_path, "\n".join(lines), "any.gct"),
        write_gctx(tmp_path, values, genes, samples, chunks=chunks, name="any.gctx"),
    )
    for path in paths:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(gct, "BLOCK", 2)  # several blocks even of so small a matrix
            adata = gct.read(path, rows=rows, columns=columns)
        np.testing.assert_array_equal(adata.X, values.T[np.ix_(columns, rows)])


def test_gct_1_2_has_one_description_column(tmp_path: Path) -> None:
    path = write_gct(tmp_path, "#1.2\n2\t2\nName\tDescription\tS1\tS2\ng1\tfirst\t1\t2\ng2\tsecond\t3\t4\n", "old.gct")
    adata = gct.read_gct(path)
    np.testing.assert_array_equal(adata.X, [[1, 3], [2, 4]])
    assert list(adata.var["Description"]) == ["first", "second"]
    assert adata.obs.shape == (2, 0)
    assert "l1000_level" not in adata.uns


def test_gct_with_windows_line_ends_and_trailing_blank_lines(tmp_path: Path) -> None:
    adata = gct.read_gct(write_gct(tmp_path, GCT.replace("\n", "\r\n") + "\r\n\r\n"))
    np.testing.assert_array_equal(adata.X, VALUES.T)
    assert list(adata.obs["canonical_smiles"])[3] == "CCO"


def test_missing_cells_of_the_matrix_are_nan(tmp_path: Path) -> None:
    text = GCT.replace("\t1.5\t-2\t3.25\t0\n", "\t-666\t\tNaN\tna\n")
    adata = gct.read_gct(write_gct(tmp_path, text))
    assert np.isnan(adata.X[:, 0]).all()
    np.testing.assert_array_equal(adata.X[:, 1:], VALUES.T[:, 1:])


def test_latin_1_micro_signs_are_read(tmp_path: Path) -> None:
    path = tmp_path / "plate.gct"
    path.write_bytes(GCT.replace("\t10\t500", "\t10 µM\t5 µM").encode("latin-1"))
    assert list(gct.read_gct(path).obs["pert_dose"])[2:] == ["10 µM", "5 µM"]


def test_only_the_selected_part_of_a_gct_is_parsed(tmp_path: Path) -> None:
    path = write_gct(tmp_path, GCT.replace("\t10.0\t", "\tbroken\t"))
    np.testing.assert_array_equal(gct.read_gct(path, rows=["5720", "6009"]).X, VALUES.T[:, [0, 2]])
    np.testing.assert_array_equal(gct.read_gct(path, columns=[0, 1, 3]).X, VALUES.T[[0, 1, 3]])
    with pytest.raises(DataError, match=r"line 11, sample 'P1:A03': 'broken' is not a number"):
        gct.read_gct(path, rows=["466"])


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("#1.3", "#2.0", r"plate_level3.gct, line 1: '#2.0' is no GCT version: expected '#1.2' or '#1.3'"),
        ("3\t4\t2\t6", "3\t4", r"line 2: '3.*4': expected 4 whole numbers \(rows, columns, row metadata"),
        ("3\t4\t2\t6", "3\tx\t2\t6", r"line 2: .* expected 4 whole numbers"),
        ("3\t4\t2\t6", "0\t4\t2\t6", r"line 2: 0 rows and 4 columns: there is nothing to read"),
        ("3\t4\t2\t6", "3\t5\t2\t6", r"line 3: 7 fields where line 2 states 8"),
        ("3\t4\t2\t6", "4\t4\t2\t6", r"ends at line 12: 3 of the 4 rows that line 2 states"),
        ("3\t4\t2\t6", "2\t4\t2\t6", r"line 12: more rows than the 2 that line 2 states"),
        ("3\t4\t2\t6", "3\t4\t2\t40", r"ends before line 13: it is truncated, or line 2 states the wrong dimensions"),
        ("P1:A02\tP1:A03", "P1:A02\tP1:A02", r"line 3: duplicate sample ids: 'P1:A02'; each must appear once"),
        ("pr_is_lmark", "pr_gene_symbol", r"line 3: duplicate names of row metadata: 'pr_gene_symbol'"),
        ("\n466\t", "\n5720\t", r"duplicate gene ids: '5720'"),
        ("\tdrug A\t89671", "\tdrug A", r"line 4: 6 fields where line 2 states 7"),
        ("pert_type", "pert_iname", r"line 5: the column metadata 'pert_iname' appears twice"),
        (
            "\t9.5\t10.0\t11.75\n",
            "\t9.5\t10.0\n",
            r"line 11: 6 fields where line 2 states 7: a truncated line",
        ),
        ("\t0.25\t1.25e-1\t4\n", "\t0.2", r"line 12: 5 fields where line 2 states 7"),
        ("\t-2\t", "\t-2,5\t", r"line 10, sample 'P1:A02': '-2,5' is not a number"),
    ],
)
def test_a_malformed_gct_is_named_with_its_line(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert GCT.count(old) == 1
    with pytest.raises(DataError, match=message):
        gct.read_gct(write_gct(tmp_path, GCT.replace(old, new)))


def test_a_gzipped_gct_that_is_cut_off_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "plate.gct.gz"
    path.write_bytes(gzip.compress(GCT.encode())[:-30])
    with pytest.raises(DataError, match=r"plate.gct.gz cannot be read \(.*\): truncated or damaged"):
        gct.read(path)


def test_gctx_ids_are_text_whatever_type_they_are_stored_in(tmp_path: Path) -> None:
    row = {"pr_gene_id": np.array([5720, 466, 6009], np.float32), "pr_is_lm": ["1", "0", "1"]}
    column = {"cell_id": ["697", "697", "A375", "-666"], "pert_idose": np.array([b"10 \xb5M"] * 4)}
    path = write_gctx(tmp_path, genes=np.array([5720, 466, 6009]), row=row, column=column)
    adata = gct.read_gctx(path, rows=["466"])
    assert list(adata.var_names) == ["466"]
    assert list(adata.var["pr_gene_id"]) == ["466"]
    assert list(adata.obs["cell_id"]) == ["697", "697", "A375", None]
    assert list(adata.obs["pert_idose"]) == ["10 µM"] * 4
    np.testing.assert_array_equal(l1000.landmarks(gct.read(path).var), [True, False, True])


def test_gctx_with_variable_length_strings_and_a_missing_value(tmp_path: Path) -> None:
    values = VALUES.copy()
    values[1, 2] = -666
    path = write_gctx(tmp_path, values)
    with h5py.File(path, "r+") as file:
        file["0/META/COL/pert_desc"] = np.array(["ä", "b", "c", "-666"], dtype=object)
    adata = gct.read_gctx(path)
    assert list(adata.obs["pert_desc"]) == ["ä", "b", "c", None]
    assert np.isnan(adata.X[2, 1])
    assert np.isnan(adata.X).sum() == 1


@pytest.mark.parametrize("chunks", [None, (100, 64)])
def test_gctx_is_read_in_blocks_around_the_selection(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunks: tuple[int, int] | None
) -> None:
    values = np.random.default_rng(0).normal(size=(300, 2000)).astype(np.float32)
    path = write_gctx(tmp_path, values, [f"g{i}" for i in range(300)], [f"s{i}" for i in range(2000)], chunks=chunks)
    reads: list[tuple[int, ...]] = []
    original = h5py.Dataset.__getitem__

    def counted(self: h5py.Dataset, key: Any, **options: Any) -> Any:
        result = original(self, key, **options)
        if self.ndim == 2:
            reads.append(result.shape)
        return result

    monkeypatch.setattr(h5py.Dataset, "__getitem__", counted)
    few = gct.read_gctx(path, rows=["g7", "g3"], columns=["s1500", "s10", "s12"])
    np.testing.assert_array_equal(few.X, values[np.ix_([7, 3], [1500, 10, 12])].T)
    assert sorted(reads) == [(1, 5), (3, 5)]  # samples 10 to 12 and 1500, genes 3 to 7: nothing else

    reads.clear()
    everything = gct.read_gctx(path)
    np.testing.assert_array_equal(everything.X, values.T)
    assert max(rows for rows, _ in reads) <= gct.BLOCK
    assert sum(rows * columns for rows, columns in reads) == values.size  # nothing is read twice


def test_reading_a_few_genes_does_not_load_the_matrix(tmp_path: Path) -> None:
    path = write_gctx(tmp_path, np.ones((1000, 6000), np.float32), np.arange(1000), [f"s{i}" for i in range(6000)])
    tracemalloc.start()
    try:
        adata = gct.read_gctx(path, rows=[0, 500, 999])
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert adata.shape == (6000, 3)
    assert peak < 10e6  # the matrix is 24 MB, a block of it 2 MB


def _without(key: str) -> Callable[[h5py.File], None]:
    return lambda file: file.__delitem__(key)


def _with(key: str, value: Any) -> Callable[[h5py.File], None]:
    def change(file: h5py.File) -> None:
        if key in file:
            del file[key]
        file[key] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_without("0/DATA/0/matrix"), r"plate.gctx has no dataset 0/DATA/0/matrix: it is HDF5, but no GCTX"),
        (_without("0/META/ROW/id"), r"has no dataset 0/META/ROW/id: a GCTX names its samples in COL/id"),
        (_without("0/META/COL"), r"has no dataset 0/META/COL/id"),
        (_with("0/DATA/0/matrix", np.ones(4)), r"0/DATA/0/matrix has shape \(4,\) of float64: expected numbers"),
        (_with("0/DATA/0/matrix", np.full((4, 3), b"x")), r"0/DATA/0/matrix has shape \(4, 3\) of \|S1"),
        (_with("0/DATA/0/matrix", VALUES), r"COL/id has shape \(4,\), but 0/DATA/0/matrix has 3 samples: .* samples x"),
        (_with("0/META/ROW/pr_is_lm", np.ones(5)), r"0/META/ROW/pr_is_lm has shape \(5,\), but .* has 3 genes"),
        (_with("0/META/COL/id", [b"a", b"b", b"a", b"c"]), r"duplicate ids in 0/META/COL/id: 'a'"),
    ],
)
def test_a_malformed_gctx_is_named_with_its_dataset(
    tmp_path: Path, change: Callable[[h5py.File], None], message: str
) -> None:
    path = write_gctx(tmp_path)
    with h5py.File(path, "r+") as file:
        change(file)
    with pytest.raises(DataError, match=message):
        gct.read(path)


def test_files_that_are_neither_are_refused(tmp_path: Path) -> None:
    path = write_gctx(tmp_path)
    cut = tmp_path / "cut.gctx"
    cut.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(DataError, match=r"cut.gctx cannot be read \(.*truncated file"):
        gct.read(cut)
    text = write_gct(tmp_path, name="text.gctx")
    with pytest.raises(DataError, match=r"text.gctx is not an HDF5 file: a GCTX is HDF5"):
        gct.read(text)
    packed = tmp_path / "plate.gctx.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    with pytest.raises(DataError, match=r"plate.gctx.gz is a gzipped GCTX, .*: unpack it first"):
        gct.read(packed)
    other = tmp_path / "table.csv"
    other.write_text("a,b\n1,2\n")
    with pytest.raises(DataError, match=r"table.csv starts with b'a,b.*: expected GCT text"):
        gct.read(other)
    for reader in (gct.read, gct.read_gct, gct.read_gctx):
        with pytest.raises(DataError, match=r"there is no file .*nowhere.gctx"):
            reader(tmp_path / "nowhere.gctx")
    with pytest.raises(DataError, match=r"cannot be read"):
        gct.read(tmp_path)


def test_content_decides_over_the_suffix(tmp_path: Path) -> None:
    np.testing.assert_array_equal(gct.read(write_gct(tmp_path, name="plate.txt")).X, VALUES.T)
    np.testing.assert_array_equal(gct.read(write_gctx(tmp_path, name="plate.h5")).X, VALUES.T)


@pytest.mark.parametrize(
    ("name", "level"),
    [
        ("GSE70138_Broad_LINCS_Level5_COMPZ_n118050x12328_2017-03-06.gctx", 5),
        ("GSE92742_Broad_LINCS_Level3_INF_mlr12k_n1319138x12328.gctx", 3),
        ("LJP005_A375_24H_X1_level3.gctx", 3),
        ("modzs_n272x978.gctx", 5),
        ("zspc_n757x978.gctx", 4),
        ("plate_QNORM_n300x978.gctx", 3),
        ("anything.gctx", None),
    ],
)
def test_the_level_is_what_the_file_name_says(tmp_path: Path, name: str, level: int | None) -> None:
    assert gct.read(write_gctx(tmp_path, name=name)).uns.get("l1000_level") == level


@pytest.fixture
def a375(data_folder: Path) -> Path:
    return data_folder / "l1000_a375"


def test_real_plates_read_in_part_equal_the_whole(a375: Path) -> None:
    for _, file in A375:
        whole = gct.read(a375 / file)
        genes, wells = list(whole.var_names[[900, 3, 77]]), np.arange(whole.n_obs) % 50 == 7
        part = gct.read(a375 / file, rows=genes, columns=wells)
        np.testing.assert_array_equal(part.X, whole[wells, genes].X)
        pd.testing.assert_frame_equal(part.obs, whole.obs[wells])
