"""GCT and GCTX readers, metadata tables, doses and times, vehicle centring, stacked plates."""

import gzip
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from anndata import AnnData, read_h5ad
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pyro_scm.data import l1000
from pyro_scm.errors import DataError

GENES = ["5720", "466", "6009"]
SAMPLES = ["P1:A01", "P1:A02", "P1:A03", "P1:A04"]
# genes x samples, as a GCT holds them; all exact in float32
VALUES = np.array([[1.5, -2.0, 3.25, 0.0], [8.0, 9.5, 10.0, 11.75], [0.5, 0.25, 0.125, 4.0]], np.float32)
GCT = """#1.3
3\t4\t2\t6
id\tpr_gene_symbol\tpr_is_lmark\tP1:A01\tP1:A02\tP1:A03\tP1:A04
pert_iname\tna\tna\tDMSO\tDMSO\tdrug A\t89671
pert_type\tna\tna\tctl_vehicle\tctl_vehicle\ttrt_cp\ttrt_cp
pert_dose\tna\tna\t-666\t-666\t10\t500
pert_dose_unit\tna\tna\t-666\t-666\tum\tnM
qc_slope\tna\tna\t58\t57\t-666\t60.5
canonical_smiles\tna\tna\t-666\trestricted\t\tCCO
5720\tPSME1\t1\t1.5\t-2\t3.25\t0
466\tATF1\t1\t8\t9.5\t10.0\t11.75
6009\tRHEB\t0\t.5\t0.25\t1.25e-1\t4
"""


def gct(folder: Path, text: str = GCT, name: str = "plate_level3.gct") -> Path:
    path = folder / name
    path.write_bytes(text.encode())
    return path


def gctx(
    folder: Path,
    values: Any = VALUES,
    genes: Any = GENES,
    samples: Any = SAMPLES,
    row: dict[str, Any] | None = None,
    column: dict[str, Any] | None = None,
    chunks: tuple[int, int] | None = None,
    name: str = "plate.gctx",
) -> Path:
    """A GCTX file: the matrix is stored samples x genes, strings as bytes."""
    path = folder / name
    with h5py.File(path, "w") as file:
        file.attrs["version"] = "GCTX1.0"
        file.create_dataset("0/DATA/0/matrix", data=np.asarray(values).T, chunks=chunks)
        for group, ids, extra in (("ROW", genes, row), ("COL", samples, column)):
            for key, items in {"id": ids, **(extra or {})}.items():
                array = np.asarray(items)
                file[f"0/META/{group}/{key}"] = np.char.encode(array, "utf-8") if array.dtype.kind == "U" else array
    return path


@pytest.fixture(params=["gct", "gct.gz", "gctx", "gctx chunked"])
def plate(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """The same plate in every format."""
    if request.param == "gct":
        return gct(tmp_path)
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
    return gctx(tmp_path, row=row, column=column, chunks=chunks, name="plate_level3.gctx")


# -------------------------------------------------------------------------------------------------------- both formats


def test_every_format_gives_samples_by_genes_with_typed_metadata(plate: Path) -> None:
    adata = l1000.read(plate)
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
    adata = l1000.standardise(l1000.read(plate))
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
    adata = l1000.read(plate, rows=rows, columns=columns)
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
        l1000.read(plate, **selection)


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
        gct(tmp_path, "\n".join(lines), "any.gct"),
        gctx(tmp_path, values, genes, samples, chunks=chunks, name="any.gctx"),
    )
    for path in paths:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(l1000, "BLOCK", 2)  # several blocks even of so small a matrix
            adata = l1000.read(path, rows=rows, columns=columns)
        np.testing.assert_array_equal(adata.X, values.T[np.ix_(columns, rows)])


# ------------------------------------------------------------------------------------------------------------------ GCT


def test_gct_1_2_has_one_description_column(tmp_path: Path) -> None:
    path = gct(tmp_path, "#1.2\n2\t2\nName\tDescription\tS1\tS2\ng1\tfirst\t1\t2\ng2\tsecond\t3\t4\n", "old.gct")
    adata = l1000.read_gct(path)
    np.testing.assert_array_equal(adata.X, [[1, 3], [2, 4]])
    assert list(adata.var["Description"]) == ["first", "second"]
    assert adata.obs.shape == (2, 0)
    assert "l1000_level" not in adata.uns


def test_gct_with_windows_line_ends_and_trailing_blank_lines(tmp_path: Path) -> None:
    adata = l1000.read_gct(gct(tmp_path, GCT.replace("\n", "\r\n") + "\r\n\r\n"))
    np.testing.assert_array_equal(adata.X, VALUES.T)
    assert list(adata.obs["canonical_smiles"])[3] == "CCO"


def test_missing_cells_of_the_matrix_are_nan(tmp_path: Path) -> None:
    text = GCT.replace("\t1.5\t-2\t3.25\t0\n", "\t-666\t\tNaN\tna\n")
    adata = l1000.read_gct(gct(tmp_path, text))
    assert np.isnan(adata.X[:, 0]).all()
    np.testing.assert_array_equal(adata.X[:, 1:], VALUES.T[:, 1:])


def test_latin_1_micro_signs_are_read(tmp_path: Path) -> None:
    path = tmp_path / "plate.gct"
    path.write_bytes(GCT.replace("\t10\t500", "\t10 µM\t5 µM").encode("latin-1"))
    assert list(l1000.read_gct(path).obs["pert_dose"])[2:] == ["10 µM", "5 µM"]


