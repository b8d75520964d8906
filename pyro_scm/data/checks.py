"""Checks of an expression matrix before a model sees it: every message names cells and genes."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import pandas as pd
import scipy.sparse as sp
from numpy.typing import NDArray

from pyro_scm.errors import DataError, listing

if TYPE_CHECKING:
    from anndata import AnnData

__all__ = ["Survey", "check_matrix", "check_names", "looks_like_counts", "survey"]

Matrix: TypeAlias = "NDArray[Any] | sp.csr_matrix"

# kind of value -> what messages say of it, and what to do about it
_FAULTS = {
    "infinite": ("is not finite", "remove NaN and infinities"),
    "negative": ("is negative", "counts cannot be; pass counts=False for z-scores"),
    "broken": (
        "is not a whole number",
        "pass counts=False for log-normalised values, or name the layer of raw counts",
    ),
}


@dataclass(frozen=True)
class Survey:
    """What one pass over a matrix [N, G] finds.

    Args:
        faults: kind of value that may be wrong -> how many there are, and row, column and value of the first.
        totals: ``[N]`` sum of each row.
        empty: whether no value is stored at all.
    """

    faults: dict[str, tuple[int, int, int, object]]
    totals: NDArray[Any]
    empty: bool

    @property
    def counts(self) -> bool:
        """Whether every value is a non-negative whole number."""
        return not self.empty and not self.faults.keys() & {"negative", "broken"}

    def check(
        self,
        cells: "pd.Index[Any]",
        genes: "pd.Index[Any]",
        *,
        counts: bool,
        where: str = "X",
        all_zero: bool = False,
    ) -> None:
        """Check that the values are finite, and if they are counts whole, non-negative and not all zero in a cell.

        Args:
            cells: N names.
            genes: G names.
            counts: what the matrix is meant to hold.
            where: its name in the messages.
            all_zero: allow cells without a count.

        Raises:
            DataError: names the first cell and gene at fault and how many there are.
        """
        for kind in _FAULTS if counts else ("infinite",):
            if kind in self.faults:
                number, i, j, value = self.faults[kind]
                what, mend = _FAULTS[kind]
                raise DataError(
                    f"{where}: {number} values: the first, {value} in cell {cells[i]!r}, gene {genes[j]!r}, "
                    f"{what}: {mend}"
                )
        empty = self.totals == 0
        if counts and not all_zero and empty.any():
            raise DataError(
                f"{where}: {int(empty.sum())} cells have no count ({listing(cells[empty])}): filter them out"
            )


def survey(blocks: Iterable[tuple[int, Matrix]]) -> Survey:
    """Look at every value of a matrix once.

    Args:
        blocks: (first row, rows) in order.
    """
    faults: dict[str, tuple[int, int, int, object]] = {}
    totals, empty = [], True
    for start, x in blocks:
        values = _values(x)
        empty = empty and not len(values)
        for kind, bad in (
            ("infinite", ~np.isfinite(values)),
            ("negative", values < 0),
            ("broken", values != np.round(values)),
        ):
            number = int(np.count_nonzero(bad))
            if number and kind in faults:
                faults[kind] = (faults[kind][0] + number, *faults[kind][1:])
            elif number:
                i, j, value = _first(x, bad)
                faults[kind] = (number, start + i, j, value)
        with np.errstate(all="ignore"):
            totals.append(np.asarray(x.sum(1)).ravel())
    return Survey(faults, np.concatenate(totals) if totals else np.empty(0, np.float32), empty)


def looks_like_counts(x: Matrix) -> bool:
    """Whether every value is a non-negative whole number."""
    return survey([(0, x)]).counts


def check_names(adata: "AnnData") -> None:
    """Cells and genes are there and have unique names.

    Raises:
        DataError: none, or duplicates.
    """
    if adata.n_obs == 0 or adata.n_vars == 0:
        raise DataError(f"the AnnData has {adata.n_obs} cells and {adata.n_vars} genes: it must have some of both")
    for what, index, mend in (("cell", adata.obs_names, "obs"), ("gene", adata.var_names, "var")):
        if not index.is_unique:
            double = index[index.duplicated()].unique()
            raise DataError(f"duplicate {what} names {listing(double)}: call adata.{mend}_names_make_unique() first")


def check_matrix(
    x: Matrix,
    cells: "pd.Index[Any]",
    genes: "pd.Index[Any]",
    *,
    counts: bool,
    where: str = "X",
    all_zero: bool = False,
) -> None:
    """`Survey.check` of a matrix in memory."""
    survey([(0, x)]).check(cells, genes, counts=counts, where=where, all_zero=all_zero)


def _values(x: Matrix) -> NDArray[Any]:
    return np.asarray(x.data if sp.issparse(x) else x)


def _first(x: Matrix, bad: NDArray[np.bool_]) -> tuple[int, int, object]:
    """Row, column and value of the first that is bad."""
    position = int(bad.argmax())
    if sp.issparse(x):
        row = int(np.searchsorted(x.indptr, position, side="right")) - 1
        return row, int(x.indices[position]), x.data[position]
    row, column = divmod(position, x.shape[1])
    return row, column, x[row, column]
