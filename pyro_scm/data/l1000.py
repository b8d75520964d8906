"""LINCS L1000 as AnnData: GCT and GCTX files, the GEO metadata tables, doses, times and vehicle centring.

Formats and levels: Subramanian et al. 2017, Cell 171:1437 (level 3: normalised log2 expression per well; level 4:
robust z-scores per well; level 5: one z-score signature per condition), and the GCT 1.3 / GCTX description of the
Connectivity Map. A file's rows are genes and become ``var``; its columns are samples (wells or signatures) and become
``obs``.
"""

import csv
import gzip
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from pyro_scm.errors import DataError, listing

if TYPE_CHECKING:
    from anndata import AnnData

__all__ = [
    "centre_on_vehicle",
    "join_metadata",
    "landmarks",
    "load_plates",
    "parse_dose",
    "parse_time",
    "read",
    "read_gct",
    "read_gctx",
    "standardise",
]

Selection: TypeAlias = (
    "Sequence[str] | Sequence[int] | NDArray[Any] | pd.Index[Any] | pd.Series[Any] | slice "
    "| Callable[[pd.DataFrame], Any] | None"
)
Table: TypeAlias = str | Path | pd.DataFrame

MISSING = frozenset({"", "-666", "-666.0", "restricted", "nan", "na"})
MISSING_NUMBER = -666.0
BLOCK = 512  # samples read at once: 25 MB of the 12,328 genes in float32

# Columns that are names even where every value looks like a number: gene 5720, the compound 89671, the cell line 697.
_NAMES = re.compile(
    r"(^|_)(id|name|iname|desc|symbol|title|plate|well|smiles|inchi|key|type|unit|idose|itime|prefix)$", re.IGNORECASE
)
_LANDMARK_COLUMNS = ("pr_is_lmark", "pr_is_lm", "is_lmark", "is_lm", "feature_space")
_SAMPLE_IDS = ("sig_id", "inst_id", "distil_id", "id")
_TEXT_SOURCES: Mapping[str, tuple[str, ...]] = {
    "perturbation": ("pert_iname", "cmap_name", "pert_desc", "pert_id", "perturbation"),
    "pert_id": ("pert_id",),
    "pert_type": ("pert_type",),
    "cell_line": ("cell_id", "cell_iname", "cell_line"),
    "smiles": ("canonical_smiles", "smiles"),
    "plate": ("rna_plate", "plate", "det_plate"),
    "well": ("rna_well", "well", "det_well"),
}
# (column of the value, column of the unit or the unit itself): the first that gives a number wins
_DOSE_SOURCES = (
    ("pert_idose", None),
    ("pert_dose", "pert_dose_unit"),
    ("exp_pert_dose", "exp_pert_dose_unit"),
    ("dose_um", "um"),
    ("dose", "um"),
)
_TIME_SOURCES = (
    ("pert_itime", None),
    ("pert_time", "pert_time_unit"),
    ("exp_pert_time", "exp_pert_time_unit"),
    ("time_h", "h"),
    ("time", "h"),
)
_STANDARD = ("perturbation", "pert_id", "pert_type", "dose", "time", "cell_line", "smiles", "plate", "well", "control")
_CONTROL_TYPES = ("ctl_vehicle", "ctl_untrt", "ctl_vector")  # and their consensus signatures, ctl_vehicle.cns ...
_MICROMOLAR = {"pm": Fraction(1, 10**6), "nm": Fraction(1, 1000), "um": Fraction(1), "mm": Fraction(1000)}
_HOURS = {
    **dict.fromkeys(("m", "min", "mins", "minute", "minutes"), Fraction(1, 60)),
    **dict.fromkeys(("h", "hr", "hrs", "hour", "hours"), Fraction(1)),
    **dict.fromkeys(("d", "day", "days"), Fraction(24)),
}
_QUANTITY = re.compile(r"([+-]?(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?)\s*(.*)", re.IGNORECASE)
_MAD_TO_SIGMA = 1.4826  # 1 / Phi^-1(3/4): the MAD of a normal variable times this is its standard deviation


# ---------------------------------------------------------------------------------------------------------------- read


def read(path: str | Path, *, rows: Selection = None, columns: Selection = None) -> "AnnData":
    """`read_gct` or `read_gctx`, by the file's first bytes.

    Args:
        path: .gct, .gct.gz or .gctx.
        rows: see `read_gctx`.
        columns: see `read_gctx`.

    Returns:
        samples x genes.

    Raises:
        DataError: neither GCT nor GCTX, or a gzipped GCTX, which cannot be read in parts.
    """
    path = Path(path)
    with _reading(path), path.open("rb") as stream:
        head = stream.read(8)
    if head == b"\x89HDF\r\n\x1a\n":
        return read_gctx(path, rows=rows, columns=columns)
    if head[:2] == b"\x1f\x8b":
        if path.name.endswith(".gctx.gz"):
            raise DataError(f"{path} is a gzipped GCTX, which cannot be read in parts: unpack it first (gunzip -k)")
        return read_gct(path, rows=rows, columns=columns)
    if path.suffix == ".gctx":
        return read_gctx(path, rows=rows, columns=columns)
    if path.suffix == ".gct" or head[:2] == b"#1":
        return read_gct(path, rows=rows, columns=columns)
    raise DataError(f"{path} starts with {head!r}: expected GCT text ('#1.3', plain or gzipped) or GCTX (HDF5)")


