"""Every metric against an independent reference: scikit-learn, SciPy, closed forms, brute force or hand computation."""

import itertools
import math
import tracemalloc
from collections.abc import Callable

import numpy as np
import pytest
import scipy.sparse
import scipy.stats
import sklearn.metrics
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.spatial.distance import cdist
from sklearn.linear_model import LinearRegression
from sklearn.metrics.pairwise import rbf_kernel

from pyro_scm import metrics
from pyro_scm.errors import DataError, PyroScmError

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
def rng() -> np.random.Generator:
    return np.random.default_rng(20240611)


@pytest.fixture
def means(rng) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Truth, prediction and control of one condition with 50 genes."""
    control = rng.gamma(2.0, 1.0, 50)
    truth = control + rng.normal(0, 0.5, 50)
    return truth, truth + rng.normal(0, 0.3, 50), control


# --- per-condition mean expression ------------------------------------------------------------------------------------


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


def test_sparse_input_is_named_with_its_cure():
    with pytest.raises(
        DataError, match=r"truth is not a dense array of numbers .* a sparse matrix needs \.toarray\(\)"
    ):
        metrics.energy_distance(scipy.sparse.eye_array(3, format="csr"), np.eye(3))
    with pytest.raises(PyroScmError, match="prediction is not a dense array of numbers"):
        metrics.r2([1.0, 2.0], ["a", "b"])


# --- ranks over conditions --------------------------------------------------------------------------------------------


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


# --- distributions of cells -------------------------------------------------------------------------------------------


def gaussian_gap(mean: float, variance: float) -> float:
    """E|N(mean, variance)|, the folded normal mean."""
    sd = math.sqrt(variance)
    return sd * math.sqrt(2 / math.pi) * math.exp(-(mean**2) / (2 * variance)) + mean * math.erf(
        mean / sd / math.sqrt(2)
    )


@pytest.mark.parametrize(("n", "m"), [(1, 1), (4, 9)])
def test_energy_distance_of_two_point_masses_is_twice_their_distance(n, m):
    x, y = np.tile([1.0, 2.0, 3.0], (n, 1)), np.tile([1.0, 5.0, 7.0], (m, 1))
    assert metrics.energy_distance(x, y) == pytest.approx(2 * 5.0)
    assert metrics.energy_distance(x, x.copy()) == pytest.approx(0.0, abs=1e-12)
    if n > 1:
        assert metrics.energy_distance(x, y, unbiased=True) == pytest.approx(2 * 5.0)


def test_energy_distance_by_hand():
    # between: 1, 4, 1, 2 (mean 2); within x 2 (mean 1 of four pairs), within y 3 (mean 1.5)
    x, y = np.array([[0.0], [2.0]]), np.array([[1.0], [4.0]])
    assert metrics.energy_distance(x, y) == pytest.approx(2 * 2 - 1 - 1.5)
    assert metrics.energy_distance(x, y, unbiased=True) == pytest.approx(2 * 2 - 2 - 3)


def test_energy_distance_of_two_gaussians(rng):
    x, y = rng.normal(0, 1, (4000, 1)), rng.normal(1.5, 1, (4000, 1))
    closed = 2 * gaussian_gap(1.5, 2.0) - 2 * gaussian_gap(0.0, 2.0)
    assert metrics.energy_distance(x, y, unbiased=True) == pytest.approx(closed, abs=0.08)
    # SciPy's one-dimensional distance is the square root of the biased form
    reference = scipy.stats.energy_distance(x[:, 0], y[:, 0]) ** 2
    assert metrics.energy_distance(x, y) == pytest.approx(reference, rel=1e-9)


def test_energy_distance_in_many_dimensions_against_all_pairs(rng):
    x, y = rng.gamma(1.0, 2.0, (37, 20)) + 1e4, rng.gamma(1.2, 2.0, (23, 20)) + 1e4
    between, xx, yy = cdist(x, y).mean(), cdist(x, x), cdist(y, y)
    assert metrics.energy_distance(x, y) == pytest.approx(2 * between - xx.mean() - yy.mean(), rel=1e-9)
    unbiased = 2 * between - xx.sum() / (37 * 36) - yy.sum() / (23 * 22)
    assert metrics.energy_distance(x, y, unbiased=True) == pytest.approx(unbiased, rel=1e-9)
    assert metrics.energy_distance(y, x) == pytest.approx(metrics.energy_distance(x, y))


def test_plain_distances_are_never_negative(rng):
    for _ in range(40):
        x = rng.normal(0, 10, size=(50, 1))
        assert metrics.energy_distance(x, x[::-1]) >= 0.0
        assert metrics.mmd(x, x[::-1]) >= 0.0
        assert metrics.energy_distance(x, x[::-1]) == pytest.approx(0.0, abs=1e-6)


def test_the_plain_energy_distance_grows_with_few_cells_and_the_unbiased_one_does_not(rng):
    plain, unbiased = (
        np.mean(
            [
                metrics.energy_distance(rng.normal(size=(10, 5)), rng.normal(size=(10, 5)), unbiased=choice)
                for _ in range(200)
            ]
        )
        for choice in (False, True)
    )
    typical = np.mean(cdist(rng.normal(size=(500, 5)), rng.normal(size=(500, 5))))
    assert plain == pytest.approx(typical * (1 / 10 + 1 / 10), rel=0.1)
    assert unbiased == pytest.approx(0.0, abs=0.03)


@pytest.mark.parametrize("entries", [1, 7, 60, 10_000])
@pytest.mark.parametrize("metric", [metrics.energy_distance, metrics.mmd])
def test_the_size_of_the_blocks_does_not_change_the_value(metric, entries, rng, monkeypatch):
    x, y = rng.normal(size=(13, 4)), rng.normal(0.5, 1, (11, 4))
    expected = [metric(x, y, unbiased=choice) for choice in (False, True)]
    monkeypatch.setattr(metrics, "BLOCK_ENTRIES", entries)
    assert [metric(x, y, unbiased=choice) for choice in (False, True)] == pytest.approx(expected, rel=1e-12)


def test_memory_stays_within_blocks(rng, monkeypatch):
    monkeypatch.setattr(metrics, "BLOCK_ENTRIES", 2**14)
    x, y = rng.normal(size=(1500, 3)), rng.normal(size=(1500, 3))
    tracemalloc.start()
    metrics.energy_distance(x, y)
    metrics.mmd(x, y, [1.0, 2.0])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1500 * 1500 * 8 / 4  # a quarter of one full matrix of distances


def test_mmd_against_full_kernel_matrices(rng):
    x, y = rng.normal(size=(30, 6)), rng.normal(0.4, 1.3, (25, 6))
    for widths in ([0.7], [0.5, 2.0, 8.0]):

        def kernel(a, b, widths=widths):
            return np.mean([rbf_kernel(a, b, gamma=1 / (2 * s**2)) for s in widths], axis=0)

        xx, yy, xy = kernel(x, x), kernel(y, y), kernel(x, y)
        assert metrics.mmd(x, y, widths) == pytest.approx(xx.mean() + yy.mean() - 2 * xy.mean(), rel=1e-9)
        off_x = (xx.sum() - np.trace(xx)) / (30 * 29)
        off_y = (yy.sum() - np.trace(yy)) / (25 * 24)
        assert metrics.mmd(x, y, widths, unbiased=True) == pytest.approx(off_x + off_y - 2 * xy.mean(), rel=1e-9)


def test_mmd_of_two_gaussians(rng):
    # x - y ~ N(mean, 2): E exp(-(x - y)^2 / (2 s^2)) = s / sqrt(s^2 + 2) exp(-mean^2 / (2 (s^2 + 2)))
    def expected_kernel(mean, s):
        return s / math.sqrt(s**2 + 2) * math.exp(-(mean**2) / (2 * (s**2 + 2)))

    x, y = rng.normal(0, 1, (3000, 1)), rng.normal(1.5, 1, (3000, 1))
    closed = 2 * expected_kernel(0.0, 0.8) - 2 * expected_kernel(1.5, 0.8)
    assert metrics.mmd(x, y, [0.8], unbiased=True) == pytest.approx(closed, abs=0.02)


def test_mmd_of_two_point_masses_by_hand():
    x, y = np.zeros((3, 2)), np.tile([3.0, 4.0], (2, 1))
    assert metrics.mmd(x, y, [5.0]) == pytest.approx(2 - 2 * math.exp(-0.5))
    # default: the only positive distance is 5
    assert metrics.mmd(x, y) == pytest.approx(2 - 2 * math.exp(-0.5))
    assert metrics.mmd(x, x.copy()) == pytest.approx(0.0, abs=1e-15)


def test_default_bandwidth_is_the_median_of_the_pooled_cells(rng):
    x, y = rng.normal(size=(30, 6)), rng.normal(2, 1, (25, 6))
    pooled = np.concatenate([x, y])
    median = np.median(cdist(pooled, pooled)[np.triu_indices(55, 1)])
    assert metrics.median_bandwidth(pooled) == pytest.approx(median)
    assert metrics.mmd(x, y) == pytest.approx(metrics.mmd(x, y, [median]))


def test_median_bandwidth_of_many_cells_uses_evenly_spaced_ones(rng):
    cells = rng.normal(size=(4000, 3))
    exact = np.median(cdist(cells[::4], cells[::4])[np.triu_indices(1000, 1)])
    assert metrics.median_bandwidth(cells) == pytest.approx(exact, rel=0.05)
    assert metrics.median_bandwidth(cells) == metrics.median_bandwidth(cells)
    assert metrics.median_bandwidth([[0.0], [0.0], [0.0], [2.0]]) == 2.0
    assert math.isnan(metrics.median_bandwidth(np.full((5, 2), 0.3)))


def test_distribution_metrics_tell_apart_what_means_cannot(rng):
    x = rng.normal(0, 1, (600, 4))
    narrow = x * 0.1
    assert abs(narrow.mean() - x.mean()) < 0.05
    noise = metrics.energy_distance(x, rng.normal(0, 1, (600, 4)))
    assert metrics.energy_distance(x, narrow) > 20 * noise
    assert metrics.mmd(x, narrow, unbiased=True) > 0.05
    assert metrics.variance_r2(x, narrow) < 0


@pytest.mark.parametrize("metric", [metrics.energy_distance, metrics.mmd])
def test_unbiased_forms_with_one_cell_are_nan(metric):
    one, two = np.zeros((1, 3)), np.arange(6.0).reshape(2, 3)
    assert math.isnan(metric(one, two, unbiased=True))
    assert math.isnan(metric(two, one, unbiased=True))
    assert metric(one, two) > 0


@pytest.mark.parametrize(
    "metric", [metrics.energy_distance, metrics.mmd, metrics.variance_r2, metrics.gene_wasserstein]
)
def test_distribution_metrics_refuse_bad_input(metric):
    with pytest.raises(DataError, match="truth has 3 genes and prediction 2: expected the same genes"):
        metric(np.zeros((4, 3)), np.zeros((4, 2)))
    with pytest.raises(DataError, match="truth has 0 cells and prediction 4: expected one or more in each"):
        metric(np.zeros((0, 3)), np.zeros((4, 3)))
    with pytest.raises(DataError, match=r"prediction holds inf at position \(1, 2\)"):
        metric(np.zeros((4, 3)), np.array([[0, 0, 0], [0, 0, math.inf]]))


@pytest.mark.parametrize("widths", [[], [0.0], [1.0, -2.0]])
def test_mmd_refuses_bad_bandwidths(widths):
    with pytest.raises(DataError, match=r"bandwidths is .*: expected one or more positive widths"):
        metrics.mmd(np.zeros((2, 1)), np.ones((2, 1)), widths)


def test_variance_r2_is_r2_of_sample_variances(rng):
    scales = rng.gamma(2, 1, 12)
    x, y = rng.normal(0, scales, (40, 12)), rng.normal(3, scales, (70, 12))
    reference = sklearn.metrics.r2_score(np.var(x, axis=0, ddof=1), np.var(y, axis=0, ddof=1))
    assert metrics.variance_r2(x, y) == pytest.approx(reference)
    genes = [1, 4, 6]
    reference = sklearn.metrics.r2_score(np.var(x[:, genes], axis=0, ddof=1), np.var(y[:, genes], axis=0, ddof=1))
    assert metrics.variance_r2(x, y, genes=genes) == pytest.approx(reference)
    assert math.isnan(metrics.variance_r2(x[:1], y))


def test_a_model_of_means_alone_has_a_negative_variance_r2(rng):
    x = rng.normal(0, [1.0, 1.1, 0.9], (500, 3))
    assert metrics.variance_r2(x, np.tile(x.mean(axis=0), (500, 1))) < -10


def test_gene_wasserstein_of_shifted_and_of_paired_values(rng):
    x = rng.normal(size=(100, 3))
    np.testing.assert_allclose(metrics.gene_wasserstein(x, x + np.array([0.0, 2.0, -3.0])), [0.0, 2.0, 3.0], atol=1e-12)
    y = rng.gamma(1.0, 2.0, (100, 3))  # equal numbers of cells: mean gap of the sorted values
    expected = np.abs(np.sort(x, axis=0) - np.sort(y, axis=0)).mean(axis=0)
    np.testing.assert_allclose(metrics.gene_wasserstein(x, y), expected)


# --- recovery of latents ----------------------------------------------------------------------------------------------


def brute_force_mcc(truth, inferred, correlation) -> float:
    """Best mean absolute correlation over all injections of true into inferred latents, or the reverse when k < d."""
    d, k = truth.shape[1], inferred.shape[1]
    table = np.array([[abs(correlation(truth[:, i], inferred[:, j])) for j in range(k)] for i in range(d)])
    if k >= d:
        return max(sum(table[i, p[i]] for i in range(d)) for p in itertools.permutations(range(k), d)) / d
    return max(sum(table[p[j], j] for j in range(k)) for p in itertools.permutations(range(d), k)) / d


@pytest.mark.parametrize("k", [2, 4, 6])
@pytest.mark.parametrize(
    ("method", "correlation"),
    [
        ("pearson", lambda a, b: scipy.stats.pearsonr(a, b).statistic),
        ("spearman", lambda a, b: scipy.stats.spearmanr(a, b).statistic),
    ],
)
def test_mcc_against_all_permutations(k, method, correlation, rng):
    truth = rng.normal(size=(60, 4))
    inferred = truth @ rng.normal(size=(4, k)) + 0.3 * rng.normal(size=(60, k))
    matching = metrics.mcc(truth, inferred, method=method)
    assert matching.score == pytest.approx(brute_force_mcc(truth, inferred, correlation))
    assert matching.score == pytest.approx(matching.correlations.mean())
    used = matching.permutation[matching.permutation >= 0]
    assert len(set(used.tolist())) == len(used) == min(4, k)
    for i, j in enumerate(matching.permutation):
        if j >= 0:
            signed = correlation(truth[:, i], inferred[:, j])
            assert matching.correlations[i] == pytest.approx(abs(signed))
            assert matching.sign[i] == np.sign(signed)
        else:
            assert (matching.correlations[i], matching.sign[i]) == (0.0, 0)


def test_mcc_is_not_greedy():
    # greedy pairing takes the largest correlation first and loses on the rest
    basis = np.linalg.qr(np.random.default_rng(1).normal(size=(40, 4)) @ np.eye(4))[0]
    basis = np.linalg.qr(basis - basis.mean(axis=0))[0]
    truth = basis[:, :2]
    first = 0.9 * basis[:, 0] + 0.43 * basis[:, 1]
    second = 0.85 * basis[:, 0] + 0.5 * basis[:, 2]
    matching = metrics.mcc(truth, np.column_stack([first, second]))
    assert matching.permutation.tolist() == [1, 0]


def test_mcc_finds_order_sign_and_scale(rng):
    truth = rng.normal(size=(200, 3))
    matching = metrics.mcc(truth, truth[:, [2, 0, 1]] * [-3.0, 0.1, 50.0] + [1.0, 2.0, 3.0])
    assert matching.permutation.tolist() == [1, 2, 0]
    assert matching.sign.tolist() == [1, 1, -1]
    np.testing.assert_allclose(matching.correlations, 1.0)
    assert matching.score == pytest.approx(1.0)
    with pytest.raises(AttributeError):
        matching.score = 0.0


def test_mcc_falls_under_rotation_and_spearman_survives_monotone_maps(rng):
    truth = rng.normal(size=(4000, 2))
    turn = np.array([[1.0, -1.0], [1.0, 1.0]]) / math.sqrt(2)
    assert metrics.mcc(truth, truth @ turn).score == pytest.approx(math.sqrt(0.5), abs=0.03)
    warped = np.exp(3 * truth)
    assert metrics.mcc(truth, warped).score < 0.6
    assert metrics.mcc(truth, warped, method="spearman").score == pytest.approx(1.0)


def test_mcc_with_collapsed_and_missing_latents(rng):
    truth = rng.normal(size=(100, 3))
    collapsed = truth.copy()
    collapsed[:, 1] = 0.1
    matching = metrics.mcc(truth, collapsed)
    assert matching.correlations.tolist() == pytest.approx([1.0, 0.0, 1.0])
    assert matching.score == pytest.approx(2 / 3)
    missing = metrics.mcc(truth, truth[:, [2]])
    assert missing.permutation.tolist() == [-1, -1, 0]
    assert missing.score == pytest.approx(1 / 3)


def test_mcc_of_a_constant_true_latent_is_nan(rng):
    truth = rng.normal(size=(100, 3))
    inferred = truth.copy()
    truth[:, 1] = 0.1
    for method in ("pearson", "spearman"):
        matching = metrics.mcc(truth, inferred, method=method)
        assert math.isnan(matching.score)
        assert np.isnan(matching.correlations).tolist() == [False, True, False]


def test_linear_r2_against_scikit_learn(rng):
    truth = rng.normal(size=(120, 3))
    inferred = truth @ rng.normal(size=(3, 5)) + rng.normal(size=(120, 5)) + 4.0
    model = LinearRegression().fit(inferred, truth)
    assert metrics.linear_r2(truth, inferred) == pytest.approx(model.score(inferred, truth))
    half = LinearRegression().fit(inferred[:60], truth[:60])
    assert metrics.linear_r2(truth, inferred, held_out=True) == pytest.approx(half.score(inferred[60:], truth[60:]))


def test_linear_r2_is_blind_to_an_affine_map_and_permuted_r2_is_not(rng):
    truth = rng.normal(size=(500, 3))
    mixed = truth @ np.linalg.qr(rng.normal(size=(3, 3)))[0] + 7.0
    assert metrics.linear_r2(truth, mixed) == pytest.approx(1.0)
    assert metrics.linear_r2(truth, mixed, held_out=True) == pytest.approx(1.0)
    assert metrics.permuted_r2(truth, mixed) < 0.9
    assert metrics.permuted_r2(truth, truth[:, [1, 2, 0]] * -5.0 + 1.0) == pytest.approx(1.0)
    assert metrics.permuted_r2(truth, truth[:, [1, 2, 0]] * -5.0 + 1.0, held_out=True) == pytest.approx(1.0)


def test_in_sample_linear_r2_flatters_many_latents(rng):
    truth, noise = rng.normal(size=(200, 2)), rng.normal(size=(200, 80))
    assert metrics.linear_r2(truth, noise) == pytest.approx(80 / 200, abs=0.12)
    assert metrics.linear_r2(truth, noise, held_out=True) < 0


def test_permuted_r2_is_the_mean_squared_matched_correlation(rng):
    truth = rng.normal(size=(150, 3))
    inferred = truth[:, [2, 0, 1]] + rng.normal(size=(150, 3))
    expected = np.mean(metrics.mcc(truth, inferred).correlations ** 2)
    assert metrics.permuted_r2(truth, inferred) == pytest.approx(expected)
    held_out = []
    for i, j in enumerate([1, 2, 0]):
        line = scipy.stats.linregress(inferred[:75, j], truth[:75, i])
        held_out.append(sklearn.metrics.r2_score(truth[75:, i], line.intercept + line.slope * inferred[75:, j]))
    assert metrics.permuted_r2(truth, inferred, held_out=True) == pytest.approx(np.mean(held_out))


def test_held_out_matching_does_not_look_at_the_scored_half(rng):
    truth, noise = rng.normal(size=(400, 1)), rng.normal(size=(400, 1))
    first = np.arange(400)[:, None] < 200
    # the first latent is right on the first half only, the second on the second half only but more strongly
    inferred = np.column_stack([np.where(first, truth, noise), np.where(first, noise, 10 * truth)])
    assert metrics.mcc(truth, inferred).permutation.tolist() == [1]
    assert metrics.permuted_r2(truth, inferred, held_out=True) == pytest.approx(-1.0, abs=0.4)


def test_permuted_r2_of_missing_collapsed_and_constant_latents(rng):
    truth = rng.normal(size=(100, 2))
    assert metrics.permuted_r2(truth, truth[:, :1]) == pytest.approx(0.5)
    assert metrics.permuted_r2(truth, truth * [1.0, 0.0]) == pytest.approx(0.5)
    assert metrics.linear_r2(truth, truth * [1.0, 0.0]) == pytest.approx(0.5, abs=0.05)
    assert math.isnan(metrics.linear_r2(truth * [1.0, 0.0], truth))
    assert math.isnan(metrics.permuted_r2(truth * [1.0, 0.0], truth))


def entropy_scores(importance: np.ndarray) -> tuple[float, float]:
    """Disentanglement and completeness of an importance matrix [k, d] with SciPy's entropies."""
    k, d = importance.shape
    rho = importance.sum(axis=1) / importance.sum()
    by_code = [1 - scipy.stats.entropy(row, base=d) if row.sum() else 0.0 for row in importance]
    by_factor = [1 - scipy.stats.entropy(column, base=k) for column in importance.T]
    return float(rho @ by_code), float(np.mean(by_factor))