def test_only_the_selected_part_of_a_gct_is_parsed(tmp_path: Path) -> None:
    path = gct(tmp_path, GCT.replace("\t10.0\t", "\tbroken\t"))
    np.testing.assert_array_equal(l1000.read_gct(path, rows=["5720", "6009"]).X, VALUES.T[:, [0, 2]])
    np.testing.assert_array_equal(l1000.read_gct(path, columns=[0, 1, 3]).X, VALUES.T[[0, 1, 3]])
    with pytest.raises(DataError, match=r"line 11, sample 'P1:A03': 'broken' is not a number"):
        l1000.read_gct(path, rows=["466"])


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
        l1000.read_gct(gct(tmp_path, GCT.replace(old, new)))


def test_a_gzipped_gct_that_is_cut_off_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "plate.gct.gz"
    path.write_bytes(gzip.compress(GCT.encode())[:-30])
    with pytest.raises(DataError, match=r"plate.gct.gz cannot be read \(.*\): truncated or damaged"):
        l1000.read(path)


# ----------------------------------------------------------------------------------------------------------------- GCTX


def test_gctx_ids_are_text_whatever_type_they_are_stored_in(tmp_path: Path) -> None:
    row = {"pr_gene_id": np.array([5720, 466, 6009], np.float32), "pr_is_lm": ["1", "0", "1"]}
    column = {"cell_id": ["697", "697", "A375", "-666"], "pert_idose": np.array([b"10 \xb5M"] * 4)}
    path = gctx(tmp_path, genes=np.array([5720, 466, 6009]), row=row, column=column)
    adata = l1000.read_gctx(path, rows=["466"])
    assert list(adata.var_names) == ["466"]
    assert list(adata.var["pr_gene_id"]) == ["466"]
    assert list(adata.obs["cell_id"]) == ["697", "697", "A375", None]
    assert list(adata.obs["pert_idose"]) == ["10 µM"] * 4
    np.testing.assert_array_equal(l1000.landmarks(l1000.read(path).var), [True, False, True])


def test_gctx_with_variable_length_strings_and_a_missing_value(tmp_path: Path) -> None:
    values = VALUES.copy()
    values[1, 2] = -666
    path = gctx(tmp_path, values)
    with h5py.File(path, "r+") as file:
        file["0/META/COL/pert_desc"] = np.array(["ä", "b", "c", "-666"], dtype=object)
    adata = l1000.read_gctx(path)
    assert list(adata.obs["pert_desc"]) == ["ä", "b", "c", None]
    assert np.isnan(adata.X[2, 1])
    assert np.isnan(adata.X).sum() == 1


@pytest.mark.parametrize("chunks", [None, (100, 64)])
def test_gctx_is_read_in_blocks_around_the_selection(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunks: tuple[int, int] | None
) -> None:
    values = np.random.default_rng(0).normal(size=(300, 2000)).astype(np.float32)
    path = gctx(tmp_path, values, [f"g{i}" for i in range(300)], [f"s{i}" for i in range(2000)], chunks=chunks)
    reads: list[tuple[int, ...]] = []
    original = h5py.Dataset.__getitem__

    def counted(self: h5py.Dataset, key: Any, **options: Any) -> Any:
        result = original(self, key, **options)
        if self.ndim == 2:
            reads.append(result.shape)
        return result

    monkeypatch.setattr(h5py.Dataset, "__getitem__", counted)
    few = l1000.read_gctx(path, rows=["g7", "g3"], columns=["s1500", "s10", "s12"])
    np.testing.assert_array_equal(few.X, values[np.ix_([7, 3], [1500, 10, 12])].T)
    assert sorted(reads) == [(1, 5), (3, 5)]  # samples 10 to 12 and 1500, genes 3 to 7: nothing else

    reads.clear()
    everything = l1000.read_gctx(path)
    np.testing.assert_array_equal(everything.X, values.T)
    assert max(rows for rows, _ in reads) <= l1000.BLOCK
    assert sum(rows * columns for rows, columns in reads) == values.size  # nothing is read twice


def test_reading_a_few_genes_does_not_load_the_matrix(tmp_path: Path) -> None:
    path = gctx(tmp_path, np.ones((1000, 6000), np.float32), np.arange(1000), [f"s{i}" for i in range(6000)])
    tracemalloc.start()
    try:
        adata = l1000.read_gctx(path, rows=[0, 500, 999])
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
    path = gctx(tmp_path)
    with h5py.File(path, "r+") as file:
        change(file)
    with pytest.raises(DataError, match=message):
        l1000.read(path)


def test_files_that_are_neither_are_refused(tmp_path: Path) -> None:
    path = gctx(tmp_path)
    cut = tmp_path / "cut.gctx"
    cut.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(DataError, match=r"cut.gctx cannot be read \(.*truncated file"):
        l1000.read(cut)
    text = gct(tmp_path, name="text.gctx")
    with pytest.raises(DataError, match=r"text.gctx is not an HDF5 file: a GCTX is HDF5"):
        l1000.read(text)
    packed = tmp_path / "plate.gctx.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    with pytest.raises(DataError, match=r"plate.gctx.gz is a gzipped GCTX, .*: unpack it first"):
        l1000.read(packed)
    other = tmp_path / "table.csv"
    other.write_text("a,b\n1,2\n")
    with pytest.raises(DataError, match=r"table.csv starts with b'a,b.*: expected GCT text"):
        l1000.read(other)
    for reader in (l1000.read, l1000.read_gct, l1000.read_gctx):
        with pytest.raises(DataError, match=r"there is no file .*nowhere.gctx"):
            reader(tmp_path / "nowhere.gctx")
    with pytest.raises(DataError, match=r"cannot be read"):
        l1000.read(tmp_path)


