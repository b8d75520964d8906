import sys
import warnings
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from scipy.stats import mannwhitneyu, ttest_ind

from pyro_scm.data.dataset import EnvironmentDataset
from pyro_scm.data.single_cell import differential_genes, halves, highly_variable
from pyro_scm.data.splits import by_environment, leaks
from pyro_scm.errors import DataError

GENES = 60
SHIFTED = {"A": {3: 3.0, 17: 0.2, 40: 2.0}, "B": {5: 0.3, 8: 2.5}}
"""Factor by which a perturbation multiplies the mean of a gene."""


def screen(cells: int = 80, sparse: bool = True, **columns: Any) -> EnvironmentDataset:
    """Poisson counts with mean 10 of the control and two perturbations, in which a few genes are shifted."""
    rng = np.random.default_rng(1)
    drug = np.repeat(["control", "A", "B"], cells)
    mean = np.full((len(drug), GENES), 10.0)
    for name, genes in SHIFTED.items():
        for gene, factor in genes.items():
            mean[drug == name, gene] *= factor
    x = rng.poisson(mean).astype(np.float32)
    obs = pd.DataFrame({"drug": drug, **columns}, index=[f"c{i}" for i in range(len(drug))])
    adata = anndata.AnnData(X=sp.csr_matrix(x) if sparse else x, obs=obs)
    adata.var_names = [f"g{i}" for i in range(GENES)]
    return EnvironmentDataset.from_anndata(adata, environment="drug", control="control", **{c: c for c in columns})


def variable(sparse: bool = True) -> EnvironmentDataset:
    """500 genes; two differ between A and the control, three between B and the others, and all have their own mean."""
    rng = np.random.default_rng(2)
    drug = np.repeat(["control", "A", "B"], 60)
    mean = np.tile(np.linspace(10.0, 30.0, 500), (len(drug), 1))
    mean[np.ix_(drug == "control", [310, 120])] *= 0.25
    mean[np.ix_(drug == "A", [310, 120])] *= 1.75
    mean[np.ix_(drug == "B", [370, 70, 210])] *= 2.5
    mean[np.ix_(drug != "B", [370, 70, 210])] *= 0.25
    x = rng.poisson(mean).astype(np.float32)
    obs = pd.DataFrame({"drug": drug}, index=[f"c{i}" for i in range(len(drug))])
    adata = anndata.AnnData(X=sp.csr_matrix(x) if sparse else x, obs=obs)
    adata.var_names = [f"g{i}" for i in range(500)]
    return EnvironmentDataset.from_anndata(adata, environment="drug", control="control")


def dense(cells: EnvironmentDataset) -> np.ndarray:
    x = cells.normalised()
    return np.asarray(x.toarray() if sp.issparse(x) else x, np.float64)


# ---------------------------------------------------------------------- differential genes
@pytest.mark.parametrize("sparse", [True, False])
def test_the_shifted_genes_come_first_in_both_directions(sparse: bool) -> None:
    top = differential_genes(screen(sparse=sparse), top=3)
    assert list(top) == ["A", "B"]
    assert set(top["A"].tolist()) == {3, 17, 40}
    assert set(top["B"][:2].tolist()) == {5, 8}
    assert top["A"].dtype == np.int64


def test_the_order_is_that_of_welch_statistics() -> None:
    cells = screen()
    values = dense(cells)
    group, control = values[cells.env == 1], values[cells.env == 0]
    score = np.abs(ttest_ind(group, control, equal_var=False).statistic)
    assert differential_genes(cells, top=15)["A"].tolist() == np.argsort(-score)[:15].tolist()


def test_the_order_is_that_of_rank_sums() -> None:
    cells = screen()
    values = dense(cells)
    group, control = values[cells.env == 2], values[cells.env == 0]
    u = mannwhitneyu(group, control).statistic
    score = np.abs(u - len(group) * len(control) / 2)
    assert differential_genes(cells, top=5, method="wilcoxon")["B"].tolist() == np.argsort(-score)[:5].tolist()


def test_other_environments_do_not_matter() -> None:
    cells = screen()
    alone = differential_genes(cells.of("control", "A"), top=20)
    assert list(alone) == ["A"]
    together = differential_genes(cells, top=20, environments=["B", "A"])
    assert list(together) == ["B", "A"]
    assert together["A"].tolist() == alone["A"].tolist()


def test_only_the_cells_given_are_looked_at() -> None:
    cells = screen()
    first = np.flatnonzero(np.arange(len(cells)) % 80 < 40)
    part = differential_genes(cells.subset(first), top=10)
    x = cells.x.toarray()
    rest = np.setdiff1d(np.arange(len(cells)), first)
    x[rest] = 1
    changed = anndata.AnnData(X=x, obs=cells.obs, var=cells.var)
    again = EnvironmentDataset.from_anndata(changed, environment="drug", control="control").subset(first)
    assert {e: g.tolist() for e, g in differential_genes(again, top=10).items()} == {
        e: g.tolist() for e, g in part.items()
    }