def read_gct(path: str | Path, *, rows: Selection = None, columns: Selection = None) -> "AnnData":
    """GCT 1.2 or 1.3 text as samples x genes; numbers are parsed in the selected rows and columns only.

    Args:
        path: tab-separated text, plain or gzipped.
        rows: see `read_gctx`.
        columns: see `read_gctx`.

    Returns:
        X float32 [samples, genes]; obs from the column metadata, var from the row metadata (1.2: ``Description``).

    Raises:
        DataError: names the file and line: version, dimensions, truncation, duplicate names, text among the numbers.
    """
    path = Path(path)
    with _reading(path), _open(path) as stream:
        layout = _gct_layout(stream, path)
        genes = _positions(rows, layout.var, f"{path}: rows")
        samples = _positions(columns, layout.obs, f"{path}: columns")
        x = _gct_values(stream, layout, samples, genes, path)
    return _anndata(x, layout.obs.iloc[samples], layout.var.iloc[genes], path)


def read_gctx(path: str | Path, *, rows: Selection = None, columns: Selection = None) -> "AnnData":
    """GCTX (HDF5) as samples x genes, read in blocks of about 512 samples; only the selection is kept.

    Args:
        path: HDF5 with ``0/DATA/0/matrix`` [samples, genes], ``0/META/ROW/*`` (genes) and ``0/META/COL/*`` (samples).
        rows: the genes: strings are row ids (``["5720", "466"]``), integers positions, booleans a mask over all rows,
            a slice, or a function of the row metadata that gives one of these (``rows=landmarks``). None: all.
            The order of ids and positions is kept.
        columns: the samples, in the same way.

    Returns:
        X float32 [samples, genes]; -666 is NaN. Names are strings also where the file holds integer gene ids.
        ``uns["l1000_level"]`` is the level that the file name gives, if it gives one.

    Raises:
        DataError: not HDF5; a dataset that is missing or has the wrong shape or type; duplicate ids; unknown selection.
    """
    import h5py

    path = Path(path)
    with _reading(path):
        if path.is_file() and not h5py.is_hdf5(path):
            raise DataError(f"{path} is not an HDF5 file: a GCTX is HDF5 (unpack a .gz first; read_gct reads text)")
        with h5py.File(path, "r") as file:
            matrix = _gctx_matrix(file, path)
            obs = _gctx_table(file, "0/META/COL", matrix.shape[0], path)
            var = _gctx_table(file, "0/META/ROW", matrix.shape[1], path)
            genes = _positions(rows, var, f"{path}: rows")
            samples = _positions(columns, obs, f"{path}: columns")
            x = _gctx_values(matrix, samples, genes)
    return _anndata(x, obs.iloc[samples], var.iloc[genes], path)


def landmarks(var: pd.DataFrame) -> NDArray[np.bool_]:
    """Which genes are measured landmarks (978 of the 12,328), by ``pr_is_lmark``, ``pr_is_lm`` or ``feature_space``.

    Args:
        var: gene annotation, one row per gene.

    Returns:
        [genes].

    Raises:
        DataError: none of the columns is there.
    """
    for name in _LANDMARK_COLUMNS:
        if name in var:
            return var[name].astype(str).str.lower().isin(["1", "1.0", "true", "landmark"]).to_numpy(bool)
    raise DataError(
        f"no column of {listing(_LANDMARK_COLUMNS)} tells the landmarks apart: there are {listing(var.columns, 10)}; "
        "join the gene_info table with join_metadata(adata, genes=...)"
    )


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """What the operating system, gzip and HDF5 raise over a bad file, as a DataError that names it."""
    try:
        yield
    except FileNotFoundError as error:
        raise DataError(f"there is no file {path}") from error
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read ({error}): truncated or damaged? Fetch it again") from error


@contextmanager
def _open(path: Path) -> Iterator[IO[bytes]]:
    with path.open("rb") as raw:
        gzipped = raw.read(2) == b"\x1f\x8b"
        raw.seek(0)
        if gzipped:
            with gzip.open(raw, "rb") as unpacked:
                yield unpacked  # type: ignore[misc]  # GzipFile is an IO[bytes] in all but its declaration
        else:
            yield raw


def _anndata(x: NDArray[np.float32], obs: pd.DataFrame, var: pd.DataFrame, path: Path) -> "AnnData":
    from anndata import AnnData

    adata = AnnData(X=x, obs=obs.copy(), var=var.copy())
    level = _level(path.name)
    if level is not None:
        adata.uns["l1000_level"] = level
    return adata


def _level(name: str) -> int | None:
    """3, 4 or 5 (or 1, 2) where the file name tells, as those of GEO and of the Connectivity Map's tools do."""
    if stated := re.search(r"level[ _-]?([1-5])", name, re.IGNORECASE):
        return int(stated[1])
    for pattern, level in ((r"modz|compz", 5), (r"zspc|zscore", 4), (r"q2?norm", 3)):
        if re.search(pattern, name, re.IGNORECASE):
            return level
    return None


# ----------------------------------------------------------------------------------------------------------------- GCT


class _GctLayout(NamedTuple):
    obs: pd.DataFrame
    var: pd.DataFrame
    lead: int  # fields before the first value of a row: the id and the row metadata
    first_line: int  # number of the line of the first gene
    offsets: list[int]  # where each gene's line starts in the (unpacked) file