def test_dci_of_the_truth_is_one(rng):
    truth = rng.normal(size=(2000, 4))
    scores = metrics.dci(truth, truth[:, [3, 1, 0, 2]] * [1.0, -9.0, 0.01, 3.0])
    assert scores.disentanglement == pytest.approx(1.0)
    assert scores.completeness == pytest.approx(1.0)
    # a lasso weight is shrunk by the penalty 0.01, so R2 is 1 - 0.01^2
    assert scores.informativeness == pytest.approx(1 - 1e-4, abs=2e-5)
    assert np.argmax(scores.importance, axis=0).tolist() == [2, 1, 3, 0]


@pytest.mark.parametrize("held_out", [False, True])
def test_dci_entropies_against_scipy(held_out, rng):
    truth = rng.normal(size=(800, 3))
    inferred = np.column_stack([truth[:, 0] + 0.4 * truth[:, 1], truth[:, 1], truth[:, 2], rng.normal(size=800)])
    scores = metrics.dci(truth, inferred, held_out=held_out)
    expected = entropy_scores(scores.importance)
    assert scores.importance.shape == (4, 3)
    assert scores.disentanglement == pytest.approx(expected[0])
    assert scores.completeness == pytest.approx(expected[1])
    assert 0.5 < scores.disentanglement < 1.0
    assert scores.informativeness > 0.99


