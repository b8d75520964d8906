"""`EnvironmentDataset`: cells, the table of environments they were measured in, and its representation."""

import warnings
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch
from numpy.typing import NDArray
from torch import Tensor

from pyro_scm.batch import Batch, Schema, Statistics
from pyro_scm.data.checks import check_matrix, check_names, survey
from pyro_scm.data.representations import PARTS, Representation, represent
from pyro_scm.data.stored import Matrix, StoredCells, StoredMatrix, Values, blocks
from pyro_scm.errors import DataError, listing, nearest

if TYPE_CHECKING:
    from anndata import AnnData

__all__ = ["EnvironmentDataset"]

UNS_KEY = "pyro_scm"
_LOADED_BYTES = 2 << 30  # of stored expression, dense, that is read into memory without being asked to


@dataclass(frozen=True, eq=False)
class EnvironmentDataset:
    """N cells in E environments.

    Args:
        x: ``[N, G]`` expression, dense, CSR or left on disk: counts, or continuous values (log1p-normalised, z-scores,
            ...).
        env: ``[N]`` int64, each cell's environment.
        environments: E rows, indexed by the environment's name, with columns perturbation (``A+B`` for a combination),
            dose (uM), time (h), cell_line, smiles, targets and is_reference.
        representation: ``[E, F]`` float32, what a model knows of each environment.
        features: names of its F columns.
        obs: N rows of annotation, indexed by cell name.
        var: G rows of annotation, indexed by gene name.
        counts: whether x holds counts.
        size: ``[N]`` library size; ones where x does not hold counts.
        covariates: name -> ``[N]`` int64 category.
        categories: name -> names of a covariate's categories.
        y: ``[N, P]`` protein counts, NaN in cells without them, or None.
        proteins: names of the P proteins.
        origin: ``[N]`` rows of the data set that this one was split from; what tells two splits apart.
    """

    x: Matrix
    env: NDArray[np.int64]
    environments: pd.DataFrame
    representation: NDArray[np.float32]
    features: tuple[str, ...]
    obs: pd.DataFrame
    var: pd.DataFrame
    counts: bool
    size: NDArray[np.float32]
    covariates: Mapping[str, NDArray[np.int64]]
    categories: Mapping[str, tuple[str, ...]]
    y: NDArray[np.float32] | None = None
    proteins: tuple[str, ...] = ()
    origin: NDArray[np.int64] | None = None

    # ------------------------------------------------------------------ AnnData in and out
    @classmethod
    def from_anndata(
        cls,
        adata: "AnnData",
        *,
        environment: str | None = None,
        control: str | Sequence[str] | None = None,
        representation: Representation | None = None,
        dose: str | None = None,
        time: str | None = None,
        cell_line: str | None = None,
        smiles: str | None = None,
        targets: str | None = None,
        covariates: Sequence[str] = (),
        layer: str | None = None,
        size: str | None = None,
        proteins: str | None = None,
        counts: bool | None = None,
        radius: int = 2,
        bits: int = 1024,
        separator: str = "+",
        missing_smiles: str = "error",
    ) -> "EnvironmentDataset":
        """Read cells from an AnnData; an environment is a distinct (perturbation, dose, time, cell line).

        Args:
            adata: cells by genes.
            environment: obs column of the perturbation. May be left out for an AnnData that `to_anndata` wrote.
            control: its value(s) in unperturbed cells; they make the reference environment(s).
            representation: see `represent`; ``"one-hot"`` by default.
            dose: obs column, uM (``"1.0+0.5"`` for a combination).
            time: obs column, h.
            cell_line: obs column.
            smiles: obs column.
            targets: obs column naming the latent or gene an environment acts on, where that is known.
            covariates: obs columns of cell covariates (batch, replicate, cell type).
            layer: layer to read instead of X.
            size: obs column of the library size; by default each cell's total count.
            proteins: obsm key of surface-protein counts; rows of NaN where they were not measured.
            counts: True if x holds counts, False if it is continuous; None to tell by looking.
            radius: of Morgan fingerprints.
            bits: of Morgan fingerprints.
            separator: between the parts of a combination.
            missing_smiles: ``"zero"`` describes drugs without SMILES by zeros; by default they are an error.

        Raises:
            DataError: a column, value or number that cannot be used; the message names it.

        Example:
            >>> cells = EnvironmentDataset.from_anndata(adata, environment="perturbation", control="control")
            >>> len(cells), len(cells.genes), len(cells.environments)
            (180, 6, 9)
        """
        stored = adata.uns.get(UNS_KEY)
        if environment is None:
            if stored is None:
                raise DataError(
                    "environment is missing: name the obs column of the perturbation; "
                    f"this AnnData has {listing(adata.obs.columns, 20)}"
                )
            return cls._restore(adata, stored)
        check_names(adata)
        x = _matrix(adata, layer)
        where = f"layer {layer!r}" if layer else "X"
        found = survey(blocks(x))
        is_counts = found.counts if counts is None else counts
        found.check(adata.obs_names, adata.var_names, counts=is_counts, where=where, all_zero=size is not None)
        columns = {"dose": dose, "time": time, "cell_line": cell_line}
        table, env = _environment_table(
            adata.obs, environment, control, {k: v for k, v in columns.items() if v}, smiles, targets, separator
        )
        kind = "one-hot" if representation is None else representation
        r, features = represent(
            table, kind, radius=radius, bits=bits, separator=separator, missing_smiles=missing_smiles
        )
        codes, categories = _covariates(adata.obs, covariates)
        y, protein_names = _proteins(adata, proteins)
        return cls(
            x=x,
            env=env,
            environments=table,
            representation=r,
            features=tuple(features),
            obs=adata.obs.copy(),
            var=adata.var.copy(),
            counts=is_counts,
            size=_library_size(adata.obs, found.totals, size, is_counts),
            covariates=codes,
            categories=categories,
            y=y,
            proteins=protein_names,
            origin=np.arange(adata.n_obs),
        )

    @classmethod
    def _restore(cls, adata: "AnnData", stored: Mapping[str, Any]) -> "EnvironmentDataset":
        check_names(adata)
        x, counts = _matrix(adata, None), bool(stored["counts"])
        found = survey(blocks(x))
        found.check(adata.obs_names, adata.var_names, counts=counts, all_zero=True)
        table = stored["environments"].copy()
        table["is_reference"] = table["is_reference"].astype(bool)
        table["dose"] = _stored_doses(table["dose"])
        for column in ("perturbation", "cell_line", "smiles", "targets"):
            table[column] = table[column].astype(object).where(table[column].astype(str) != "", None)
        categories = {k: tuple(str(v) for v in vs) for k, vs in dict(stored.get("categories", {})).items()}
        proteins = tuple(str(name) for name in stored["proteins"])
        y, _ = _proteins(adata, "protein" if proteins else None)
        return cls(
            x=x,
            env=_stored_codes(adata.obs, "environment", [str(name) for name in table.index]),
            environments=table,
            representation=np.asarray(stored["representation"], np.float32),
            features=tuple(str(f) for f in stored["features"]),
            obs=adata.obs.copy(),
            var=adata.var.copy(),
            counts=counts,
            size=_library_size(adata.obs, found.totals, "size", counts),
            covariates={name: _stored_codes(adata.obs, name, values) for name, values in categories.items()},
            categories=categories,
            y=y,
            proteins=proteins,
            origin=np.arange(adata.n_obs),
        )

    def to_anndata(self) -> "AnnData":
        """Cells, annotation, environment table and representation as one AnnData; `from_anndata` reads it back."""
        from anndata import AnnData

        obs = self.obs.copy()
        obs["environment"] = pd.Categorical(self.environments.index[self.env], categories=self.environments.index)
        obs["size"] = self.size
        for name, codes in self.covariates.items():
            obs[name] = pd.Categorical.from_codes(codes, categories=pd.Index(list(self.categories[name])))
        table = self.environments.copy()
        for column in ("perturbation", "cell_line", "smiles", "targets"):  # HDF5 has no None
            table[column] = table[column].astype(object).where(table[column].notna(), "").astype(str)
        if table["dose"].map(lambda dose: isinstance(dose, str)).any():  # nor columns of numbers and texts
            table["dose"] = table["dose"].map(str)
        x = self.x.load() if isinstance(self.x, StoredMatrix) else self.x.copy()
        adata = AnnData(X=x, obs=obs, var=self.var.copy())
        if self.y is not None:
            adata.obsm["protein"] = self.y.copy()
        adata.uns[UNS_KEY] = {
            "environments": table,
            "representation": self.representation,
            "features": np.array(self.features, dtype=object).astype(str),
            "counts": self.counts,
            "proteins": np.array(self.proteins, dtype=object).astype(
                str
            ),  # their names may hold a slash, HDF5 keys not
            "categories": {k: np.array(v, dtype=object).astype(str) for k, v in self.categories.items()},
        }
        return adata

    @classmethod
    def read(cls, path: str | Path, **options: Any) -> "EnvironmentDataset":
        """`from_anndata` of an h5ad file; every error names the file."""
        adata = read_h5ad(path)
        with _naming(path):
            return cls.from_anndata(adata, **options)

    @classmethod
    def open(cls, path: str | Path, *, obs: pd.DataFrame | None = None, **options: Any) -> "EnvironmentDataset":
        """`from_anndata` of a file whose expression stays on disk and is read when it is asked for.

        The file must stay as it is. Its values are checked once, in blocks; annotation is in memory.

        Args:
            path: an .h5ad file or zarr folder that AnnData wrote, X or the layer dense or CSR; or a GCTX file, with
                obs and var from its metadata as `pyro_scm.data.gct.read_gctx` has them.
            obs: annotation by cell name, instead of the file's own.
            **options: of `from_anndata`.

        Raises:
            DataError: see `from_anndata`; no such file, a damaged one, or one stored gene by gene (CSC).
        """
        with closing(StoredCells(path, obs)) as cells, _naming(path):
            return cls.from_anndata(cast("AnnData", cells), **options)

    def load(self) -> "EnvironmentDataset":
        """The same cells with their expression in memory."""
        return replace(self, x=self.x.load()) if isinstance(self.x, StoredMatrix) else self

    # ------------------------------------------------------------------ sizes and names
    def __len__(self) -> int:
        return int(self.x.shape[0])

    @property
    def genes(self) -> tuple[str, ...]:
        """Names of the G genes."""
        return tuple(str(g) for g in self.var.index)

    @property
    def cells(self) -> tuple[str, ...]:
        """Names of the N cells."""
        return tuple(str(c) for c in self.obs.index)

    @property
    def reference(self) -> NDArray[np.bool_]:
        """``[E]`` True for reference environments."""
        return self.environments["is_reference"].to_numpy(dtype=bool)

    @property
    def present(self) -> NDArray[np.int64]:
        """Indices of the environments that have cells here."""
        return np.unique(self.env)

    @cached_property
    def schema(self) -> Schema:
        """Names, sizes and statistics of these cells. Take it from the training split: the statistics are its own."""
        depth = float(np.median(self.size)) if self.counts else 1.0
        mean, scale, total = self._moments(depth)
        proportion = (total + 1.0) / (total + 1.0).sum() if self.counts else np.zeros(len(total))
        return Schema(
            genes=self.genes,
            environments=tuple(str(n) for n in self.environments.index),
            features=self.features,
            counts=self.counts,
            covariates=dict(self.categories),
            proteins=self.proteins,
            cells=len(self),
            statistics=Statistics(
                mean=torch.as_tensor(mean, dtype=torch.float32),
                scale=torch.as_tensor(scale, dtype=torch.float32),
                proportion=torch.as_tensor(proportion, dtype=torch.float32),
                depth=depth,
                log_background=self._log_background(),
            ),
        )

    def _log_background(self) -> Tensor | None:
        """Of `Statistics`; 0 for a protein that no cell has measured."""
        if self.y is None:
            return None
        measured = self.y[~np.isnan(self.y).any(axis=1)]
        level = np.quantile(measured, 0.2, axis=0) if len(measured) else np.zeros(self.y.shape[1])
        return torch.as_tensor(np.log1p(level), dtype=torch.float32)

    # ------------------------------------------------------------------ cells out
    def __getitem__(self, index: Any) -> Batch:
        return self.batch(torch.as_tensor(np.arange(len(self))[index]).reshape(-1))

    def batch(self, index: Tensor | NDArray[np.int64] | None = None) -> Batch:
        """Cells by row number (all of them by default) as dense float32 tensors on the CPU.

        The plate's size is the number of cells in this data set, so a mini-batch's loss estimates the whole set's.
        """
        rows = np.arange(len(self)) if index is None else np.asarray(index, dtype=np.int64).copy()
        x: Any = self.x[rows]
        dense = x if isinstance(x, np.ndarray) else x.toarray()
        return replace(self.labels(rows), x=torch.as_tensor(dense.astype(np.float32, copy=False)))

    def labels(self, index: Tensor | NDArray[np.int64] | None = None) -> Batch:
        """What is known of cells besides their expression: a `batch` whose x is None."""
        rows = np.arange(len(self)) if index is None else np.asarray(index, dtype=np.int64).copy()
        env = self.env[rows]
        if len(self.environments) <= max(len(rows), 64):  # the whole table is cheaper than looking for duplicates
            distinct, row = np.arange(len(self.environments)), env
        else:
            distinct, row = np.unique(env, return_inverse=True)
        return Batch(
            index=torch.as_tensor(rows),
            env=torch.as_tensor(env),
            row=torch.as_tensor(row.astype(np.int64)),
            r=torch.as_tensor(self.representation[distinct]),
            perturbed=torch.as_tensor((~self.reference[distinct]).astype(np.float32)),
            total=len(self),
            y=None if self.y is None else torch.as_tensor(self.y[rows]),
            size=torch.as_tensor(self.size[rows]) if self.counts else None,
            covariates={name: torch.as_tensor(codes[rows]) for name, codes in self.covariates.items()},
        )

    def batches(self, size: int, order: NDArray[np.int64] | None = None) -> Iterator[Batch]:
        """All cells in mini-batches of `size`, in the given order."""
        rows = np.arange(len(self)) if order is None else order
        for start in range(0, len(rows), size):
            yield self.batch(rows[start : start + size])

    def normalised(self, depth: float | None = None) -> Values:
        """``[N, G]`` log1p(x / size * depth) where x holds counts, else x itself; sparse stays sparse.

        Args:
            depth: counts a cell is scaled to; by default the median library size of these cells.

        Raises:
            DataError: x is on disk and would take more than 2 GiB in memory; `normalised_blocks` reads it in parts.
        """
        x = self.x.load(_LOADED_BYTES) if isinstance(self.x, StoredMatrix) else self.x
        return _scaled(x, self._factor(depth)) if self.counts else x

    def normalised_blocks(self, depth: float | None = None) -> Iterator[tuple[int, Values]]:
        """`normalised` in parts: (first row, rows), in order."""
        factor = self._factor(depth)
        for start, x in blocks(self.x):
            yield start, _scaled(x, factor[start : start + x.shape[0]]) if self.counts else x

    def mean_expression(self, depth: float | None = None) -> pd.DataFrame:
        """Mean normalised expression, one row for each environment that has cells, one column a gene."""
        present, place, number = np.unique(self.env, return_inverse=True, return_counts=True)
        total = np.zeros((len(present), self.x.shape[1]))
        for start, x in self.normalised_blocks(depth):
            here, row = np.unique(place[start : start + x.shape[0]], return_inverse=True)
            member = sp.csr_matrix((np.ones(len(row)), (row, np.arange(len(row)))))
            total[here] += _dense(member @ x.astype(np.float64))
        mean = (total / number[:, None]).astype(np.float32)
        return pd.DataFrame(mean, index=self.environments.index[present], columns=list(self.genes))

    def _factor(self, depth: float | None) -> NDArray[np.float32]:
        """What each cell's counts are multiplied by."""
        return (depth or float(np.median(self.size))) / self.size

    def _moments(self, depth: float) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
        """Each gene's mean and standard deviation (1 where it is constant), normalised, and its total of x."""
        mean, square, total = np.zeros((3, self.x.shape[1]))
        factor = self._factor(depth)
        for start, x in blocks(self.x):
            if self.counts:
                total += np.asarray(x.sum(0, dtype=np.float64)).ravel()
                x = _scaled(x, factor[start : start + x.shape[0]])
            x = x.astype(np.float64)
            mean += np.asarray(x.sum(0)).ravel()
            square += np.asarray(x.multiply(x).sum(0)).ravel() if sp.issparse(x) else np.einsum("ij,ij->j", x, x)
        mean /= len(self)
        scale = np.sqrt(np.maximum(square / len(self) - mean**2, 0))
        return mean, np.where(scale < 1e-6 * np.maximum(1, np.abs(mean)), 1.0, scale), total

    # ------------------------------------------------------------------ other data sets from this one
    def subset(self, rows: NDArray[Any]) -> "EnvironmentDataset":
        """Some of the cells (mask or row numbers); the environment table stays whole, so that indices keep meaning.

        Raises:
            DataError: a mask that is not of one value a cell.
        """
        rows = np.asarray(rows)
        if rows.dtype == bool and rows.shape != (len(self),):
            raise DataError(f"a mask of shape {rows.shape} for {len(self)} cells: give one value for each")
        rows = np.flatnonzero(rows) if rows.dtype == bool else rows.astype(np.int64)
        return replace(
            self,
            x=self.x[rows],
            env=self.env[rows],
            obs=self.obs.iloc[rows],
            size=self.size[rows],
            covariates={name: codes[rows] for name, codes in self.covariates.items()},
            y=None if self.y is None else self.y[rows],
            origin=rows if self.origin is None else self.origin[rows],
        )

    def of(self, *environments: Hashable) -> "EnvironmentDataset":
        """The cells of the named environments.

        Raises:
            DataError: no such environment.
        """
        return self.subset(np.isin(self.env, self.environment_index(*environments)))

    def environment_index(self, *names: Hashable) -> NDArray[np.int64]:
        """Row numbers of environments in the table.

        Raises:
            DataError: no such environment; the message lists the nearest names.
        """
        known = {str(n): i for i, n in enumerate(self.environments.index)}
        for name in names:
            if str(name) not in known:
                raise DataError(
                    f"no environment {str(name)!r}: did you mean one of {listing(nearest(str(name), known))}?"
                )
        return np.array([known[str(n)] for n in names], dtype=np.int64)

    def same_compounds(self) -> pd.DataFrame:
        """Perturbations that are one compound under several names or as several salts.

        Returns:
            See `pyro_scm.data.chemistry.same_compound`; no rows where there are none, or no SMILES.

        Raises:
            DataError: a SMILES that is no molecule.
        """
        from pyro_scm.data.chemistry import same_compound

        drugs = self.environments.dropna(subset=["smiles"]).drop_duplicates("perturbation")
        drugs = drugs[~drugs["smiles"].astype(str).str.contains(PARTS, regex=False)]  # combinations
        return same_compound([str(s) for s in drugs["smiles"]], [str(p) for p in drugs["perturbation"]])

    def with_representation(self, kind: Representation, **options: Any) -> "EnvironmentDataset":
        """The same cells with another representation of their environments; see `represent`."""
        r, features = represent(self.environments, kind, **options)
        return replace(self, representation=r, features=tuple(features))


