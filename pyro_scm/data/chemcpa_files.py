"""The h5ad files that chemCPA publishes: sci-Plex 3 (``sciplex_complete_*.h5ad``) and LINCS (``lincs_full_*.h5ad``).

Their columns, as its preprocessing notebooks write them (github.com/theislab/chemCPA, Hetzel et al., NeurIPS 2022):

| meaning | sci-Plex 3 | LINCS |
|---|---|---|
| drug | condition (or product_name, whose first word is the drug) | condition |
| dose | dose, nM | pert_dose, uM |
| share of the largest dose | dose_val; 1 for controls too | dose_val |
| structure | SMILES | canonical_smiles |
| control | control (0 or 1), named control | control, named DMSO |
| cell line | cell_type | cell_type |
| split | split_ood_finetuning, split_ho_pathway, split_random, ... | split |
| gene | var gene_id (Ensembl, without version), else the names | likewise |

Expression is log-normalised. dose_val of two files is in different units, so that a dose in uM is read instead.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from pyro_scm.errors import DataError, listing, nearest

if TYPE_CHECKING:
    from anndata import AnnData

__all__ = ["CONTROL", "in_order", "read", "sides", "standardise"]

CONTROL = "control"
"""Name of the control in what `standardise` returns, whatever the file calls it."""

_DRUG = ("condition", "product_name")
_SMILES = ("SMILES", "canonical_smiles", "smiles_rdkit", "smiles")
_CELL_LINE = ("cell_type", "cell_id")
_DOSES = (("pert_dose", 1.0), ("dose", 1e-3))  # uM, and nM in sci-Plex 3
_CONTROLS = ("control", "dmso", "vehicle")
_SIDES = {"train": "train", "test": "validation", "ood": "test"}


def read(path: str | Path, *, largest: float | None = None) -> "AnnData":
    """One of the files, with the columns of `standardise`; every error names the file.

    Args:
        path: of the file.
        largest: see `standardise`.

    Raises:
        DataError: no such file, a damaged one, or see `standardise`.
    """
    import anndata

    if not Path(path).is_file():
        raise DataError(f"{path}: no such file: give the path of an .h5ad file that chemCPA published")
    try:
        adata = anndata.read_h5ad(path)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: not a readable .h5ad file ({type(error).__name__}: {error})") from error
    try:
        return standardise(adata, largest=largest)
    except DataError as error:
        raise DataError(f"{path}: {error}") from error


def standardise(adata: "AnnData", *, largest: float | None = None) -> "AnnData":
    """obs columns drug, dose (uM, 0 in controls), cell_line, smiles (None in controls) and control; genes by id.

    Args:
        adata: of either layout.
        largest: uM of the largest dose, for a file that has the shares dose_val alone.

    Returns:
        A copy whose other columns stay.

    Raises:
        DataError: a column that is missing or cannot be used, no control cells, drugs without SMILES or with several,
            or genes that occur twice.
    """
    result = adata.copy()
    obs = result.obs
    names = _column(obs, _DRUG, "the drug").astype(str).str.strip()
    if "condition" not in obs:
        names = names.str.split(" ").str[0]
    control = _controls(obs, names)
    smiles = _column(obs, _SMILES, "the structure").astype(object)
    smiles = smiles.where(smiles.notna() & ~smiles.astype(str).isin(("", "nan", "None")), None)
    _check_structures(names[~control], smiles[~control])
    obs["drug"] = np.where(control, CONTROL, names)
    obs["dose"] = np.where(control, 0.0, _micromolar(obs, ~control, largest))
    obs["cell_line"] = _column(obs, _CELL_LINE, "the cell line").astype(str).to_numpy()
    obs["smiles"] = smiles.where(~control, None)
    obs["control"] = control
    ids = result.var["gene_id"] if "gene_id" in result.var else pd.Series(result.var_names, result.var_names)
    genes = ids.astype(str).str.split(".").str[0]
    if genes.duplicated().any():
        raise DataError(f"gene {listing(genes[genes.duplicated()].unique())} occurs twice: keep one column of each")
    result.var_names = pd.Index(genes.to_numpy(), name=None)
    return result


def in_order(adata: "AnnData", genes: Sequence[str]) -> "AnnData":
    """The cells with these genes in this order: what was fitted to one file asks the same columns of another.

    Args:
        adata: of `standardise`.
        genes: such as ``run.schema.genes``.

    Raises:
        DataError: genes that the file has not, or that are asked for twice.
    """
    known = set(adata.var_names)
    lacking = [g for g in genes if g not in known]
    if lacking:
        raise DataError(
            f"{len(lacking)} of {len(genes)} genes are not in the file, such as {listing(lacking)}; it has "
            f"{listing(nearest(str(lacking[0]), adata.var_names))}: take the genes of both files, by one kind of name"
        )
    if len(set(genes)) < len(genes):
        raise DataError("a gene is asked for twice: name each once")
    return adata[:, list(genes)].copy()


def sides(adata: "AnnData", column: str) -> NDArray[np.object_]:
    """``[N]`` "train", "validation" or "test" of each cell: what the files call train, test and ood.

    Args:
        adata: of `standardise`.
        column: such as ``"split_ood_finetuning"``.

    Raises:
        DataError: no such column, or other values.
    """
    if column not in adata.obs:
        known = [name for name in adata.obs if str(name).startswith("split")]
        raise DataError(f"obs has no column {column!r}: its splits are {listing(known, 20) or 'none'}")
    values = adata.obs[column].astype(str)
    unknown = sorted(set(values) - set(_SIDES))
    if unknown:
        raise DataError(f"obs[{column!r}] has the value {listing(unknown)}: use {listing(_SIDES)}")
    found: NDArray[np.object_] = values.map(_SIDES).to_numpy(object)
    return found


def _column(obs: pd.DataFrame, names: Sequence[str], what: str) -> "pd.Series[Any]":
    for name in names:
        if name in obs:
            return obs[name]
    raise DataError(f"no obs column {listing(names)} names {what}: obs has {listing(obs.columns, 20)}")


def _controls(obs: pd.DataFrame, names: "pd.Series[str]") -> NDArray[np.bool_]:
    named = names.str.lower().isin(_CONTROLS).to_numpy(bool)
    if "control" in obs:
        values = pd.to_numeric(obs["control"].astype(str).replace({"True": "1", "False": "0"}), errors="coerce")
        if not values.isin([0, 1]).all():
            row = obs.index[~values.isin([0, 1]).to_numpy()][0]
            raise DataError(f"obs['control'] is {obs.loc[row, 'control']} in row {str(row)!r}: use 0 or 1")
        marked = values.to_numpy() == 1
        if (marked != named).any():
            name = names[marked != named].iloc[0]
            raise DataError(
                f"obs['control'] and the drug's name disagree for {name!r}: mark {listing(_CONTROLS)} alone"
            )
    if not named.any():
        raise DataError(f"no control cells: none has a drug named {listing(_CONTROLS)}")
    return named


def _check_structures(names: "pd.Series[str]", smiles: "pd.Series[Any]") -> None:
    lacking = names[smiles.isna()].unique()
    if len(lacking):
        raise DataError(f"no SMILES for {listing(lacking)}: fill the column, or drop the cells of these drugs")
    several = smiles.groupby(names).nunique()
    if (several > 1).any():
        raise DataError(f"several SMILES for {listing(several.index[several > 1])}: write one for each drug")


def _micromolar(obs: pd.DataFrame, perturbed: NDArray[np.bool_], largest: float | None) -> NDArray[np.float64]:
    """Doses in uM, checked where cells are perturbed."""
    known = [(name, unit) for name, unit in _DOSES if name in obs]
    if known:
        name, unit = known[0]
    elif "dose_val" in obs:
        if largest is None:
            raise DataError("doses are shares of the largest one (dose_val) alone: give the largest dose in uM")
        name, unit = "dose_val", largest
    else:
        raise DataError(f"no obs column 'pert_dose', 'dose' or 'dose_val': obs has {listing(obs.columns, 20)}")
    values = np.asarray(pd.to_numeric(obs[name].astype(str), errors="coerce"), np.float64) * unit
    bad = perturbed & ~(np.isfinite(values) & (values >= 0))
    if bad.any():
        row = obs.index[np.flatnonzero(bad)[0]]
        raise DataError(f"obs[{name!r}] is {obs.loc[row, name]} in row {str(row)!r}: give a dose of 0 or more")
    return values
