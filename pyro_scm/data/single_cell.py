"""Gene selection for single cells: highly variable genes, differential genes, and halves that keep the two apart."""

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from pyro_scm.data.dataset import EnvironmentDataset
from pyro_scm.errors import DataError, listing

__all__ = ["differential_genes", "halves", "highly_variable"]


def highly_variable(
    cells: EnvironmentDataset, genes: int = 2000, *, chosen_on: EnvironmentDataset | None = None
) -> EnvironmentDataset:
    """The same cells with the genes of highest normalised dispersion (variance / mean within bins of the mean).

    Satija et al., Nature Biotechnology 33, 495 (2015), as scanpy's ``highly_variable_genes`` with flavor ``"seurat"``
    has it, on log-normalised expression. Library sizes stay those of all genes.

    Args:
        cells: N cells of G genes.
        genes: number of genes to keep; all of them where there are no more.
        chosen_on: cells to choose the genes on, such as those of the training split; `cells` by default.

    Returns:
        N cells, the genes in their old order.

    Raises:
        DataError: a number below 1, other genes in `chosen_on`, negative expression, or scanpy is not installed.
    """
    source = cells if chosen_on is None else chosen_on
    if genes < 1:
        raise DataError(f"{genes} genes cannot be kept: give a number of 1 or more")
    if source.genes != cells.genes:
        raise DataError(
            f"chosen_on has {len(source.genes)} genes, the cells {len(cells.genes)}: they must be the same genes"
        )
    if genes >= len(cells.genes):
        return cells
    adata = _normalised(source)
    if adata.X.min() < 0:
        raise DataError("expression is negative: dispersion needs counts or log-normalised values, not z-scores")
    scanpy = _scanpy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scanpy.pp.highly_variable_genes(adata, n_top_genes=genes, flavor="seurat")
    dispersion = np.nan_to_num(adata.var["dispersions_norm"].to_numpy(dtype=np.float64), nan=-np.inf)
    keep = np.sort(np.argsort(-dispersion, kind="stable")[:genes])  # scanpy keeps more where the last ones tie
    return replace(cells, x=cells.x[:, keep], var=cells.var.iloc[keep])


def differential_genes(
    cells: EnvironmentDataset,
    *,
    top: int = 50,
    method: str = "t-test",
    environments: Sequence[str] | None = None,
) -> dict[str, NDArray[np.int64]]:
    """Genes that differ most between each environment and the reference cells, by absolute score.

    An environment is compared with the references of its time and cell line, or with all references where it has none
    of its own. Nothing but the cells given is looked at, so give the training split, or one of the `halves` of held-out
    cells together with their references.

    Args:
        cells: cells of the environments and of references.
        top: number of genes.
        method: of scanpy's ``rank_genes_groups``: ``"t-test"`` (Welch), ``"t-test_overestim_var"`` or ``"wilcoxon"``.
        environments: names; by default all that are not references and have cells.

    Returns:
        Environment -> ``[top]`` columns of x, the most different first.

    Raises:
        DataError: no reference cells, an environment or reference of fewer than 2 cells, a number below 1, an unknown
            name or method, or scanpy is not installed.
    """
    methods = ("t-test", "t-test_overestim_var", "wilcoxon")
    if method not in methods:
        raise DataError(f"unknown method {method!r}: use one of {listing(methods)}")
    if top < 1:
        raise DataError(f"the top {top} genes cannot be given: ask for 1 or more")
    tested = _tested(cells, environments)
    controls: dict[tuple[int, ...], list[int]] = {}
    for e in tested:
        controls.setdefault(_references_of(cells, e), []).append(e)
    scanpy = _scanpy()
    ranked = {e: genes for own, group in controls.items() for e, genes in _rank(scanpy, cells, group, own, top, method)}
    return {str(cells.environments.index[e]): ranked[e] for e in tested}