def test_content_decides_over_the_suffix(tmp_path: Path) -> None:
    np.testing.assert_array_equal(l1000.read(gct(tmp_path, name="plate.txt")).X, VALUES.T)
    np.testing.assert_array_equal(l1000.read(gctx(tmp_path, name="plate.h5")).X, VALUES.T)


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
    assert l1000.read(gctx(tmp_path, name=name)).uns.get("l1000_level") == level


def test_landmarks_need_a_column() -> None:
    space = pd.DataFrame({"feature_space": ["landmark", "inferred", "best inferred"]})
    np.testing.assert_array_equal(l1000.landmarks(space), [True, False, False])
    with pytest.raises(DataError, match=r"no column of 'pr_is_lmark', .* there are 'pr_gene_symbol'; join"):
        l1000.landmarks(pd.DataFrame({"pr_gene_symbol": ["A"]}))


# ------------------------------------------------------------------------------------------------------------- metadata

SIGNATURES = (
    "sig_id\tpert_id\tpert_iname\tpert_type\tcell_id\tpert_idose\tpert_itime\tdistil_id\n"
    "S3\tBRD-3\tdrug C\ttrt_cp\tA375\t-666\t24 h\tx:A05\n"
    "S1\tBRD-1\t10-DEBC 5'\"\ttrt_cp\tA375\t10 µM\t24 h\tx:A01|x:A02\n"
    "S2\tDMSO\tDMSO\tctl_vehicle\tPC3\t-666\t6 h\tx:A03|x:A04\n"
)


@pytest.fixture
def bare() -> AnnData:
    """Names only, as the GEO matrices have them."""
    return AnnData(
        X=np.arange(6, dtype=np.float32).reshape(2, 3),
        obs=pd.DataFrame(index=["S1", "S2"]),
        var=pd.DataFrame(index=["5720", "466", "6009"]),
    )


@pytest.fixture
def signatures(tmp_path: Path) -> Path:
    path = tmp_path / "GSE_sig_info.txt.gz"
    path.write_bytes(gzip.compress(SIGNATURES.encode()))
    return path


def test_the_four_tables_are_joined_by_id(bare: AnnData, signatures: Path, tmp_path: Path) -> None:
    perturbations = tmp_path / "pert_info.txt"
    perturbations.write_text(
        "pert_id\tpert_iname\tcanonical_smiles\nDMSO\tDMSO\tCS(C)=O\nBRD-1\tdebc\trestricted\nBRD-9\tx\tC\n"
    )
    cells = pd.DataFrame({"cell_id": ["PC3", "A375"], "primary_site": ["prostate", "skin"], "age": ["62", "-666"]})
    genes = pd.DataFrame({"pr_gene_id": [466, 5720, 6009, 1], "pr_gene_symbol": ["ATF1", "PSME1", "RHEB", "A1BG"]})
    genes["pr_is_lm"] = [1, 1, 0, 0]
    adata = l1000.join_metadata(bare, signatures=signatures, perturbations=perturbations, cells=cells, genes=genes)
    assert list(adata.obs["pert_iname"]) == ["10-DEBC 5'\"", "DMSO"]  # the signature's own name stays
    assert list(adata.obs["canonical_smiles"]) == [None, "CS(C)=O"]
    assert list(adata.obs["primary_site"]) == ["skin", "prostate"]
    np.testing.assert_array_equal(adata.obs["age"], [np.nan, 62])
    assert list(adata.var["pr_gene_symbol"]) == ["PSME1", "ATF1", "RHEB"]
    np.testing.assert_array_equal(l1000.landmarks(adata.var), [True, True, False])
    np.testing.assert_array_equal(adata.X, bare.X)
    assert bare.obs.shape == (2, 0)  # the argument is left alone
    done = l1000.standardise(adata)
    np.testing.assert_array_equal(done.obs["dose"], [10, 0])
    np.testing.assert_array_equal(done.obs["time"], [24, 6])


def test_the_table_may_be_keyed_by_well_or_by_its_index(bare: AnnData) -> None:
    wells = pd.DataFrame({"inst_id": ["S2", "S1"], "rna_plate": ["P", "Q"]})
    assert list(l1000.join_metadata(bare, signatures=wells).obs["rna_plate"]) == ["Q", "P"]
    indexed = wells.set_index("inst_id")
    assert list(l1000.join_metadata(bare, signatures=indexed).obs["rna_plate"]) == ["Q", "P"]
    # both columns are there: the one that the samples are called by is taken
    both = wells.rename(columns={"inst_id": "distil_id"}).assign(sig_id=["other 1", "other 2"])
    joined = l1000.join_metadata(bare, signatures=both).obs
    assert list(joined["rna_plate"]) == ["Q", "P"]
    assert list(joined["sig_id"]) == ["other 2", "other 1"]


def test_values_that_are_there_stay_and_gaps_are_filled(bare: AnnData) -> None:
    bare.obs["pert_id"] = ["mine", None]
    bare.obs["count"] = [np.nan, 3.0]
    table = pd.DataFrame({"sig_id": ["S1", "S2"], "pert_id": ["theirs 1", "theirs 2"], "count": [7, 8]})
    obs = l1000.join_metadata(bare, signatures=table).obs
    assert list(obs["pert_id"]) == ["mine", "theirs 2"]
    np.testing.assert_array_equal(obs["count"], [7, 3])
    flags = pd.DataFrame({"sig_id": ["S2", "S1"], "is_gold": [True, False]})
    assert l1000.join_metadata(bare, signatures=flags).obs["is_gold"].tolist() == [False, True]


