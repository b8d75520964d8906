from dataclasses import replace
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest

from pyro_scm.data.dataset import EnvironmentDataset, read_h5ad
from pyro_scm.data.splits import (
    KINDS,
    Split,
    by_combination,
    by_dose,
    by_environment,
    by_group,
    by_row,
    check,
    leaks,
)
from pyro_scm.errors import DataError

SMILES = {
    "ethanol": "CCO",
    "alcohol": "OCC",  # the same molecule, written in another order
    "aspirin": "CC(=O)Oc1ccccc1C(O)=O",
    "aspirin sodium": "CC(=O)Oc1ccccc1C([O-])=O.[Na+]",
    "caffeine": "Cn1cnc2n(C)c(=O)n(C)c(=O)c12",
    "theophylline": "Cn1c(=O)c2[nH]cnc2n(C)c1=O",
    "decane": "CCCCCCCCCC",
    "haloperidol": "OC1(CCN(CCCC(=O)c2ccc(F)cc2)CC1)c1ccc(Cl)cc1",
}


def dataset(rows: list[dict[str, Any]], representation: Any = "one-hot", **options: Any) -> EnvironmentDataset:
    """One cell for each row of obs; the column is named drug, and the reference vehicle."""
    obs = pd.DataFrame(rows, index=[f"c{i}" for i in range(len(rows))])
    x = np.random.default_rng(0).poisson(5, (len(obs), 3)).astype(np.float32) + 1
    named = {k: k for k in ("dose", "time", "cell_line", "smiles") if k in obs}
    return EnvironmentDataset.from_anndata(
        anndata.AnnData(X=x, obs=obs), environment="drug", control="vehicle", representation=representation,
        **named, **options,
    )  # fmt: skip


def knockouts(genes: int = 20, cells: int = 4) -> EnvironmentDataset:
    """A screen of single knock-outs without chemistry."""
    return dataset([{"drug": d} for d in ["vehicle", *(f"K{i:02d}" for i in range(genes))] for _ in range(cells)])


def compounds(representation: Any = "one-hot") -> EnvironmentDataset:
    """Eight drugs, of which two pairs are one compound each; three cells of each and of the vehicle."""
    rows = [{"drug": "vehicle", "smiles": None}] + [{"drug": d, "smiles": s} for d, s in SMILES.items()]
    return dataset([row for row in rows for _ in range(3)], representation)


def doses() -> EnvironmentDataset:
    """Drug A at 1, 10, 100 uM, B at 1, 10 uM, C at 5 uM only; 6 and 24 h; two cells of each."""
    rows = [{"drug": "vehicle", "dose": 0.0, "time": t} for t in (6, 24)]
    for drug, levels in {"A": [1, 10, 100], "B": [1, 10], "C": [5]}.items():
        rows += [{"drug": drug, "dose": float(d), "time": t} for d in levels for t in (6, 24)]
    return dataset([row for row in rows for _ in range(2)], ["one-hot", "dose", "time"])


def lines() -> EnvironmentDataset:
    """Drugs A, B, C in cell lines P, Q, R, except C in R; vehicle in P and Q; two cells of each."""
    pairs = [(d, c) for d in "ABC" for c in "PQR" if (d, c) != ("C", "R")] + [("vehicle", "P"), ("vehicle", "Q")]
    rows = [{"drug": d, "cell_line": c, "site": c.lower()} for d, c in pairs for _ in range(2)]
    return dataset(rows, ["one-hot", "cell_line"], covariates=["site"])


def drugs(cells: EnvironmentDataset | None) -> set[str]:
    assert cells is not None
    return set(cells.environments["perturbation"].iloc[cells.present])


def names(cells: EnvironmentDataset | None) -> set[str]:
    assert cells is not None
    return set(cells.environments.index[cells.present])


def assert_partition(cells: EnvironmentDataset, split: Split) -> None:
    """Every cell is in one part, and parts keep the table."""
    parts = [part for part in (split.train, split.validation, split.test) if part is not None]
    assert sorted(c for part in parts for c in part.cells) == sorted(cells.cells)
    assert all(part.environments is cells.environments for part in parts)
    assert split.train.reference[split.train.present].any()


