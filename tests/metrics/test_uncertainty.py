"""Bootstrap intervals against the normal approximation, SciPy and their coverage."""

import math

import numpy as np
import pytest
import scipy.stats

from pyro_scm import metrics
from pyro_scm.errors import DataError
from pyro_scm.metrics import uncertainty

NAN = float("nan")


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
    monkeypatch.setattr(uncertainty, "BLOCK_ENTRIES", 333)
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
