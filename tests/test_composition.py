import numpy as np
import pytest
import torch

from pyro_scm.batch import Schema
from pyro_scm.composition import (
    Columns,
    CompositionShift,
    CovariateShift,
    DosedShift,
    MoleculeShift,
    ShiftedPrior,
    dosed,
)
from pyro_scm.data.dataset import EnvironmentDataset
from pyro_scm.data.representations import represent
from pyro_scm.errors import DataError, ModelError
from tests.compositions import cells


def rows(data: EnvironmentDataset) -> dict[str, torch.Tensor]:
    """Representation of each environment."""
    return dict(zip(data.environments.index, torch.as_tensor(data.representation), strict=True))


def effects(shift: CompositionShift, data: EnvironmentDataset) -> dict[str, torch.Tensor]:
    """What each environment does to the latents."""
    with torch.no_grad():
        r = torch.as_tensor(data.representation)
        loc, scale = shift.moments(r, torch.as_tensor(~data.reference).float())
    assert (scale == 1).all()
    return dict(zip(data.environments.index, loc, strict=True))


# ---------------------------------------------------------------------- representations
def test_multi_dose_holds_the_dose_of_every_part_in_micromolar() -> None:
    data = cells()
    assert data.features == ("dose=A", "dose=B", "dose=C")
    assert data.schema.doses == [0, 1, 2]
    found = {name: r.tolist() for name, r in rows(data).items()}
    assert found["DMSO"] == [0, 0, 0]
    assert found["A 10 uM"] == [10, 0, 0]
    assert found["A+B 10+10 uM"] == [10, 10, 0]


def test_molecules_describe_every_part_of_a_combination() -> None:
    data = cells("molecules")
    width = len(data.features) // 2
    r = {name: row.view(2, width) for name, row in rows(data).items()}
    assert data.features[0] == "part 1: morgan4:0"
    assert data.features[-1] == "part 2: log10(1 + dose)"
    assert not r["DMSO"].any()
    assert not r["A 10 uM"][1].any()
    combination = r["A+B 10+10 uM"]
    torch.testing.assert_close(combination[0], r["A 10 uM"][0])
    torch.testing.assert_close(combination[1], r["B 10 uM"][0])
    assert float(r["A 1 uM"][0, -1]) == pytest.approx(np.log10(2))
    assert r["A 10 uM"].abs().max() <= 3


def test_a_drug_is_described_by_the_same_numbers_in_every_data_set() -> None:
    together = cells(["morgan", "descriptors"])
    table = together.environments.loc[["DMSO", "A 10 uM"]]
    alone, names = represent(table, ["morgan", "descriptors"], bits=64)
    assert tuple(names) == together.features
    np.testing.assert_array_equal(rows(together)["A 10 uM"].numpy(), alone[1])


def test_missing_smiles_are_an_error_unless_zeros_are_asked_for() -> None:
    data = cells()
    table = data.environments.copy()
    table.loc["C 10 uM", "smiles"] = None
    bare = EnvironmentDataset(**{**vars(data), "environments": table})
    for kind in ("morgan", "descriptors", "molecules"):
        with pytest.raises(DataError, match=r"no SMILES for 'C 10 uM'.*take zeros for them \(missing_smiles='zero'\)"):
            bare.with_representation(kind)
        zero = bare.with_representation(kind, missing_smiles="zero")
        r = rows(zero)["C 10 uM"]
        assert (r != 0).sum() == (1 if kind == "molecules" else 0)  # the dose
    with pytest.raises(DataError, match="missing_smiles = 'drop': use one of error, zero"):
        bare.with_representation("morgan", missing_smiles="drop")


def test_a_combination_needs_a_molecule_for_each_part() -> None:
    data = cells()
    table = data.environments.copy()
    table.loc["A+B 10+10 uM", "smiles"] = "CCO"
    with pytest.raises(DataError, match=r"'A\+B 10\+10 uM' has 2 perturbations and 1 SMILES: give one for each"):
        EnvironmentDataset(**{**vars(data), "environments": table}).with_representation("molecules")


def test_columns_are_told_by_their_names() -> None:
    features = ("dose=A", "perturbation=B", "cell_line=PC3", "time / 24 h", "morgan4:0", "log10(1 + dose)")
    schema = Schema(genes=("g",), environments=("e",), features=features, counts=False)
    found = Columns.of(schema)
    assert found == Columns({"A": 0, "B": 1}, [2, 3], [5], [4])
    with pytest.raises(ModelError, match="perturbations and doses apart: take 'multi-dose'"):
        _ = found.amounts
    numbers = Columns.of(Schema(genes=("g",), environments=("e",), features=("f0", "f1", "time / 24 h"), counts=False))
    assert numbers.amounts == [0, 1]


