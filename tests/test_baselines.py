from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from anndata import AnnData
from numpy.typing import NDArray
from sklearn.linear_model import Ridge as SklearnRidge

from pyro_scm import baselines
from pyro_scm.baselines import BASELINES, Additive, NearestEnvironment, NoChange, Ridge, TrainingMean
from pyro_scm.data import splits, synthetic
from pyro_scm.data.dataset import EnvironmentDataset
from pyro_scm.errors import DataError, ModelError

GENES = 3


def screen(rows: Sequence[tuple[Any, ...]], representation: Any = None, **columns: str) -> EnvironmentDataset:
    """Cells from rows (perturbation, values of further obs columns ..., expression of the genes)."""
    names = list(columns)
    obs = pd.DataFrame([row[:-1] for row in rows], columns=["perturbation", *names]).astype({"perturbation": str})
    obs.index = pd.Index([f"cell {i}" for i in range(len(rows))])
    x = np.array([row[-1] for row in rows], np.float32)
    adata = AnnData(X=x, obs=obs, var=pd.DataFrame(index=[f"gene {g}" for g in range(x.shape[1])]))
    return EnvironmentDataset.from_anndata(
        adata, environment="perturbation", control="ctrl", counts=False, representation=representation, **columns
    )


def train_of(cells: EnvironmentDataset, *held_out: str) -> EnvironmentDataset:
    return cells.subset(~np.isin(cells.env, cells.environment_index(*held_out)))


def simple() -> EnvironmentDataset:
    """Control mean (1, 2, 3); A, of 2 cells, adds (1, 0, 0) and B, of 1, adds (0, 4, 0); C is held out."""
    cells = screen(
        [
            ("ctrl", (0.0, 2.0, 3.0)),
            ("ctrl", (2.0, 2.0, 3.0)),
            ("A", (1.0, 2.0, 3.0)),
            ("A", (3.0, 2.0, 3.0)),
            ("B", (1.0, 6.0, 3.0)),
            ("C", (9.0, 9.0, 9.0)),
        ]
    )
    return train_of(cells, "C")


def lines() -> EnvironmentDataset:
    """Two cell lines with controls of their own: A and B in line x, A in line y."""
    return screen(
        [
            ("ctrl", "x", (0.0, 0.0, 0.0)),
            ("ctrl", "y", (10.0, 0.0, 0.0)),
            ("ctrl", "y", (14.0, 0.0, 0.0)),
            ("A", "x", (1.0, 0.0, 0.0)),
            ("B", "x", (0.0, 3.0, 0.0)),
            ("A", "y", (12.0, 0.0, 5.0)),
            ("B", "y", (0.0, 0.0, 0.0)),
            ("C", "y", (0.0, 0.0, 0.0)),
            ("A", "z", (7.0, 7.0, 7.0)),
        ],
        cell_line="cell_line",
    )


# ---------------------------------------------------------------------- the face that all of them have
@pytest.mark.parametrize("name", list(BASELINES))
def test_a_baseline_predicts_the_named_environments_in_their_order(name: str) -> None:
    fitted = BASELINES[name]().fit(simple())
    one, two = fitted.predict(["B", "C"]), fitted.predict(["C", "ctrl", "B"])
    assert one.shape == (2, GENES)
    assert one.dtype == np.float64
    assert two[[2, 0]].tolist() == one.tolist()
    assert two[1].tolist() == [1, 2, 3]  # a reference environment is its control
    assert fitted.predict([]).shape == (0, GENES)


@pytest.mark.parametrize("name", list(BASELINES))
def test_a_prediction_is_the_caller_s_to_change(name: str) -> None:
    fitted = BASELINES[name]().fit(simple())
    before = fitted.predict(["C"]).copy()
    fitted.predict(["C"])[:] = 99
    assert fitted.predict(["C"]).tolist() == before.tolist()


@pytest.mark.parametrize("name", list(BASELINES))
def test_unknown_environments_are_refused(name: str) -> None:
    fitted = BASELINES[name]().fit(simple())
    with pytest.raises(DataError, match=r"no environment 'D': did you mean one of"):
        fitted.predict(["A", "D"])


@pytest.mark.parametrize("name", list(BASELINES))
def test_training_needs_reference_cells(name: str) -> None:
    with pytest.raises(DataError, match=r"no cells of a reference environment.*keep the unperturbed cells in training"):
        BASELINES[name]().fit(train_of(simple(), "ctrl"))