def _scaled(x: Values, factor: NDArray[np.float32]) -> Values:
    """log1p of counts times a factor for each cell."""
    if sp.issparse(x):
        scaled = x.copy()
        scaled.data = np.log1p(x.data * np.repeat(factor, np.diff(x.indptr))).astype(np.float32)
        return scaled
    dense: Values = np.log1p(x * factor[:, None]).astype(np.float32)
    return dense


def _dense(x: Any) -> NDArray[Any]:
    return x if isinstance(x, np.ndarray) else np.asarray(x.toarray())


# ---------------------------------------------------------------------- reading the parts
@contextmanager
def _naming(path: str | Path) -> Iterator[None]:
    """Errors that do not name the file yet."""
    try:
        yield
    except DataError as error:
        if str(error).startswith(str(path)):
            raise
        raise DataError(f"{path}: {error}") from error


def read_h5ad(path: str | Path) -> "AnnData":
    """An h5ad file as AnnData.

    Raises:
        DataError: no such file, or not an h5ad file.
    """
    import anndata

    if not Path(path).is_file():
        raise DataError(f"{path}: no such file: give the path of an .h5ad file")
    try:
        with warnings.catch_warnings():  # anndata reads files of its older versions correctly, and says that they are
            warnings.simplefilter("ignore", anndata.OldFormatWarning)
            warnings.simplefilter("ignore", FutureWarning)
            return anndata.read_h5ad(path)
    except Exception as error:  # HDF5 and anndata raise many kinds; all mean an unreadable file
        raise DataError(f"{path}: not a readable .h5ad file ({type(error).__name__}: {error})") from error