def halves(cells: EnvironmentDataset, seed: int = 0) -> tuple[EnvironmentDataset, EnvironmentDataset]:
    """Two disjoint sets of cells, each with half of every environment's; an odd cell is in the first.

    Genes that are called differential on one half and scored on the other are not chosen by the noise they are scored
    on.

    Args:
        cells: cells of any environments.
        seed: of the draw.

    Raises:
        DataError: an environment of fewer than 2 cells.
    """
    _enough(cells, cells.present)
    order = np.lexsort((np.random.default_rng(seed).random(len(cells)), cells.env))
    counts = np.bincount(cells.env)
    place = np.arange(len(cells)) - (np.cumsum(counts) - counts)[cells.env[order]]
    second = np.zeros(len(cells), bool)
    second[order] = place >= (counts[cells.env[order]] + 1) // 2
    return cells.subset(~second), cells.subset(second)


def _scanpy() -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import scanpy
    except ImportError as error:
        raise DataError(f"scanpy cannot be imported ({error}): install pyro-scm[single-cell]") from error
    return scanpy


def _normalised(cells: EnvironmentDataset) -> Any:
    """AnnData of log-normalised expression; genes are named by their column, because names may be repeated."""
    from anndata import AnnData

    x: Any = cells.normalised()
    obs, var = (pd.DataFrame(index=pd.Index([str(i) for i in range(n)])) for n in x.shape)
    return AnnData(X=x.astype(np.float32), obs=obs, var=var)


def _tested(cells: EnvironmentDataset, names: Sequence[str] | None) -> list[int]:
    """Environments to compare with references."""
    if names is None:
        chosen = cells.present[~cells.reference[cells.present]]
    else:
        chosen = cells.environment_index(*names)
        references = [name for name, e in zip(names, chosen, strict=True) if cells.reference[e]]
        if references:
            raise DataError(f"{listing(references)} is a reference: name environments to compare with it")
    if not cells.reference[cells.present].any():
        raise DataError("no reference cells: add the unperturbed cells to those given, or name them with control=")
    _enough(cells, chosen)
    return [int(e) for e in chosen]


def _references_of(cells: EnvironmentDataset, environment: int) -> tuple[int, ...]:
    """References with the time and cell line of an environment, or all of them; with 2 cells at least."""
    table, every = cells.environments, cells.present[cells.reference[cells.present]]
    own = [
        int(e)
        for e in every
        if all(_equal(table[c].iloc[e], table[c].iloc[environment]) for c in ("time", "cell_line"))
    ]
    chosen = tuple(own or every.tolist())
    if int(np.isin(cells.env, chosen).sum()) < 2:
        _enough(cells, np.array(chosen))
    return chosen


def _equal(a: object, b: object) -> bool:
    return bool(a == b) or bool(pd.isna(a) and pd.isna(b))  # type: ignore[call-overload]


def _enough(cells: EnvironmentDataset, environments: NDArray[np.int64]) -> None:
    counts = np.bincount(cells.env, minlength=len(cells.environments))
    few = [str(cells.environments.index[e]) for e in environments.tolist() if counts[e] < 2]
    if few:
        raise DataError(f"fewer than 2 cells in {listing(few)}: drop these environments or add cells")


def _rank(
    scanpy: Any, cells: EnvironmentDataset, group: list[int], references: tuple[int, ...], top: int, method: str
) -> list[tuple[int, NDArray[np.int64]]]:
    """Top genes of each environment of a group against the cells of `references`."""
    part = cells.subset(np.isin(cells.env, [*group, *references]))
    adata = _normalised(part)
    label = np.where(np.isin(part.env, references), "reference", part.env.astype(str))
    adata.obs["group"] = pd.Categorical(label)
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        scanpy.tl.rank_genes_groups(
            adata,
            "group",
            groups=[str(e) for e in group],
            reference="reference",
            method=method,
            n_genes=min(top, adata.n_vars),
            rankby_abs=True,
            use_raw=False,
        )
    names = adata.uns["rank_genes_groups"]["names"]
    return [(e, np.array([int(gene) for gene in names[str(e)]], dtype=np.int64)) for e in group]
