"""Scores of means against scikit-learn, SciPy, the definition or hand computation."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import scipy.spatial.distance
import scipy.stats
import sklearn.metrics
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from pyro_scm import metrics
from pyro_scm.errors import DataError

NAN = float("nan")
VECTOR_METRICS = (
    metrics.r2,
    metrics.pearson,
    metrics.squared_pearson,
    metrics.mse,
    metrics.rmse,
    metrics.mae,
    metrics.cosine,
)
PAIRED_VECTORS = st.integers(3, 12).flatmap(
    lambda n: st.tuples(*[arrays(np.float64, n, elements=st.floats(-100, 100, width=32)) for _ in range(2)])
)


@pytest.fixture
def means(rng) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Truth, prediction and control of one condition with 50 genes."""
    control = rng.gamma(2.0, 1.0, 50)
    truth = control + rng.normal(0, 0.5, 50)
    return truth, truth + rng.normal(0, 0.3, 50), control


@pytest.mark.parametrize(
    ("metric", "reference"),
    [
        (metrics.r2, sklearn.metrics.r2_score),
        (metrics.pearson, lambda t, p: scipy.stats.pearsonr(t, p).statistic),
        (metrics.squared_pearson, lambda t, p: scipy.stats.linregress(t, p).rvalue ** 2),
        (metrics.mse, sklearn.metrics.mean_squared_error),
        (metrics.rmse, sklearn.metrics.root_mean_squared_error),
        (metrics.mae, sklearn.metrics.mean_absolute_error),
        (metrics.cosine, lambda t, p: 1 - scipy.spatial.distance.cosine(t, p)),
    ],
)
def test_vector_metrics_agree_with_scikit_learn_and_scipy(metric, reference, means):
    truth, prediction, _ = means
    assert metric(truth, prediction) == pytest.approx(reference(truth, prediction), rel=1e-12)
    genes = np.array([40, 3, 7, 12, 21])
    assert metric(truth, prediction, genes=genes) == pytest.approx(
        reference(truth[genes], prediction[genes]), rel=1e-12
    )
    assert metric(list(truth), prediction.astype(np.float32)) == pytest.approx(reference(truth, prediction), rel=1e-4)


@given(PAIRED_VECTORS)
@settings(max_examples=60, deadline=None)
def test_r2_is_never_above_the_squared_correlation(pair):
    truth, prediction = pair
    r2, squared = metrics.r2(truth, prediction), metrics.squared_pearson(truth, prediction)
    assert math.isnan(r2) == (np.ptp(truth) == 0.0)
    if not math.isnan(squared):
        assert r2 <= squared + 1e-9
        assert 0.0 <= squared <= 1.0


def test_r2_by_hand():
    # total sum of squares 2, residual sum of squares 0 + 1 + 4
    assert metrics.r2([1, 2, 3], [1, 1, 1]) == pytest.approx(1 - 5 / 2)
    assert metrics.r2([1, 2, 3], [2, 2, 2]) == 0.0
    assert metrics.r2([1, 2, 3], [1, 2, 3]) == 1.0


def test_r2_is_not_clipped_and_not_symmetric(means):
    truth, prediction, _ = means
    assert metrics.r2(truth, truth * 0 - 50) < -70
    assert metrics.r2(truth, prediction * 2) != pytest.approx(metrics.r2(prediction * 2, truth), abs=0.05)
    assert metrics.r2([0, 1, 2], [1, 1, 1]) == 0.0
    assert math.isnan(metrics.r2([1, 1, 1], [0, 1, 2]))


def test_pearson_is_blind_to_scale_and_r2_is_not(means):
    truth, prediction, _ = means
    assert metrics.pearson(truth, 3 * prediction + 5) == pytest.approx(metrics.pearson(truth, prediction))
    assert metrics.pearson(truth, -prediction) == pytest.approx(-metrics.pearson(truth, prediction))
    assert metrics.squared_pearson(truth, -prediction) == pytest.approx(metrics.squared_pearson(truth, prediction))
    assert metrics.r2(truth, 3 * prediction + 5) < 0


def test_rmse_and_mae_by_hand():
    assert metrics.mse([0, 0, 0, 0], [1, -1, 3, 1]) == 3.0
    assert metrics.rmse([0, 0, 0, 0], [1, -1, 3, 1]) == pytest.approx(math.sqrt(3))
    assert metrics.mae([0, 0, 0, 0], [1, -1, 3, 1]) == 1.5