# ---------------------------------------------------------------------- whole environments
def test_named_perturbations_are_held_out_with_all_their_environments() -> None:
    cells = doses()
    split = by_environment(cells, held_out=["A"])
    assert drugs(split.test) == {"A"}
    assert drugs(split.train) == {"vehicle", "B", "C"}
    assert split.validation is None
    assert len(split.held_out) == 6
    assert split.held_out[0] == "A 1 uM 6 h"
    assert_partition(cells, split)


def test_named_environments_are_held_out_alone() -> None:
    split = by_environment(doses(), held_out=["A 10 uM 6 h", "B 1 uM 24 h"])
    assert names(split.test) == {"A 10 uM 6 h", "B 1 uM 24 h"}
    assert {"A 10 uM 24 h", "B 1 uM 6 h"} <= names(split.train)


def test_a_fraction_of_the_perturbations_is_drawn() -> None:
    cells = knockouts(20)
    split = by_environment(cells, fraction=0.2, validation_fraction=0.1, seed=3)
    assert len(drugs(split.test)) == 4
    assert len(drugs(split.validation)) == 2
    assert len(drugs(split.train)) == 1 + 14
    assert not drugs(split.test) & drugs(split.validation)
    assert set(split.held_out) == drugs(split.test)
    assert_partition(cells, split)


def test_a_draw_depends_on_its_seed_only() -> None:
    cells = knockouts()
    first, again = by_environment(cells, seed=1), by_environment(cells, seed=1)
    assert first.held_out == again.held_out
    assert first.test.cells == again.test.cells
    assert len({by_environment(cells, seed=s).held_out for s in range(5)}) > 1


@pytest.mark.parametrize("seed", range(8))
def test_a_draw_never_parts_the_names_of_a_compound(seed: int) -> None:
    split = by_environment(compounds(), fraction=0.4, validation_fraction=0.2, seed=seed)
    for pair in ({"ethanol", "alcohol"}, {"aspirin", "aspirin sodium"}):
        assert len([part for part in (split.train, split.validation, split.test) if drugs(part) & pair]) == 1


def test_held_out_names_make_the_same_test_cells_again() -> None:
    cells = compounds()
    split = by_environment(cells, seed=5)
    assert by_environment(cells, held_out=split.held_out).test.cells == split.test.cells


def test_validation_beside_named_environments_is_drawn_from_the_others() -> None:
    split = by_environment(knockouts(10), held_out=["K00", "K01"], validation_fraction=0.3)
    assert drugs(split.test) == {"K00", "K01"}
    assert len(drugs(split.validation)) == 3
    assert len(drugs(split.train)) == 1 + 5


def test_a_reference_is_never_held_out() -> None:
    with pytest.raises(DataError, match="'vehicle' is a reference: references stay in training"):
        by_environment(knockouts(), held_out=["K00", "vehicle"])
    for seed in range(10):
        assert "vehicle" in drugs(by_environment(knockouts(3), fraction=0.5, seed=seed).train)


def test_an_unknown_name_is_refused_with_near_ones() -> None:
    with pytest.raises(DataError, match="no environment 'K019': did you mean one of 'K19', 'K09'"):
        by_environment(knockouts(), held_out=["K019"])
    with pytest.raises(DataError, match="held_out names no environment"):
        by_environment(knockouts(), held_out=[])


def test_an_environment_without_cells_is_refused() -> None:
    cells = knockouts()
    rest = cells.subset(~np.isin(cells.env, cells.environment_index("K03")))
    with pytest.raises(DataError, match="'K03' has no cells here"):
        by_environment(rest, held_out=["K03"])
    drawn = [by_environment(rest, fraction=0.5, seed=s) for s in range(5)]
    assert all("K03" not in split.held_out for split in drawn)


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, float("nan")])
def test_a_fraction_outside_its_limits_is_refused(fraction: float) -> None:
    with pytest.raises(DataError, match=r"fraction is .*: give a number in \(0, 1\)"):
        by_environment(knockouts(), fraction=fraction)