def test_dci_under_rotation_loses_disentanglement_but_not_information(rng):
    truth = rng.normal(size=(3000, 2))
    turn = np.array([[1.0, -1.0], [1.0, 1.0]]) / math.sqrt(2)
    scores = metrics.dci(truth, truth @ turn)
    assert scores.disentanglement < 0.01
    assert scores.completeness < 0.01
    assert scores.informativeness > 0.99


def test_dci_of_noise_one_latent_and_collinear_latents(rng):
    truth = rng.normal(size=(4000, 2))
    noise = metrics.dci(truth, rng.normal(size=(4000, 3)), penalty=0.2)
    assert (noise.disentanglement, noise.completeness, noise.informativeness) == pytest.approx(
        (0.0, 0.0, 0.0), abs=1e-6
    )
    one = metrics.dci(truth[:, :1], truth)
    assert math.isnan(one.disentanglement)
    assert one.completeness == pytest.approx(1.0, abs=0.05)
    assert math.isnan(metrics.dci(truth, truth[:, :1]).completeness)
    few = truth[:50]
    collinear = metrics.dci(few, np.hstack([few, few, few @ rng.normal(size=(2, 60))]))
    assert collinear.informativeness > 0.99


@pytest.mark.parametrize("score", [metrics.mcc, metrics.linear_r2, metrics.permuted_r2, metrics.dci])
def test_latent_scores_refuse_bad_input(score):
    with pytest.raises(DataError, match=r"truth has shape \(4, 2\) and inferred \(3, 2\)"):
        score(np.zeros((4, 2)), np.zeros((3, 2)))
    with pytest.raises(DataError, match=r"inferred holds nan at position \(0, 1\)"):
        score(np.zeros((1, 2)), np.array([[0.0, NAN]]))