def _gct_layout(stream: IO[bytes], path: Path) -> _GctLayout:
    """Everything but the values, with a check of every line's number of fields."""
    version = _text(stream.readline()).strip()
    if version not in ("#1.2", "#1.3"):
        raise DataError(f"{path}, line 1: {version[:40]!r} is no GCT version: expected '#1.2' or '#1.3'")
    n_rows, n_columns, n_row_meta, n_column_meta = _gct_dimensions(_text(stream.readline()), version, path)
    lead = 1 + n_row_meta
    header = _gct_fields(stream.readline(), lead + n_columns, 3, path)
    samples, row_meta = header[lead:], header[1:lead]
    _refuse_duplicates(samples, f"{path}, line 3: duplicate sample ids")
    _refuse_duplicates(row_meta, f"{path}, line 3: duplicate names of row metadata")

    column_meta: dict[str, list[str]] = {}
    for number in range(4, 4 + n_column_meta):
        name, *values = _gct_fields(stream.readline(), lead + n_columns, number, path)
        if name in column_meta:
            raise DataError(f"{path}, line {number}: the column metadata {name!r} appears twice")
        column_meta[name] = values[lead - 1 :]

    first_line = 4 + n_column_meta
    offsets, leads = _gct_rows(stream, n_rows, lead, lead + n_columns, first_line, path)
    genes = [fields[0] for fields in leads]
    _refuse_duplicates(genes, f"{path}: duplicate gene ids")
    row_values = {name: [fields[k] for fields in leads] for k, name in enumerate(row_meta, start=1)}
    return _GctLayout(_frame(column_meta, samples), _frame(row_values, genes), lead, first_line, offsets)


def _gct_dimensions(line: str, version: str, path: Path) -> tuple[int, int, int, int]:
    parts = line.split()
    wanted = 4 if version == "#1.3" else 2
    if len(parts) != wanted or not all(p.isdecimal() for p in parts):
        what = "rows, columns, row metadata, column metadata" if wanted == 4 else "rows, columns"
        raise DataError(f"{path}, line 2: {line.strip()[:60]!r}: expected {wanted} whole numbers ({what})")
    n_rows, n_columns, n_row_meta, n_column_meta = (int(p) for p in [*parts, "1", "0"][:4])
    if not n_rows or not n_columns:
        raise DataError(f"{path}, line 2: {n_rows} rows and {n_columns} columns: there is nothing to read")
    return n_rows, n_columns, n_row_meta, n_column_meta


def _gct_fields(line: bytes, expected: int, number: int, path: Path) -> list[str]:
    if not line:
        raise DataError(f"{path} ends before line {number}: it is truncated, or line 2 states the wrong dimensions")
    fields = _text(line).rstrip("\r\n").split("\t")
    if len(fields) != expected:
        raise _wrong_width(len(fields), expected, number, path)
    return [f.strip() for f in fields]


def _wrong_width(given: int, expected: int, number: int, path: Path) -> DataError:
    return DataError(
        f"{path}, line {number}: {given} fields where line 2 states {expected}: a truncated line, or wrong dimensions"
    )


def _gct_rows(
    stream: IO[bytes], n_rows: int, lead: int, width: int, first_line: int, path: Path
) -> tuple[list[int], list[list[str]]]:
    """Offset and leading fields of each gene's line; the values stay unparsed."""
    offset = stream.tell()
    offsets, leads = [], []
    for i in range(n_rows):
        line = stream.readline()
        if not line.strip():
            raise DataError(f"{path} ends at line {first_line + i - 1}: {i} of the {n_rows} rows that line 2 states")
        if line.count(b"\t") + 1 != width:
            raise _wrong_width(line.count(b"\t") + 1, width, first_line + i, path)
        offsets.append(offset)
        leads.append([_text(f).strip() for f in line.split(b"\t", lead)[:lead]])
        offset += len(line)
    for number, line in enumerate(stream, start=first_line + n_rows):
        if line.strip():
            raise DataError(f"{path}, line {number}: more rows than the {n_rows} that line 2 states")
    return offsets, leads


def _gct_values(
    stream: IO[bytes], layout: _GctLayout, samples: NDArray[np.int64], genes: NDArray[np.int64], path: Path
) -> NDArray[np.float32]:
    x = np.empty((len(samples), len(genes)), np.float32)
    fields = (samples + layout.lead).tolist()
    for k in np.argsort(genes).tolist():  # in file order, so that a gzipped file is unpacked once
        gene = int(genes[k])
        stream.seek(layout.offsets[gene])
        cells = _text(stream.readline()).rstrip("\r\n").split("\t")
        try:
            x[:, k] = [float(cells[f]) for f in fields]
        except ValueError:
            where = f"{path}, line {layout.first_line + gene}"
            x[:, k] = [_number(cells[f], where, layout.obs.index[f - layout.lead]) for f in fields]
    x[x == MISSING_NUMBER] = np.nan
    return x


def _number(cell: str, where: str, sample: str) -> float:
    if cell.strip().lower() in MISSING:
        return float("nan")
    try:
        return float(cell)
    except ValueError:
        raise DataError(f"{where}, sample {sample!r}: {cell[:40]!r} is not a number") from None


# ---------------------------------------------------------------------------------------------------------------- GCTX


def _gctx_matrix(file: Any, path: Path) -> Any:
    matrix = file.get("0/DATA/0/matrix")
    if matrix is None or not hasattr(matrix, "dtype"):
        raise DataError(f"{path} has no dataset 0/DATA/0/matrix: it is HDF5, but no GCTX")
    if matrix.ndim != 2 or matrix.dtype.kind not in "fiu":
        raise DataError(
            f"{path}: 0/DATA/0/matrix has shape {matrix.shape} of {matrix.dtype}: expected numbers, samples x genes"
        )
    return matrix


