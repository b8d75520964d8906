"""Calibration of predicted intervals by hand, against scikit-learn's pinball loss, and on predictions of known law."""

import math

import numpy as np
import pytest
from sklearn.metrics import mean_pinball_loss

from pyro_scm import metrics
from pyro_scm.errors import DataError


def test_coverage_and_interval_score_by_hand():
    truth, lower, upper = [0.0, 1.0, 2.0, 5.0], [0.0, 0.0, 3.0, 0.0], [1.0, 2.0, 4.0, 4.0]
    assert metrics.coverage(truth, lower, upper) == 0.5  # both ends belong to the interval
    # widths 1, 2, 1, 4; outside by 0, 0, 1, 1, each fined by 2 / 0.2
    assert metrics.interval_score(truth, lower, upper, level=0.8) == pytest.approx((8 + 2 * 10) / 4)
    assert math.isnan(metrics.coverage([], [], []))
    assert math.isnan(metrics.interval_score([], [], [], level=0.5))


def test_the_interval_score_is_the_pinball_loss_of_both_ends(rng):
    truth, lower = rng.normal(size=50), rng.normal(size=50) - 1
    upper = lower + rng.exponential(size=50)
    tail = 0.1
    both = sum(mean_pinball_loss(truth, end, alpha=a) for end, a in ((lower, tail / 2), (upper, 1 - tail / 2)))
    assert metrics.interval_score(truth, lower, upper, level=1 - tail) == pytest.approx(2 / tail * both)


def test_true_predictions_are_calibrated_and_others_are_not(rng):
    """Wide intervals cover too much and narrow ones too little; the score tells that both are worse."""
    mean = rng.normal(size=4000)
    truth = mean + rng.normal(size=4000)
    draws = {scale: mean + scale * rng.normal(size=(400, 4000)) for scale in (0.3, 1.0, 10.0)}
    found = {scale: metrics.calibration(truth, own) for scale, own in draws.items()}
    assert found[1.0].levels.tolist() == [0.5, 0.8, 0.9, 0.95]
    assert found[1.0].coverage == pytest.approx(found[1.0].levels, abs=0.025)
    assert found[1.0].width[3] == pytest.approx(2 * 1.96, rel=0.03)
    assert found[1.0].error < 0.015
    assert (found[0.3].coverage < found[0.3].levels - 0.2).all()
    assert (found[10.0].coverage > 0.95).all()
    assert min(found[0.3].error, found[10.0].error) > 0.15
    for scale in (0.3, 10.0):
        assert (found[scale].score > found[1.0].score).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: metrics.coverage([0.0], [1.0], [0.5]), "upper is below lower at position 0 and in 1 in all: swap"),
        (lambda: metrics.coverage([0.0], [1.0, 2.0], [1.0]), r"truth has shape \(1,\) and lower \(2,\)"),
        (lambda: metrics.interval_score([0.0], [0.0], [1.0], level=95), "level is 95: expected a number between"),
        (lambda: metrics.calibration([0.0], np.zeros((3, 2))), r"truth has shape \(1,\) and draws \(3, 2\)"),
        (lambda: metrics.calibration([0.0], np.zeros((0, 1))), "neither of them empty"),
        (lambda: metrics.calibration([0.0], np.zeros((3, 1)), levels=[1.0]), r"levels is 1\.0: expected numbers"),
        (lambda: metrics.calibration([0.0], np.full((3, 1), np.nan)), "draws holds nan"),
    ],
)
def test_intervals_that_make_no_sense_are_refused(call, message):
    with pytest.raises(DataError, match=message):
        call()