def test_latent_scores_refuse_bad_options():
    with pytest.raises(DataError, match="method is 'kendall': expected 'pearson' or 'spearman'"):
        metrics.mcc(np.eye(3), np.eye(3), method="kendall")
    with pytest.raises(DataError, match=r"penalty is 0\.0: expected a positive number"):
        metrics.dci(np.eye(3), np.eye(3), penalty=0.0)
    for score in (metrics.linear_r2, metrics.permuted_r2, metrics.dci):
        with pytest.raises(DataError, match="held_out needs 4 or more cells to split in halves, there are 3"):
            score(np.eye(3), np.eye(3), held_out=True)


# --- recovery of targets and graphs -----------------------------------------------------------------------------------


def test_target_scores_by_hand():
    true = np.array([[1, 0], [0, 1], [1, 1]], dtype=bool)
    # inferred latents in the order (other, second, first); columns' maxima are 9, 4, 2
    effects = np.array([[9.0, 0.5, -2.0], [9.0, -4.0, 0.7], [0.0, 1.0, 0.1]])
    scores = metrics.target_scores(true, effects, [2, 1])
    # thresholds 0.6 and 1.2: found are (0, first), (1, first) and (1, second)
    assert scores == pytest.approx((2 / 3, 2 / 4, 2 * 2 / (3 + 4)))
    # a lower threshold also finds (2, second)
    assert metrics.target_scores(true, effects, [2, 1], threshold=0.2) == pytest.approx((3 / 4, 3 / 4, 3 / 4))