def _matrix(adata: "AnnData", layer: str | None) -> Matrix:
    if layer is not None and layer not in adata.layers:
        raise DataError(f"no layer {layer!r}: this AnnData has {listing(adata.layers.keys()) or 'none'}")
    x: Any = adata.layers[layer] if layer else adata.X
    if x is None:
        raise DataError("X is empty: give an AnnData with expression in X, or name a layer")
    if isinstance(x, StoredMatrix):
        return x
    if sp.issparse(x):
        sparse: Matrix = sp.csr_matrix(cast(Any, x))
        return sparse
    x = np.asarray(x)
    if x.dtype.kind not in "fiub":
        raise DataError(f"X has dtype {x.dtype}: expression must be numbers")
    dense: Matrix = x.astype(np.float32)
    return dense


def _environment_table(
    obs: pd.DataFrame,
    environment: str,
    control: str | Sequence[str] | None,
    columns: Mapping[str, str],
    smiles: str | None,
    targets: str | None,
    separator: str,
) -> tuple[pd.DataFrame, NDArray[np.int64]]:
    """E rows and each cell's row number: a row is a distinct (perturbation, dose, time, cell line).

    Doses count as one where they agree to six digits. A reference has no molecule, target or dose, whatever the
    columns say: a vehicle is often listed with the drug that it was measured for.
    """
    for name in (environment, *columns.values(), *(c for c in (smiles, targets) if c)):
        if name not in obs:
            raise DataError(f"no obs column {name!r}: this AnnData has {listing(obs.columns, 20)}")
    for name in (environment, *(v for k, v in columns.items() if k == "cell_line")):
        missing = obs.index[obs[name].isna()]
        if len(missing):
            raise DataError(
                f"obs column {name!r} is missing in {len(missing)} cells ({listing(missing)}): "
                "fill them or drop the cells"
            )
    keys = pd.DataFrame({"perturbation": obs[environment].astype(str)}, index=obs.index)
    controls = [control] if isinstance(control, str) else [str(c) for c in control or ()]
    known = set(keys["perturbation"])
    absent = [c for c in controls if c not in known]
    if absent:
        raise DataError(
            f"control {listing(absent)} is not in obs column {environment!r}: it has {listing(sorted(known), 10)}"
        )
    reference = keys["perturbation"].isin(controls)
    for kind, name in columns.items():
        keys[kind] = obs[name].astype(str) if kind == "cell_line" else _amount(obs[name], kind, name, separator)
    if "dose" in keys:
        keys.loc[reference, "dose"] = 0.0
    labels = _labels(keys, reference)
    names = keys.drop(columns="dose", errors="ignore").assign(label=labels).drop_duplicates()["label"]
    if names.duplicated().any():
        raise DataError(
            f"two environments would be called {names[names.duplicated()].iloc[0]!r}: "
            "rename perturbations or cell lines so that their names cannot be confused"
        )
    first = ~labels.duplicated()
    table = keys[first].set_axis(pd.Index(labels[first], name="environment"))
    for kind in ("dose", "time"):
        if kind not in table:
            table[kind] = np.nan
    for kind, column in (("cell_line", None), ("smiles", smiles), ("targets", targets)):
        if kind not in table:
            values = _constant(obs[~reference], labels[~reference], column, table.index) if column else None
            table[kind] = pd.Series(values, index=table.index, dtype=object)
    table["is_reference"] = reference[first].to_numpy()
    table = table[["perturbation", "dose", "time", "cell_line", "smiles", "targets", "is_reference"]]
    order = np.lexsort((np.arange(len(table)), ~table["is_reference"].to_numpy()))  # reference first, then as met
    table = table.iloc[order]
    position = pd.Series(np.arange(len(table)), index=table.index)
    return table, position[labels].to_numpy(np.int64)