def test_an_environment_is_compared_with_the_reference_of_its_cell_line_and_time() -> None:
    rng = np.random.default_rng(0)
    rows = [(d, c) for c in ("P", "Q") for d in ("control", "A") for _ in range(30)]
    obs = pd.DataFrame(rows, columns=["drug", "line"], index=[str(i) for i in range(len(rows))])
    x = rng.normal(5, 0.1, (len(obs), 4)).astype(np.float32)
    x[:, 0] += 3.0 * (obs["line"] == "Q")  # a difference between lines, not an effect
    x[:, 1] += 0.15 * (obs["drug"] == "A")
    adata = anndata.AnnData(X=x, obs=obs)
    cells = EnvironmentDataset.from_anndata(adata, environment="drug", control="control", cell_line="line")
    top = differential_genes(cells, top=1)
    assert {name: genes.tolist() for name, genes in top.items()} == {"A P": [1], "A Q": [1]}
    without = cells.subset(~((obs["line"] == "Q") & (obs["drug"] == "control")).to_numpy())
    assert differential_genes(without, top=1)["A Q"].tolist() == [0]  # the other line's reference is all there is


def test_there_are_no_more_top_genes_than_genes() -> None:
    genes = differential_genes(screen(cells=10), top=500)["A"]
    assert sorted(genes.tolist()) == list(range(GENES))


def test_a_gene_without_any_variance_makes_no_warning_and_ranks_last() -> None:
    cells = screen(sparse=False)
    x = cells.x.copy()
    x[:, 0] = 0
    adata = anndata.AnnData(X=np.log1p(x), obs=cells.obs)
    continuous = EnvironmentDataset.from_anndata(adata, environment="drug", control="control")
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        genes = differential_genes(continuous, top=GENES)["A"]
    assert not [w for w in seen if "scanpy" in str(w.filename) or issubclass(w.category, RuntimeWarning)]
    assert genes[-1] == 0


def test_few_cells_and_missing_references_are_named() -> None:
    cells = screen(cells=5)
    few = cells.subset(np.array([0, 1, 2, 5, 10, 11]))
    with pytest.raises(DataError, match="fewer than 2 cells in 'A': drop these environments or add cells"):
        differential_genes(few)
    assert list(differential_genes(few, environments=["B"])) == ["B"]
    with pytest.raises(DataError, match="fewer than 2 cells in 'control'"):
        differential_genes(cells.subset(np.array([0, 5, 6])))
    with pytest.raises(DataError, match="no reference cells: add the unperturbed cells"):
        differential_genes(cells.of("A", "B"))


def test_unknown_names_methods_and_numbers_are_refused() -> None:
    with pytest.raises(DataError, match="no environment 'a': did you mean"):
        differential_genes(screen(cells=5), environments=["a"])
    with pytest.raises(DataError, match="'control' is a reference: name environments to compare with it"):
        differential_genes(screen(cells=5), environments=["A", "control"])
    with pytest.raises(DataError, match="unknown method 'deseq2': use one of 't-test', 't-test_overestim_var', 'wilc"):
        differential_genes(screen(cells=5), method="deseq2")
    with pytest.raises(DataError, match="the top 0 genes cannot be given: ask for 1 or more"):
        differential_genes(screen(cells=5), top=0)


# ---------------------------------------------------------------------- highly variable genes
@pytest.mark.parametrize("sparse", [True, False])
def test_the_genes_that_differ_between_environments_are_the_variable_ones(sparse: bool) -> None:
    cells = variable(sparse)
    chosen = highly_variable(cells, 5)
    assert chosen.genes == ("g70", "g120", "g210", "g310", "g370")  # in their old order
    assert sp.issparse(chosen.x) == sparse
    np.testing.assert_array_equal(chosen.batch().x, cells.batch().x[:, [70, 120, 210, 310, 370]])  # type: ignore[index]
    assert chosen.size.tolist() == cells.size.tolist()
    assert chosen.schema.genes == chosen.genes
    assert chosen.env.tolist() == cells.env.tolist()


def test_the_genes_are_those_of_scanpy(data_folder: Path) -> None:
    import scanpy

    path = data_folder / "papalexi_thp1" / "papalexi_thp1_rep12_counts.h5ad"
    cells = EnvironmentDataset.read(path, environment="grna_target", control="non-targeting")
    adata = anndata.read_h5ad(path)
    scanpy.pp.normalize_total(adata)
    scanpy.pp.log1p(adata)
    scanpy.pp.highly_variable_genes(adata, n_top_genes=50)
    assert highly_variable(cells, 50).genes == tuple(adata.var_names[adata.var["highly_variable"]])


