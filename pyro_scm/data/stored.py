"""`StoredMatrix`: expression that stays on disk, in an .h5ad file, a zarr folder or a GCTX file.

Layouts: AnnData's on-disk format (``X`` and ``layers/*``, dense or CSR) and GCTX (``0/DATA/0/matrix``).
"""

import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import numpy as np
import pandas as pd
import scipy.sparse as sp
from numpy.typing import NDArray

from pyro_scm.data.gct import MISSING_NUMBER, gctx_matrix, gctx_table, refuse_duplicates
from pyro_scm.errors import DataError, listing

if TYPE_CHECKING:
    from anndata import AnnData

__all__ = ["StoredCells", "StoredMatrix", "blocks"]

Values: TypeAlias = "NDArray[Any] | sp.csr_matrix"
Matrix: TypeAlias = "Values | StoredMatrix"
Index: TypeAlias = NDArray[np.int64]

_BLOCK_VALUES = 8 << 20  # of a block: 32 MB in float32
_RUN = 1024  # rows of the file read at once
_GAP = 16  # rows that are read and dropped: one more request costs more than they do


def blocks(x: Matrix) -> Iterator[tuple[int, Values]]:
    """(first row, rows) of a matrix in order, on disk or in memory; the same blocks for the same shape."""
    size = max(1, min(8192, _BLOCK_VALUES // max(x.shape[1], 1)))
    if isinstance(x, StoredMatrix):
        yield from x.blocks(size)
        return
    for start in range(0, x.shape[0], size):
        yield start, x[start : start + size]


class StoredMatrix:
    """Some rows and columns of a matrix that stays on disk.

    Indexing gives another view and reads nothing. The file is opened when it is first read, once in every process;
    copies share it.

    Args:
        source: the matrix in its file.
        rows: that this view has, in its order; all by default.
        columns: likewise.
    """

    def __init__(self, source: "_Source", rows: Index | None = None, columns: Index | None = None) -> None:
        self._source, self._rows, self._columns = source, rows, columns
        self.shape = (
            source.shape[0] if rows is None else len(rows),
            source.shape[1] if columns is None else len(columns),
        )

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of what `read` gives: float32 where the file is dense, the file's own where it is sparse."""
        return self._source.dtype

    def __repr__(self) -> str:
        return f"StoredMatrix({self.shape[0]} x {self.shape[1]} of {self._source.path}: {self._source.key})"

    def __getitem__(self, key: Any) -> "StoredMatrix":
        rows, columns = key if isinstance(key, tuple) else (key, slice(None))
        return StoredMatrix(
            self._source, _chosen(self._rows, self.shape[0], rows), _chosen(self._columns, self.shape[1], columns)
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> "StoredMatrix":
        return self  # nothing of it ever changes

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        return self.toarray().astype(dtype or np.float32, copy=False)

    def read(self, rows: NDArray[np.integer[Any]]) -> Values:
        """Some rows: dense float32, or CSR of the file's own type.

        Rows that lie close together are read as one slice of the file.

        Args:
            rows: positions in this view, from 0, in any order.

        Raises:
            DataError: a file that is damaged, or has changed since it was opened.
        """
        wanted = np.asarray(rows, np.int64)
        if len(wanted) and not (wanted.min() >= 0 and wanted.max() < self.shape[0]):
            raise IndexError(f"rows {wanted.min()} to {wanted.max()} of a matrix of {self.shape[0]}")
        if self._rows is not None:
            wanted = self._rows[wanted]
        if bool((np.diff(wanted) > 0).all()):
            return self._source.read(wanted, self._columns)
        ascending, place = np.unique(wanted, return_inverse=True)
        return self._source.read(ascending, self._columns)[place]

    def blocks(self, size: int) -> Iterator[tuple[int, Values]]:
        """(first row, rows) in order, `size` rows at a time."""
        for start in range(0, self.shape[0], size):
            yield start, self.read(np.arange(start, min(start + size, self.shape[0])))

    def toarray(self) -> NDArray[np.float32]:
        """All of it, dense float32; never more than a block of it in another form."""
        dense = np.empty(self.shape, np.float32)
        for start, block in blocks(self):
            dense[start : start + block.shape[0]] = block.toarray() if sp.issparse(block) else block
        return dense

    def load(self, limit: float = float("inf")) -> Values:
        """All of it, as `read` gives it.

        Args:
            limit: bytes that it may take as dense float32.

        Raises:
            DataError: it would take more.
        """
        need = 4 * self.shape[0] * self.shape[1]
        if need > limit:
            raise DataError(
                f"{self._source.path}: {self.shape[0]} cells x {self.shape[1]} genes would take {need / 1e9:.1f} GB in "
                "memory: take fewer with subset(...), or load() them if you have it"
            )
        return self.read(np.arange(self.shape[0]))


def _chosen(present: Index | None, number: int, key: Any) -> Index | None:
    if isinstance(key, slice) and key == slice(None):
        return present
    every = np.arange(number) if present is None else present
    return np.atleast_1d(every[key])


# ---------------------------------------------------------------------- the matrix in its file
class _Source:
    """A matrix in its file: what is known of it, and how ascending rows of it are read."""

    def __init__(self, path: Path, key: str, missing: float | None = None) -> None:
        self.path, self.key, self.missing = path, key, missing
        self._opened: tuple[int, tuple[Any, ...]] | None = None
        with _reading(path, key):
            self._stamp = self._state()
            node = _root(path)[key]
            self.sparse = not hasattr(node, "dtype")
            self.shape: tuple[int, int] = self._shape(node)
            values = node["data"] if self.sparse else node
            if values.dtype.kind not in "fiub":
                raise DataError(f"{path}: {key} has dtype {values.dtype}: expression must be numbers")
            self.dtype = np.dtype(values.dtype if self.sparse else np.float32)
            self.indptr = self._starts(node) if self.sparse else np.empty(0, np.int64)

    def close(self) -> None:
        """Close the file until the next reading."""
        self._opened = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": None}

    def _shape(self, node: Any) -> tuple[int, int]:
        if not self.sparse:
            if len(node.shape) != 2:
                raise DataError(f"{self.path}: {self.key} has shape {node.shape}: expected cells x genes")
            return int(node.shape[0]), int(node.shape[1])
        # before AnnData 0.7 the attributes had other names
        kind = str(node.attrs.get("encoding-type", node.attrs.get("h5sparse_format", "nothing known")))
        if kind.startswith("csc"):
            raise DataError(
                f"{self.path}: {self.key} is stored gene by gene (CSC), so that no cell can be read without reading "
                "all: write it cell by cell (X = X.tocsr()), or read it into memory with EnvironmentDataset.read"
            )
        if not kind.startswith("csr"):
            raise DataError(f"{self.path}: {self.key} holds {kind!r}: expected a dense or a CSR matrix")
        rows, columns = node.attrs.get("shape", node.attrs.get("h5sparse_shape"))
        return int(rows), int(columns)

    def _starts(self, node: Any) -> Index:
        starts = np.asarray(node["indptr"][:], np.int64)
        lengths = (node["data"].shape[0], node["indices"].shape[0])
        if (
            len(starts) != self.shape[0] + 1
            or starts[0] != 0
            or (np.diff(starts) < 0).any()
            or lengths != (starts[-1], starts[-1])
        ):
            raise DataError(
                f"{self.path}: {self.key} is damaged: {len(starts)} row starts up to {starts.max(initial=0)} for "
                f"{self.shape[0]} cells with {lengths[0]} values in {lengths[1]} columns"
            )
        return starts

    def _state(self) -> list[tuple[int, int]]:
        """Size and time of change of the file, or of a zarr array's metadata."""
        if not self.path.is_dir():
            paths: Iterable[Path] = [self.path]
        else:
            folders = (self.path / self.key, self.path / self.key / "data", self.path / self.key / "indices")
            paths = [f / name for f in folders for name in ("zarr.json", ".zarray", ".zattrs") if (f / name).exists()]
        return [(s.st_size, s.st_mtime_ns) for s in map(os.stat, paths)]

    @property
    def arrays(self) -> tuple[Any, ...]:
        """Data and indices, or the dense matrix, opened by this process."""
        if self._opened is None or self._opened[0] != os.getpid():
            node = _root(self.path)[self.key]
            self._opened = os.getpid(), (node["data"], node["indices"]) if self.sparse else (node,)
        return self._opened[1]

    def read(self, rows: Index, columns: Index | None) -> Values:
        """Ascending rows of the file, each once."""
        with _reading(self.path, self.key):
            if self._state() != self._stamp:
                raise DataError(f"{self.path} has changed since it was opened: open it again")
            return self._sparse(rows, columns) if self.sparse else self._dense(rows, columns)

    def _dense(self, rows: Index, columns: Index | None) -> NDArray[np.float32]:
        every = np.arange(self.shape[1]) if columns is None else columns
        first, stop = (int(every.min()), int(every.max()) + 1) if len(every) else (0, 0)
        found = np.empty((len(rows), len(every)), np.float32)
        for run in _runs(rows):
            top = rows[run.start]
            part = self.arrays[0][top : rows[run.stop - 1] + 1, first:stop]
            part = part if len(part) == run.stop - run.start else part[rows[run] - top]
            found[run] = part if columns is None else part[:, columns - first]
        if self.missing is not None:
            found[found == self.missing] = np.nan
        return found

    def _sparse(self, rows: Index, columns: Index | None) -> sp.csr_matrix:
        # as large as they could become: memory that is not written to is not taken
        most = int((self.indptr[rows + 1] - self.indptr[rows]).sum())
        data, indices = np.empty(most, self.dtype), np.empty(most, self.arrays[1].dtype)
        starts = np.zeros(len(rows) + 1, np.int64)
        for run in _runs(rows):
            part = self._run(rows[run], columns)
            begin = starts[run.start]
            data[begin : begin + part.nnz], indices[begin : begin + part.nnz] = part.data, part.indices
            starts[run.start + 1 : run.stop + 1] = begin + part.indptr[1:]
        width = self.shape[1] if columns is None else len(columns)
        return sp.csr_matrix((data[: starts[-1]], indices[: starts[-1]], starts), shape=(len(rows), width))

    def _run(self, rows: Index, columns: Index | None) -> sp.csr_matrix:
        """Rows that are read as one slice."""
        first, stop = int(rows[0]), int(rows[-1]) + 1
        begin, end = int(self.indptr[first]), int(self.indptr[stop])
        data, indices = (np.asarray(array[begin:end]) for array in self.arrays)
        if len(indices) and not (indices.min() >= 0 and indices.max() < self.shape[1]):
            raise DataError(
                f"{self.path}: {self.key} is damaged: a value of cells {first} to {stop - 1} is in column "
                f"{indices.max()} of {self.shape[1]}"
            )
        starts = self.indptr[first : stop + 1] - begin
        part = sp.csr_matrix((data, indices, starts), shape=(stop - first, self.shape[1]))
        if len(rows) < stop - first:
            part = part[rows - first]
        return part if columns is None else part[:, columns]


def _runs(rows: Index) -> Iterator[slice]:
    """Slices of ascending rows, each without a large gap and not longer than is read at once."""
    after_gap = [*(np.flatnonzero(np.diff(rows) > _GAP) + 1).tolist(), len(rows)]
    start = 0
    for end in after_gap:
        while start < end:
            stop = start + int(np.searchsorted(rows[start:end], rows[start] + _RUN))
            yield slice(start, stop)
            start = stop


# ---------------------------------------------------------------------- files
class StoredCells:
    """The parts of an AnnData that `EnvironmentDataset.from_anndata` reads; each is read when it is asked for.

    Args:
        path: an .h5ad file, a zarr folder that AnnData wrote, or a GCTX file.
        obs: annotation of the cells by their names, instead of the file's own.

    Raises:
        DataError: no such file, none of these three, or cells that `obs` does not have.
    """

    def __init__(self, path: str | Path, obs: pd.DataFrame | None = None) -> None:
        self.path = path = Path(path)
        self._sources: list[_Source] = []
        if not path.exists():
            raise DataError(f"{path}: no such file: give the path of an .h5ad file, a zarr folder or a .gctx file")
        with _reading(path, "the file"):
            self._root = root = _root(path)
            self._gctx = "0/DATA/0/matrix" in root
            if self._gctx:
                matrix = gctx_matrix(root, path)
                self.obs = gctx_table(root, "0/META/COL", matrix.shape[0], path)
                self.var = gctx_table(root, "0/META/ROW", matrix.shape[1], path)
            elif "obs" in root and "var" in root:
                self.obs, self.var = self._element("obs"), self._element("var")
            else:
                raise DataError(f"{path} has neither obs and var nor 0/DATA/0/matrix: AnnData or GCTX is expected")
        if obs is not None:
            absent = self.obs.index[~self.obs.index.isin(obs.index)]
            if len(absent):
                raise DataError(f"{path}: obs has no row for {len(absent)} of its cells ({listing(absent)}): add them")
            refuse_duplicates(obs.index, f"{path}: obs names cells twice")
            self.obs = obs.loc[self.obs.index]

    def close(self) -> None:
        """Close the file: nothing more of it can be asked for here, and matrices open it again when they are read.

        Otherwise the traceback of a later error would keep it open, and it could not be written anew.
        """
        self._root = None
        for source in self._sources:
            source.close()

    @property
    def n_obs(self) -> int:
        """Number of cells."""
        return len(self.obs)

    @property
    def n_vars(self) -> int:
        """Number of genes."""
        return len(self.var)

    @property
    def obs_names(self) -> "pd.Index[Any]":
        """Names of the cells."""
        return self.obs.index

    @property
    def var_names(self) -> "pd.Index[Any]":
        """Names of the genes."""
        return self.var.index

    @cached_property
    def X(self) -> StoredMatrix | None:
        """Expression; None where there is none."""
        if self._gctx:
            return self._matrix("0/DATA/0/matrix", MISSING_NUMBER)
        empty = "X" not in self._root or self._root["X"].attrs.get("encoding-type") == "null"
        return None if empty else self._matrix("X")

    @cached_property
    def layers(self) -> Mapping[str, StoredMatrix]:
        """Expression of other kinds."""
        return self._elements("layers", self._matrix)

    @cached_property
    def obsm(self) -> Mapping[str, Any]:
        """Tables with a row a cell."""
        return self._elements("obsm", self._element)

    @cached_property
    def uns(self) -> Mapping[str, Any]:
        """Whatever else is there."""
        return self._elements("uns", self._element)

    def annotation(self) -> "AnnData":
        """Everything but the expression."""
        from anndata import AnnData

        return AnnData(obs=self.obs.copy(), var=self.var.copy(), obsm=dict(self.obsm), uns=dict(self.uns))

    def _matrix(self, key: str, missing: float | None = None) -> StoredMatrix:
        self._sources.append(_Source(self.path, key, missing))
        matrix = StoredMatrix(self._sources[-1])
        if matrix.shape != (self.n_obs, self.n_vars):
            raise DataError(
                f"{self.path}: {key} has {matrix.shape[0]} rows and {matrix.shape[1]} columns for {self.n_obs} cells "
                f"and {self.n_vars} genes"
            )
        return matrix

    def _element(self, key: str) -> Any:
        from anndata.io import read_elem

        with _reading(self.path, key), warnings.catch_warnings():  # AnnData reads its older formats, and says so
            warnings.simplefilter("ignore")
            return read_elem(self._root[key])

    def _elements(self, group: str, read: Callable[[str], Any]) -> "_Elements":
        names = list(self._root[group].keys()) if group in self._root and not self._gctx else []
        return _Elements(group, names, read)


class _Elements(Mapping[str, Any]):
    """Parts of a file by name, each read when it is asked for."""

    def __init__(self, group: str, names: Iterable[str], read: Callable[[str], Any]) -> None:
        self._keys, self._read = {name: f"{group}/{name}" for name in names}, read

    def __getitem__(self, name: str) -> Any:
        return self._read(self._keys[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)


def _root(path: Path) -> Any:
    """The file, opened for reading. It is closed when nothing that was taken from it is left."""
    if not path.is_dir():
        import h5py

        return h5py.File(path, "r")
    try:
        import zarr
    except ImportError as error:
        raise DataError(f"{path}: zarr cannot be imported ({error}): install pyro-scm[zarr]") from error
    return cast(Any, zarr).open_group(str(path), mode="r")


@contextmanager
def _reading(path: Path, what: str) -> Iterator[None]:
    """What HDF5, zarr and AnnData raise over a bad file, as a DataError that names it."""
    try:
        yield
    except (DataError, MemoryError):
        raise
    except Exception as error:  # of many kinds, and all mean an unreadable file
        raise DataError(
            f"{path}: {what} cannot be read ({type(error).__name__}: {error}): truncated, damaged or of another kind?"
        ) from error