def test_genes_are_looked_up_by_entrez_id_where_var_has_it(bare: AnnData) -> None:
    bare.var.index = ["200814_at", "222103_at", "201453_x_at"]
    bare.var["pr_gene_id"] = ["5720", "466", "6009"]
    table = pd.DataFrame({"pr_gene_id": [6009.0, 466.0, 5720.0], "pr_gene_title": ["c", "b", "a"]})
    assert list(l1000.join_metadata(bare, genes=table).var["pr_gene_title"]) == ["a", "b", "c"]


def test_metadata_that_does_not_fit_is_named(bare: AnnData, signatures: Path, tmp_path: Path) -> None:
    bare.obs.index = ["S1", "S7"]
    message = r"GSE_sig_info.txt.gz: no metadata for 1 of 2 samples \('S7'; sig_id 'S7'\): give the table of the same"
    with pytest.raises(DataError, match=message):
        l1000.join_metadata(bare, signatures=signatures)
    bare.obs.index = ["S1", "S2"]
    with pytest.raises(DataError, match=r"signatures table: no id column 'sig_id', 'inst_id', .* there are 'name'"):
        l1000.join_metadata(bare, signatures=pd.DataFrame({"name": ["S1"]}))
    with pytest.raises(DataError, match=r"perturbations: obs has no column 'pert_id' .*; join signatures=... first"):
        l1000.join_metadata(bare, perturbations=pd.DataFrame({"pert_id": ["x"]}))
    with pytest.raises(DataError, match=r"genes table: no metadata for 2 of 3 genes \('466', '6009'"):
        l1000.join_metadata(bare, genes=pd.DataFrame({"pr_gene_id": [5720]}))
    twice = pd.DataFrame({"sig_id": ["S1", "S2", "S2"], "cell_id": ["a", "b", "c"]})
    with pytest.raises(DataError, match=r"signatures table: rows that differ for one sig_id: 'S2'"):
        l1000.join_metadata(bare, signatures=twice)
    repeated = twice.assign(cell_id="a")  # the same row twice says nothing false
    assert list(l1000.join_metadata(bare, signatures=repeated).obs["cell_id"]) == ["a", "a"]
    ragged = tmp_path / "ragged.txt"
    ragged.write_text("sig_id\tcell_id\nS1\tA375\n\nS2\n")
    with pytest.raises(DataError, match=r"ragged.txt, line 4: 1 fields where the header has 2"):
        l1000.join_metadata(bare, signatures=ragged)
    ragged.write_text("sig_id\tcell_id\tcell_id\nS1\tA\tB\n")
    with pytest.raises(DataError, match=r"ragged.txt, line 1: duplicate columns: 'cell_id'; each must appear once"):
        l1000.join_metadata(bare, signatures=ragged)
    ragged.write_text("sig_id\tcell_id\n")
    with pytest.raises(DataError, match=r"ragged.txt has no rows"):
        l1000.join_metadata(bare, signatures=ragged)
    with pytest.raises(DataError, match=r"there is no file .*absent.txt"):
        l1000.join_metadata(bare, signatures=tmp_path / "absent.txt")


# -------------------------------------------------------------------------------------------------------- dose and time


@pytest.mark.parametrize(
    ("value", "unit", "expected"),
    [
        ("10.0 um", None, 10.0),
        ("10 µM", None, 10.0),
        ("10 \u03bcM", None, 10.0),
        ("0.04 uM", None, 0.04),
        ("500 nM", None, 0.5),
        ("40nM", None, 0.04),
        ("2.5 mM", None, 2500.0),
        ("3 pM", None, 3e-6),
        ("1e-1 UM", None, 0.1),
        (1.5, "um", 1.5),
        (np.float32(44.4), "UM", 44.4),
        (500, "nM", 0.5),
        ("10 um", "nM", 10.0),
        ("300 um|300.0 um", None, 300.0),
        (0, "um", 0.0),
    ],
)
def test_doses_are_converted_to_micromolar(value: object, unit: object, expected: float) -> None:
    assert l1000.parse_dose(value, unit) == expected


@pytest.mark.parametrize(
    ("value", "unit"),
    [
        ("-666", "um"),
        (-666, "um"),
        (-666.0, None),
        ("", "um"),
        (None, "um"),
        (float("nan"), "um"),
        ("restricted", None),
        ("1 %", None),
        (2.0, "UL"),
        ("300 ng", None),
        ("10 um|20 um", None),
        ("1.5", None),
        (1.5, "-666"),
        ("-1 um", None),
        ("ten um", None),
        ("1.2.3 um", None),
    ],
)
def test_doses_that_are_unknown_or_no_concentration_are_nan(value: object, unit: object) -> None:
    assert np.isnan(l1000.parse_dose(value, unit))


@pytest.mark.parametrize(
    ("value", "unit", "expected"),
    [
        ("24 h", None, 24.0),
        ("6 H", None, 6.0),
        ("30 m", None, 0.5),
        ("2 days", None, 48.0),
        (np.float32(96), "H", 96.0),
        ("90", "min", 1.5),
        ("6 h|6 h", None, 6.0),
    ],
)
def test_times_are_converted_to_hours(value: object, unit: object, expected: float) -> None:
    assert l1000.parse_time(value, unit) == expected


