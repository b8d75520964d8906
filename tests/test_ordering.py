"""The counting algorithm finds trees, forests and transitive reductions, and says when the data are no tree."""

import importlib
from pathlib import Path

import networkx as nx
import numpy as np
import pandas as pd
import pytest
from scipy import stats

from experiments import launch
from pyro_scm import graphs, metrics
from pyro_scm.data.synthetic import simulate
from pyro_scm.errors import DataError
from pyro_scm.ordering import CHANGES, UNCHANGED, Changes, _adjusted, changes, dag, forest


def implied(graph: nx.DiGraph, targets: list[int]) -> Changes:
    """What environments with these targets would change, without error."""
    d = len(graph)
    changed = np.zeros((len(targets), d), dtype=bool)
    for row, t in zip(changed, targets, strict=True):
        row[[t, *nx.descendants(graph, t)]] = True
    return Changes(np.where(changed, 0.0, 1.0), changed, np.arange(len(targets)))


def relabelled(graph: nx.DiGraph, seed: int) -> nx.DiGraph:
    """The same graph with shuffled labels: lower numbers are no longer earlier."""
    turn = np.random.default_rng(seed).permutation(len(graph))
    shuffled = graphs.independent(len(graph))
    shuffled.add_edges_from((int(turn[i]), int(turn[j])) for i, j in graph.edges)
    return shuffled


def test_every_tree_is_found_from_its_changes_with_targets_known_or_not() -> None:
    for seed in range(50):
        rng = np.random.default_rng(seed)
        d = 5 + seed % 16
        truth = relabelled(graphs.growing(d, seed), seed)
        targets = [*rng.permutation(d).tolist(), *rng.integers(d, size=d).tolist()]
        found = implied(truth, targets)
        for structure in (forest(found), forest(found, targets), dag(found)):
            assert set(structure.graph.edges) == set(truth.edges)
            assert structure.targets.tolist() == targets
            assert not structure.contradicted
            assert structure.contradictions.empty
            assert structure.undetermined == ()
            rank = np.argsort(structure.order)
            assert all(rank[i] < rank[j] for i, j in truth.edges)


def test_forests_and_isolated_variables() -> None:
    truth = graphs.from_edges([(3, 1), (1, 0), (5, 4)], range(6))
    structure = forest(implied(truth, list(range(6))))
    assert set(structure.graph.edges) == set(truth.edges)
    assert structure.adjacency().sum() == 3
    assert structure.adjacency()[3, 1] == 1


def test_dags_are_found_up_to_their_transitive_reduction() -> None:
    for seed in range(30):
        truth = relabelled(graphs.multi_growing(12, seed), seed)
        found = implied(truth, list(range(12)))
        for structure in (dag(found), dag(found, range(12))):
            assert set(structure.graph.edges) == set(nx.transitive_reduction(truth).edges)
            assert not structure.contradicted


def test_two_unrelated_causes_of_one_variable_contradict_a_tree() -> None:
    collider = graphs.from_edges([(0, 2), (1, 2)])
    structure = forest(implied(collider, [0, 1, 2]))
    assert structure.contradicted
    row = structure.contradictions.iloc[0]
    assert (row["environment"], row["target"], row["variable"], row["finding"]) == (1, 1, 2, CHANGES)
    assert not dag(implied(collider, [0, 1, 2])).contradicted


def test_missed_changes_are_reported_and_outvoted() -> None:
    chain = graphs.from_edges([(0, 1), (1, 2)])
    found = implied(chain, [0, 0, 0, 1, 2])
    found.changed[0, 2] = False
    structure = forest(found)
    assert set(structure.graph.edges) == set(chain.edges)
    assert structure.contradictions["finding"].tolist() == [UNCHANGED]
    assert not structure.contradicted


def test_known_targets_make_up_for_missed_changes_of_far_descendants() -> None:
    chain = graphs.from_edges([(3, 1), (1, 2), (2, 0)])
    found = implied(chain, [3, 1, 2, 0])
    found.changed[0, [0, 2]] = False
    found.changed[1, 0] = False
    structure = forest(found, [3, 1, 2, 0])
    assert set(structure.graph.edges) == set(chain.edges)
    assert not structure.contradicted
    assert structure.contradictions["variable"].tolist() == [0, 2, 0]
    assert forest(found).contradicted


def test_what_no_environment_acts_on_is_undetermined() -> None:
    chain = graphs.from_edges([(0, 1), (1, 2)])
    # without an environment of its own, 1 changes exactly when 0 does: which is the other's parent cannot be told
    assert forest(implied(chain, [0, 2])).undetermined == (0, 1)
    assert forest(implied(chain, [0, 2]), [0, 2]).undetermined == (1,)


def test_counting_finds_trees_from_cells() -> None:
    for seed in range(4):
        d = 5 + 5 * seed
        adata = simulate(latent=d, genes=2, environments=d + 1, cells=400, strength=2.0, constant=True, seed=seed)
        truth = adata.uns["truth"]
        env = adata.obs["perturbation"].cat.codes.to_numpy()
        reference = np.arange(d + 1) == 0
        found = changes(adata.obsm["c"], env, reference)
        assert found.counts.tolist() == found.changed.sum(0).tolist()
        structure = forest(found)
        assert metrics.shd(truth["graph"].T, structure.adjacency()) == 0
        assert structure.targets.tolist() == np.argmax(truth["targets"][1:], axis=1).tolist()


