import numpy as np
import pandas as pd
import pytest

from pyro_scm.data.representations import represent
from pyro_scm.errors import DataError


def table(**columns: object) -> pd.DataFrame:
    """A vehicle and three treatments."""
    base: dict[str, object] = {
        "perturbation": ["vehicle", "B", "A", "A+B"],
        "dose": [0.0, 9.0, 99.0, np.nan],
        "time": [24.0, 24.0, 48.0, 24.0],
        "cell_line": ["PC3", "PC3", "A549", "PC3"],
        "smiles": [None, "CCO", "CCN", "CCC"],
        "is_reference": [True, False, False, False],
    }
    return pd.DataFrame({**base, **columns}, index=["vehicle", "B 9 uM", "A 99 uM", "A+B"])


def test_one_hot_of_the_perturbation_is_zero_for_a_reference() -> None:
    r, names = represent(table())
    assert names == ["perturbation=A", "perturbation=A+B", "perturbation=B"]
    assert r.tolist() == [[0, 0, 0], [0, 0, 1], [1, 0, 0], [0, 1, 0]]
    assert r.dtype == np.float32


def test_multi_hot_marks_each_part_and_weighs_it_with_its_dose() -> None:
    r, names = represent(table(dose=[0.0, 9.0, 99.0, "9+999"]), "multi-hot")
    assert names == ["perturbation=A", "perturbation=B"]
    np.testing.assert_allclose(r, [[0, 0], [0, 1], [2, 0], [1, 3]])


def test_multi_hot_uses_one_dose_for_all_parts_and_one_where_it_is_unknown() -> None:
    r, _ = represent(table(dose=[0.0, np.nan, 9.0, 99.0]), "multi-hot")
    np.testing.assert_allclose(r, [[0, 0], [0, 1], [1, 0], [2, 2]])


def test_multi_hot_without_doses_and_with_another_separator() -> None:
    r, names = represent(
        table(perturbation=["vehicle", "B", "A", "A|B"]).drop(columns="dose"), "multi-hot", separator="|"
    )
    assert names == ["perturbation=A", "perturbation=B"]
    assert r.tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]


def test_a_combination_needs_one_dose_or_one_for_each_part() -> None:
    with pytest.raises(DataError, match=r"'A\+B' has 2 perturbations and 3 doses: give one dose for each"):
        represent(table(dose=[0.0, 1.0, 1.0, "1+2+3"]), "multi-hot")


def test_dose_is_a_logarithm_with_a_flag_where_it_is_unknown() -> None:
    r, names = represent(table(), "dose")
    assert names == ["log10(1 + dose)", "log10(1 + dose) unknown"]
    np.testing.assert_allclose(r, [[0, 0], [1, 0], [2, 0], [0, 1]])


def test_no_flag_where_all_doses_are_known_and_the_reference_has_none() -> None:
    r, names = represent(table(dose=[5.0, 9.0, 99.0, 0.0]), "dose")
    assert names == ["log10(1 + dose)"]
    np.testing.assert_allclose(r, [[0], [1], [2], [0]])


def test_doses_of_combinations_are_not_one_number() -> None:
    with pytest.raises(DataError, match=r"'A\+B' have one dose for each part: represent them as 'multi-hot'"):
        represent(table(dose=[0.0, 9.0, 99.0, "9+999"]), "dose")


def test_time_is_in_days() -> None:
    r, names = represent(table(), "time")
    assert names == ["time / 24 h"]
    assert r.tolist() == [[1], [1], [2], [1]]


def test_cell_lines_are_one_hot_for_references_too() -> None:
    r, names = represent(table(), "cell_line")
    assert names == ["cell_line=A549", "cell_line=PC3"]
    assert r.tolist() == [[0, 1], [0, 1], [1, 0], [0, 1]]


def test_several_kinds_stand_side_by_side() -> None:
    r, names = represent(table(), ["time", "cell_line"])
    assert names == ["time / 24 h", "cell_line=A549", "cell_line=PC3"]
    assert r.tolist() == [[1, 0, 1], [1, 0, 1], [2, 1, 0], [1, 0, 1]]


@pytest.mark.parametrize("kind", ["dose", "time", "cell_line"])
def test_a_column_that_is_not_there_is_named_with_the_argument_that_fills_it(kind: str) -> None:
    with pytest.raises(DataError, match=rf"the environments have no {kind}: .*from_anndata\(\.\.\., {kind}=COLUMN\)"):
        represent(table(**{kind: [None] * 4}), kind)
    with pytest.raises(DataError, match=f"the environments have no {kind}"):
        represent(table().drop(columns=kind), ["one-hot", kind])