def test_delta_metrics_are_those_of_the_changes(means):
    truth, prediction, control = means
    genes = np.arange(0, 50, 3)
    change, predicted = truth - control, prediction - control
    assert metrics.delta_pearson(truth, prediction, control) == pytest.approx(
        scipy.stats.pearsonr(change, predicted).statistic
    )
    assert metrics.delta_r2(truth, prediction, control) == pytest.approx(sklearn.metrics.r2_score(change, predicted))
    assert metrics.delta_pearson(truth, prediction, control, genes=genes) == pytest.approx(
        scipy.stats.pearsonr(change[genes], predicted[genes]).statistic
    )
    assert metrics.delta_r2(truth, prediction, control, genes=genes) == pytest.approx(
        sklearn.metrics.r2_score(change[genes], predicted[genes])
    )


def test_absolute_means_flatter_the_no_change_prediction_and_deltas_do_not(rng):
    control = rng.gamma(1.0, 3.0, 300)
    truth = control + rng.normal(0.05, 0.3, 300)
    assert metrics.r2(truth, control) > 0.95
    assert metrics.pearson(truth, control) > 0.95
    assert math.isnan(metrics.delta_pearson(truth, control, control))
    change = truth - control
    expected = -300 * change.mean() ** 2 / np.sum((change - change.mean()) ** 2)
    assert metrics.delta_r2(truth, control, control) == pytest.approx(expected)
    assert metrics.delta_r2(truth, control, control) <= 0


def test_genes_as_positions_as_mask_and_repeated_order(means):
    truth, prediction, _ = means
    mask = np.zeros(50, dtype=bool)
    mask[[2, 5, 30]] = True
    for metric in VECTOR_METRICS:
        expected = metric(truth[[2, 5, 30]], prediction[[2, 5, 30]])
        assert metric(truth, prediction, genes=mask) == pytest.approx(expected)
        assert metric(truth, prediction, genes=[30, 2, 5]) == pytest.approx(expected)


@pytest.mark.parametrize("metric", [metrics.pearson, metrics.squared_pearson])
@pytest.mark.parametrize("constant", [0.0, 0.1, -7.3, 1e6])
def test_correlation_with_a_constant_vector_is_nan(metric, constant):
    assert math.isnan(metric(np.arange(7.0), np.full(7, constant)))
    assert math.isnan(metric(np.full(7, constant), np.arange(7.0)))


def test_r2_of_a_constant_truth_is_nan_even_when_perfect():
    assert math.isnan(metrics.r2(np.full(7, 0.1), np.full(7, 0.1)))
    assert math.isnan(metrics.delta_r2([1, 2, 3], [1, 2, 4], [0, 1, 2]))


def test_a_change_that_is_constant_up_to_rounding_is_constant(rng):
    control = rng.uniform(0, 15, 500)
    shifted = control + 1.0
    assert np.ptp(shifted - control) > 0  # rounding, not signal
    assert math.isnan(metrics.delta_pearson(shifted, control + rng.normal(size=500), control))
    assert math.isnan(metrics.delta_r2(shifted, control + rng.normal(size=500), control))


def test_undefined_small_subsets_are_nan():
    for metric in VECTOR_METRICS:
        assert math.isnan(metric([1.0, 2.0], [1.0, 3.0], genes=[]))
    for metric in (metrics.r2, metrics.pearson, metrics.squared_pearson):
        assert math.isnan(metric([1.0, 2.0], [1.0, 3.0], genes=[1]))
    assert metrics.mae([1.0, 2.0], [1.0, 3.0], genes=[1]) == 1.0
    assert math.isnan(metrics.cosine([0.0, 0.0], [1.0, 3.0]))
    assert math.isnan(metrics.cosine([1.0, 3.0], [0.0, 0.0]))


def test_a_diverged_but_finite_prediction_scores_without_a_warning():
    assert metrics.r2([1.0, 2.0, 3.0], [1e200, 0.0, 0.0]) == -math.inf
    assert metrics.rmse([1.0, 2.0, 3.0], [1e200, 0.0, 0.0]) == math.inf
    assert metrics.pearson([1.0, 2.0, 4.0], [1e200, 2e200, 4e200]) == pytest.approx(1.0)
    assert metrics.pearson([1.0, 2.0, 4.0], [1e-200, 2e-200, 4e-200]) == pytest.approx(1.0)
    assert metrics.cosine([1.0, 0.0], [1e200, 1e200]) == pytest.approx(math.sqrt(0.5))