def _amount(values: "pd.Series[Any]", kind: str, name: str, separator: str) -> "pd.Series[Any]":
    """Doses or times as numbers; doses of combinations as texts such as ``"1+0.5"``."""
    unit = "uM" if kind == "dose" else "h"
    numeric = pd.to_numeric(values.astype(object), errors="coerce").astype(float)
    text = values.astype(object).map(str)
    combined = numeric.isna() & text.map({t: kind == "dose" and _is_combined(t, separator) for t in text.unique()})
    bad = values.index[values.notna() & ~combined & ~np.isfinite(numeric)]
    if len(bad):
        raise DataError(f"{kind} column {name!r} holds {text[bad[0]]!r} (cell {bad[0]!r}): give numbers in {unit}")
    negative = values.index[numeric < 0]
    if len(negative):
        raise DataError(
            f"{kind} column {name!r} is negative in {listing(negative)}: "
            f"give {unit}, and NaN (not -666) where it is unknown"
        )
    if not combined.any():
        return numeric
    return numeric.astype(object).where(~combined, text)


def _is_combined(text: str, separator: str) -> bool:
    """Whether a text is several doses of 0 or more."""
    parts = pd.to_numeric(pd.Series(text.split(separator)), errors="coerce").to_numpy(dtype=float)
    return len(parts) > 1 and bool((np.isfinite(parts) & (parts >= 0)).all())


