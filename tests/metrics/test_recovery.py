"""Recovery of latents, targets and effects against brute force, SciPy, scikit-learn or hand computation."""

import itertools
import math

import numpy as np
import pytest
import scipy.stats
import sklearn.metrics
from sklearn.linear_model import LinearRegression

from pyro_scm import metrics
from pyro_scm.errors import DataError

NAN = float("nan")


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