@pytest.mark.parametrize("correction", ["holm", "bh"])
@pytest.mark.parametrize("test", ["location-scale", "ks"])
def test_nothing_changes_among_equal_cells(test: str, correction: str) -> None:
    rng = np.random.default_rng(0)
    env = np.repeat(np.arange(6), 80)
    false = [
        changes(rng.normal(size=(480, 4)), env, np.arange(6) == 0, test=test, correction=correction, alpha=0.05).changed
        for _ in range(60)
    ]
    assert np.mean([f.any() for f in false]) <= 0.05 + 3 * (0.05 * 0.95 / 60) ** 0.5


def test_changes_of_scale_are_seen_and_ks_sees_changes_of_shape() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=500), 3 * rng.normal(size=500)
    two_peaks = rng.choice([-1.0, 1.0], 500)  # mean 0 and variance 1, as the reference
    env, reference = np.repeat([0, 1, 2], 500), np.array([True, False, False])
    c = np.concatenate([a, b, two_peaks])[:, None]
    assert changes(c, env, reference).changed[0, 0]
    assert changes(c, env, reference, test="ks").changed.all()


def test_p_values_are_scipys() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(40, 1)), rng.normal(0.5, 1, size=(60, 1))
    c, env, reference = np.concatenate([a, b]), np.repeat([0, 1], [40, 60]), np.array([True, False])
    ks = stats.ks_2samp(b[:, 0], a[:, 0], method="asymp").pvalue
    assert changes(c, env, reference, test="ks").p == pytest.approx(ks)
    location = stats.mannwhitneyu(b[:, 0], a[:, 0], method="asymptotic").pvalue
    scale = stats.ttest_ind(abs(b - np.median(b)), abs(a - np.median(a)), equal_var=False).pvalue[0]
    assert changes(c, env, reference).p == pytest.approx(2 * min(location, scale))


def test_adjusted_by_hand() -> None:
    p = np.array([[0.01, 0.04], [0.03, 0.5]])
    assert _adjusted(p, "holm") == pytest.approx(np.array([[0.04, 0.09], [0.09, 0.5]]))
    assert _adjusted(p, "bh") == pytest.approx(np.array([[0.04, 0.16 / 3], [0.16 / 3, 0.5]]))


def test_constant_variables_do_not_change() -> None:
    rng = np.random.default_rng(0)
    c = np.stack([rng.normal(size=60), np.ones(60)], 1)
    assert not changes(c, np.repeat([0, 1], 30), np.array([True, False])).changed[:, 1].any()


def test_arguments_that_do_not_fit() -> None:
    c, env, reference = np.zeros((6, 2)), np.repeat([0, 1], 3), np.array([True, False])
    with pytest.raises(DataError, match=r"c has shape \(6, 2\), env \(5,\)"):
        changes(c, env[:5], reference)
    with pytest.raises(DataError, match="c is not finite in row 2"):
        changes(np.where(np.arange(6)[:, None] == 2, np.nan, c), env, reference)
    with pytest.raises(DataError, match="env goes from 0 to 1: give numbers from 0 to 0"):
        changes(c, env, reference[:1])
    with pytest.raises(DataError, match="test 'welch' with correction 'holm': use location-scale or ks"):
        changes(c, env, reference, test="welch")
    with pytest.raises(DataError, match="0 reference cells, 2 other environments"):
        changes(c, env, np.array([False, False]))
    with pytest.raises(DataError, match="too few cells in 1: give 3 or more"):
        changes(c[:5], env[:5], reference)
    found = Changes(np.ones((1, 2)), np.zeros((1, 2), bool), np.array([1]))
    with pytest.raises(DataError, match="targets 2 of 1 environments: give one of the 2 variables"):
        forest(found, [2])
    with pytest.raises(DataError, match="no variables"):
        dag(Changes(np.ones((1, 0)), np.zeros((1, 0), bool), np.array([1])))


def test_the_experiment_runs_small_and_finds_its_trees(tmp_path: Path) -> None:
    module = importlib.import_module("experiments.counting_algorithm")
    argv = ["--preset", "smoke", "--cells", "300", "--out", str(tmp_path)]
    assert launch.launch(module.__file__, module.Counting, module.main, argv) == 0
    (folder,) = (tmp_path / "counting_algorithm").iterdir()
    structures = pd.read_csv(folder / "structures.csv")
    trees = structures[(structures["graph"] == "tree") & (structures["correction"] == "holm")]
    assert trees["exact"].eq(1).all()
    inferred = pd.read_csv(folder / "inferred.csv").set_index("model")
    assert inferred.loc["known variables", "shd"].eq(0).all()
    assert inferred.loc["no edges", "shd"].eq(4).all()
    assert inferred["order_violations"].between(0, 10).all()
    assert (folder / "curve.png").is_file()
