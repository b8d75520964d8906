"""The basis in which a matrix of effects is sparse, where it is known."""

import numpy as np
import pytest

from pyro_scm.directions import CONTRASTS, centre, sparse_directions
from pyro_scm.errors import DataError, ModelError
from pyro_scm.metrics import mcc

Array = np.ndarray


def sparse_effects(d: int = 5, environments: int = 40, seed: int = 0) -> Array:
    """One target an environment, N(0, 3^2), each latent in turn."""
    rng = np.random.default_rng(seed)
    truth = np.zeros((environments, d))
    truth[np.arange(environments), np.arange(environments) % d] = rng.normal(0, 3, environments)
    return truth


def turned(truth: Array, seed: int = 1) -> Array:
    """In another orthonormal basis, with a little noise."""
    rng = np.random.default_rng(seed)
    basis = np.linalg.qr(rng.normal(size=(truth.shape[1],) * 2))[0]
    return truth @ basis.T + 0.05 * rng.normal(size=truth.shape)


# ---------------------------------------------------------------------- the basis
@pytest.mark.parametrize(
    ("contrast", "oblique"), [(c, o) for c in CONTRASTS for o in (0.3, None) if c != "varimax" or o is None]
)
def test_the_basis_of_sparse_effects_is_found(contrast: str, oblique: float | None) -> None:
    truth = sparse_effects()
    found = sparse_directions(turned(truth), contrast=contrast, oblique=oblique)
    assert mcc(truth, found.effects).score > 0.99
    assert mcc(truth, turned(truth)).score < 0.9
    assert np.allclose(found.effects, turned(truth) @ found.matrix.T)


def test_an_oblique_basis_needs_the_oblique_search() -> None:
    truth = sparse_effects(4, 60)
    skew = np.eye(4) + 0.5 * np.triu(np.ones((4, 4)), 1)
    scores = {
        oblique: mcc(truth, sparse_directions(truth @ skew.T, oblique=oblique).effects).score for oblique in (0.3, None)
    }
    assert scores[0.3] > 0.99
    assert scores[0.3] > scores[None] + 0.01


def test_rows_are_unit_vectors_in_a_settled_order_and_sign() -> None:
    e = turned(sparse_effects())
    first, again = (sparse_directions(e, seed=seed) for seed in (0, 1))
    assert np.allclose(np.linalg.norm(first.matrix, axis=1), 1)
    assert np.allclose(first.matrix, again.matrix, atol=1e-3)
    sizes = np.square(first.effects).sum(0)
    assert (np.diff(sizes) <= 0).all()
    assert (first.effects[np.abs(first.effects).argmax(0), np.arange(5)] > 0).all()
    assert first.agreement > 0.5
    assert first.correlation < 1e-6 < sparse_directions(e, oblique=0.3).correlation


def test_effects_that_cannot_be_unmixed_are_refused() -> None:
    with pytest.raises(DataError, match="effects of 3 environments span 3 of 5 latents: fit with latent=3"):
        sparse_directions(sparse_effects(5, 3))
    with pytest.raises(DataError, match="expected finite numbers"):
        sparse_directions(np.full((9, 2), np.nan))
    with pytest.raises(ModelError, match="unknown contrast 'entropy': use one of log-cosh, l1, varimax"):
        sparse_directions(sparse_effects(), contrast="entropy")
    with pytest.raises(ModelError, match="varimax is a contrast of rotations: use oblique=None"):
        sparse_directions(sparse_effects(), contrast="varimax", oblique=0.3)
    with pytest.raises(ModelError, match="covariances are made diagonal by a rotation"):
        sparse_directions(sparse_effects(), covariances=np.ones((40, 5, 5)), oblique=0.3)
    with pytest.raises(DataError, match=r"covariances have shape \(3, 5, 5\)"):
        sparse_directions(sparse_effects(), covariances=np.ones((3, 5, 5)))
    with pytest.raises(DataError, match="rank is 6: give a number from 1 to 5"):
        sparse_directions(sparse_effects(), rank=6)