def test_fractions_must_leave_something_to_train_on() -> None:
    with pytest.raises(DataError, match=r"fraction 0\.6 and validation_fraction 0.4 leave nothing to train on"):
        by_environment(knockouts(), fraction=0.6, validation_fraction=0.4)
    with pytest.raises(DataError, match=r"validation_fraction is 1.5: give a number in \[0, 1\)"):
        by_environment(knockouts(), validation_fraction=1.5)
    with pytest.raises(DataError, match="2 sets of perturbations to draw from, 3 are needed"):
        by_environment(knockouts(2), fraction=0.4, validation_fraction=0.4)
    with pytest.raises(DataError, match="nothing is left for validation"):
        by_environment(knockouts(2), held_out=["K00"], validation_fraction=0.5)


def test_perturbations_that_a_representation_cannot_tell_apart_are_one_set() -> None:
    cells = knockouts(4).with_representation(np.array([[0], [1], [1], [2], [2]]))
    for seed in range(6):
        held = drugs(by_environment(cells, fraction=0.5, seed=seed).test)
        assert held in ({"K00", "K01"}, {"K02", "K03"})
    with pytest.raises(DataError, match="1 sets of perturbations to draw from, 2 are needed"):
        by_environment(cells.with_representation(np.array([[0], [1], [1], [1], [1]])))


def test_named_environments_must_not_leak() -> None:
    with pytest.raises(
        DataError, match="1 leaks between the training and the test cells: compound 'ethanol': the comp"
    ):
        by_environment(compounds(), held_out=["ethanol"])
    with pytest.raises(DataError, match="compound 'aspirin sodium': the compound, or a salt of it, of 'aspirin'"):
        by_environment(compounds(), held_out=["aspirin sodium"])
    same = doses().with_representation(["one-hot", "time"])
    with pytest.raises(DataError, match="representation 'A 10 uM 6 h': the representation of 'A 1 uM 6 h', 'A 100 uM"):
        by_environment(same, held_out=["A 10 uM 6 h"])


def test_a_combination_in_another_order_is_the_same_perturbation() -> None:
    cells = dataset([{"drug": d} for d in ["vehicle", "A", "B", "A+B", "B+A", "C"] for _ in range(2)])
    with pytest.raises(DataError, match=r"perturbation 'A\+B': the perturbation of 'B\+A'"):
        by_environment(cells, held_out=["A+B"])
    assert drugs(by_environment(cells, held_out=["A+B", "B+A"]).test) == {"A+B", "B+A"}
    for seed in range(6):
        assert len(drugs(by_environment(cells, fraction=0.5, seed=seed).test) & {"A+B", "B+A"}) in (0, 2)


def test_the_drugs_of_a_mixture_may_be_in_training() -> None:
    rows = [{"drug": "vehicle", "smiles": None}, {"drug": "A", "smiles": SMILES["haloperidol"]}]
    rows += [{"drug": "B", "smiles": "CCO"}, {"drug": "A+B", "smiles": SMILES["haloperidol"] + ".CCO"}]
    assert by_environment(dataset(rows), held_out=["A+B"]).held_out == ("A+B",)