def test_target_scores_ignore_the_scale_and_sign_of_latents(rng):
    true = rng.random((20, 5)) < 0.3
    effects = (true * rng.normal(5, 0.5, (20, 5)) + rng.normal(0, 0.2, (20, 5)))[:, [4, 0, 1, 3, 2]]
    permutation = np.array([1, 2, 4, 3, 0])
    assert metrics.target_scores(true, effects, permutation) == (1.0, 1.0, 1.0)
    assert metrics.target_scores(true, effects * [1e-6, -3.0, 1.0, 1e4, -1.0], permutation) == (1.0, 1.0, 1.0)
    reference = sklearn.metrics.precision_recall_fscore_support(
        true[:, [1, 0, 2, 3, 4]].ravel(), true.ravel(), average="binary"
    )[:3]
    wrong = metrics.target_scores(true[:, [1, 0, 2, 3, 4]], effects, permutation)
    assert wrong == pytest.approx(reference)


def test_target_scores_of_unmatched_and_silent_latents():
    true = np.array([[1, 0], [0, 1]])
    assert metrics.target_scores(true, [[1.0], [0.0]], [0, -1]) == pytest.approx((1.0, 0.5, 2 / 3))
    silent = metrics.target_scores(true, np.zeros((2, 2)), [0, 1])
    assert math.isnan(silent.precision)
    assert (silent.recall, silent.f1) == (0.0, 0.0)
    nothing = metrics.target_scores(np.zeros((2, 2)), np.zeros((2, 2)), [0, 1])
    assert all(math.isnan(value) for value in nothing)


def test_target_scores_take_the_matching(rng):
    truth = rng.normal(size=(100, 3))
    matching = metrics.mcc(truth, truth[:, [2, 0, 1]])
    targets = np.eye(3, dtype=bool)
    assert metrics.target_scores(targets, 5.0 * targets[:, [2, 0, 1]], matching.permutation).f1 == 1.0


@pytest.mark.parametrize("permutation", [[0], [0, 0], [0, 2], [0, -2], [0.0, 1.0]])
def test_target_scores_refuse_a_bad_permutation(permutation):
    with pytest.raises(DataError, match="expected 2 different positions from 0 to 1, or -1 for no partner"):
        metrics.target_scores(np.eye(2), np.eye(2), permutation)


def test_target_scores_refuse_bad_input():
    with pytest.raises(DataError, match="true_targets has 2 environments and effects 3"):
        metrics.target_scores(np.eye(2), np.zeros((3, 2)), [0, 1])
    with pytest.raises(DataError, match="true_targets holds values other than 0 and 1"):
        metrics.target_scores(np.eye(2) * 5, np.eye(2), [0, 1])
    with pytest.raises(DataError, match=r"threshold is 1\.0: expected a share of the column maximum"):
        metrics.target_scores(np.eye(2), np.eye(2), [0, 1], threshold=1.0)


def graph(d: int, *edges: tuple[int, int]) -> np.ndarray:
    """Adjacency matrix with weights 0.5."""
    adjacency = np.zeros((d, d))
    for source, target in edges:
        adjacency[source, target] = 0.5
    return adjacency


CHAIN = graph(4, (0, 1), (1, 2), (2, 3))


@pytest.mark.parametrize(
    ("learnt", "distance", "precision", "recall", "violations"),
    [
        (CHAIN, 0, 1.0, 1.0, 0),
        (graph(4), 3, NAN, 0.0, 0),
        (CHAIN.T, 3, 0.0, 0.0, 6),
        (graph(4, (0, 1), (2, 1), (2, 3)), 1, 2 / 3, 2 / 3, 1),  # 1 -> 2 reversed
        (graph(4, (0, 1), (1, 2)), 1, 1.0, 2 / 3, 0),  # 2 -> 3 missing
        (graph(4, (0, 1), (1, 2), (2, 3), (0, 3)), 1, 3 / 4, 1.0, 0),  # an extra edge along the order
        (graph(4, (0, 1), (1, 2), (2, 3), (3, 0)), 1, 3 / 4, 1.0, 6),  # an extra edge that closes a cycle
        (graph(4, (3, 0)), 4, 0.0, 0.0, 1),  # no true edge is touched, yet the order of 0 and 3 is wrong
        (graph(4, (0, 1), (1, 0), (1, 2), (2, 3)), 1, 3 / 4, 1.0, 1),  # both directions of one edge
    ],
)
def test_graph_scores_by_hand(learnt, distance, precision, recall, violations):
    assert metrics.shd(CHAIN, learnt) == distance
    scores = metrics.edge_scores(CHAIN, learnt)
    assert scores.precision == pytest.approx(precision, nan_ok=True)
    assert scores.recall == pytest.approx(recall)
    assert scores.f1 == pytest.approx(0.0 if not recall else 2 * precision * recall / (precision + recall))
    assert metrics.ancestral_violations(CHAIN, learnt) == violations


def test_graph_scores_against_networkx(rng):
    networkx = pytest.importorskip("networkx")
    for _ in range(10):
        true, learnt = np.triu(rng.random((6, 6)) < 0.4, 1), np.triu(rng.random((6, 6)) < 0.4, 1)
        order = rng.permutation(6)
        learnt = learnt[np.ix_(order, order)]
        truth, found = (networkx.DiGraph(a.astype(int)) for a in (true, learnt))
        states = [
            {(g.has_edge(i, j), g.has_edge(j, i)) for g in (truth, found)}
            for i, j in itertools.combinations(range(6), 2)
        ]
        assert metrics.shd(true, learnt) == sum(len(s) > 1 for s in states)
        reversed_pairs = sum(
            j in networkx.ancestors(truth, i) and i in networkx.ancestors(found, j)
            for i, j in itertools.permutations(range(6), 2)
        )
        assert metrics.ancestral_violations(true, learnt) == reversed_pairs
        reference = sklearn.metrics.f1_score(true.ravel(), learnt.ravel())
        assert metrics.edge_scores(true, learnt).f1 == pytest.approx(reference)


def test_graph_scores_of_two_empty_graphs():
    assert metrics.shd(graph(3), graph(3)) == 0
    assert math.isnan(metrics.edge_scores(graph(3), graph(3)).f1)


@pytest.mark.parametrize("score", [metrics.shd, metrics.edge_scores, metrics.ancestral_violations])
def test_graph_scores_refuse_bad_input(score):
    with pytest.raises(DataError, match=r"adjacency has shape \(2, 3\): expected a square adjacency matrix"):
        score(graph(3), np.zeros((2, 3)))
    with pytest.raises(DataError, match=r"true_adjacency has 3 nodes and adjacency 4: .* Matching\.permutation"):
        score(graph(3), graph(4))
    with pytest.raises(DataError, match="adjacency has self-loops at nodes 1, 2: expected zeros on the diagonal"):
        score(graph(3), graph(3, (1, 1), (2, 2)))


def test_ancestral_violations_need_an_acyclic_truth():
    with pytest.raises(DataError, match="true_adjacency has a cycle through nodes 0, 1: expected an acyclic graph"):
        metrics.ancestral_violations(graph(3, (0, 1), (1, 0)), graph(3))