def test_genes_can_be_chosen_on_the_training_cells() -> None:
    cells = variable()
    split = by_environment(cells, held_out=["B"])
    train = highly_variable(split.train, 2)
    assert train.genes == ("g120", "g310")
    test = highly_variable(split.test, 2, chosen_on=split.train)
    assert test.genes == train.genes
    assert test.cells == split.test.cells


@pytest.mark.parametrize("genes", [GENES, GENES + 1])
def test_all_genes_are_kept_where_there_are_no_more(genes: int) -> None:
    cells = screen(cells=5)
    assert highly_variable(cells, genes) is cells


def test_the_number_of_genes_is_exact_where_dispersions_tie() -> None:
    cells = screen(cells=20, sparse=False)
    twice = np.concatenate([cells.x, cells.x], axis=1)
    adata = anndata.AnnData(X=twice, obs=cells.obs)
    doubled = EnvironmentDataset.from_anndata(adata, environment="drug", control="control")
    assert len(highly_variable(doubled, 7).genes) == 7


def test_genes_that_cannot_be_chosen_are_refused() -> None:
    cells = screen(cells=5)
    with pytest.raises(DataError, match="0 genes cannot be kept: give a number of 1 or more"):
        highly_variable(cells, 0)
    with pytest.raises(DataError, match="chosen_on has 4 genes, the cells 60: they must be the same genes"):
        highly_variable(cells, 3, chosen_on=highly_variable(cells, 4))
    scores = anndata.AnnData(X=np.random.default_rng(0).normal(size=(15, 9)), obs=cells.obs)
    with pytest.raises(DataError, match="expression is negative: dispersion needs counts or log-normalised values"):
        highly_variable(EnvironmentDataset.from_anndata(scores, environment="drug"), 3)


def test_scanpy_is_asked_for_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scanpy", None)
    with pytest.raises(DataError, match=r"scanpy cannot be imported .*: install pyro-scm\[single-cell\]"):
        highly_variable(screen(cells=5), 3)
    with pytest.raises(DataError, match=r"install pyro-scm\[single-cell\]"):
        differential_genes(screen(cells=5))


# ---------------------------------------------------------------------- halves
def test_halves_part_each_environment_in_two() -> None:
    cells = screen(cells=7)
    first, second = halves(cells, seed=2)
    assert sorted(first.cells + second.cells) == sorted(cells.cells)
    assert np.bincount(first.env).tolist() == [4, 4, 4]
    assert np.bincount(second.env).tolist() == [3, 3, 3]
    assert len(leaks(first, second, kinds=["cell"])) == 0
    assert first.environments is cells.environments


def test_halves_depend_on_the_seed_only() -> None:
    cells = screen(cells=9)
    assert halves(cells, 1)[0].cells == halves(cells, 1)[0].cells
    assert halves(cells, 1)[0].cells != halves(cells, 2)[0].cells
    assert {c for s in range(30) for c in halves(cells, s)[1].cells} == set(cells.cells)


def test_halves_of_uneven_and_absent_environments() -> None:
    cells = screen(cells=6)
    part = cells.subset(np.array([1, 0, 12, 14, 16, 13, 15]))  # two controls, five of B, none of A
    first, second = halves(part)
    assert np.bincount(first.env, minlength=3).tolist() == [1, 0, 3]
    assert np.bincount(second.env, minlength=3).tolist() == [1, 0, 2]
    with pytest.raises(DataError, match="fewer than 2 cells in 'control', 'B'"):
        halves(cells.subset(np.array([0, 6, 7, 12])))


def test_genes_of_one_half_can_be_scored_on_the_other() -> None:
    cells = screen()
    called, scored = halves(cells)
    top = differential_genes(called, top=2)["B"]
    mean = scored.mean_expression()
    change = (mean.loc["B"] - mean.loc["control"]).to_numpy()
    assert set(top.tolist()) == {5, 8}
    np.testing.assert_allclose(change[[5, 8]], np.log([0.3, 2.5]), atol=0.2)


def test_knock_outs_of_the_interferon_receptor_lose_its_targets(data_folder: Path) -> None:
    cells = EnvironmentDataset.read(
        data_folder / "papalexi_thp1" / "papalexi_thp1_rep12_counts.h5ad",
        environment="grna_target",
        control="non-targeting",
    )
    called, _ = halves(cells.of("non-targeting", "IFNGR2", "CAV1"))
    genes = np.array(cells.genes)
    top = {name: set(genes[index]) for name, index in differential_genes(called, top=10).items()}
    assert {"PSMB9", "UBE2L6", "STAT1"} <= top["IFNGR2"]
    assert not {"PSMB9", "UBE2L6"} & top["CAV1"]  # the screen's negative control