@pytest.mark.parametrize("value", ["-666", "", "24", "24 fortnights", None])
def test_times_that_are_unknown_are_nan(value: object) -> None:
    assert np.isnan(l1000.parse_time(value))


# --------------------------------------------------------------------------------------------------------- standardise


def _wells(**columns: Any) -> AnnData:
    n = len(next(iter(columns.values())))
    obs = pd.DataFrame(columns, index=[f"w{i}" for i in range(n)])
    return AnnData(X=np.zeros((n, 2), np.float32), obs=obs, var=pd.DataFrame(index=["g1", "g2"]))


def test_standardise_reads_the_columns_of_the_current_release() -> None:
    adata = l1000.standardise(
        _wells(
            pert_iname=["DMSO", "trametinib", None, "UnTrt"],
            pert_id=["DMSO", "BRD-1", "BRD-2", "CMAP-000"],
            pert_type=["ctl_vehicle", "trt_cp", "trt_cp", "ctl_untrt.cns"],
            pert_idose=[None, "0.37 um", None, None],
            pert_dose=[np.nan, 0.3704, 500.0, 3.0],
            pert_dose_unit=[None, "um", "nM", "um"],
            pert_time=[24, 24, 6, 6],
            pert_time_unit=["h", "h", "h", "h"],
            cell_id=["A375", "A375", "PC3", "PC3"],
            canonical_smiles=[None, "CCO", None, None],
            det_plate=["P_B19", "P_B19", "P_B19", "P_B19"],
            rna_plate=["P", "P", None, "P"],
            det_well=["A01", "A02", "A03", "A04"],
        )
    )
    obs = adata.obs
    assert list(obs["perturbation"]) == ["DMSO", "trametinib", "BRD-2", "UnTrt"]
    np.testing.assert_array_equal(obs["dose"], [0, 0.37, 0.5, 0])
    np.testing.assert_array_equal(obs["time"], [24, 24, 6, 6])
    assert list(obs["cell_line"]) == ["A375", "A375", "PC3", "PC3"]
    assert list(obs["smiles"]) == [None, "CCO", None, None]
    assert list(obs["plate"]) == ["P", "P", "P_B19", "P"]
    assert list(obs["well"]) == ["A01", "A02", "A03", "A04"]
    assert obs["control"].dtype == bool
    assert list(obs["control"]) == [True, False, False, True]
    again = l1000.standardise(adata).obs
    pd.testing.assert_frame_equal(again, obs)


def test_standardise_reads_the_columns_of_older_files() -> None:
    obs = l1000.standardise(
        _wells(
            pert_desc=["DMSO", "GELDANAMYCIN", "GELDANAMYCIN"],
            pert_type=["CTL_VEHICLE", "TRT_CP", "TRT_CP"],
            exp_pert_dose=np.array([10, 11.1, 44.4], np.float32),
            exp_pert_dose_unit=["UM", "UM", "UM"],
            exp_pert_time=[6.0, 6.0, 6.0],
            exp_pert_time_unit=["H", "H", "H"],
        )
    ).obs
    assert list(obs["pert_type"]) == ["ctl_vehicle", "trt_cp", "trt_cp"]
    np.testing.assert_array_equal(obs["dose"], [0, 11.1, 44.4])  # a vehicle has no dose; float32 leaves no 11.1000003
    np.testing.assert_array_equal(obs["time"], [6, 6, 6])
    assert not {"cell_line", "smiles", "plate", "well", "pert_id"} & set(obs)


def test_control_perturbations_can_be_named() -> None:
    wells = _wells(pert_desc=["EMPTY", "gfp", "STAT1", "dmso"], pert_type=["TRT_SHRNA"] * 4)
    assert list(l1000.standardise(wells).obs["control"]) == [False, False, False, True]
    named = l1000.standardise(wells, control_names=("Empty", "GFP"))
    assert list(named.obs["control"]) == [True, True, False, False]


def test_standardise_needs_to_know_the_perturbation() -> None:
    message = r"no obs column of 'pert_iname', .* names the perturbation: obs has 'cell_id'; join the sig_info"
    with pytest.raises(DataError, match=message):
        l1000.standardise(_wells(cell_id=["A375"]))


# ------------------------------------------------------------------------------------------------------------- centring


@pytest.fixture
def two_plates() -> AnnData:
    """Plate P: vehicles 1, 3, 8 (median 3, MAD 2, mean 4); plate Q: 10, 20 (median 15). Gene 2 is saturated."""
    first = [1.0, 3.0, 8.0, 5.0, 10.0, 20.0, 18.0]
    obs = pd.DataFrame(
        {"plate": list("PPPPQQQ"), "control": [True, True, True, False, True, True, False]},
        index=[f"w{i}" for i in range(7)],
    )
    return AnnData(X=np.array([[v, 15.0] for v in first], np.float32), obs=obs, var=pd.DataFrame(index=["g1", "g2"]))


def test_the_vehicle_median_of_each_plate_is_subtracted(two_plates: AnnData) -> None:
    centred = l1000.centre_on_vehicle(two_plates)
    np.testing.assert_array_equal(centred.X[:, 0], [-2, 0, 5, 2, -5, 5, 3])
    np.testing.assert_array_equal(centred.X[:, 1], 0)
    assert centred.uns["l1000_centred"] == {"statistic": "median", "scaled": False}
    assert two_plates.X[0, 0] == 1.0  # a copy
    assert "l1000_centred" not in two_plates.uns


