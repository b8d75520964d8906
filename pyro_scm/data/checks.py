"""Checks of an expression matrix before a model sees it: every message names cells and genes."""

from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import pandas as pd
import scipy.sparse as sp
from numpy.typing import NDArray

from pyro_scm.errors import DataError, listing

if TYPE_CHECKING:
    from anndata import AnnData

__all__ = ["check_matrix", "check_names", "looks_like_counts"]

Matrix: TypeAlias = "NDArray[Any] | sp.csr_matrix"


def looks_like_counts(x: Matrix) -> bool:
    """Whether every value is a non-negative whole number."""
    values = _values(x)
    return bool(len(values)) and bool((values >= 0).all() and (values == np.round(values)).all())


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
    """Check that x [N, G] is finite, and where it holds counts they are whole, non-negative and not all zero in a cell.

    Args:
        x: the matrix.
        cells: N names.
        genes: G names.
        counts: what x is meant to hold.
        where: its name in the messages.
        all_zero: allow cells without a count.

    Raises:
        DataError: names the first cell and gene at fault and how many there are.
    """
    values = _values(x)
    _refuse(x, ~np.isfinite(values), cells, genes, where, "is not finite", "remove NaN and infinities")
    if not counts:
        return
    _refuse(x, values < 0, cells, genes, where, "is negative", "counts cannot be; pass counts=False for z-scores")
    _refuse(x, values != np.round(values), cells, genes, where, "is not a whole number",
            "pass counts=False for log-normalised values, or name the layer of raw counts")  # fmt: skip
    if not all_zero:
        empty = np.asarray(x.sum(1)).ravel() == 0
        if empty.any():
            raise DataError(
                f"{where}: {int(empty.sum())} cells have no count ({listing(cells[empty])}): filter them out"
            )


def _values(x: Matrix) -> NDArray[Any]:
    return np.asarray(x.data if sp.issparse(x) else x)


def _refuse(
    x: Matrix,
    bad: NDArray[np.bool_],
    cells: "pd.Index[Any]",
    genes: "pd.Index[Any]",
    where: str,
    what: str,
    mend: str,
) -> None:
    if not bad.any():
        return
    if sp.issparse(x):
        coordinates = sp.coo_matrix(x)
        position = int(np.flatnonzero(bad)[0])
        i, j = int(coordinates.row[position]), int(coordinates.col[position])
        value = x.data[position]
    else:
        i, j = (int(k) for k in np.argwhere(bad)[0])
        value = x[i, j]
    raise DataError(
        f"{where}: {int(bad.sum())} values: the first, {value} in cell {cells[i]!r}, gene {genes[j]!r}, {what}: {mend}"
    )