# --- disentanglement of the environment's effect ----------------------------------------------------------------------


def test_effect_concentration_by_hand():
    shifts = np.array([[0.0, -3.0, 0.0], [1.0, 1.0, -1.0], [6.0, -2.0, 0.0], [0.0, 0.0, 0.0]])
    shares = metrics.effect_concentration(shifts)
    np.testing.assert_allclose(shares, [1.0, 1 / 3, 0.75, NAN])
    # in units of the latents' spread the third environment acts equally on two latents
    np.testing.assert_allclose(metrics.effect_concentration(shifts, scale=[3.0, 1.0, 1.0])[2], 0.5)


@pytest.mark.parametrize("scale", [[1.0], [1.0, 0.0], [1.0, -1.0]])
def test_effect_concentration_refuses_a_bad_scale(scale):
    with pytest.raises(DataError, match="expected 2 positive standard deviations; leave collapsed latents out"):
        metrics.effect_concentration(np.eye(2), scale=scale)


def test_changed_latents_counts_the_shifted_ones(rng):
    reference, environment = rng.normal(size=(800, 10)), rng.normal(size=(700, 10))
    assert metrics.changed_latents(reference, environment) == 0
    environment[:, [2, 5, 6]] += 0.6
    assert metrics.changed_latents(reference, environment) == 3
    assert metrics.changed_latents(reference, environment, test="mean") == 3


def test_changed_latents_ks_sees_spread_and_the_mean_test_does_not(rng):
    reference, environment = rng.normal(size=(800, 4)), rng.normal(size=(800, 4))
    environment -= environment.mean(axis=0) - reference.mean(axis=0)
    environment[:, 1] *= 3.0
    environment[:, 1] -= environment[:, 1].mean() - reference[:, 1].mean()
    assert metrics.changed_latents(reference, environment) == 1
    assert metrics.changed_latents(reference, environment, test="mean") == 0


def step_up(p_values: list[float], alpha: float) -> int:
    """Benjamini-Hochberg: the largest r with p_(r) <= r alpha / d."""
    ordered = sorted(p_values)
    return max((r for r, p in enumerate(ordered, 1) if p <= r * alpha / len(ordered)), default=0)


@pytest.mark.parametrize("alpha", [0.001, 0.01, 0.05, 0.2, 0.5])
def test_changed_latents_against_scipy_tests_and_the_step_up_rule(alpha, rng):
    shifts = np.linspace(0, 0.5, 12)
    reference, environment = rng.normal(size=(150, 12)), rng.normal(shifts, 1.4, size=(90, 12))
    welch = [
        scipy.stats.ttest_ind(a, b, equal_var=False).pvalue for a, b in zip(reference.T, environment.T, strict=True)
    ]
    ks = [scipy.stats.ks_2samp(a, b, method="asymp").pvalue for a, b in zip(reference.T, environment.T, strict=True)]
    assert metrics.changed_latents(reference, environment, alpha=alpha, test="mean") == step_up(welch, alpha)
    assert metrics.changed_latents(reference, environment, alpha=alpha) == step_up(ks, alpha)


@pytest.mark.parametrize(("n", "m", "spread"), [(3, 12, 4.0), (9, 4, 0.2), (40, 40, 1.0)])
def test_the_mean_test_of_one_latent_turns_at_the_p_value_of_welch(n, m, spread, rng):
    reference, environment = rng.normal(size=(n, 1)), rng.normal(1.0, spread, size=(m, 1))
    p_value = float(scipy.stats.ttest_ind(reference[:, 0], environment[:, 0], equal_var=False).pvalue)
    for factor, expected in ((1 - 1e-9, 0), (1 + 1e-9, 1)):
        assert metrics.changed_latents(reference, environment, alpha=p_value * factor, test="mean") == expected


def test_changed_latents_keeps_the_false_discovery_rate(rng):
    found = [
        metrics.changed_latents(rng.normal(size=(60, 8)), rng.normal(size=(60, 8)), alpha=0.05, test="mean") > 0
        for _ in range(400)
    ]
    assert np.mean(found) == pytest.approx(0.05, abs=0.035)


@pytest.mark.parametrize("test", ["ks", "mean"])
def test_changed_latents_of_collapsed_latents(test):
    reference, same, moved = (np.full((30, 2), value) for value in (0.1, 0.1, 0.7))
    assert metrics.changed_latents(reference, same, test=test) == 0
    assert metrics.changed_latents(reference, moved, test=test) == 2


def test_changed_latents_refuses_bad_input():
    with pytest.raises(DataError, match=r"reference has shape \(5, 2\) and environment \(5, 3\)"):
        metrics.changed_latents(np.zeros((5, 2)), np.zeros((5, 3)))
    with pytest.raises(DataError, match=r"reference has shape \(1, 2\)"):
        metrics.changed_latents(np.zeros((1, 2)), np.zeros((5, 2)))
    with pytest.raises(DataError, match="alpha is 1: expected a false discovery rate"):
        metrics.changed_latents(np.zeros((5, 2)), np.zeros((5, 2)), alpha=1)
    with pytest.raises(DataError, match="test is 'median': expected 'ks' or 'mean'"):
        metrics.changed_latents(np.zeros((5, 2)), np.zeros((5, 2)), test="median")


# --- rotation of two latents ------------------------------------------------------------------------------------------


def rotation(theta: float) -> np.ndarray:
    return np.array([[math.cos(theta), -math.sin(theta)], [math.sin(theta), math.cos(theta)]])


@pytest.fixture
def decoder() -> np.ndarray:
    """Ten genes with parents and signs as in the two-latent experiment: entries -1, 0 and 1, no row of zeros."""
    return np.array(
        [[1, 0], [0, -1], [1, 1], [1, -1], [-1, 0], [0, 1], [-1, 1], [1, 0], [0, 1], [-1, -1]], dtype=np.float64
    )


def apart(a: float, b: float) -> float:
    """Distance of two angles modulo pi."""
    return abs((a - b + math.pi / 2) % math.pi - math.pi / 2)


def test_row_cosine_distances_by_hand(decoder):
    # the first gene's row (1, 0) turned by theta is (cos, -sin); its cosine with (1, 0) is cos theta
    angles = np.linspace(0, 2 * math.pi, 9)
    distances = metrics.row_cosine_distances(decoder, np.tile([1.0, 0.0], (10, 1)), angles)
    assert distances.shape == (9, 10)
    np.testing.assert_allclose(distances[:, 0], 1 - np.cos(angles), atol=1e-12)
    np.testing.assert_allclose(distances[:, 1], 1 + np.sin(angles), atol=1e-12)
    mirrored = metrics.row_cosine_distances(decoder, np.tile([1.0, 0.0], (10, 1)), angles, reflected=True)
    np.testing.assert_allclose(mirrored[:, 0], 1 + np.cos(angles), atol=1e-12)
    np.testing.assert_allclose(mirrored[:, 1], distances[:, 1], atol=1e-12)