# ---------------------------------------------------------------------- groups
def test_groups_of_ones_own_stay_whole() -> None:
    cells = knockouts(12)
    groups = {f"K{i:02d}": i // 3 for i in range(12)}
    split = by_group(cells, groups, fraction=0.25, validation_fraction=0.25, seed=2)
    for part in (split.test, split.validation):
        held = {groups[d] for d in drugs(part)}
        assert len(held) == 1
        assert len(drugs(part)) == 3
    assert_partition(cells, split)


def test_a_group_larger_than_the_fraction_stays_in_training() -> None:
    groups = {f"K{i:02d}": max(i - 7, 0) for i in range(12)}  # K00 to K07 together, four alone
    for seed in range(10):
        held = drugs(by_group(knockouts(12), groups, fraction=0.25, seed=seed).test)
        assert len(held) == 3
        assert held <= {"K08", "K09", "K10", "K11"}
    two = {f"K{i:02d}": i // 8 for i in range(12)}
    assert drugs(by_group(knockouts(12), two, fraction=0.1).test) == {"K08", "K09", "K10", "K11"}


@pytest.mark.parametrize("seed", range(4))
def test_similar_compounds_stay_together(seed: int) -> None:
    split = by_group(compounds("morgan"), "tanimoto", threshold=0.4, fraction=0.5, seed=seed)
    for alike in ({"ethanol", "alcohol"}, {"aspirin", "aspirin sodium"}, {"caffeine", "theophylline"}):
        assert alike <= drugs(split.test) or alike <= drugs(split.train)


def test_the_threshold_of_similarity_is_used() -> None:
    parted = []
    for seed in range(10):
        held = drugs(by_group(compounds(), "tanimoto", threshold=0.95, fraction=0.5, seed=seed).test)
        parted.append(len(held & {"caffeine", "theophylline"}) == 1)
    assert any(parted)


@pytest.mark.parametrize("seed", range(4))
def test_scaffolds_stay_together(seed: int) -> None:
    rings = {"benzene": "c1ccccc1", "piperidine": "C1CCNCC1", "pyridine": "c1ccncc1", "naphthalene": "c1ccc2ccccc2c1"}
    chains = {"methyl": "C", "ethyl": "CC", "hydroxyethyl": "OCC"}
    rows = [{"drug": f"{c} {r}", "smiles": chains[c] + rings[r]} for c in chains for r in rings]
    split = by_group(dataset([{"drug": "vehicle", "smiles": None}, *rows]), "scaffold", fraction=0.25, seed=seed)
    assert len(drugs(split.test)) == 3
    assert len({name.split()[1] for name in drugs(split.test)}) == 1


def test_every_perturbation_needs_a_group() -> None:
    with pytest.raises(DataError, match="no group for 'K01', 'K02': give every perturbation a group"):
        by_group(knockouts(3), {"K00": 0})
    with pytest.raises(DataError, match="no SMILES for 'K00', 'K01', 'K02': fill the SMILES column"):
        by_group(knockouts(3), "scaffold")
    with pytest.raises(DataError, match="unknown groups 'ecfp': use 'tanimoto', 'scaffold', or a group for each"):
        by_group(knockouts(3), "ecfp")


# ---------------------------------------------------------------------- doses
@pytest.mark.parametrize(
    ("which", "held"),
    [
        ("highest", {"A 100 uM", "B 10 uM"}),
        ("lowest", {"A 1 uM", "B 1 uM"}),
        ("middle", {"A 10 uM"}),
        ([10.0], {"A 10 uM", "B 10 uM"}),
        ([1, 10], {"A 1 uM", "A 10 uM"}),  # B would have no dose left
        ([100.0, 5.0], {"A 100 uM"}),  # C has only that dose
    ],
)
def test_a_dose_is_held_out_where_another_is_left(which: Any, held: set[str]) -> None:
    cells = doses()
    split = by_dose(cells, doses=which)
    assert names(split.test) == {f"{name} {t} h" for name in held for t in (6, 24)}
    assert drugs(split.train) == {"vehicle", "A", "B", "C"}
    assert_partition(cells, split)


def test_doses_of_named_perturbations_only() -> None:
    assert drugs(by_dose(doses(), held_out=["B"]).test) == {"B"}
    split = by_dose(doses())
    assert by_dose(doses(), held_out=split.held_out).test.cells == split.test.cells


def test_doses_of_some_perturbations_for_testing_and_of_others_for_validation() -> None:
    seen = set()
    for seed in range(8):
        split = by_dose(doses(), fraction=0.5, validation_fraction=0.5, seed=seed)
        assert (drugs(split.test), drugs(split.validation)) in [({"A"}, {"B"}), ({"B"}, {"A"})]
        assert drugs(split.train) == {"vehicle", "A", "B", "C"}
        seen |= drugs(split.test)
    assert seen == {"A", "B"}


def test_a_perturbation_keeps_a_dose_in_training() -> None:
    with pytest.raises(DataError, match="'C' would have no dose held out, or none left in training"):
        by_dose(doses(), held_out=["A", "C"])
    with pytest.raises(DataError, match="'B' would have no dose held out"):
        by_dose(doses(), doses="middle", held_out=["A", "B"])
    with pytest.raises(DataError, match="every perturbation would have no dose held out"):
        by_dose(doses(), doses=[5.0])


def test_doses_must_be_known() -> None:
    with pytest.raises(DataError, match=r"no environment has dose 3 uM: it has 1\.0, 5\.0, 10\.0, 100\.0"):
        by_dose(doses(), doses=[10, 3])
    with pytest.raises(
        DataError, match="unknown doses 'top': use one of 'highest', 'middle', 'lowest', or doses in uM"
    ):
        by_dose(doses(), doses="top")
    with pytest.raises(DataError, match=r"the environments have no dose: .*dose=COLUMN"):
        by_dose(knockouts())
    with pytest.raises(DataError, match="no environment 'Z'"):
        by_dose(doses(), held_out=["Z"])


def test_doses_of_combinations_stay_in_training() -> None:
    rows = [
        {"drug": d, "dose": v} for d, v in [("vehicle", "0"), ("A", "1"), ("A", "9"), ("A+B", "1+1"), ("A+B", "9+9")]
    ]
    assert by_dose(dataset(rows, "multi-hot")).held_out == ("A 9 uM",)


def test_a_dose_that_the_representation_does_not_show_is_a_leak() -> None:
    with pytest.raises(
        DataError, match=r"representation 'A 100 uM 6 h': .* use a representation that tells them apart"
    ):
        by_dose(doses().with_representation(["one-hot", "time"]))


# ---------------------------------------------------------------------- combinations with a covariate
@pytest.mark.parametrize(("covariate", "category"), [("cell_line", "Q"), ("site", "q")])
def test_a_named_pair_is_held_out(covariate: str, category: str) -> None:
    cells = lines()
    split = by_combination(cells, covariate=covariate, held_out=[("A", category)])
    assert names(split.test) == {"A Q"}
    assert {"A P", "B Q", "vehicle Q"} <= names(split.train)
    assert split.held_out == (("A", category),)
    assert split.combination == covariate
    assert_partition(cells, split)


def test_a_pair_within_one_environment_is_held_out() -> None:
    rows = [{"drug": d, "type": t} for d in ("vehicle", "interferon") for t in ("B", "T", "NK") for _ in range(3)]
    cells = dataset(rows)  # the type is an obs column, not part of the environment
    split = by_combination(cells, covariate="type", held_out=[("interferon", "NK")])
    assert set(split.test.obs["type"]) == {"NK"}
    assert drugs(split.test) == {"interferon"}
    assert sorted(split.train.obs["type"].value_counts().items()) == [("B", 6), ("NK", 3), ("T", 6)]


@pytest.mark.parametrize("seed", range(10))
def test_drawn_pairs_leave_each_perturbation_and_category_in_training(seed: int) -> None:
    cells = lines()
    split = by_combination(cells, covariate="cell_line", fraction=0.25, validation_fraction=0.25, seed=seed)
    assert len(split.held_out) == 2
    assert len(names(split.validation)) == 2
    assert drugs(split.train) == {"vehicle", "A", "B", "C"}
    assert set(split.train.environments["cell_line"].iloc[split.train.present]) == {"P", "Q", "R"}
    assert_partition(cells, split)


def test_more_pairs_than_possible_are_not_drawn() -> None:
    split = by_combination(lines(), covariate="cell_line", fraction=0.99)
    left = names(split.train)
    assert 3 <= len([name for name in left if not name.startswith("vehicle")]) <= 4
    assert {name.split()[0] for name in left} == {"vehicle", "A", "B", "C"}
    assert {name.split()[1] for name in left} == {"P", "Q", "R"}


def test_a_pair_must_leave_both_in_training() -> None:
    with pytest.raises(DataError, match=r"holding out .* leaves no cell of 'C', 'Q' in training for one of the two"):
        by_combination(lines(), covariate="cell_line", held_out=[("C", "P"), ("C", "Q")])
    with pytest.raises(DataError, match="leaves no cell of 'B', 'R' in training for one of the two"):  # no vehicle in R
        by_combination(lines(), covariate="cell_line", held_out=[("A", "R"), ("B", "R")])
    split = by_combination(lines(), covariate="cell_line", held_out=[(d, "P") for d in "ABC"])  # the vehicle is in P
    assert names(split.test) == {"A P", "B P", "C P"}


def test_pairs_must_exist() -> None:
    with pytest.raises(DataError, match=r"no cells of \('C', 'R'\) for 'cell_line': did you mean one of \('C', '"):
        by_combination(lines(), covariate="cell_line", held_out=[("C", "R")])
    with pytest.raises(DataError, match="held_out names no pair"):
        by_combination(lines(), covariate="cell_line", held_out=[])
    with pytest.raises(
        DataError, match="no covariate, obs column or cell line 'tissue': these cells have 'site', 'drug'"
    ):
        by_combination(lines(), covariate="tissue")
    with pytest.raises(DataError, match="no pair of a perturbation and 'drug' can be held out"):
        by_combination(knockouts(3), covariate="drug")
    cells = lines()
    cells.obs["site"] = [None] + ["p"] * (len(cells) - 1)
    with pytest.raises(DataError, match="obs column 'site' is missing in 'c0': fill or drop them"):
        by_combination(replace(cells, covariates={}, categories={}), covariate="site")


# ---------------------------------------------------------------------- cells
def test_rows_are_held_out_of_every_environment_alike() -> None:
    cells = knockouts(9, cells=20)
    split = by_row(cells, 0.1, 0.2, seed=4)
    for part, number in ((split.test, 2), (split.validation, 4), (split.train, 14)):
        assert part is not None
        assert np.bincount(part.env).tolist() == [number] * 10
    assert_partition(cells, split)


def test_uneven_environments_are_held_out_to_the_nearest_cell() -> None:
    cells = dataset([{"drug": d} for d, n in [("vehicle", 7), ("A", 1), ("B", 13), ("C", 29)] for _ in range(n)])
    split = by_row(cells, 0.2)
    held, left = np.bincount(split.test.env, minlength=4), np.bincount(split.train.env, minlength=4)
    assert held.sum() == 10
    assert (abs(held - 0.2 * np.array([7, 1, 13, 29])) < 1).all()
    assert left[1] == 1  # the only cell of its environment


def test_no_environment_leaves_training() -> None:
    split = by_row(knockouts(5, cells=2), 0.49, 0.49)
    assert np.bincount(split.train.env, minlength=6).min() == 1
    assert len(split.test) + len(split.train) + (0 if split.validation is None else len(split.validation)) == 12


def test_rows_without_strata() -> None:
    cells = knockouts(30, cells=5)
    split = by_row(cells, 0.2, stratify=False)
    assert len(split.test) == 31  # of 155
    assert len(set(np.bincount(split.test.env, minlength=31).tolist())) > 2
    assert_partition(cells, split)
    single = dataset([{"drug": "vehicle"}] + [{"drug": "A"}] * 9)
    assert all(by_row(single, 0.9, seed=s, stratify=False).train.cells == ("c0",) for s in range(5))


def test_rows_depend_on_the_seed_only() -> None:
    cells = knockouts()
    assert by_row(cells, seed=1).test.cells == by_row(cells, seed=1).test.cells
    assert by_row(cells, seed=1).test.cells != by_row(cells, seed=2).test.cells
    drawn = {cell for seed in range(60) for cell in by_row(cells, 0.25, seed=seed).test.cells}
    assert drawn == set(cells.cells)


def test_rows_need_room() -> None:
    with pytest.raises(DataError, match="0 cells are held out for testing and 3 left to train on: both need some"):
        by_row(dataset([{"drug": d} for d in ("vehicle", "A", "B")]), 0.3)


# ---------------------------------------------------------------------- leaks
def found(train: EnvironmentDataset, held_out: EnvironmentDataset, **options: Any) -> set[tuple[str, str]]:
    table = leaks(train, held_out, **options)
    assert list(table.columns) == ["kind", "environment", "detail"]
    return set(zip(table["kind"], table["environment"], strict=True))


def test_nothing_leaks_between_different_environments() -> None:
    cells = knockouts(4)
    assert found(cells.of("vehicle", "K00", "K01"), cells.of("K02")) == set()
    assert len(leaks(cells.of("K00"), cells.of("K02"))) == 0


def test_the_same_cells_are_named() -> None:
    cells = knockouts(2, cells=4)
    table = leaks(cells, cells.subset(np.array([5, 6])), kinds=["cell"])
    assert table.to_numpy().tolist() == [["cell", "K00", "2 cells are in both ('c5', 'c6')"]]
    other = EnvironmentDataset.from_anndata(cells.to_anndata()[[1, 2, 3]].copy())
    assert found(cells.subset(np.array([0])), other, kinds=["cell"]) == set()  # row 0 of both files, another name
    assert found(cells, replace(cells, origin=None), kinds=["cell"]) == {("cell", e) for e in ("vehicle", "K00", "K01")}


def test_the_same_environment_and_a_reference_are_named() -> None:
    cells = knockouts(2, cells=4)
    odd = np.arange(len(cells)) % 2 == 1
    assert found(cells.subset(~odd), cells.subset(odd)) == {
        ("environment", "vehicle"),
        ("environment", "K00"),
        ("environment", "K01"),
        ("reference", "vehicle"),
    }
    detail = leaks(cells.subset(~odd), cells.subset(odd), kinds=["environment"])["detail"]
    assert set(detail) == {"has 2 cells in training"}


def test_another_dose_is_the_same_perturbation() -> None:
    cells = doses()
    held = cells.of("A 10 uM 6 h")
    assert found(cells.of("A 1 uM 6 h", "B 10 uM 6 h"), held) == {("perturbation", "A 10 uM 6 h")}
    assert found(cells.of("B 10 uM 6 h"), held) == set()


def test_a_compound_is_found_under_another_name_and_as_a_salt() -> None:
    cells = compounds()
    held = cells.of("alcohol", "aspirin sodium", "decane")
    assert found(cells.of("ethanol", "aspirin", "caffeine"), held) == {
        ("compound", "alcohol"),
        ("compound", "aspirin sodium"),
    }


def test_a_placeholder_is_not_a_compound() -> None:
    cells = dataset([{"drug": d, "smiles": s} for d, s in [("vehicle", "C"), ("A", "restricted"), ("B", "restricted")]])
    assert found(cells.of("A"), cells.of("B")) == set()


def test_an_identical_representation_is_named_even_if_it_is_a_references() -> None:
    cells = knockouts(3).with_representation(np.array([[0.0], [1.0], [1.0], [-0.0]]))
    assert found(cells.of("vehicle", "K00"), cells.of("K01", "K02")) == {
        ("representation", "K01"),
        ("representation", "K02"),
    }
    detail = leaks(cells.of("vehicle"), cells.of("K02"))["detail"].item()
    assert detail == "the representation of 'vehicle'"


def test_a_held_out_reference_is_not_also_a_representation() -> None:
    cells = doses().with_representation(["one-hot", "dose"])  # without the time, both vehicles look alike
    assert found(cells.of("vehicle 6 h"), cells.of("vehicle 24 h")) == {("reference", "vehicle 24 h")}


def test_a_pair_is_named_where_its_covariate_is() -> None:
    cells = lines()
    assert found(cells.of("A P", "B Q"), cells.of("A Q"), combination="cell_line") == {("perturbation", "A Q")}
    part = cells.subset(np.arange(len(cells)) % 2 == 0)
    table = leaks(part, cells.of("A Q"), combination="site", kinds=["combination"])
    assert table.to_numpy().tolist() == [["combination", "A Q", "'A' in 'q' has 1 cells in training"]]
    assert len(leaks(part, cells.of("A Q"), kinds=["combination"])) == 0


def test_an_unknown_kind_of_leak_is_refused() -> None:
    with pytest.raises(DataError, match="unknown kind of leak 'cells': use some of cell, reference, environment"):
        leaks(knockouts(), knockouts(), kinds=["cells"])


def test_a_split_is_searched_for_what_it_promises() -> None:
    cells = compounds()
    rest = cells.subset(~np.isin(cells.env, cells.environment_index("ethanol", "decane")))
    parts = {"train": rest, "validation": None, "test": cells.of("ethanol", "decane")}
    check(Split(**parts))
    with pytest.raises(DataError, match="1 leaks between the training and the test cells: compound 'ethanol'"):
        check(Split(**parts, promises=KINDS))
    overlapping = Split(train=rest, validation=cells.of("decane"), test=cells.of("decane"))
    with pytest.raises(
        DataError, match="1 leaks between the validation and the test cells: cell 'decane': 3 cells are"
    ):
        check(overlapping)
    everything = Split(train=cells, validation=None, test=cells)
    with pytest.raises(DataError, match=r"9 leaks between the training and the test cells: .*; and 4 more"):
        check(everything)


# ---------------------------------------------------------------------- real data
def test_hepatocyte_drugs_doses_and_chemical_groups(data_folder: Path) -> None:
    adata = read_h5ad(data_folder / "tggates_hepatocytes" / "tggates_hepatocytes_log2.h5ad")
    adata = adata[adata.obs["smiles"].astype(str) != ""].copy()
    treated = adata.obs["dose_level"].astype(str) != "Control"
    adata.obs["drug"] = adata.obs["treatmentid"].astype(str).where(treated, "vehicle")
    cells = EnvironmentDataset.from_anndata(
        adata, environment="drug", control="vehicle", dose="concentration", time="duration", smiles="smiles",
        representation=["morgan", "dose", "time"],
    )  # fmt: skip
    assert len(drugs(cells)) == 75

    unseen = by_environment(cells, fraction=0.2, validation_fraction=0.1)
    assert len(drugs(unseen.test)) == 15
    assert len(drugs(unseen.validation)) == 7
    assert_partition(cells, unseen)

    highest = by_dose(cells, doses="highest")
    for name in highest.held_out:
        row = cells.environments.loc[name]
        left = highest.train.environments.iloc[highest.train.present]
        left = left[left["perturbation"] == row["perturbation"]]
        assert (left["dose"] < row["dose"]).all()
    assert drugs(highest.train) == drugs(cells)
    assert_partition(cells, highest)

    alike = by_group(cells, "tanimoto", threshold=0.4)
    assert not drugs(alike.test) & drugs(alike.train)
    from pyro_scm.data.chemistry import morgan, tanimoto

    molecule = (
        cells.environments.dropna(subset="smiles").drop_duplicates("perturbation").set_index("perturbation")["smiles"]
    )
    held, seen = (
        morgan([molecule[d] for d in sorted(drugs(p) - {"vehicle"})], desalt=True) for p in (alike.test, alike.train)
    )
    assert tanimoto(held, seen).max() < 0.4


def test_an_unseen_pair_of_cell_type_and_stimulus(data_folder: Path) -> None:
    cells = EnvironmentDataset.read(
        data_folder / "kang_pbmc_ifnb" / "kang_pbmc_ifnb_log1p.h5ad",
        environment="condition", control="control", covariates=["cell_type"],
    )  # fmt: skip
    split = by_combination(cells, covariate="cell_type", held_out=[("stimulated", "NK")])
    assert set(split.test.obs["cell_type"]) == {"NK"}
    assert set(split.test.obs["condition"]) == {"stimulated"}
    kept = split.train.obs[split.train.obs["cell_type"] == "NK"]
    assert set(kept["condition"]) == {"control"}
    assert_partition(cells, split)