def test_the_mean_can_be_subtracted_instead(two_plates: AnnData) -> None:
    centred = l1000.centre_on_vehicle(two_plates, statistic="mean")
    np.testing.assert_array_equal(centred.X[:, 0], [-3, -1, 4, 1, -5, 5, 3])


def test_scaling_divides_by_the_robust_spread_of_the_vehicles(two_plates: AnnData) -> None:
    two_plates.X[3, 1] = 16.0
    scaled = l1000.centre_on_vehicle(two_plates, scale=True)
    expected = np.array([-2, 0, 5, 2, -5, 5, 3]) / np.array([2, 2, 2, 2, 5, 5, 5]) / 1.4826
    np.testing.assert_allclose(scaled.X[:, 0], expected, rtol=1e-6)
    np.testing.assert_allclose(scaled.X[3, 1], 1 / (0.1 * 1.4826), rtol=1e-6)  # the MAD is 0: the floor stands in
    wider = l1000.centre_on_vehicle(two_plates, scale=True, floor=4.0)
    np.testing.assert_allclose(wider.X[:4, 0], np.array([-2, 0, 5, 2]) / 4 / 1.4826, rtol=1e-6)


def test_missing_and_sparse_values_and_other_column_names(two_plates: AnnData) -> None:
    two_plates.obs = two_plates.obs.rename(columns={"plate": "batch", "control": "is_vehicle"})
    two_plates.X[2, 0] = np.nan  # vehicles 1 and 3 remain
    two_plates.X[[4, 5], 1] = np.nan  # no vehicle of plate Q has gene 2
    centred = l1000.centre_on_vehicle(two_plates, plate="batch", control="is_vehicle")
    np.testing.assert_array_equal(centred.X[:4, 0], [-1, 1, np.nan, 3])
    assert np.isnan(centred.X[4:, 1]).all()
    two_plates.X = sp.csr_matrix(np.nan_to_num(two_plates.X))
    sparse = l1000.centre_on_vehicle(two_plates, plate="batch", control="is_vehicle")
    np.testing.assert_array_equal(sparse.X[:4, 0], [0, 2, -1, 4])


def test_centring_that_cannot_be_done_is_refused(two_plates: AnnData) -> None:
    two_plates.obs.loc["w4", "control"] = False
    with pytest.raises(
        DataError, match=r"plate 'Q': fewer than 2 vehicle wells \('control' is true in none or too few"
    ):
        l1000.centre_on_vehicle(two_plates, scale=True)
    two_plates.obs.loc["w5", "control"] = False
    with pytest.raises(DataError, match=r"plate 'Q': fewer than 1 vehicle wells .* drop the plate"):
        l1000.centre_on_vehicle(two_plates)
    with pytest.raises(DataError, match=r"statistic='mode': expected 'median' or 'mean'"):
        l1000.centre_on_vehicle(two_plates, statistic="mode")
    with pytest.raises(DataError, match=r"floor=0: the smallest MAD must be positive"):
        l1000.centre_on_vehicle(two_plates, floor=0)
    with pytest.raises(DataError, match=r"no obs column 'batch': run standardise first; obs has 'plate', 'control'"):
        l1000.centre_on_vehicle(two_plates, plate="batch")
    with pytest.raises(DataError, match=r"obs column 'plate' has type object: expected booleans"):
        l1000.centre_on_vehicle(two_plates, control="plate")
    two_plates.obs.loc["w0", "plate"] = None
    with pytest.raises(DataError, match=r"obs column 'plate' is missing in 1 samples \('w0'\)"):
        l1000.centre_on_vehicle(two_plates)


@pytest.mark.parametrize("level", [4, 5])
def test_z_scores_are_never_centred(two_plates: AnnData, level: int) -> None:
    two_plates.uns["l1000_level"] = level
    with pytest.raises(DataError, match=rf"these are level {level} z-scores, which are relative to controls already"):
        l1000.centre_on_vehicle(two_plates)
    two_plates.uns["l1000_level"] = 3
    assert l1000.centre_on_vehicle(two_plates).X[3, 0] == 2.0


# --------------------------------------------------------------------------------------------------------- load_plates


def _plate(folder: Path, name: str, genes: dict[str, str], first: float, wells: list[str]) -> Path:
    """A plate of constant genes: value of gene k is first + k, with 100 x well added."""
    values = np.array([[first + k + 100 * w for w in range(len(wells))] for k in range(len(genes))], np.float32)
    return gctx(
        folder,
        values,
        [f"{gene}_at" for gene in genes],
        [f"{name}:{well}" for well in wells],
        row={"pr_gene_id": np.array([float(g) for g in genes]), "pr_gene_symbol": list(genes.values())},
        column={
            "pert_iname": ["DMSO", *(f"drug {w}" for w in wells[1:])],
            "rna_plate": [name] * len(wells),
            "rna_well": wells,
        },
        name=f"{name}_level3.gctx",
    )