@pytest.mark.parametrize("name", ["training_mean", "additive", "ridge", "nearest"])
def test_training_needs_perturbed_cells_to_learn_a_change(name: str) -> None:
    with pytest.raises(DataError, match=rf"{BASELINES[name].__name__}: there are no perturbed training cells"):
        BASELINES[name]().fit(train_of(simple(), "A", "B"))


def test_no_change_needs_no_perturbed_cells() -> None:
    assert NoChange().fit(train_of(simple(), "A", "B")).predict(["A"]).tolist() == [[1, 2, 3]]


@pytest.mark.parametrize("name", list(BASELINES))
def test_prediction_needs_a_fit(name: str) -> None:
    with pytest.raises(ModelError, match=r"is not fitted: call fit\(train\) first"):
        BASELINES[name]().predict(["A"])


@pytest.mark.parametrize("name", list(BASELINES))
def test_the_order_of_the_cells_and_sparse_storage_do_not_matter(name: str) -> None:
    adata = synthetic.simulate(latent=3, genes=12, environments=8, cells=9, observation="negative-binomial")
    cells = train_of(synthetic.dataset(adata), "env_4")
    other = cells.subset(np.random.default_rng(0).permutation(len(cells)))
    other = replace(other, x=sp.csr_matrix(other.x))
    asked = ["env_4", "env_1"]
    expected = BASELINES[name]().fit(cells).predict(asked)
    np.testing.assert_allclose(BASELINES[name]().fit(other).predict(asked), expected, atol=1e-5)


# ---------------------------------------------------------------------- controls
def test_counts_are_normalised_at_the_depth_of_the_training_cells() -> None:
    adata = synthetic.simulate(latent=3, genes=12, environments=4, cells=25, observation="negative-binomial")
    cells = synthetic.dataset(adata)
    own = np.asarray(cells.x)[cells.env == 0]
    size, depth = own.sum(1, keepdims=True), np.median(np.asarray(cells.x).sum(1))
    expected = np.log1p(own / size * depth).mean(0)
    np.testing.assert_allclose(NoChange().fit(cells).predict(["env_2"])[0], expected, rtol=1e-5)
    np.testing.assert_allclose(baselines.controls(cells, ["env_2"])[0], expected, rtol=1e-5)
    twice = baselines.controls(cells, ["env_2"], depth=2 * depth)[0]
    np.testing.assert_allclose(twice, np.log1p(own / size * 2 * depth).mean(0), rtol=1e-5)


def test_the_control_is_that_of_the_environment_s_cell_line() -> None:
    train = lines()
    assert NoChange().fit(train).predict(["A x", "C y"]).tolist() == [
        [0, 0, 0],
        [12, 0, 0],
    ]
    # line z has no control of its own: all control cells, each of them counting once
    np.testing.assert_allclose(NoChange().fit(train).predict(["A z"]), [[8, 0, 0]])


def test_the_control_is_that_of_the_environment_s_time() -> None:
    rows = [("ctrl", 6.0, (1.0,)), ("ctrl", 24.0, (5.0,)), ("A", 24.0, (6.0,)), ("B", 48.0, (0.0,))]
    cells = screen(rows, time="time")
    assert baselines.matched_references(cells, ["A 24 h", "ctrl 6 h", "B 48 h"]) == [(1,), (0,), (0, 1)]
    assert baselines.controls(cells, ["A 24 h", "B 48 h"]).tolist() == [[5], [3]]


def test_means_of_environments_without_cells_are_missing() -> None:
    means, counts = baselines.environment_means(simple(), 1.0)
    assert counts.tolist() == [2, 2, 1, 0]
    assert means[:3].tolist() == [[1, 2, 3], [2, 2, 3], [1, 6, 3]]
    assert np.isnan(means[3]).all()


# ---------------------------------------------------------------------- training mean
def test_each_training_environment_counts_once_whatever_its_number_of_cells() -> None:
    assert TrainingMean().fit(simple()).predict(["C"]).tolist() == [[1.5, 4, 3]]


def test_the_training_mean_is_that_of_the_cell_line_where_there_is_one() -> None:
    train = train_of(lines(), "B y", "C y", "A z")
    fitted = TrainingMean().fit(train)
    np.testing.assert_allclose(fitted.predict(["C y"]), [[12, 0, 5]])  # only A was seen in y
    np.testing.assert_allclose(fitted.predict(["B x"]), [[0.5, 1.5, 0]])
    # line z has neither controls nor perturbed cells: all of training
    np.testing.assert_allclose(fitted.predict(["A z"]), [[8 + 1 / 3, 1, 5 / 3]])