# ---------------------------------------------------------------------- rank
def test_latents_that_nothing_moves_are_left_alone() -> None:
    truth = sparse_effects()
    wide = np.concatenate([truth, np.zeros((40, 5))], 1)
    basis = np.linalg.qr(np.random.default_rng(1).normal(size=(10, 10)))[0]
    noisy = wide @ basis.T + 0.01 * np.random.default_rng(2).normal(size=wide.shape)
    found = sparse_directions(noisy, rank=5)
    assert found.rank == 5
    assert np.allclose(found.matrix @ found.matrix.T, np.eye(10), atol=1e-9)
    assert mcc(truth, found.effects[:, :5]).score > 0.99
    assert np.abs(found.effects[:, 5:]).max() < 0.1


def test_fewer_environments_than_latents_can_be_turned() -> None:
    truth = sparse_effects(5, 40)[:4]  # one environment for each of four latents
    found = sparse_directions(turned(truth), rank=4)
    largest = np.abs(found.effects).max(1)
    assert (np.sort(np.abs(found.effects), 1)[:, -2] < 0.25 * largest).all()


# ---------------------------------------------------------------------- a common offset
def test_an_offset_that_all_share_hides_the_basis_until_it_is_taken_off() -> None:
    truth = sparse_effects(5, 60)
    offset = np.array([3.0, -4.0, 5.0, 2.0, -3.0])
    basis = np.linalg.qr(np.random.default_rng(1).normal(size=(5, 5)))[0]
    e = (truth + offset) @ basis.T + 0.05 * np.random.default_rng(2).normal(size=truth.shape)
    plain, centred = sparse_directions(e), sparse_directions(e, offset=True)
    assert mcc(truth, centred.effects).score > 0.99
    assert mcc(truth, plain.effects).score < 0.95
    assert np.allclose(np.sort(np.abs(centred.offset)), np.sort(np.abs(offset)), atol=0.1)
    assert np.allclose(centred.effects + centred.offset, e @ centred.matrix.T)
    assert (plain.offset == 0).all()


def test_the_spatial_median_turns_with_the_data_and_ignores_a_few() -> None:
    rng = np.random.default_rng(0)
    e = rng.normal(size=(50, 3)) + 2
    e[:10] += 100
    basis = np.linalg.qr(rng.normal(size=(3, 3)))[0]
    assert np.allclose(centre(e @ basis.T), centre(e) @ basis.T, atol=1e-6)
    assert np.linalg.norm(centre(e) - 2) < 1
    assert np.linalg.norm(e.mean(0) - 2) > 20
    assert np.allclose(centre(np.full((4, 3), 7.0)), 7)


# ---------------------------------------------------------------------- scales
def test_covariances_tell_the_basis_where_means_do_not() -> None:
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.normal(size=(4, 4)))[0]
    scales = np.ones((24, 4))
    scales[np.arange(24), np.arange(24) % 4] = rng.choice([3.0, 1 / 3], 24)
    covariances = np.einsum("ij,ej,kj->eik", basis, scales**2, basis)
    means = 0.05 * rng.normal(size=(24, 4))
    found = sparse_directions(means, covariances=covariances)
    assert np.allclose(np.abs(found.matrix @ basis).max(1), 1, atol=0.02)
    assert np.abs(sparse_directions(means).matrix @ basis).max(1).min() < 0.95


def test_covariances_that_say_nothing_change_nothing() -> None:
    e = turned(sparse_effects())
    same = np.broadcast_to(np.eye(5), (40, 5, 5))
    assert np.allclose(sparse_directions(e).matrix, sparse_directions(e, covariances=same).matrix, atol=1e-3)
    # only their ratios of scales count: the same size in all directions, whatever it is in each environment
    sizes = np.linspace(0.5, 2, 40)[:, None, None]
    assert np.allclose(sparse_directions(e).matrix, sparse_directions(e, covariances=same * sizes).matrix, atol=1e-3)