def test_morgan_fingerprints_are_zero_for_references_only() -> None:
    from pyro_scm.data.chemistry import morgan

    r, names = represent(table(), "morgan", bits=64, radius=1)
    assert names[0] == "morgan2:0"
    assert len(names) == 64
    assert not r[0].any()
    np.testing.assert_array_equal(r[1:], morgan(["CCO", "CCN", "CCC"], radius=1, bits=64))


def test_a_missing_or_wrong_smiles_is_named() -> None:
    with pytest.raises(DataError, match="no SMILES for 'A 99 uM': fill the SMILES column, drop these environments"):
        represent(table(smiles=[None, "CCO", None, "CCC"]), "morgan")
    with pytest.raises(DataError, match="drug 'A 99 uM': the SMILES 'C1CC'"):
        represent(table(smiles=[None, "CCO", "C1CC", "CCC"]), "morgan")
    with pytest.raises(DataError, match=r"the environments have no smiles: .*smiles=COLUMN"):
        represent(table(smiles=[None] * 4), "morgan")


def test_an_unknown_kind_is_refused_with_the_known_ones() -> None:
    with pytest.raises(DataError, match="unknown representation 'onehot': use one of one-hot, multi-hot, multi-dose"):
        represent(table(), "onehot")
    with pytest.raises(DataError, match="no representation given: name at least one of 'one-hot'"):
        represent(table(), [])


def test_an_array_is_taken_in_the_order_of_the_table() -> None:
    values = np.arange(8).reshape(4, 2)
    r, names = represent(table(), values)
    assert r.tolist() == values.tolist()
    assert r.dtype == np.float32
    assert names == ["feature 0", "feature 1"]


@pytest.mark.parametrize("shape", [(3, 2), (4,), (4, 2, 1)])
def test_an_array_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(DataError, match=r"has shape .*, the environment table 4 rows: give an array \[4, F\]"):
        represent(table(), np.zeros(shape))


def test_an_array_of_text_is_refused() -> None:
    with pytest.raises(DataError, match="the representation has dtype <U1: give numbers"):
        represent(table(), np.full((4, 2), "x"))


def test_rows_are_found_by_environment_then_by_perturbation_and_a_reference_may_lack_one() -> None:
    frame = pd.DataFrame({"p": [1, 2, 3, 4], "q": [5, 6, 7, 8]}, index=["A", "B", "A+B", "B 9 uM"])
    r, names = represent(table(), frame)
    assert names == ["p", "q"]
    assert r.tolist() == [[0, 0], [4, 8], [1, 5], [3, 7]]


def test_rows_of_a_mapping_and_of_a_reference() -> None:
    rows = {"A": np.array([1.0]), "B": np.array([2.0]), "A+B": np.array([3.0]), "vehicle": np.array([9.0])}
    r, names = represent(table(), rows)
    assert names == ["feature 0"]
    assert r.tolist() == [[9], [2], [1], [3]]


def test_environments_without_a_row_are_listed() -> None:
    with pytest.raises(DataError, match=r"no row for 'B 9 uM', 'A\+B': add them by environment or perturbation"):
        represent(table(), {"A": np.array([1.0])})


def test_rows_must_have_one_length_and_occur_once() -> None:
    with pytest.raises(DataError, match=r"rows have lengths \[1, 2\]: give vectors of one length"):
        represent(table(), {"A": np.zeros(1), "B": np.zeros(2), "A+B": np.zeros(1)})
    with pytest.raises(DataError, match="has several rows for 'A': keep one for each"):
        represent(table(), pd.DataFrame({"p": [1, 2]}, index=["A", "A"]))


def test_rows_must_be_finite_numbers() -> None:
    rows = {"A": np.array([1.0]), "B": np.array([np.nan]), "A+B": np.array([3.0])}
    with pytest.raises(DataError, match="the representation of 'B 9 uM' is not finite: remove NaN"):
        represent(table(), rows)
    with pytest.raises(DataError, match="the representation of 'A 99 uM' is not finite"):
        represent(table(), np.array([[0], [1], [np.inf], [3]]))
    with pytest.raises(DataError, match="the representation of 'B 9 uM' is not a vector of numbers"):
        represent(table(), pd.DataFrame({"p": ["x", "y", "z"]}, index=["A", "B", "A+B"]))
