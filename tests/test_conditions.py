"""Conditions beyond a run's table, and what is said of those that are unlike training."""

import functools
from typing import Any

import numpy as np
import pytest
import torch

from pyro_scm import recipes
from pyro_scm.baselines import controls
from pyro_scm.conditions import at_dose, entered, novelty, parts, perturbations, single_dose, singles
from pyro_scm.data.dataset import EnvironmentDataset
from pyro_scm.errors import DataError, ModelError
from pyro_scm.infer import fit
from pyro_scm.run import Run
from tests.compositions import cells

PAIR = "A+B 10+10 uM"


@functools.cache
def run_of(representation: Any, held_out: tuple[str, ...] = (PAIR,)) -> tuple[Run, EnvironmentDataset]:
    """One epoch of a small model, and all cells."""
    screen = cells(representation)
    training = screen.subset(~np.isin(screen.env, screen.environment_index(*held_out)))
    torch.manual_seed(0)
    model, guide = recipes.make("translation_vae", training.schema, latent=2, hidden=(4,), guide_hidden=(4,))
    return fit(model, guide, training, epochs=1, progress=False), screen


def named(run: Run, row: np.ndarray) -> dict[str, float]:
    return {n: round(float(v), 4) for n, v in zip(run.schema.features, row, strict=True) if v and "morgan" not in n}


def test_single_perturbations_are_found_by_dose() -> None:
    run, screen = run_of("multi-dose")
    names = list(screen.environments.index)
    assert {k: [names[i] for i in v] for k, v in perturbations(run).items()} == {
        "A": ["A 1 uM", "A 10 uM"],
        "B": ["B 1 uM", "B 10 uM"],
        "C": ["C 10 uM"],
    }
    assert single_dose(3) == 3
    assert np.isnan(single_dose("1+2"))


@pytest.mark.parametrize(
    ("representation", "expected"),
    [
        ("multi-dose", {"dose=A": 3.0}),
        ("multi-hot", {"perturbation=A": 0.6021}),
        (("one-hot", "dose"), {"perturbation=A": 1.0, "log10(1 + dose)": 0.6021}),
    ],
)
def test_another_dose_changes_what_holds_it(representation: Any, expected: dict[str, float]) -> None:
    run, screen = run_of(representation, ()) if isinstance(representation, str) else run_without_pair(representation)
    assert named(run, at_dose(run, "A 10 uM", 3.0)) == expected
    for name, dose in (("A 10 uM", 10.0), ("A 1 uM", 1.0), ("B 10 uM", 10.0)):
        own = screen.representation[screen.environment_index(name)[0]]
        np.testing.assert_allclose(at_dose(run, name, dose), own, rtol=1e-6)


@functools.cache
def run_without_pair(representation: Any) -> tuple[Run, EnvironmentDataset]:
    """Of the single perturbations: some representations have nothing to say of pairs' doses."""
    import anndata

    from tests.compositions import screen

    adata: anndata.AnnData = screen()[screen().obs["drug"] != "A+B"].copy()
    found = EnvironmentDataset.from_anndata(
        adata, environment="drug", control="DMSO", dose="dose", representation=list(representation)
    )
    torch.manual_seed(0)
    model, guide = recipes.make("translation_vae", found.schema, latent=2, hidden=(4,), guide_hidden=(4,))
    return fit(model, guide, found, epochs=1, progress=False), found


def test_the_dose_of_a_molecule_is_its_parts() -> None:
    run, screen = run_of("molecules")
    row = at_dose(run, "A 10 uM", 3.0)
    own = screen.representation[screen.environment_index("A 10 uM")[0]]
    changed = [run.schema.features[i] for i in np.flatnonzero(row != own)]
    assert changed == ["part 1: log10(1 + dose)"]
    assert row[run.schema.features.index(changed[0])] == pytest.approx(np.log10(4))


def test_what_has_no_dose_to_change_is_refused() -> None:
    run, _ = run_of("one-hot")
    with pytest.raises(ModelError, match="does not hold its dose: fit with doses in 'multi-dose'"):
        at_dose(run, "A 10 uM", 3.0)
    dosed, _ = run_of("multi-dose")
    for environment in ("DMSO", PAIR):
        with pytest.raises(DataError, match="is a reference or a combination"):
            at_dose(dosed, environment, 3.0)
    with pytest.raises(DataError, match="dose -1: give a dose in uM"):
        at_dose(dosed, "A 10 uM", -1)
    with pytest.raises(DataError, match="no environment 'D 1 uM'"):
        at_dose(dosed, "D 1 uM", 1)


@pytest.mark.parametrize("representation", ["multi-dose", "multi-hot", "molecules", "morgan"])
def test_the_parts_of_a_pair_alone_are_what_the_table_has(representation: str) -> None:
    run, screen = run_of(representation)
    found = singles(run, PAIR)
    assert list(found) == ["A", "B"]
    for part, row in found.items():
        own = screen.representation[screen.environment_index(f"{part} 10 uM")[0]]
        np.testing.assert_allclose(row, own, rtol=1e-6)
    with pytest.raises(DataError, match="'A 1 uM' is no combination"):
        singles(run, "A 1 uM")