def _labels(keys: pd.DataFrame, reference: "pd.Series[bool]") -> "pd.Series[str]":
    """Names of the environments: the perturbation, then what tells its environments apart."""
    label = keys["perturbation"].copy()
    if "dose" in keys:
        dose = keys["dose"].map(lambda d: d if isinstance(d, str) else ("?" if np.isnan(d) else f"{d:g}"))
        label = label.where(reference, label + " " + dose + " uM")
    if "time" in keys and keys["time"].nunique(dropna=False) > 1:
        label = label + " " + keys["time"].map(lambda t: "? h" if np.isnan(t) else f"{t:g} h")
    if "cell_line" in keys and keys["cell_line"].nunique() > 1:
        label = label + " " + keys["cell_line"].astype(str)
    return label


def _constant(obs: pd.DataFrame, labels: "pd.Series[str]", column: str, index: "pd.Index[Any]") -> NDArray[np.object_]:
    """The value of an obs column in each environment: there must be only one. None where it is missing or blank."""
    pairs = pd.DataFrame({"label": labels, "value": obs[column].astype(object)}).drop_duplicates()
    pairs = pairs[pairs["value"].notna() & (pairs["value"].map(lambda v: str(v).strip()) != "")]
    clash = pairs["label"][pairs["label"].duplicated()]
    if len(clash):
        found = pairs.loc[pairs["label"] == clash.iloc[0], "value"]
        raise DataError(f"environment {clash.iloc[0]!r} has several values of {column!r}: {listing(found)}; keep one")
    value = dict(zip(pairs["label"], pairs["value"], strict=True))
    return np.array([value.get(label) for label in index], dtype=object)