# ---------------------------------------------------------------------- additive
def additive_screen(effects: dict[str, NDArray[np.float64]], combinations: Sequence[str]) -> EnvironmentDataset:
    control = np.array([1.0, -2.0, 0.5, 4.0])
    rows: list[tuple[Any, ...]] = [("ctrl", control - 1), ("ctrl", control + 1)]
    for name in [*effects, *combinations]:
        rows.append((name, control + sum(effects[part] for part in name.split("+"))))
    return screen(rows)


def test_additive_is_exact_where_effects_add() -> None:
    rng = np.random.default_rng(0)
    effects = {name: rng.normal(size=4) for name in "ABCD"}
    asked = ["A+B", "C+D", "B+A+D"]
    cells = additive_screen(effects, [*asked, "A+C"])
    train = train_of(cells, *asked)
    truth = baselines.environment_means(cells, 1.0)[0][cells.environment_index(*asked)]
    np.testing.assert_allclose(Additive().fit(train).predict(asked), truth, atol=1e-6)
    assert np.abs(TrainingMean().fit(train).predict(asked) - truth).max() > 0.5


def test_additive_takes_the_training_mean_for_parts_it_has_not_seen_alone() -> None:
    rng = np.random.default_rng(1)
    effects = {name: rng.normal(size=4) for name in "ABCD"}
    cells = additive_screen(effects, ["A+D", "A+B"])
    train = train_of(cells, "D", "A+D")
    control = np.array([1.0, -2.0, 0.5, 4.0])
    mean = (effects["A"] + effects["B"] + effects["C"] + effects["A"] + effects["B"]) / 4
    fitted = Additive().fit(train)
    np.testing.assert_allclose(fitted.predict(["A+D"])[0], control + effects["A"] + mean, atol=1e-6)
    np.testing.assert_allclose(fitted.predict(["D"])[0], control + mean, atol=1e-6)
    np.testing.assert_allclose(fitted.predict(["D"]), TrainingMean().fit(train).predict(["D"]), atol=1e-12)


def test_additive_does_not_read_a_single_effect_off_a_combination() -> None:
    effects = {"A": np.ones(4), "B": np.full(4, 2.0)}
    cells = additive_screen(effects, ["A+B"])
    train = train_of(cells, "B")
    mean = (1 + 3) / 2
    np.testing.assert_allclose(Additive().fit(train).predict(["B"])[0], np.array([1, -2, 0.5, 4]) + mean, atol=1e-6)


def test_a_part_that_is_the_reference_adds_nothing() -> None:
    cells = screen(
        [("ctrl", (0.0,)), ("A+ctrl", (3.0,)), ("ctrl+B", (5.0,)), ("A+B", (0.0,))],
    )
    assert Additive().fit(train_of(cells, "A+B")).predict(["A+B", "A+ctrl"]).tolist() == [[8], [3]]


def test_additive_takes_parts_from_the_same_cell_line_before_others() -> None:
    train = train_of(lines(), "B y", "C y", "A z")
    fitted = Additive().fit(train)
    np.testing.assert_allclose(fitted.predict(["A y"]), [[12, 0, 5]])
    np.testing.assert_allclose(fitted.predict(["B y"]), [[12, 3, 0]])  # only seen in x
    np.testing.assert_allclose(fitted.predict(["A z"]), [[8.5, 0, 2.5]])  # seen in x and y, not in z: their mean


def test_additive_takes_parts_of_the_nearest_dose() -> None:
    rows = [
        ("ctrl", 0.0, (0.0, 0.0)),
        ("A", 0.1, (1.0, 0.0)),
        ("A", 10.0, (9.0, 0.0)),
        ("B", 1.0, (0.0, 5.0)),
        ("A", 100.0, (0.0, 0.0)),
        ("A+B", "0.1+1.0", (0.0, 0.0)),
        ("A+B", "10+10", (0.0, 0.0)),
        ("A+B", 3.0, (0.0, 0.0)),
        ("A", np.nan, (4.0, 0.0)),
    ]
    cells = screen(rows, dose="dose")
    asked = ["A 100 uM", "A+B 0.1+1.0 uM", "A+B 10+10 uM", "A+B 3 uM"]
    predicted = Additive().fit(train_of(cells, *asked)).predict([*asked, "A ? uM"])
    # the nearest on the scale of log(1 + dose); an unknown dose is far from all, and all are equally far from it
    np.testing.assert_allclose(predicted, [[9, 0], [1, 5], [9, 5], [9, 5], [14 / 3, 0]], rtol=1e-6)