def test_all_rows_agree_at_the_true_angle_only(decoder):
    angles = np.linspace(0, 2 * math.pi, 400, endpoint=False)
    distances = metrics.row_cosine_distances(decoder, decoder @ rotation(angles[80]), angles)
    np.testing.assert_allclose(distances[80], 0.0, atol=1e-12)
    assert np.argmin(distances, axis=0).tolist() == [80] * 10
    assert np.delete(distances, 80, axis=0).max(axis=1).min() > 1e-5


def test_scaled_rows_agree_where_unscaled_ones_do_not(decoder):
    learnt = decoder @ rotation(0.9) @ np.diag([0.2, 7.0])
    assert metrics.row_cosine_distances(decoder, learnt, [0.9]).max() > 0.1
    np.testing.assert_allclose(metrics.row_cosine_distances(decoder, learnt, [0.9], scaled=True), 0.0, atol=1e-12)


@pytest.mark.parametrize("scale", [(1.0, 1.0), (0.3, 5.0)])
@pytest.mark.parametrize("signs", [(1, 1), (-1, -1), (1, -1), (-1, 1)])
@pytest.mark.parametrize("theta", [0.0, 0.3, math.pi / 4, math.pi / 2, 1.9, 3.1])
def test_optimal_angle_recovers_a_known_rotation(theta, signs, scale, decoder):
    learnt = decoder @ rotation(theta) @ np.diag(np.multiply(signs, scale))
    found = metrics.optimal_angle(decoder, learnt)
    # M R_theta diag(-1, 1) = M diag(-1, 1) R_-theta: the reflection comes before the rotation
    mirrored = signs[0] != signs[1]
    assert found.reflected is mirrored
    assert found.distance == pytest.approx(0.0, abs=1e-9)
    assert apart(found.angle, -theta if mirrored else theta) < 1e-5
    assert 0.0 <= found.angle < math.pi
    assert metrics.angle_to_axis(found.angle) == pytest.approx(metrics.angle_to_axis(theta), abs=1e-5)


def test_optimal_angle_of_a_reflection_applied_first(decoder):
    # as in figure 6 (b) of the paper: M with its first column negated, turned by 0.4 pi
    learnt = decoder @ np.diag([-1.0, 1.0]) @ rotation(0.4 * math.pi)
    found = metrics.optimal_angle(decoder, learnt)
    assert found == pytest.approx((0.4 * math.pi, 0.0, True), abs=1e-6)
    assert metrics.row_cosine_distances(decoder, learnt, [found.angle], reflected=True).max() < 1e-9
    assert metrics.row_cosine_distances(decoder, learnt, np.linspace(0, 2 * math.pi, 100)).mean(axis=1).min() > 0.1


def test_swapped_latents_are_on_an_axis(decoder):
    found = metrics.optimal_angle(decoder, decoder[:, ::-1] * [2.0, 0.5])
    assert found.distance == pytest.approx(0.0, abs=1e-9)
    assert metrics.angle_to_axis(found.angle) == pytest.approx(0.0, abs=1e-5)


def test_optimal_angle_of_many_random_decoders(rng):
    for _ in range(30):
        truth = rng.normal(size=(10, 2))
        theta, scale = rng.uniform(0, math.pi), rng.choice([-1, 1], 2) * rng.uniform(0.2, 4, 2)
        found = metrics.optimal_angle(truth, truth @ rotation(theta) @ np.diag(scale))
        expected = theta if scale[0] * scale[1] > 0 else -theta
        assert apart(found.angle, expected) < 1e-5
        assert found.distance < 1e-9


def test_optimal_angle_of_unrelated_decoders_keeps_a_distance(decoder, rng):
    assert metrics.optimal_angle(decoder, rng.normal(size=(10, 2))).distance > 0.1
    noisy = decoder @ rotation(1.0) + rng.normal(0, 0.02, (10, 2))
    found = metrics.optimal_angle(decoder, noisy)
    assert found.angle == pytest.approx(1.0, abs=0.05)
    assert 0 < found.distance < 0.01


def test_optimal_angle_is_the_best_over_a_plain_search(decoder, rng):
    learnt = decoder @ rotation(0.7) + rng.normal(0, 0.4, (10, 2))
    found = metrics.optimal_angle(decoder, learnt)
    best = math.inf
    for theta, mirror in itertools.product(np.linspace(0, 2 * math.pi, 721), (1.0, -1.0)):
        turned = decoder @ np.diag([mirror, 1.0]) @ rotation(theta)
        a, b = turned / np.linalg.norm(turned, axis=0), learnt / np.linalg.norm(learnt, axis=0)
        cosines = [row @ other / np.linalg.norm(row) / np.linalg.norm(other) for row, other in zip(a, b, strict=True)]
        best = min(best, 1 - float(np.mean(cosines)))
    assert found.distance <= best
    assert found.distance == pytest.approx(best, abs=1e-3)


def test_genes_without_parents_are_left_out(decoder):
    learnt = decoder @ rotation(0.5)
    true = decoder.copy()
    true[3], learnt[6] = 0.0, 0.0
    found = metrics.optimal_angle(true, learnt)
    assert found.distance < 0.05
    distances = metrics.row_cosine_distances(true, learnt, [0.5])
    assert np.flatnonzero(np.isnan(distances[0])).tolist() == [3, 6]
    nothing = metrics.optimal_angle(decoder, 0 * decoder)
    assert math.isnan(nothing.angle)
    assert math.isnan(nothing.distance)
    assert nothing.reflected is False