def _stored_codes(obs: pd.DataFrame, name: str, categories: Sequence[str]) -> NDArray[np.int64]:
    """Categories of a column that `to_anndata` wrote."""
    if name not in obs:
        raise DataError(f"no obs column {name!r}, which to_anndata wrote: read the cells anew with environment=COLUMN")
    values = obs[name].astype(object).map(str)
    codes = pd.Index(categories).get_indexer(pd.Index(values)).astype(np.int64)
    if (codes < 0).any():
        raise DataError(
            f"obs column {name!r} holds {listing(values[codes < 0].unique())}, which to_anndata did not write: "
            "read the cells anew with environment=COLUMN"
        )
    return codes


def _stored_doses(values: "pd.Series[Any]") -> "pd.Series[Any]":
    """Numbers again, where `to_anndata` wrote texts because some doses are those of combinations."""
    if values.dtype.kind == "f":
        return values
    numeric = pd.to_numeric(values.astype(object), errors="coerce").astype(float)
    combined = numeric.isna() & (values.astype(object).map(str) != "nan")
    return numeric.astype(object).where(~combined, values.astype(object))


def _covariates(
    obs: pd.DataFrame, names: Sequence[str]
) -> tuple[dict[str, NDArray[np.int64]], dict[str, tuple[str, ...]]]:
    codes, categories = {}, {}
    for name in names:
        if name not in obs:
            raise DataError(f"no obs column {name!r} for a covariate: this AnnData has {listing(obs.columns, 20)}")
        values = pd.Categorical(obs[name])
        if (values.codes < 0).any():
            missing = obs.index[values.codes < 0]
            raise DataError(f"covariate {name!r} is missing in {listing(missing)}: fill or drop them")
        codes[name] = values.codes.astype(np.int64)
        categories[name] = tuple(str(c) for c in values.categories)
    return codes, categories