def test_without_doses_all_environments_of_a_part_are_averaged() -> None:
    rows = [("ctrl", 6.0, (0.0,)), ("A", 6.0, (1.0,)), ("A", 24.0, (3.0,)), ("A", 48.0, (0.0,))]
    cells = screen(rows, time="time")
    assert Additive().fit(train_of(cells, "A 48 h")).predict(["A 48 h", "A 6 h"]).tolist() == [[2], [1]]


# ---------------------------------------------------------------------- ridge
def linear_screen(
    environments: int, features: int, noise: float, seed: int = 0
) -> tuple[EnvironmentDataset, NDArray[np.float64]]:
    """Changes linear in r plus a constant, 2 to 6 cells an environment, and the matrix r [environments, features]."""
    rng = np.random.default_rng(seed)
    r, weights = rng.normal(size=(environments, features)), rng.normal(size=(features, 4))
    rows: list[tuple[Any, ...]] = [("ctrl", rng.normal(size=4)) for _ in range(5)]
    control = np.mean([row[1] for row in rows], axis=0)
    for e in range(environments):
        change = 0.7 + r[e] @ weights
        rows += [(f"p{e}", control + change + noise * rng.normal(size=4)) for _ in range(rng.integers(2, 7))]
    return screen(rows, {f"p{e}": r[e] for e in range(environments)}), r