def test_a_collapsed_latent_gives_a_number_without_a_warning(decoder):
    collapsed = decoder * [1.0, 0.0]
    collapsed[:, 0] += 0.3  # otherwise half of the rows are zero
    found = metrics.optimal_angle(decoder, collapsed)
    assert 0.05 < found.distance <= 1.0
    rank_one = metrics.optimal_angle(np.outer(np.arange(1.0, 6.0), [1.0, 0.0]), np.eye(5, 2) + 1.0)
    assert math.isfinite(rank_one.distance)
    vanishing = metrics.optimal_angle([[1.0, 0.0], [1.0, 0.0], [0.0, 1e-14]], [[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    assert math.isfinite(vanishing.angle)
    assert math.isfinite(vanishing.distance)


def test_a_column_that_vanishes_by_rotation_is_not_blown_up_by_the_scaling():
    # at pi/2 the first column of M R is cos(pi/2) = 6e-17 times (1, 2, -1): zero but for rounding
    true = np.outer([1.0, 2.0, -1.0], [1.0, 0.0])
    distances = metrics.row_cosine_distances(true, np.outer([1.0, 1.0, 1.0], [0.0, 1.0]), [math.pi / 2], scaled=True)
    np.testing.assert_allclose(distances[0], [2.0, 2.0, 0.0], atol=1e-12)


@pytest.mark.parametrize(
    ("angle", "expected"),
    [(0.0, 0.0), (math.pi / 2, 0.0), (-math.pi, 0.0), (0.1, 0.1), (math.pi - 0.1, 0.1), (math.pi / 4, math.pi / 4)],
)
def test_angle_to_axis(angle, expected):
    assert metrics.angle_to_axis(angle) == pytest.approx(expected, abs=1e-12)
    brute_force = min(abs(angle - k * math.pi / 2) for k in range(-4, 5))
    assert metrics.angle_to_axis(angle) == pytest.approx(brute_force, abs=1e-12)


def test_angle_to_axis_of_nan_and_of_random_angles(rng):
    assert math.isnan(metrics.angle_to_axis(NAN))
    mean = np.mean([metrics.angle_to_axis(a) for a in rng.uniform(0, math.pi, 4000)])
    assert mean == pytest.approx(math.pi / 8, abs=0.02)


def test_angles_refuse_bad_input(decoder):
    with pytest.raises(DataError, match=r"truth has shape \(4, 3\): expected \(G, 2\), the angle is defined for two"):
        metrics.optimal_angle(np.zeros((4, 3)), np.zeros((4, 3)))
    with pytest.raises(DataError, match=r"truth has shape \(10, 2\) and inferred \(9, 2\)"):
        metrics.optimal_angle(decoder, decoder[:9])
    with pytest.raises(DataError, match="steps is 4: expected 8 or more angles"):
        metrics.optimal_angle(decoder, decoder, steps=4)


# --- uncertainty ------------------------------------------------------------------------------------------------------


def test_bootstrap_interval_of_the_mean_matches_the_normal_one(rng):
    values = rng.normal(3.0, 2.0, 400)
    interval = metrics.bootstrap_interval(values, seed=1)
    half_width = 1.96 * values.std() / math.sqrt(400)
    assert interval.estimate == pytest.approx(values.mean())
    assert interval.n == 400
    assert interval.lower == pytest.approx(values.mean() - half_width, abs=0.03)
    assert interval.upper == pytest.approx(values.mean() + half_width, abs=0.03)


def test_bootstrap_interval_against_scipy(rng):
    values = rng.gamma(1.0, 1.0, 80)
    for statistic, function in (("mean", np.mean), ("median", np.median)):
        ours = metrics.bootstrap_interval(values, level=0.9, draws=6000, seed=3, statistic=statistic)
        reference = scipy.stats.bootstrap(
            (values,),
            function,
            confidence_level=0.9,
            n_resamples=6000,
            method="percentile",
            rng=np.random.default_rng(4),
        ).confidence_interval
        assert (ours.lower, ours.upper) == pytest.approx((reference.low, reference.high), abs=0.03)
        assert ours.estimate == pytest.approx(function(values))


def test_bootstrap_interval_covers_at_about_its_level(rng):
    covered = []
    for seed in range(150):
        interval = metrics.bootstrap_interval(rng.exponential(1.0, 60), level=0.8, draws=300, seed=seed)
        covered.append(interval.lower <= 1.0 <= interval.upper)
    assert 0.68 <= np.mean(covered) <= 0.9


def test_bootstrap_interval_depends_on_the_seed_only(rng, monkeypatch):
    values = rng.normal(size=50)
    first = metrics.bootstrap_interval(values, seed=5)
    assert metrics.bootstrap_interval(values, seed=5) == first
    assert metrics.bootstrap_interval(values, seed=6) != first
    # the resamples are drawn in blocks, which must not change how many there are or which
    monkeypatch.setattr(metrics, "BLOCK_ENTRIES", 333)
    assert metrics.bootstrap_interval(values, seed=5) == pytest.approx(first)


def test_bootstrap_interval_of_few_values():
    three = metrics.bootstrap_interval([0.1, 0.2, 0.6], seed=0)
    assert three.estimate == pytest.approx(0.3)
    assert 0.1 <= three.lower < three.upper <= 0.6
    one = metrics.bootstrap_interval([0.4], seed=0)
    assert (one.estimate, one.n) == (0.4, 1)
    assert math.isnan(one.lower)
    assert math.isnan(one.upper)


def test_paired_difference_sees_what_separate_intervals_hide(rng):
    conditions = rng.normal(0, 18, 60)  # conditions differ far more than models do
    a, b = conditions + rng.normal(0.5, 0.3, 60), conditions
    difference = metrics.paired_difference(a, b, seed=0)
    assert difference.estimate == pytest.approx((a - b).mean())
    assert 0.35 < difference.lower < 0.5 < difference.upper < 0.65
    assert difference.n == 60
    mine, other = metrics.bootstrap_interval(a, seed=0), metrics.bootstrap_interval(b, seed=0)
    assert mine.lower < other.upper
    backwards = metrics.paired_difference(b, a, seed=0)
    assert backwards.estimate == pytest.approx(-difference.estimate)


def test_uncertainty_refuses_bad_input():
    with pytest.raises(DataError, match="values is empty: expected one score or more"):
        metrics.bootstrap_interval([], seed=0)
    with pytest.raises(DataError, match=r"values holds nan at position \(1,\) .* leave the condition out and say so"):
        metrics.bootstrap_interval([0.1, NAN], seed=0)
    with pytest.raises(DataError, match=r"level is 95 and draws 2000: expected a level between 0 and 1"):
        metrics.bootstrap_interval([0.1, 0.2], level=95, seed=0)
    with pytest.raises(DataError, match=r"draws 0: expected .* one draw or more"):
        metrics.bootstrap_interval([0.1, 0.2], draws=0, seed=0)
    with pytest.raises(DataError, match="statistic is 'mode': expected 'mean' or 'median'"):
        metrics.bootstrap_interval([0.1, 0.2], seed=0, statistic="mode")
    with pytest.raises(DataError, match=r"a has shape \(2,\) and b \(1,\): expected equal shapes"):
        metrics.paired_difference([0.1, 0.2], [0.1], seed=0)


# --- the module -------------------------------------------------------------------------------------------------------


def test_every_score_states_its_direction_arguments_and_result():
    for name in metrics.__all__:
        assert getattr(metrics, name).__doc__, name
    results = {"Angle", "DCI", "Detection", "Interval", "Matching"}
    not_scores = {"bootstrap_interval", "median_bandwidth", "paired_difference"}
    scored = set(metrics.__all__) - results - not_scores
    for name in sorted(scored):
        text = getattr(metrics, name).__doc__
        assert "better" in text or "best" in text, f"{name} does not say which direction is better"
        assert "Args:" in text, name
        assert "Returns:" in text, name
