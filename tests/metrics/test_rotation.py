"""Angles of known, mirrored, scaled and noisy rotations, and a plain search."""

import itertools
import math

import numpy as np
import pytest

from pyro_scm import metrics
from pyro_scm.errors import DataError

NAN = float("nan")


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
