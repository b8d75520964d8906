"""Distances of sets of cells against closed forms, all pairs, SciPy and scikit-learn."""

import math
import tracemalloc

import numpy as np
import pytest
import scipy.stats
import sklearn.metrics
from scipy.spatial.distance import cdist
from sklearn.metrics.pairwise import rbf_kernel

from pyro_scm import metrics
from pyro_scm.errors import DataError
from pyro_scm.metrics import distances


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
    monkeypatch.setattr(distances, "BLOCK_ENTRIES", entries)
    assert [metric(x, y, unbiased=choice) for choice in (False, True)] == pytest.approx(expected, rel=1e-12)


def test_memory_stays_within_blocks(rng, monkeypatch):
    monkeypatch.setattr(distances, "BLOCK_ENTRIES", 2**14)
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