def _gctx_table(file: Any, group: str, length: int, path: Path) -> pd.DataFrame:
    """The datasets of one META group as a table, by ``id``."""
    if f"{group}/id" not in file:
        raise DataError(f"{path} has no dataset {group}/id: a GCTX names its samples in COL/id and its genes in ROW/id")
    columns: dict[str, NDArray[Any]] = {}
    for name, dataset in file[group].items():
        if getattr(dataset, "shape", None) != (length,):
            raise DataError(
                f"{path}: {group}/{name} has shape {getattr(dataset, 'shape', 'of a group')}, but 0/DATA/0/matrix has "
                f"{length} {'samples' if group.endswith('COL') else 'genes'}: the matrix must be samples x genes"
            )
        columns[name] = dataset[()]
    names = [_identifier(v) for v in columns.pop("id")]
    _refuse_duplicates(names, f"{path}: duplicate ids in {group}/id")
    return _frame(columns, names)


def _gctx_values(matrix: Any, samples: NDArray[np.int64], genes: NDArray[np.int64]) -> NDArray[np.float32]:
    """Values [samples, genes], block by block: never more than a block of the matrix in memory besides the result.

    Blocks are whole chunks where the matrix is chunked, so that no chunk is unpacked twice.
    """
    rows_step, columns_step = BLOCK, matrix.shape[1]
    if matrix.chunks is not None:
        rows_step = matrix.chunks[0] * max(1, BLOCK // matrix.chunks[0])
        columns_step = matrix.chunks[1]
    x = np.empty((len(samples), len(genes)), np.float32)
    gene_blocks = _blocks(genes, columns_step)
    for into_rows in _blocks(samples, rows_step):
        rows = samples[into_rows]
        for into_columns in gene_blocks:
            columns = genes[into_columns]
            block = matrix[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
            x[np.ix_(into_rows, into_columns)] = block[np.ix_(rows - rows.min(), columns - columns.min())]
    x[x == MISSING_NUMBER] = np.nan
    return x


def _blocks(positions: NDArray[np.int64], step: int) -> list[NDArray[np.int64]]:
    """Indices into `positions`, grouped by which block of `step` they fall in."""
    order = np.argsort(positions, kind="stable")
    block = positions[order] // step
    return np.split(order, np.flatnonzero(np.diff(block)) + 1)


# ---------------------------------------------------------------------------------------------------- names and values


def _text(raw: bytes) -> str:
    """UTF-8, or Latin-1 where it is not: older files write the micro sign as one byte."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return raw.decode("latin-1")


def _identifier(value: object) -> str:
    """An id as text; 5720, 5720.0 and b'5720' are all '5720'."""
    if isinstance(value, bytes):
        return _text(value).strip()
    if isinstance(value, float | np.floating) and float(value).is_integer():
        return str(int(value))
    return str(value).strip()


def _refuse_duplicates(names: Iterable[str], what: str) -> None:
    index = pd.Index(list(names))
    if not index.is_unique:
        raise DataError(f"{what}: {listing(index[index.duplicated()].unique())}; each must appear once")


def _frame(columns: Mapping[str, Any], names: Sequence[str]) -> pd.DataFrame:
    index = pd.Index(list(names), dtype=object)
    return pd.DataFrame({str(name): _cleaned(str(name), values) for name, values in columns.items()}, index=index)


def _cleaned(name: str, values: Any) -> NDArray[Any]:
    """A metadata column: missing values as NaN or None, ids as text, other columns as numbers where all of it is.

    An all-missing column is NaN, so that every file format can store it.
    """
    array = values if isinstance(values, np.ndarray) else np.asarray(values, dtype=object)
    if array.dtype.kind == "b":
        return array
    if array.dtype.kind in "fiu" and not _NAMES.search(name):
        absent = array == MISSING_NUMBER
        return np.where(absent, np.asarray(np.nan, np.result_type(array, np.float32)), array) if absent.any() else array
    cells = [None if pd.isna(v) else _identifier(v) for v in array]
    cells = [None if c is None or c.lower() in MISSING else c for c in cells]
    if all(c is None for c in cells):
        return np.full(len(cells), np.nan)
    if not _NAMES.search(name):
        try:
            return _numbers([np.nan if c is None else float(c) for c in cells])
        except ValueError:
            pass
    return np.asarray(cells, dtype=object)


def _numbers(values: list[float]) -> NDArray[Any]:
    array = np.asarray(values, np.float64)
    array[array == MISSING_NUMBER] = np.nan
    whole = bool(np.isfinite(array).all()) and bool((array == np.round(array)).all()) and np.abs(array).max() < 2**53
    return array.astype(np.int64) if whole else array


def _positions(selection: Selection, table: pd.DataFrame, where: str) -> NDArray[np.int64]:
    """A selection of a table's rows as positions, in the order asked for."""
    everything = np.arange(len(table))
    if callable(selection):
        selection = selection(table)
    if selection is None:
        return everything
    if isinstance(selection, slice):
        chosen = everything[selection]
    else:
        chosen = _from_values(np.asarray(selection), table.index, where)
    if not len(chosen):
        raise DataError(f"{where}: the selection is empty: it must keep at least one of the {len(table)}")
    _refuse_duplicates(table.index[chosen], f"{where}: selected twice")
    return chosen


def _from_values(values: NDArray[Any], index: "pd.Index[Any]", where: str) -> NDArray[np.int64]:
    if values.ndim != 1:
        raise DataError(f"{where}: a selection is a list of ids, of positions or of booleans, not {values.tolist()!r}")
    if values.dtype.kind == "b":
        if len(values) != len(index):
            raise DataError(f"{where}: a mask of {len(values)} for {len(index)}: it needs one boolean for each")
        return np.flatnonzero(values)
    if values.dtype.kind in "iu":
        outside = values[(values < 0) | (values >= len(index))]
        if len(outside):
            raise DataError(
                f"{where}: position {listing(outside.tolist())} is outside 0 to {len(index) - 1} "
                "(integers are positions; give ids as strings)"
            )
        return values.astype(np.int64)
    found = index.get_indexer(pd.Index([_identifier(v) for v in values], dtype=object))
    if (found < 0).any():
        raise DataError(f"{where}: no id {listing(str(v) for v in values[found < 0])}; the ids are {listing(index, 3)}")
    return np.asarray(found, np.int64)


# ------------------------------------------------------------------------------------------------------------ metadata


def join_metadata(
    adata: "AnnData",
    *,
    signatures: Table | None = None,
    perturbations: Table | None = None,
    cells: Table | None = None,
    genes: Table | None = None,
) -> "AnnData":
    """The columns of the GEO tables added to obs and var; values that are there already stay, gaps are filled.

    Args:
        adata: from `read`.
        signatures: ``*_sig_info*`` (level 5) or ``*_inst_info*`` (level 3 and 4): a path (tab or comma separated, .gz
            allowed) or a DataFrame with ``sig_id``, ``inst_id`` or ``distil_id``, matched with the sample names.
        perturbations: ``*_pert_info*``, by ``pert_id``.
        cells: ``*_cell_info*``, by ``cell_id``.
        genes: ``*_gene_info*``, by ``pr_gene_id``, matched with ``var["pr_gene_id"]`` or else the gene names.

    Returns:
        A copy. Perturbations and cells are looked up after the signatures were joined.

    Raises:
        DataError: a table without its id column or with contradictory rows, and samples or genes that are not in it.
    """
    joined = adata.copy()
    obs, var = joined.obs, joined.var
    if signatures is not None:
        obs = _joined(obs, [obs.index], signatures, _SAMPLE_IDS, "signatures", "sample")
    if perturbations is not None:
        keys = _key_columns(obs, ("pert_id",), "perturbations")
        obs = _joined(obs, keys, perturbations, ("pert_id",), "perturbations", "sample")
    if cells is not None:
        keys = _key_columns(obs, ("cell_id", "cell_iname", "cell_line"), "cells")
        obs = _joined(obs, keys, cells, ("cell_id", "cell_iname"), "cells", "sample")
    if genes is not None:
        keys = [var["pr_gene_id"]] if "pr_gene_id" in var else [var.index]
        var = _joined(var, keys, genes, ("pr_gene_id", "gene_id"), "genes", "gene")
    joined.obs, joined.var = obs, var
    return joined


def _key_columns(obs: pd.DataFrame, names: Sequence[str], what: str) -> "list[pd.Series[Any]]":
    found = [obs[name] for name in names if name in obs]
    if not found:
        raise DataError(
            f"{what}: obs has no column {listing(names)} to look the table up by; join signatures=... first "
            f"(obs has {listing(obs.columns, 10)})"
        )
    return found


def _joined(
    frame: pd.DataFrame,
    keys: "Sequence[pd.Series[Any] | pd.Index[Any]]",
    source: Table,
    id_names: Sequence[str],
    what: str,
    kind: str,
    *,
    table_wins: bool = False,
) -> pd.DataFrame:
    """`frame` with the table's columns, looked up by whichever pair of key and id column matches most of its rows."""
    table, where = _table(source, what)
    ids = [name for name in id_names if name in table]
    if not ids:
        raise DataError(f"{where}: no id column {listing(id_names)}; there are {listing(table.columns, 10)}")
    texts = [pd.Series([_identifier(v) for v in key], index=frame.index, dtype=object) for key in keys]
    columns = {name: table[name].map(_identifier) for name in ids}
    pairs = [(key, name) for key in texts for name in ids]
    key, name = max(pairs, key=lambda pair: int(pair[0].isin(set(columns[pair[1]])).sum()))
    unknown = frame.index[~key.isin(set(columns[name]))]
    if len(unknown):
        raise DataError(
            f"{where}: no metadata for {len(unknown)} of {len(frame)} {kind}s ({listing(unknown)}; {name} "
            f"{listing(key[unknown].unique())}): give the table of the same release, or drop these {kind}s"
        )
    table = table.drop(columns=name).set_index(pd.Index(columns[name], dtype=object))
    table = table[table.index.isin(set(key))]
    table = table[~table.reset_index().astype(str).duplicated().to_numpy()]
    _refuse_duplicates(table.index, f"{where}: rows that differ for one {name}")
    return _merged(frame, table.reindex(pd.Index(key)).set_axis(frame.index), table_wins)


def _merged(frame: pd.DataFrame, table: pd.DataFrame, table_wins: bool) -> pd.DataFrame:
    merged = frame.copy()
    for name in table:
        new = _cleaned(str(name), table[name].to_numpy())
        if name in frame:
            old = frame[name].to_numpy()
            first, second = (new, old) if table_wins else (old, new)
            gaps = pd.isna(first)
            if not gaps.any():
                new = first
            else:
                new = _cleaned(str(name), np.where(gaps, second.astype(object), first.astype(object)))
        merged[name] = new
    return merged


def _table(source: Table, what: str) -> tuple[pd.DataFrame, str]:
    """A metadata table and how messages call it; values of a file are text until `_cleaned`."""
    if isinstance(source, pd.DataFrame):
        named = source.index.name is not None and source.index.name not in source
        return (source.reset_index() if named else source), f"{what} table"
    path = Path(source)
    same: dict[str, str] = {}  # cells repeat, and the largest table has 1.3 million rows
    rows = []
    with _reading(path), _open(path) as stream:
        first = _text(stream.readline())
        text = chain([first], map(_text, stream))
        # tab-separated names hold bare quotes (5'-deoxy...), and id lists longer than the csv module reads
        lines = (line.rstrip("\r\n").split("\t") for line in text) if "\t" in first else csv.reader(text)
        header = [name.strip() for name in next(lines, [])]
        _refuse_duplicates(header, f"{path}, line 1: duplicate columns")
        for number, row in enumerate(lines, start=2):
            if row and row != [""]:
                if len(row) != len(header):
                    raise DataError(f"{path}, line {number}: {len(row)} fields where the header has {len(header)}")
                rows.append([same.setdefault(cell, cell) for cell in row])
    if not rows:
        raise DataError(f"{path} has no rows: a metadata table has a header and at least one row")
    return pd.DataFrame(rows, columns=pd.Index(header), dtype=object), str(path)


# ------------------------------------------------------------------------------------------------------- dose and time


def parse_dose(value: object, unit: object = None) -> float:
    """A dose in uM: ``"500 nM"`` is 0.5; NaN where it is missing or its unit is not a concentration (%, ng, ul).

    Args:
        value: text with a unit (``"10.0 um"``, ``"10 µM"``), or a number.
        unit: the unit, where the value has none of its own.

    Returns:
        uM, or NaN. A number without any unit is unknown, hence NaN; of ``"300|300.0"`` both parts must agree.
    """
    return _quantity(value, unit, _MICROMOLAR)


def parse_time(value: object, unit: object = None) -> float:
    """A time in hours: ``"24 h"``, ``"6 H"`` or ``"30 m"`` (0.5); NaN where it or its unit is missing or unknown.

    Args:
        value: text with a unit, or a number.
        unit: the unit, where the value has none of its own.

    Returns:
        hours, or NaN.
    """
    return _quantity(value, unit, _HOURS)


def _quantity(value: object, unit: object, factors: Mapping[str, Fraction]) -> float:
    text = "" if value is None else str(value).strip()
    if "|" in text:
        parts = {_quantity(part, unit, factors) for part in text.split("|")}
        return parts.pop() if len(parts) == 1 else float("nan")
    found = _QUANTITY.fullmatch(text)
    if text.lower() in MISSING or found is None:
        return float("nan")
    own = (found[2] or str(unit)).strip().lower().replace("\u00b5", "u").replace("\u03bc", "u")
    factor = factors.get(own)
    number = Fraction(found[1])  # exact, so that 40 nM is the float 0.04 and not a neighbour of it
    return float(number * factor) if factor is not None and number >= 0 else float("nan")


def standardise(adata: "AnnData", *, control_names: Sequence[str] = ("DMSO",)) -> "AnnData":
    """The obs columns that the rest of the package reads, from whatever the L1000 release called them.

    ``perturbation`` (pert_iname, else pert_desc, else pert_id), ``pert_id``, ``pert_type`` (lower case), ``dose`` (uM;
    pert_idose, else pert_dose with its unit), ``time`` (h), ``cell_line``, ``smiles``, ``plate`` (rna_plate, else
    det_plate), ``well`` and ``control``. The source columns stay.

    Args:
        adata: from `read` or `join_metadata`.
        control_names: perturbations that are controls besides those whose pert_type is ctl_vehicle, ctl_untrt or
            ctl_vector (for an shRNA plate, say, ``("EMPTY", "GFP")``); case does not matter.

    Returns:
        A copy; a column without a source is left out. Controls have dose 0, whatever the file records for the vehicle.

    Raises:
        DataError: no column names the perturbation.
    """
    result = adata.copy()
    obs = result.obs
    new: dict[str, NDArray[Any]] = {}
    for name, sources in _TEXT_SOURCES.items():
        present = [obs[source] for source in sources if source in obs]
        if present:
            new[name] = _first_known(present)
    if "perturbation" not in new:
        raise DataError(
            f"no obs column of {listing(_TEXT_SOURCES['perturbation'])} names the perturbation: obs has "
            f"{listing(obs.columns, 10)}; join the sig_info or inst_info table with join_metadata first"
        )
    if "pert_type" in new:
        new["pert_type"] = np.asarray([t if pd.isna(t) else t.lower() for t in new["pert_type"]], dtype=object)
    new["control"] = _is_control(new, control_names)
    for name, quantities, parse in (("dose", _DOSE_SOURCES, parse_dose), ("time", _TIME_SOURCES, parse_time)):
        values = _first_number(obs, quantities, parse)
        if values is not None:
            new[name] = values
    if "dose" in new:
        new["dose"][new["control"]] = 0.0
    for name in _STANDARD:
        if name in new:
            obs[name] = new[name]
    return result


def _first_known(columns: "Sequence[pd.Series[Any]]") -> NDArray[Any]:
    values = np.full(len(columns[0]), None, dtype=object)
    for column in columns:
        texts = np.asarray(column.astype(object), dtype=object)
        gaps = pd.isna(values) & ~pd.isna(texts)
        values[gaps] = [_identifier(v) for v in texts[gaps]]
    return _cleaned("name", values)


def _is_control(columns: Mapping[str, NDArray[Any]], control_names: Sequence[str]) -> NDArray[np.bool_]:
    names = {name.lower() for name in control_names}
    control = np.zeros(len(columns["perturbation"]), bool)
    for name in ("perturbation", "pert_id"):
        if name in columns:
            control |= np.asarray([str(v).lower() in names for v in columns[name]])
    if "pert_type" in columns:
        control |= np.asarray([str(v).startswith(_CONTROL_TYPES) for v in columns["pert_type"]])
    return control


def _first_number(
    obs: pd.DataFrame, sources: Sequence[tuple[str, str | None]], parse: Callable[[object, object], float]
) -> NDArray[np.float64] | None:
    present = [(value, unit) for value, unit in sources if value in obs]
    if not present:
        return None
    result = np.full(len(obs), np.nan)
    for value, unit in present:
        # to_numpy keeps float32, whose shortest text is the dose that was written: 44.4, not 44.400001525878906
        texts = [str(v) for v in obs[value].to_numpy()]
        units = [str(v) for v in obs[unit].to_numpy()] if unit in obs else [unit] * len(obs)
        pairs = list(zip(texts, units, strict=True))
        known = {pair: parse(*pair) for pair in set(pairs)}
        numbers = np.asarray([known[pair] for pair in pairs])
        result = np.where(np.isnan(result), numbers, result)
    return result


# ---------------------------------------------------------------------------------------------------------- level 3


def centre_on_vehicle(
    adata: "AnnData",
    *,
    plate: str = "plate",
    control: str = "control",
    statistic: str = "median",
    scale: bool = False,
    floor: float = 0.1,
) -> "AnnData":
    """Subtract m_p, or take (x - m_p) / (1.4826 MAD_p), with m_p and MAD_p of a gene over the vehicle wells of plate p.

    The scaled form with floor 0.1 is the vehicle-controlled level 4 z-score (Subramanian et al. 2017).

    Args:
        adata: level 3 (log2 expression). Z-scores (``uns["l1000_level"]`` 4 or 5) are refused.
        plate: obs column.
        control: boolean obs column of the vehicle wells.
        statistic: "median" or "mean".
        scale: divide by the robust spread.
        floor: smallest MAD (log2 units): a saturated gene has none, and must not blow up.

    Returns:
        A copy with the centred X (NaN stays NaN) and ``uns["l1000_centred"]``.

    Raises:
        DataError: names the plates without vehicle wells (with `scale`: with fewer than two); columns that are not
            there; z-scores; an unknown statistic.
    """
    _check_centring(adata, plate, control, statistic, floor)
    x = np.array(adata.X.toarray() if hasattr(adata.X, "toarray") else adata.X, dtype=np.float32)
    vehicle = adata.obs[control].to_numpy(bool)
    plates = adata.obs[plate].astype(str).to_numpy()
    needed = 2 if scale else 1
    names = list(dict.fromkeys(plates))
    short = [name for name in names if int(vehicle[plates == name].sum()) < needed]
    if short:
        raise DataError(
            f"plate {listing(short)}: fewer than {needed} vehicle wells ({control!r} is true in none or too few): "
            "centring needs them; drop the plate or mark its controls"
        )
    for name in names:
        wells = plates == name
        reference = pd.DataFrame(x[wells & vehicle])  # its median and mean skip NaN without a warning
        centre = reference.median() if statistic == "median" else reference.mean()
        x[wells] -= centre.to_numpy(np.float32)
        if scale:
            spread = (reference - reference.median()).abs().median().clip(lower=floor) * _MAD_TO_SIGMA
            x[wells] /= spread.to_numpy(np.float32)
    result = adata.copy()
    result.X = x
    result.uns["l1000_centred"] = {"statistic": statistic, "scaled": scale}
    return result


def _check_centring(adata: "AnnData", plate: str, control: str, statistic: str, floor: float) -> None:
    if statistic not in ("median", "mean"):
        raise DataError(f"statistic={statistic!r}: expected 'median' or 'mean'")
    if not floor > 0:
        raise DataError(f"floor={floor}: the smallest MAD must be positive")
    level = adata.uns.get("l1000_level")
    if level in (4, 5):
        raise DataError(
            f"these are level {level} z-scores, which are relative to controls already: centre level 3 instead "
            "(or correct adata.uns['l1000_level'] if it is wrong)"
        )
    for name in (plate, control):
        if name not in adata.obs:
            raise DataError(f"no obs column {name!r}: run standardise first; obs has {listing(adata.obs.columns, 10)}")
    if adata.obs[plate].isna().any():
        unknown = adata.obs_names[adata.obs[plate].isna()]
        raise DataError(f"obs column {plate!r} is missing in {len(unknown)} samples ({listing(unknown)})")
    if adata.obs[control].dtype.kind != "b":
        raise DataError(f"obs column {control!r} has type {adata.obs[control].dtype}: expected booleans")


# -------------------------------------------------------------------------------------------------------------- plates


def load_plates(paths: Sequence[str | Path], obs: Table | None = None, genes: Sequence[str] | None = None) -> "AnnData":
    """Several plates, standardised and stacked on their common genes.

    Genes are matched by Entrez id (``pr_gene_id``) where every file has it, else by symbol, else by row id: symbols
    change over the years (CABC1 became ADCK3). Names and annotation of the genes are those of the first file.

    Args:
        paths: GCT or GCTX files of one level.
        obs: more sample annotation, by sample id (sig_id, inst_id, distil_id, id) or by ``plate`` and ``well``; where
            it has a value it replaces the file's.
        genes: symbols or ids to keep, in this order. None: all common genes, in the first file's order.

    Returns:
        samples of all files in order x genes; obs has the columns of `standardise` and of `obs`.

    Raises:
        DataError: no file, samples that appear twice, files of different levels, no common gene, unknown genes, samples
            that `obs` does not have.
    """
    from anndata import AnnData

    if isinstance(paths, str | Path) or not len(paths):
        raise DataError(f"paths={paths!r}: give a list of GCT or GCTX files")
    plates = [standardise(read(path)) for path in paths]
    levels = {plate.uns["l1000_level"] for plate in plates if "l1000_level" in plate.uns}
    if len(levels) > 1:
        raise DataError(f"{listing(str(p) for p in paths)}: levels {sorted(levels)} do not go together in one matrix")
    keys = _gene_keys([plate.var for plate in plates])
    common = _common_genes(keys, plates[0].var, genes)
    x = np.concatenate([plate.X[:, key.get_indexer(common)] for plate, key in zip(plates, keys, strict=True)])
    samples = pd.Index([name for plate in plates for name in plate.obs_names], dtype=object)
    _refuse_duplicates(samples, f"{listing(str(p) for p in paths)}: samples in more than one file")
    var = plates[0].var.iloc[keys[0].get_indexer(common)].copy()
    var.index = _gene_names(var, common)
    table = _stacked([plate.obs for plate in plates], samples)
    if obs is not None:
        table = _annotated(table, obs)
    result = AnnData(X=x, obs=table, var=var)
    if levels:
        result.uns["l1000_level"] = levels.pop()
    return result


def _gene_keys(tables: Sequence[pd.DataFrame]) -> "list[pd.Index[Any]]":
    """One unique name per gene and file, of the best kind that every file has."""
    for name in ("pr_gene_id", "pr_gene_symbol"):
        if all(name in t and t[name].notna().all() and t[name].is_unique for t in tables):
            return [pd.Index(t[name].map(_identifier), dtype=object) for t in tables]
    return [t.index for t in tables]


def _common_genes(keys: "Sequence[pd.Index[Any]]", var: pd.DataFrame, genes: Sequence[str] | None) -> "pd.Index[Any]":
    shared = set(keys[0]).intersection(*keys[1:])
    if not shared:
        raise DataError(f"the files have no gene in common: {listing(keys[0], 3)}, but {listing(keys[-1], 3)}")
    if genes is None:
        genes = [key for key in keys[0] if key in shared]
    columns: list[Any] = [keys[0], *(var[c] for c in ("pr_gene_symbol", "pr_gene_id") if c in var), var.index]
    lookup = {str(name): key for column in reversed(columns) for name, key in zip(column, keys[0], strict=True)}
    unknown = [g for g in genes if lookup.get(g) not in shared]
    if unknown:
        raise DataError(f"genes {listing(unknown)} are not in all files; {len(shared)} are, e.g. {listing(keys[0], 3)}")
    if not len(genes):
        raise DataError("genes is empty: name at least one, or leave it out for all common genes")
    chosen: pd.Index[Any] = pd.Index([lookup[g] for g in genes], dtype=object)
    _refuse_duplicates(chosen, "genes: named twice")
    return chosen


def _gene_names(var: pd.DataFrame, common: "pd.Index[Any]") -> "pd.Index[Any]":
    symbols = var.get("pr_gene_symbol")
    if symbols is None or symbols.isna().any() or not symbols.is_unique:
        return common
    return pd.Index([str(symbol) for symbol in symbols], dtype=object)


def _stacked(tables: Sequence[pd.DataFrame], samples: "pd.Index[Any]") -> pd.DataFrame:
    columns: dict[str, NDArray[Any]] = {}
    for name in _STANDARD:
        if any(name in table for table in tables):
            parts = [t[name].to_numpy() if name in t else np.full(len(t), np.nan) for t in tables]
            columns[name] = np.concatenate([p.astype(object) for p in parts])
    columns = {name: _as_standard(name, values) for name, values in columns.items()}
    return pd.DataFrame(columns, index=samples)


def _as_standard(name: str, values: NDArray[Any]) -> NDArray[Any]:
    if name == "control":
        return values.astype(bool)
    return values.astype(np.float64) if name in ("dose", "time") else _cleaned("name", values)


def _annotated(obs: pd.DataFrame, source: Table) -> pd.DataFrame:
    """`obs` with the user's table, by sample id or else by plate and well."""
    table, _ = _table(source, "obs")
    if not {"plate", "well"} <= set(table.columns) or any(name in table for name in _SAMPLE_IDS):
        return _joined(obs, [obs.index], table, _SAMPLE_IDS, "obs", "sample", table_wins=True)
    wells = [f"{p}:{w}" for p, w in zip(*(_key_columns(obs, (c,), "obs")[0] for c in ("plate", "well")), strict=True)]
    table = table.assign(id=table["plate"].astype(str) + ":" + table["well"].astype(str))
    return _joined(obs, [pd.Index(wells, dtype=object)], table, ("id",), "obs", "sample", table_wins=True)