@pytest.mark.parametrize("metric", VECTOR_METRICS)
def test_vector_metrics_refuse_bad_input(metric):
    with pytest.raises(DataError, match=r"truth has shape \(3,\) and prediction \(2,\): expected equal shapes"):
        metric([1, 2, 3], [1, 2])
    with pytest.raises(DataError, match=r"prediction holds nan at position \(1,\) and 2 non-finite value\(s\)"):
        metric([1, 2, 3], [1, NAN, math.inf])
    with pytest.raises(DataError, match=r"truth has shape \(1, 2\): expected 1 dimension"):
        metric([[1, 2]], [1, 2])
    with pytest.raises(DataError, match=r"genes holds -1, 3: expected positions from 0 to 2; -1 often is a gene name"):
        metric([1, 2, 3], [1, 2, 3], genes=[0, -1, 3])
    with pytest.raises(DataError, match="translate gene names into positions first"):
        metric([1, 2, 3], [1, 2, 3], genes=["TP53"])
    with pytest.raises(DataError, match="boolean mask of length 3"):
        metric([1, 2, 3], [1, 2, 3], genes=np.array([True, False]))


def test_a_control_of_another_shape_is_refused():
    with pytest.raises(DataError, match=r"truth has shape \(2,\) and control \(1,\)"):
        metrics.delta_pearson([1, 2], [1, 2], [1])


def brute_force_rank(truths, predictions, distance: Callable[[np.ndarray, np.ndarray], float]) -> list[float]:
    """The definition, condition by condition."""
    ranks = []
    for i, truth in enumerate(truths):
        own = distance(truth, predictions[i])
        others = [distance(truth, p) for j, p in enumerate(predictions) if j != i]
        ranks.append(sum(1.0 if d < own else 0.5 if d == own else 0.0 for d in others) / len(others))
    return ranks


@pytest.mark.parametrize(
    ("name", "distance"),
    [
        ("euclidean", lambda a, b: math.dist(a, b)),
        ("cityblock", lambda a, b: float(np.abs(a - b).sum())),
        ("cosine", lambda a, b: 1 - float(a @ b) / float(np.linalg.norm(a) * np.linalg.norm(b))),
    ],
)
def test_perturbation_rank_against_the_definition(name, distance, rng):
    truths = rng.normal(size=(9, 6))
    predictions = truths + rng.normal(0, 1.5, (9, 6))
    ranks = metrics.perturbation_rank(truths, predictions, distance=name)
    assert 0 < ranks.mean() < 0.5
    np.testing.assert_allclose(ranks, brute_force_rank(truths, predictions, distance))


def test_perturbation_rank_extremes():
    truths = np.eye(4) * 3
    np.testing.assert_array_equal(metrics.perturbation_rank(truths, truths), np.zeros(4))
    np.testing.assert_array_equal(metrics.perturbation_rank(truths, -truths), np.ones(4))
    # rolled predictions: exactly one other prediction hits each truth, the own one ties with the two remaining
    np.testing.assert_allclose(metrics.perturbation_rank(truths, np.roll(truths, 1, axis=0)), np.full(4, 2 / 3))


@pytest.mark.parametrize("distance", ["euclidean", "cityblock", "cosine"])
def test_the_same_prediction_for_all_conditions_ranks_as_chance(distance, rng):
    truths, same = rng.normal(size=(7, 101)), np.tile(rng.normal(size=101), (7, 1))
    np.testing.assert_array_equal(metrics.perturbation_rank(truths, same, distance=distance), np.full(7, 0.5))
    np.testing.assert_array_equal(metrics.perturbation_rank(truths, 0 * same, distance=distance), np.full(7, 0.5))


def test_random_predictions_rank_at_one_half(rng):
    ranks = metrics.perturbation_rank(rng.normal(size=(200, 20)), rng.normal(size=(200, 20)))
    assert ranks.mean() == pytest.approx(0.5, abs=0.07)