def parts_of(cells: EnvironmentDataset) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Representation, mean change and weight of each training environment, computed from the cells one by one."""
    own = [e for e in cells.present if not cells.reference[e]]
    x = np.asarray(cells.x, np.float64)
    control = x[cells.env == 0].mean(0)
    changes = np.array([x[cells.env == e].mean(0) - control for e in own])
    counts = np.array([np.sum(cells.env == e) for e in own])
    return cells.representation[own].astype(np.float64), changes, np.sqrt(counts) / np.sqrt(counts).mean()


@pytest.mark.parametrize(("environments", "features"), [(20, 5), (8, 30)])
def test_ridge_is_sklearn_s_with_the_same_alpha(environments: int, features: int) -> None:
    cells, _ = linear_screen(environments, features, noise=1.0)
    train = train_of(cells, "p0", "p1")
    r, changes, weight = parts_of(train)
    for alphas in ((0.01,), (1.0,), (100.0,)):
        ours = Ridge(alphas).fit(train)
        theirs = SklearnRidge(alpha=ours.alpha).fit(r, changes, sample_weight=weight)
        expected = NoChange().fit(train).predict(["p0", "p1"]) + theirs.predict(cells.representation[[1, 2]])
        np.testing.assert_allclose(ours.predict(["p0", "p1"]), expected, atol=1e-6)


@pytest.mark.parametrize(("environments", "features", "noise"), [(20, 5, 0.5), (12, 4, 8.0), (8, 30, 1.0)])
def test_alpha_has_the_smallest_leave_one_environment_out_error(environments: int, features: int, noise: float) -> None:
    train, _ = linear_screen(environments, features, noise)
    r, changes, weight = parts_of(train)
    fitted = Ridge(np.geomspace(0.01, 100, 31).tolist()).fit(train)
    centred = np.sqrt(weight)[:, None] * (r - weight @ r / weight.sum())
    unit = np.sum(centred**2) / len(r)
    errors = {}
    for alpha in fitted.alphas:
        errors[alpha * unit] = 0.0
        for i in range(len(r)):
            rest = np.arange(len(r)) != i
            model = SklearnRidge(alpha=alpha * unit).fit(r[rest], changes[rest], sample_weight=weight[rest])
            errors[alpha * unit] += weight[i] * np.sum((changes[i] - model.predict(r[i : i + 1])[0]) ** 2)
    assert fitted.alpha == pytest.approx(min(errors, key=lambda a: errors[a]))


def test_ridge_finds_a_linear_law() -> None:
    cells, _ = linear_screen(30, 5, noise=0.0)
    asked = ["p0", "p1", "p2"]
    truth = baselines.environment_means(cells, 1.0)[0][cells.environment_index(*asked)]
    fitted = Ridge().fit(train_of(cells, *asked))
    np.testing.assert_allclose(fitted.predict(asked), truth, atol=1e-2)
    assert fitted.alpha < 1e-2


def test_ridge_falls_back_to_a_mean_where_the_representation_says_nothing() -> None:
    rng = np.random.default_rng(3)
    cells, _ = linear_screen(30, 5, noise=0.5)
    shuffled = replace(cells, representation=rng.normal(size=cells.representation.shape).astype(np.float32))
    train = train_of(shuffled, "p0")
    _, changes, weight = parts_of(train)
    fitted = Ridge().fit(train)
    assert fitted.alpha > 10
    mean = NoChange().fit(train).predict(["p0"])[0] + weight @ changes / weight.sum()
    spread = changes.std(0).mean()
    assert np.abs(fitted.predict(["p0"])[0] - mean).max() < 0.3 * spread


def test_ridge_of_one_environment_predicts_its_change() -> None:
    train = train_of(simple(), "B")
    assert Ridge().fit(train).predict(["C", "B"]).tolist() == [[2, 2, 3], [2, 2, 3]]


@pytest.mark.parametrize("alphas", [(), (1.0, 0.0), (-1.0,)])
def test_penalties_must_be_positive(alphas: tuple[float, ...]) -> None:
    with pytest.raises(ModelError, match=r"alphas .*: give positive penalties"):
        Ridge(alphas)


def test_ridge_is_near_perfect_on_a_linear_screen_whose_descriptors_hold_the_effect() -> None:
    adata = synthetic.simulate(
        latent=4,
        genes=20,
        environments=40,
        cells=60,
        decoder="linear",
        descriptors=10,
        descriptor_noise=0.01,
        noise=0.1,
    )
    split = splits.by_environment(synthetic.dataset(adata, "descriptors"), fraction=0.25)
    names = [str(split.test.environments.index[e]) for e in split.test.present]
    truth = baselines.environment_means(split.test, 1.0)[0][split.test.environment_index(*names)]
    errors = {n: np.sqrt(np.mean((b().fit(split.train).predict(names) - truth) ** 2)) for n, b in BASELINES.items()}
    assert errors["ridge"] < 0.15 * errors["no_change"]
    assert min(errors, key=lambda name: errors[name]) == "ridge"


# ---------------------------------------------------------------------- nearest
def nearest_screen(rows: dict[str, Sequence[float]]) -> EnvironmentDataset:
    """Environments whose change is their number, 1, 2, ..., in the order given; "asked" is held out."""
    cells = [("ctrl", (0.0,)), *((name, (float(i + 1),)) for i, name in enumerate(rows))]
    return train_of(screen(cells, {name: np.array(r) for name, r in rows.items()}), "asked")


def test_the_nearest_fingerprint_by_tanimoto() -> None:
    # in common / in either: A 2/5, B 1/2, C 0
    train = nearest_screen({"A": [1, 1, 1, 1, 1], "B": [1, 0, 0, 0, 0], "C": [0, 0, 1, 0, 0], "asked": [1, 1, 0, 0, 0]})
    assert NearestEnvironment().fit(train).predict(["asked"]).tolist() == [[2]]


def test_tanimoto_is_not_the_cosine() -> None:
    # Tanimoto of counts: A min/max = 2/20, B 2/4; cosine: A is parallel
    train = nearest_screen({"A": [10, 10], "B": [2, 1], "asked": [1, 1]})
    assert NearestEnvironment().fit(train).predict(["asked"]).tolist() == [[2]]


def test_the_nearest_descriptor_by_the_cosine() -> None:
    train = nearest_screen({"A": [10, -10], "B": [1, 0], "C": [-1, 1], "asked": [1, -1]})
    assert NearestEnvironment().fit(train).predict(["asked"]).tolist() == [[1]]


def test_equally_near_environments_are_averaged() -> None:
    train = nearest_screen({"A": [1, 1, 0], "B": [1, 0, 1], "C": [0, 0, 0], "asked": [1, 0, 0]})
    assert NearestEnvironment().fit(train).predict(["asked"]).tolist() == [[1.5]]


def test_an_environment_like_no_other_is_given_the_mean() -> None:
    train = nearest_screen({"A": [1, 0, 0], "B": [0, 1, 0], "C": [0, 0, 0], "asked": [0, 0, 1]})
    assert NearestEnvironment().fit(train).predict(["asked"]).tolist() == [[2]]
    negative = nearest_screen({"A": [-1, 0], "B": [-2, 0], "asked": [0, 0]})
    assert NearestEnvironment().fit(negative).predict(["asked"]).tolist() == [[1.5]]


def test_the_nearest_environment_of_another_line_gives_its_change_not_its_level() -> None:
    cells = lines()
    r = np.zeros((len(cells.environments), 2), np.float32)
    r[cells.environment_index("A x")] = r[cells.environment_index("C y")] = [1, 0]
    train = train_of(replace(cells, representation=r), "C y", "A z", "B y")
    np.testing.assert_allclose(NearestEnvironment().fit(train).predict(["C y"]), [[13, 0, 0]])