def test_plates_are_stacked_on_their_common_genes_by_entrez_id(tmp_path: Path) -> None:
    one = _plate(tmp_path, "P1", {"11": "CABC1", "22": "B", "33": "C"}, 0, ["A01", "A02"])
    two = _plate(tmp_path, "P2", {"44": "D", "33": "C", "11": "ADCK3"}, 10, ["A01", "A02", "A03"])
    adata = l1000.load_plates([one, two])
    assert list(adata.var_names) == ["CABC1", "C"]  # the first file's symbols
    assert list(adata.var["pr_gene_id"]) == ["11", "33"]
    assert list(adata.obs_names) == ["P1:A01", "P1:A02", "P2:A01", "P2:A02", "P2:A03"]
    np.testing.assert_array_equal(adata.X, [[0, 2], [100, 102], [12, 11], [112, 111], [212, 211]])
    assert list(adata.obs["plate"]) == ["P1", "P1", "P2", "P2", "P2"]
    assert list(adata.obs["control"]) == [True, False, True, False, False]
    assert adata.uns["l1000_level"] == 3
    chosen = l1000.load_plates([one, two], genes=["33", "CABC1"])
    assert list(chosen.var_names) == ["C", "CABC1"]
    np.testing.assert_array_equal(chosen.X, adata.X[:, ::-1])


def test_plates_without_entrez_ids_are_matched_by_symbol_or_row_id(tmp_path: Path) -> None:
    one = _plate(tmp_path, "P1", {"11": "A", "22": "B"}, 0, ["A01"])
    two = _plate(tmp_path, "P2", {"99": "B", "22": "Z"}, 10, ["A01"])
    with h5py.File(two, "r+") as file:
        del file["0/META/ROW/pr_gene_id"]
    by_symbol = l1000.load_plates([one, two])
    assert list(by_symbol.var_names) == ["B"]
    np.testing.assert_array_equal(by_symbol.X, [[1], [10]])
    with h5py.File(two, "r+") as file:
        del file["0/META/ROW/pr_gene_symbol"]
    by_row = l1000.load_plates([one, two])
    np.testing.assert_array_equal(by_row.X, [[1], [11]])  # row 22_at
    assert list(by_row.var_names) == ["B"]
    assert list(l1000.load_plates([two]).var_names) == ["99_at", "22_at"]


def test_annotation_is_added_by_well_or_by_sample_and_wins(tmp_path: Path) -> None:
    one = _plate(tmp_path, "P1", {"11": "A"}, 0, ["A01", "A02"])
    two = _plate(tmp_path, "P2", {"11": "A"}, 10, ["A01"])
    table = tmp_path / "obs.csv"
    table.write_text('plate,well,perturbation,smiles\nP2,A01,,\nP1,A02,"aspirin, pure",CCO\nP1,A01,,\nP9,A01,other,C\n')
    obs = l1000.load_plates([one, two], obs=table).obs
    assert list(obs["perturbation"]) == ["DMSO", "aspirin, pure", "DMSO"]
    assert list(obs["smiles"]) == [None, "CCO", None]
    by_sample = pd.DataFrame({"id": ["P2:A01", "P1:A01", "P1:A02"], "cell_line": ["c", "a", "b"]})
    assert list(l1000.load_plates([one, two], obs=by_sample).obs["cell_line"]) == ["a", "b", "c"]
    with pytest.raises(DataError, match=r"obs table: no metadata for 1 of 3 samples \('P2:A01'"):
        l1000.load_plates([one, two], obs=pd.DataFrame({"plate": ["P1", "P1"], "well": ["A01", "A02"], "x": [1, 2]}))


def test_plates_that_do_not_go_together_are_refused(tmp_path: Path) -> None:
    one = _plate(tmp_path, "P1", {"11": "A"}, 0, ["A01"])
    two = _plate(tmp_path, "P2", {"22": "B"}, 10, ["A01"])
    with pytest.raises(DataError, match=r"the files have no gene in common: '11', but '22'"):
        l1000.load_plates([one, two])
    with pytest.raises(DataError, match=r"samples in more than one file: 'P1:A01'"):
        l1000.load_plates([one, one])
    with pytest.raises(DataError, match=r"genes 'B', 'X' are not in all files; 1 are, e.g. '11'"):
        l1000.load_plates([one], genes=["A", "B", "X"])
    with pytest.raises(DataError, match=r"genes is empty"):
        l1000.load_plates([one], genes=[])
    with pytest.raises(DataError, match=r"genes: named twice: '11'"):
        l1000.load_plates([one], genes=["A", "11"])
    with pytest.raises(DataError, match=r"paths=\[\]: give a list"):
        l1000.load_plates([])
    with pytest.raises(DataError, match=r"paths=.*: give a list"):
        l1000.load_plates(one)  # type: ignore[arg-type]
    scores = _plate(tmp_path, "P3", {"11": "A"}, 0, ["A01"]).rename(tmp_path / "P3_level5.gctx")
    with pytest.raises(DataError, match=r"levels \[3, 5\] do not go together in one matrix"):
        l1000.load_plates([one, scores])


# ------------------------------------------------------------------------------------------------------------ real data

A375 = (
    ("LJP005_A375_24H_X1", "LJP005_A375_24H_X1_level3.gct"),
    ("LJP009_A375_24H_X1", "LJP009_A375_24H_X1_level3_qnorm.gct"),
    ("CPC006_A375_6H_X1", "CPC006_A375_6H_X1_level3.gctx"),
)


@pytest.fixture
def a375(data_folder: Path) -> Path:
    return data_folder / "l1000_a375"