def _proteins(adata: "AnnData", key: str | None) -> tuple[NDArray[np.float32] | None, tuple[str, ...]]:
    if key is None:
        return None, ()
    if key not in adata.obsm:
        raise DataError(f"no obsm entry {key!r} for proteins: this AnnData has {listing(adata.obsm.keys()) or 'none'}")
    values: Any = adata.obsm[key]
    named = isinstance(values, pd.DataFrame)
    names = list(values.columns) if named else [f"protein {i}" for i in range(values.shape[1])]
    dense = np.asarray(cast(Any, values).toarray() if sp.issparse(values) else values)
    measured = ~np.isnan(dense).all(1) if dense.dtype.kind == "f" else np.ones(len(dense), dtype=bool)
    check_matrix(
        dense[measured], adata.obs_names[measured], pd.Index(names), counts=True, where=f"obsm {key!r}", all_zero=True
    )
    return dense.astype(np.float32), tuple(str(n) for n in names)


def _library_size(obs: pd.DataFrame, totals: NDArray[Any], column: str | None, counts: bool) -> NDArray[np.float32]:
    if column is None:
        return totals.astype(np.float32) if counts else np.ones(len(totals), np.float32)
    if column not in obs:
        raise DataError(f"no obs column {column!r} for the library size: this AnnData has {listing(obs.columns, 20)}")
    size = pd.to_numeric(obs[column].astype(object), errors="coerce").to_numpy(dtype=np.float32)
    bad = ~(np.isfinite(size) & (size > 0))
    if bad.any():
        raise DataError(
            f"library size {column!r} is not positive in {int(bad.sum())} cells ({listing(obs.index[bad])}): "
            "filter them out, or leave the column out to use each cell's total count"
        )
    return size
