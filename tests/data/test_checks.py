import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from pyro_scm.data.checks import check_matrix, check_names, looks_like_counts
from pyro_scm.errors import DataError

CELLS = pd.Index(["c0", "c1", "c2"])
GENES = pd.Index(["a", "b"])
COUNTS = np.array([[0, 3], [1, 0], [2, 5]], np.float32)
KINDS = [pytest.param(np.asarray, id="dense"), pytest.param(sp.csr_matrix, id="sparse")]


def changed(value: float) -> np.ndarray:
    """The counts with one value in cell c1, gene b."""
    x = COUNTS.copy()
    x[1, 1] = value
    return x


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("value", "expected"), [(4, True), (0.5, False), (-1, False), (np.nan, False)])
def test_counts_are_whole_and_not_negative(kind, value: float, expected: bool) -> None:
    assert looks_like_counts(kind(changed(value))) is expected


def test_integers_look_like_counts_and_an_empty_matrix_does_not() -> None:
    assert looks_like_counts(sp.csr_matrix(COUNTS.astype(np.int32)))
    assert not looks_like_counts(sp.csr_matrix((3, 2), dtype=np.float32))


@pytest.mark.parametrize("kind", KINDS)
def test_good_counts_pass(kind) -> None:
    check_matrix(kind(COUNTS), CELLS, GENES, counts=True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("counts", [True, False])
def test_a_value_that_is_not_finite_is_named(kind, value: float, counts: bool) -> None:
    with pytest.raises(
        DataError, match=r"X: 1 values: the first, (nan|inf) in cell 'c1', gene 'b', is not finite: remove"
    ):
        check_matrix(kind(changed(value)), CELLS, GENES, counts=counts)


@pytest.mark.parametrize("kind", KINDS)
def test_a_negative_count_is_named(kind) -> None:
    message = (
        r"layer 'raw': 1 values: the first, -2\.0 in cell 'c1', gene 'b', is negative: .* counts=False for z-scores"
    )
    with pytest.raises(DataError, match=message):
        check_matrix(kind(changed(-2)), CELLS, GENES, counts=True, where="layer 'raw'")


@pytest.mark.parametrize("kind", KINDS)
def test_a_broken_count_is_named_and_all_are_numbered(kind) -> None:
    x = changed(0.5)
    x[2] += 0.25
    with pytest.raises(DataError, match=r"X: 3 values: the first, 0\.5 in cell 'c1', gene 'b', is not a whole number"):
        check_matrix(kind(x), CELLS, GENES, counts=True)


@pytest.mark.parametrize("kind", KINDS)
def test_continuous_values_may_be_negative_and_broken(kind) -> None:
    check_matrix(kind(changed(-0.5)), CELLS, GENES, counts=False)


@pytest.mark.parametrize("kind", KINDS)
def test_cells_without_a_count_are_named_unless_they_are_allowed(kind) -> None:
    x = COUNTS.copy()
    x[[0, 2]] = 0
    with pytest.raises(DataError, match=r"X: 2 cells have no count \('c0', 'c2'\): filter them out"):
        check_matrix(kind(x), CELLS, GENES, counts=True)
    check_matrix(kind(x), CELLS, GENES, counts=True, all_zero=True)
    check_matrix(kind(x), CELLS, GENES, counts=False)


def test_an_explicit_zero_of_a_sparse_matrix_does_not_shift_the_names() -> None:
    x = sp.csr_matrix(COUNTS)
    x.data[0] = 0  # cell c0, gene b, stays stored
    x.data[1] = -1
    with pytest.raises(DataError, match=r"cell 'c1', gene 'a', is negative"):
        check_matrix(x, CELLS, GENES, counts=True)


def named(cells: list[str], genes: list[str]) -> anndata.AnnData:
    x = np.ones((len(cells), len(genes)), np.float32)
    return anndata.AnnData(X=x, obs=pd.DataFrame(index=cells), var=pd.DataFrame(index=genes))


def test_names_that_occur_once_pass() -> None:
    check_names(named(["c0", "c1"], ["a"]))


@pytest.mark.filterwarnings("ignore:(Observation|Variable) names are not unique")
def test_names_that_occur_twice_are_listed_with_a_remedy() -> None:
    with pytest.raises(DataError, match=r"duplicate cell names 'c0': call adata\.obs_names_make_unique"):
        check_names(named(["c0", "c0", "c0"], ["a"]))
    with pytest.raises(DataError, match=r"duplicate gene names 'a': call adata\.var_names_make_unique"):
        check_names(named(["c0"], ["a", "a"]))


def test_nothing_to_learn_from_is_refused() -> None:
    with pytest.raises(DataError, match="0 cells and 1 genes: it must have some of both"):
        check_names(named([], ["a"]))
    with pytest.raises(DataError, match="1 cells and 0 genes: it must have some of both"):
        check_names(named(["c0"], []))
