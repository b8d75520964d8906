"""GCT (text) and GCTX (HDF5) files as AnnData, the tables of metadata beside them, and the values that both hold.

Formats: the GCT 1.3 / GCTX description of the Connectivity Map. A file's rows are genes and become ``var``; its columns
are samples (wells or signatures) and become ``obs``.
"""

import csv
import gzip
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from pyro_scm.errors import DataError, listing

if TYPE_CHECKING:
    from anndata import AnnData

__all__ = ["gctx_matrix", "gctx_table", "read", "read_gct", "read_gctx"]

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
            a slice, or a function of the row metadata that gives one of these (``rows=l1000.landmarks``). None: all.
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
            matrix = gctx_matrix(file, path)
            obs = gctx_table(file, "0/META/COL", matrix.shape[0], path)
            var = gctx_table(file, "0/META/ROW", matrix.shape[1], path)
            genes = _positions(rows, var, f"{path}: rows")
            samples = _positions(columns, obs, f"{path}: columns")
            x = _gctx_values(matrix, samples, genes)
    return _anndata(x, obs.iloc[samples], var.iloc[genes], path)


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
    refuse_duplicates(samples, f"{path}, line 3: duplicate sample ids")
    refuse_duplicates(row_meta, f"{path}, line 3: duplicate names of row metadata")

    column_meta: dict[str, list[str]] = {}
    for number in range(4, 4 + n_column_meta):
        name, *values = _gct_fields(stream.readline(), lead + n_columns, number, path)
        if name in column_meta:
            raise DataError(f"{path}, line {number}: the column metadata {name!r} appears twice")
        column_meta[name] = values[lead - 1 :]

    first_line = 4 + n_column_meta
    offsets, leads = _gct_rows(stream, n_rows, lead, lead + n_columns, first_line, path)
    genes = [fields[0] for fields in leads]
    refuse_duplicates(genes, f"{path}: duplicate gene ids")
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


def gctx_matrix(file: Any, path: Path) -> Any:
    """The dataset of an open GCTX file's values, samples x genes.

    Raises:
        DataError: none, or of another form.
    """
    matrix = file.get("0/DATA/0/matrix")
    if matrix is None or not hasattr(matrix, "dtype"):
        raise DataError(f"{path} has no dataset 0/DATA/0/matrix: it is HDF5, but no GCTX")
    if matrix.ndim != 2 or matrix.dtype.kind not in "fiu":
        raise DataError(
            f"{path}: 0/DATA/0/matrix has shape {matrix.shape} of {matrix.dtype}: expected numbers, samples x genes"
        )
    return matrix


def gctx_table(file: Any, group: str, length: int, path: Path) -> pd.DataFrame:
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
    names = [identifier(v) for v in columns.pop("id")]
    refuse_duplicates(names, f"{path}: duplicate ids in {group}/id")
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
    refuse_duplicates(table.index[chosen], f"{where}: selected twice")
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
    found = index.get_indexer(pd.Index([identifier(v) for v in values], dtype=object))
    if (found < 0).any():
        raise DataError(f"{where}: no id {listing(str(v) for v in values[found < 0])}; the ids are {listing(index, 3)}")
    return np.asarray(found, np.int64)


def read_table(source: Table, what: str) -> tuple[pd.DataFrame, str]:
    """A metadata table and how messages call it; values of a file are text until `cleaned`."""
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
        refuse_duplicates(header, f"{path}, line 1: duplicate columns")
        for number, row in enumerate(lines, start=2):
            if row and row != [""]:
                if len(row) != len(header):
                    raise DataError(f"{path}, line {number}: {len(row)} fields where the header has {len(header)}")
                rows.append([same.setdefault(cell, cell) for cell in row])
    if not rows:
        raise DataError(f"{path} has no rows: a metadata table has a header and at least one row")
    return pd.DataFrame(rows, columns=pd.Index(header), dtype=object), str(path)


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


def _text(raw: bytes) -> str:
    """UTF-8, or Latin-1 where it is not: older files write the micro sign as one byte."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return raw.decode("latin-1")


def identifier(value: object) -> str:
    """An id as text; 5720, 5720.0 and b'5720' are all '5720'."""
    if isinstance(value, bytes):
        return _text(value).strip()
    if isinstance(value, float | np.floating) and float(value).is_integer():
        return str(int(value))
    return str(value).strip()


def refuse_duplicates(names: Iterable[str], what: str) -> None:
    """Raise for names that are not unique."""
    index = pd.Index(list(names))
    if not index.is_unique:
        raise DataError(f"{what}: {listing(index[index.duplicated()].unique())}; each must appear once")


def _frame(columns: Mapping[str, Any], names: Sequence[str]) -> pd.DataFrame:
    index = pd.Index(list(names), dtype=object)
    return pd.DataFrame({str(name): cleaned(str(name), values) for name, values in columns.items()}, index=index)


def cleaned(name: str, values: Any) -> NDArray[Any]:
    """A metadata column: missing values as NaN or None, ids as text, other columns as numbers where all of it is.

    An all-missing column is NaN, so that every file format can store it.
    """
    array = values if isinstance(values, np.ndarray) else np.asarray(values, dtype=object)
    if array.dtype.kind == "b":
        return array
    if array.dtype.kind in "fiu" and not _NAMES.search(name):
        absent = array == MISSING_NUMBER
        return np.where(absent, np.asarray(np.nan, np.result_type(array, np.float32)), array) if absent.any() else array
    cells = [None if pd.isna(v) else identifier(v) for v in array]
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