def test_parts_that_name_a_reference_do_not_count() -> None:
    """Screens with two guides a cell write A+ctrl for A alone."""
    import anndata
    import pandas as pd

    names = ["ctrl", "A+ctrl", "ctrl+B", "A+B", "B+C"]
    obs = pd.DataFrame({"p": np.repeat(names, 8)}, index=[f"c{i}" for i in range(40)])
    x = np.random.default_rng(0).normal(size=(40, 5)).astype(np.float32)
    adata = anndata.AnnData(x, obs, pd.DataFrame(index=[f"g{i}" for i in range(5)]))
    screen = EnvironmentDataset.from_anndata(adata, environment="p", control="ctrl", representation="multi-hot")
    assert parts(screen.environments) == [(), ("A",), ("B",), ("A", "B"), ("B", "C")]
    torch.manual_seed(0)
    model, guide = recipes.make("cpa", screen.schema, latent=2, hidden=(4,), guide_hidden=(4,))
    run = fit(model, guide, screen.subset(screen.env < 4), epochs=1, progress=False)
    assert list(perturbations(run)) == ["A", "B"]
    found = singles(run, "A+B")
    np.testing.assert_array_equal(found["A"], screen.representation[1])
    np.testing.assert_array_equal(found["B"], screen.representation[2])
    new = novelty(run, ["A+ctrl", "B+C"])
    assert list(new["parts"]) == [1, 2]
    assert list(new["unseen"]) == ["", "C"]


def test_further_conditions_can_be_asked_for_by_name() -> None:
    run, screen = run_of("multi-dose")
    row = at_dose(run, "A 10 uM", 3.0)
    wide, known = entered(run, screen, {"A 3 uM": ("A 10 uM", row)})
    e = wide.environments.index("A 3 uM")
    assert e == len(screen.environments)
    np.testing.assert_array_equal(wide.environments.representation[e], row)
    assert not wide.environments.table["trained"].iloc[e]
    assert len(known) == len(screen)
    np.testing.assert_allclose(controls(known, ["A 3 uM"]), controls(screen, ["A 10 uM"]))
    assert len(run.environments.table) == len(screen.environments)  # the run itself is as it was
    with pytest.raises(DataError, match="'A 1 uM' is an environment of the run"):
        entered(run, screen, {"A 1 uM": ("A 10 uM", row)})
    with pytest.raises(DataError, match="other environments than the run"):
        entered(wide, screen, {"A 4 uM": ("A 10 uM", row)})


# ---------------------------------------------------------------------- novelty
def test_conditions_that_were_trained_on_are_no_news() -> None:
    run, screen = run_of("multi-dose")
    table = novelty(run)
    assert list(table.index) == list(screen.environments.index)
    trained = table[table["trained"]]
    assert len(trained) == len(table) - 1
    assert (trained["distance"] == 0).all()
    assert list(trained["nearest"]) == list(trained.index)
    assert (trained["warning"] == "").all()


def test_a_pair_of_known_parts_lies_near_one_of_them() -> None:
    run, _ = run_of("multi-dose")
    found = novelty(run, PAIR).loc[PAIR]
    assert (found["parts"], found["unseen"], found["trained"]) == (2, "", False)
    assert found["nearest"] in ("A 10 uM", "B 10 uM")
    assert found["distance"] == pytest.approx(0.5)  # half of the dose in common


def test_unseen_parts_are_named() -> None:
    run, _ = run_of("multi-dose", (PAIR, "B 1 uM", "B 10 uM"))
    found = novelty(run, [PAIR, "B 1 uM"])
    assert list(found["unseen"]) == ["B", "B"]
    assert "no training cell had 'B': nothing was learnt of its effect" in found.loc[PAIR, "warning"]
    by_molecule, _ = run_of("molecules", (PAIR, "B 1 uM", "B 10 uM"))
    assert (
        "no training cell had 'B': it is predicted from its features alone"
        in novelty(by_molecule, "B 1 uM")["warning"].iloc[0]
    )


@pytest.mark.parametrize("representation", ["multi-dose", "multi-hot", "molecules"])
def test_doses_outside_those_of_training_are_told_in_uM(representation: str) -> None:
    run, _ = run_of(representation)
    doses = {f"{d:g}": at_dose(run, "A 10 uM", d) for d in (0.1, 1.0, 5.0, 10.0, 100.0)}
    found = novelty(run, doses)
    told = found["doses"] != ""
    assert list(found.index[told]) == ["0.1", "100"]
    assert "100 is outside the 1 to 10 of training" in found.loc["100", "warning"]


def test_a_molecule_unlike_all_others_is_far() -> None:
    run, _ = run_of("morgan", (PAIR, "C 10 uM"))
    own = np.zeros(len(run.schema.features), np.float32)
    own[1::2] = 1  # a bit pattern of no molecule
    found = novelty(run, {"odd": own})
    assert found["distance"].iloc[0] > found["usual"].iloc[0]
    assert found["far"].iloc[0]
    assert "from the nearest training condition" in found["warning"].iloc[0]
    assert "1 - Tanimoto" in found["warning"].iloc[0]


def test_representations_with_negative_numbers_are_compared_in_standard_deviations() -> None:
    rows = {name: np.array([i, -i]) for i, name in enumerate(("DMSO", "A", "B", "C", "A+B"))}
    run, _ = run_of_rows(tuple((k, tuple(v)) for k, v in rows.items()))
    sd = np.array([rows[n] for n in ("DMSO", "A", "A", "B", "B", "C")])[:, 0].std()
    found = novelty(run, PAIR).loc[PAIR]
    assert found["nearest"] == "C 10 uM"
    assert found["distance"] == pytest.approx(1 / sd)


@functools.cache
def run_of_rows(rows: tuple[tuple[str, tuple[float, ...]], ...]) -> tuple[Run, EnvironmentDataset]:
    return run_of.__wrapped__({name: np.array(row) for name, row in rows})


def test_a_representation_of_another_length_is_refused() -> None:
    run, _ = run_of("multi-dose")
    with pytest.raises(DataError, match="represent a condition by the run's 3 features"):
        novelty(run, {"odd": np.zeros(2)})
    with pytest.raises(DataError, match="no environment 'nothing'"):
        novelty(run, "nothing")