@pytest.mark.parametrize(("plate_name", "file"), A375)
def test_real_plates_hold_the_values_that_were_aligned_independently(a375: Path, plate_name: str, file: str) -> None:
    reference = np.load(a375 / "l1000_a375_level3.npz", allow_pickle=False)
    table = pd.read_csv(a375 / "obs.csv.gz")
    mine = (table["plate"] == plate_name).to_numpy()
    adata = l1000.standardise(l1000.read(a375 / file))
    order = pd.Index(adata.var["pr_gene_id"].astype(int)).get_indexer(reference["entrez"])
    assert (order >= 0).all()
    np.testing.assert_array_equal(adata.X[:, order], reference["X"][mine])
    obs, expected = adata.obs, table[mine]
    pairs = [("plate", "plate"), ("well", "well"), ("pert_type", "pert_type"), ("pert_id", "pert_id")]
    for ours, theirs in [*pairs, ("perturbation", "pert_iname"), ("cell_line", "cell_line"), ("time", "time_h")]:
        assert obs[ours].tolist() == expected[theirs].tolist(), ours
    treated = ~obs["control"].to_numpy()
    assert list(treated) == (expected["pert_type"] != "ctl_vehicle").tolist()
    np.testing.assert_allclose(obs["dose"][treated], expected["dose_um"][treated.tolist()], rtol=1e-6)
    assert (obs["dose"][~treated] == 0).all()


def test_real_plates_read_in_part_equal_the_whole(a375: Path) -> None:
    for _, file in A375:
        whole = l1000.read(a375 / file)
        genes, wells = list(whole.var_names[[900, 3, 77]]), np.arange(whole.n_obs) % 50 == 7
        part = l1000.read(a375 / file, rows=genes, columns=wells)
        np.testing.assert_array_equal(part.X, whole[wells, genes].X)
        pd.testing.assert_frame_equal(part.obs, whole.obs[wells])


def test_real_plates_are_stacked_and_centred(a375: Path) -> None:
    reference = np.load(a375 / "l1000_a375_level3.npz", allow_pickle=False)
    adata = l1000.load_plates([a375 / file for _, file in A375], obs=a375 / "obs.csv.gz")
    np.testing.assert_array_equal(adata.X, reference["X"])
    assert list(adata.var_names) == list(reference["genes"])
    assert int(adata.obs["control"].sum()) == 64
    assert int(adata.obs["smiles"].notna().sum()) == 1048
    obs, centred = adata.obs, l1000.centre_on_vehicle(adata)
    for (name, _), count in zip(A375, (26, 22, 16), strict=True):
        vehicle = ((obs["plate"] == name) & obs["control"]).to_numpy()
        assert vehicle.sum() == count
        np.testing.assert_allclose(np.median(centred.X[vehicle], axis=0), 0, atol=2e-6)
    assert np.isfinite(l1000.centre_on_vehicle(adata, scale=True).X).all()


def test_centring_makes_plates_comparable(a375: Path) -> None:
    """Dabrafenib (BRAF, plate LJP009) is like the MEK inhibitors of plate LJP005, and not like all that is on it."""
    adata = l1000.load_plates([a375 / file for _, file in A375[:2]])
    obs, x = adata.obs, l1000.centre_on_vehicle(adata).X
    treated = (obs["dose"] >= 1).to_numpy()
    profile = x[treated & (obs["perturbation"] == "dabrafenib").to_numpy()].mean(0)
    others = pd.DataFrame(x[treated]).groupby(obs["perturbation"][treated].to_numpy()).mean()
    others = others.loc[obs["perturbation"][treated & (obs["plate"] == "LJP005_A375_24H_X1").to_numpy()].unique()]
    similarity = others.T.corrwith(pd.Series(profile))
    assert similarity[["trametinib", "PD-0325901", "AZD-8330"]].min() > 0.6
    assert similarity.median() < 0.4


def test_real_signatures_have_doses_and_cell_lines(data_folder: Path) -> None:
    adata = l1000.standardise(l1000.read(data_folder / "l1000_multicell" / "modzs_n272x978.gctx"))
    assert adata.shape == (272, 978)
    assert adata.uns["l1000_level"] == 5
    assert l1000.landmarks(adata.var).all()
    assert int((adata.obs["dose"] == 10).sum()) == 218
    assert adata.obs["perturbation"].nunique() == 3
    joined = l1000.join_metadata(adata, cells=data_folder / "l1000_multicell" / "cellinfo_dhimmel.tsv.gz")
    assert joined.obs.loc[joined.obs["cell_line"] == "A549", "cell_lineage"].unique().tolist() == ["lung"]
    with pytest.raises(DataError, match="these are level 5 z-scores"):
        l1000.centre_on_vehicle(adata)


def test_real_hairpins_agree_with_their_table(data_folder: Path) -> None:
    folder = data_folder / "l1000_shrna_pc3"
    controls = ("EMPTY", "pgw", "GFP", "LUCIFERASE", "lacZ", "RFP")
    adata = l1000.read(folder / "LITMUS001_PC3_96H_X2_X5_zscore_n757x978.gctx")
    adata = l1000.standardise(adata, control_names=controls)
    table = pd.read_csv(folder / "litmus001_obs.csv.gz").set_index("id").loc[adata.obs_names]
    assert adata.obs["perturbation"].tolist() == table["pert_desc"].tolist()
    assert adata.obs["well"].tolist() == table["rna_well"].tolist()
    assert adata.obs["control"].tolist() == table["pert_desc"].isin(controls).tolist()
    assert adata.uns["l1000_level"] == 4
    np.testing.assert_array_equal(adata.obs["time"], 96)
    assert adata.obs.loc[~adata.obs["control"], "dose"].isna().all()  # microlitres of virus are no concentration