def test_cosine_rank_takes_a_zero_prediction_as_orthogonal():
    truths = np.array([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    predictions = np.array([[0.0, 0.0], [1.0, 1.0], [-1.0, 0.0]])
    # truth 0 has distances 1 (zero), 1 - sqrt(1/2) and 2: one of the other two is closer
    np.testing.assert_allclose(metrics.perturbation_rank(truths, predictions, distance="cosine"), [0.5, 0.0, 0.0])


def test_cosine_rank_of_a_zero_truth_is_chance(rng):
    truths = rng.normal(size=(6, 31))
    predictions = truths.copy()
    truths[2] = 0.0
    ranks = metrics.perturbation_rank(truths, predictions, distance="cosine")
    np.testing.assert_array_equal(ranks, [0, 0, 0.5, 0, 0, 0])


def test_perturbation_rank_of_one_condition_is_nan():
    assert np.isnan(metrics.perturbation_rank([[1.0, 2.0]], [[1.0, 2.0]])).tolist() == [True]


def test_perturbation_rank_refuses_bad_input():
    with pytest.raises(DataError, match="distance is 'manhattan': expected 'euclidean', 'cityblock' or 'cosine'"):
        metrics.perturbation_rank(np.eye(2), np.eye(2), distance="manhattan")
    with pytest.raises(DataError, match=r"truths has shape \(2, 2\) and predictions \(3, 3\)"):
        metrics.perturbation_rank(np.eye(2), np.eye(3))


def sorted_discrimination(truths, predictions, targets=None) -> list[float]:
    """1 - (position of the own condition among the sorted L1 distances) / K, without the targeted gene."""
    scores = []
    for i, prediction in enumerate(predictions):
        kept = np.ones(truths.shape[1], dtype=bool)
        if targets is not None and targets[i] >= 0:
            kept[targets[i]] = False
        distances = np.abs(truths[:, kept] - prediction[kept]).sum(axis=1)
        position = np.argsort(distances, kind="stable").tolist().index(i)
        scores.append(1 - position / len(truths))
    return scores


def test_discrimination_against_sorting(rng):
    truths = rng.normal(size=(15, 8))
    predictions = truths + rng.normal(0, 1.5, (15, 8))
    scores = metrics.discrimination(truths, predictions)
    assert 0.5 < scores.mean() < 1.0
    np.testing.assert_allclose(scores, sorted_discrimination(truths, predictions))


def test_discrimination_without_the_target_gene(rng):
    truths = rng.normal(size=(15, 8))
    predictions = truths + rng.normal(0, 1.5, (15, 8))
    targets = np.array([0, 1, 2, 3, 4, 5, 6, 7, -1, -1, -1, -1, 0, 0, 0])
    truths[np.arange(8), np.arange(8)] = predictions[np.arange(8), np.arange(8)] = -20.0  # the knocked-down gene itself
    with_targets, without = (
        metrics.discrimination(truths, predictions),
        metrics.discrimination(truths, predictions, target_genes=targets),
    )
    np.testing.assert_allclose(without, sorted_discrimination(truths, predictions, targets))
    np.testing.assert_array_equal(with_targets[:8], np.ones(8))  # trivially found by its own knock-down
    assert without[:8].mean() < 1.0


def test_discrimination_extremes_and_ties():
    truths = np.diag([1.0, 2.0, 3.0, 4.0])
    np.testing.assert_array_equal(metrics.discrimination(truths, truths), np.ones(4))
    # no change predicted: the condition with the smallest effect is nearest to every prediction
    np.testing.assert_allclose(metrics.discrimination(truths, 0 * truths), [1.0, 0.75, 0.5, 0.25])
    # two conditions with the same truth: each ties with the other, rank one half of four
    truths[1] = truths[0]
    np.testing.assert_allclose(metrics.discrimination(truths, truths), [0.875, 0.875, 1.0, 1.0])


def test_discrimination_ranks_truths_and_perturbation_rank_ranks_predictions():
    truths = np.array([[0.0], [1.0], [10.0]])
    predictions = np.array([[0.0], [0.4], [0.6]])
    np.testing.assert_allclose(metrics.discrimination(truths, predictions), [1.0, 1 - 1 / 3, 1 - 2 / 3])
    np.testing.assert_allclose(metrics.perturbation_rank(truths, predictions), [0.0, 0.5, 0.0])


def test_discrimination_refuses_bad_targets():
    with pytest.raises(DataError, match=r"target_genes has shape \(1,\) and type int64: expected 2 gene positions"):
        metrics.discrimination(np.eye(2), np.eye(2), target_genes=np.array([0]))
    with pytest.raises(DataError, match="target_genes runs from -1 to 2: expected -1 to 1"):
        metrics.discrimination(np.eye(2), np.eye(2), target_genes=np.array([-1, 2]))
    with pytest.raises(DataError, match="target_genes runs from -2 to 1"):
        metrics.discrimination(np.eye(2), np.eye(2), target_genes=np.array([-2, 1]))


@pytest.mark.parametrize(
    ("n", "expected"),
    [(None, 2 / 4), (1, 0.0), (2, 1 / 2), (3, 1 / 3), (4, 2 / 4), (50, 2 / 4)],
)
def test_degs_overlap_by_hand(n, expected):
    # N is bounded by the 4 true genes; the fifth prediction, which is true, comes too late
    assert metrics.degs_overlap(["a", "b", "c", "d"], ["b", "x", "y", "d", "a"], n) == pytest.approx(expected)


def test_degs_overlap_depends_on_the_argument_order_and_takes_positions():
    assert metrics.degs_overlap([1, 2], [2, 1, 5, 6]) == 1.0
    assert metrics.degs_overlap([2, 1, 5, 6], [1, 2]) == 0.5
    assert metrics.degs_overlap([], [1, 2]) == 0.0
    assert metrics.degs_overlap([1, 2], []) == 0.0


def test_degs_overlap_refuses_bad_input():
    with pytest.raises(DataError, match="n is 0: expected 1 or more genes"):
        metrics.degs_overlap(["a"], ["a"], 0)
    with pytest.raises(DataError, match="predicted_ranked lists 'b' more than once"):
        metrics.degs_overlap(["a"], ["b", "b"])


def test_discrimination_leaves_out_all_targets_of_a_combination(rng):
    truths = rng.normal(size=(9, 6))
    predictions = truths + rng.normal(0, 1.5, (9, 6))
    single = np.array([0, 1, 2, 3, -1, -1, 5, 0, 1])
    mask = np.arange(6) == single[:, None]
    expected = metrics.discrimination(truths, predictions, target_genes=single)
    np.testing.assert_array_equal(metrics.discrimination(truths, predictions, target_genes=mask), expected)
    mask[0, 3] = True
    found = metrics.discrimination(truths, predictions, target_genes=mask)
    kept = [1, 2, 4, 5]  # without both targets of the first condition
    distances = np.abs(predictions[0, kept] - truths[:, kept]).sum(1)
    assert found[0] == pytest.approx(1 - np.sum(distances < distances[0]) / 9)
    np.testing.assert_array_equal(found[1:], expected[1:])
    with pytest.raises(DataError, match=r"target_genes has shape \(2, 6\) and type bool: expected 9 gene positions"):
        metrics.discrimination(truths, predictions, target_genes=mask[:2])


def test_degs_recall_by_hand():
    assert metrics.degs_recall(["a", "b", "c", "d"], ["x", "d", "a"]) == 0.5
    assert metrics.degs_recall(["a", "b"], ["b", "a", "x", "y"]) == 1.0  # calling more costs nothing
    assert metrics.degs_recall(["a"], []) == 0.0
    assert math.isnan(metrics.degs_recall([], ["a"]))
    with pytest.raises(DataError, match="true_degs lists 'a' more than once"):
        metrics.degs_recall(["a", "a"], ["a"])


def test_top_recall_by_hand():
    change = np.array([0.1, -3.0, 2.0, 0.0, 1.0])
    assert metrics.top_recall([1, 4], change) == 0.5  # the first two are genes 1 and 2
    assert metrics.top_recall([4, 2, 1], change) == 1.0
    # genes 1, 2, 3 tie for two places: each has two thirds of one
    assert metrics.top_recall([1, 2], np.array([0.0, 1.0, -1.0, 1.0])) == pytest.approx(2 / 3)
    assert metrics.top_recall([0, 1], np.array([5.0, 1.0, -1.0, 1.0])) == pytest.approx((1 + 1 / 3) / 2)
    assert math.isnan(metrics.top_recall([], change))
    with pytest.raises(DataError, match="genes holds 5: expected positions from 0 to 4"):
        metrics.top_recall([5], change)


def test_top_recall_of_no_change_and_of_random_changes_is_chance(rng):
    assert metrics.top_recall([3, 7, 8], np.zeros(30)) == pytest.approx(3 / 30)
    found = [metrics.top_recall(np.arange(10), rng.normal(size=50)) for _ in range(400)]
    assert np.mean(found) == pytest.approx(10 / 50, abs=0.02)