# ---------------------------------------------------------------------- sums
@pytest.mark.parametrize("doser", ["linear", "log-sigmoid", "hill", "mlp"])
def test_a_combination_is_the_sum_of_its_parts(doser: str) -> None:
    data = cells()
    found = effects(CompositionShift(DosedShift(data.schema, 4, doser), CovariateShift(data.schema, 4)), data)
    torch.testing.assert_close(found["A+B 10+10 uM"], found["A 10 uM"] + found["B 10 uM"])
    assert not found["DMSO"].any()
    assert (found["A 1 uM"] != found["A 10 uM"]).all()


@pytest.mark.parametrize("doser", ["linear", "sigmoid", "hill", "mlp"])
def test_a_combination_of_molecules_is_too(doser: str) -> None:
    data = cells("molecules")
    found = effects(
        CompositionShift(MoleculeShift(data.schema, 4, (8, 5), doser), CovariateShift(data.schema, 4)), data
    )
    torch.testing.assert_close(found["A+B 10+10 uM"], found["A 10 uM"] + found["B 10 uM"])
    assert not found["DMSO"].any()
    assert (found["A 1 uM"] != found["A 10 uM"]).all()
    assert (found["A 10 uM"] != found["C 10 uM"]).all()


def test_a_molecule_has_one_direction_whatever_its_dose() -> None:
    table = cells().environments.iloc[:-1].astype({"dose": float})
    r, names = represent(table, ["morgan", "dose"], bits=64)
    shift = MoleculeShift(Schema(("g",), tuple(table.index), tuple(names), counts=False), 4)
    low, high = shift.effects(torch.as_tensor(r[[list(table.index).index(e) for e in ("A 1 uM", "A 10 uM")]]))
    torch.testing.assert_close(low / low.norm(), high / high.norm())
    assert high.norm() > low.norm()


def test_a_learnt_embedding_needs_names_and_features_need_molecules() -> None:
    named, numbered = cells().schema, cells("molecules").schema
    found = effects(CompositionShift(MoleculeShift(named, 4, (5,), embedding=True), CovariateShift(named, 4)), cells())
    torch.testing.assert_close(found["A+B 10+10 uM"], found["A 10 uM"] + found["B 10 uM"])
    with pytest.raises(ModelError, match="names perturbations and describes no molecule: take 'molecules'"):
        MoleculeShift(named, 4)
    with pytest.raises(ModelError, match="a learnt embedding needs a feature for each perturbation"):
        MoleculeShift(numbered, 4, embedding=True)


# ---------------------------------------------------------------------- covariates
def test_covariates_and_cell_lines_add_to_references_too() -> None:
    data = cells()
    shift = CompositionShift(DosedShift(data.schema, 3), CovariateShift(data.schema, 3, ("cell_type",)))
    batch = data.batch()
    with torch.no_grad():
        found = shift(batch)
        types = shift.covariates.tables[0][batch.covariates["cell_type"]]
        torch.testing.assert_close(found - types, shift.effects(batch))
    assert (found[batch.env == 0] != 0).all()
    schema = Schema(("g",), ("e",), ("perturbation=A", "cell_line=PC3", "time / 24 h"), counts=False)
    lines = CovariateShift(schema, 3)
    assert lines.context is not None
    assert lines.context.shape == (2, 3)


def test_an_unknown_covariate_is_refused() -> None:
    with pytest.raises(ModelError, match=r"no covariate 'donor': the cells have 'cell_type'"):
        CovariateShift(cells().schema, 3, ("donor",))


def test_a_shifted_prior_is_the_shift_in_centred_coordinates() -> None:
    data = cells()
    shift = DosedShift(data.schema, 3)
    prior = ShiftedPrior(shift, 3)
    with torch.no_grad():
        prior.centre.copy_(torch.tensor([1.0, 2.0, 3.0]))
    law = prior(data.batch())
    torch.testing.assert_close(law.mean, shift(data.batch()) + prior.centre)
    assert (law.base_dist.scale == 1).all()


# ---------------------------------------------------------------------- conditions outside the table
def test_a_condition_of_ones_own_is_written_by_names() -> None:
    data = cells()
    assert dosed(data.schema, {"C": 3.0, "A": 0.5}).tolist() == [0.5, 0, 3]
    schema = Schema(("g",), ("e",), ("dose=A", "cell_line=PC3"), counts=False)
    assert dosed(schema, {"A": 2.0}, {"cell_line=PC3": 1}).tolist() == [2, 1]
    with pytest.raises(ModelError, match="the representation has no 'D': it has 'A', 'B', 'C'"):
        dosed(data.schema, {"D": 1.0})
