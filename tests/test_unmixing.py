"""`unmix`: sparse coordinates of a dense fit, and that nothing but the coordinates changes."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import pyro_scm as ps
from guides import amortise
from pyro_scm.data import synthetic
from pyro_scm.data.dataset import EnvironmentDataset
from pyro_scm.effects import shifts
from pyro_scm.errors import DataError, ModelError
from pyro_scm.evaluation import predict_means, recovery
from pyro_scm.metrics import mcc
from pyro_scm.objectives import EffectSparsity, Objective
from pyro_scm.run import Run
from pyro_scm.unmixing import CONTRASTS, directions, refine, sparse_directions, unmix

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


# ---------------------------------------------------------------------- fitted models
@pytest.fixture(scope="module")
def cells() -> EnvironmentDataset:
    return synthetic.dataset(
        synthetic.simulate(latent=3, genes=12, environments=13, cells=60, decoder="linear", seed=3)
    )


def dense(cells: EnvironmentDataset, name: str = "translation_vae", epochs: int = 15, **options: object) -> Run:
    torch.manual_seed(0)
    given = {"latent": 3, "hidden": (), "environment_hidden": (), "sparsity": "dense"}
    given |= {"scale": False} if "environment" in name else {}
    model = getattr(ps.models, name)(cells.schema, **{**given, **options})
    guide = amortise(model, cells, hidden=(32,))
    return ps.fit(model, guide, cells, seeds=(0, 1), epochs=epochs, lr=1e-2, batch_size=64, progress=False)


@pytest.mark.parametrize("name", ["translation_vae", "environment_vae", "structured_translation_vae"])
@pytest.mark.parametrize("hidden", [(), (16,)])
def test_a_rotation_leaves_the_model_as_it_is(cells: EnvironmentDataset, name: str, hidden: tuple[int, ...]) -> None:
    run = dense(cells, name, epochs=3, hidden=hidden)
    found = directions(run, cells, oblique=None)
    after = unmix(run, cells, oblique=None)
    for k in range(2):
        before_model, _ = run.member(k)
        after_model, _ = after.member(k)
        m = torch.as_tensor(found[k].matrix, dtype=torch.float32)
        z = torch.randn(40, 3)
        batch = cells.batch(torch.arange(40))
        with torch.no_grad():
            old = before_model.likelihoods[0].location(before_model.scm.solve(z), batch)
            new = after_model.likelihoods[0].location(after_model.scm.solve(z @ m.mT), batch)
        assert torch.allclose(old, new, atol=1e-4)
    assert np.allclose(shifts(after).loc[0], shifts(run).loc[0] @ found[0].matrix.T, atol=1e-4)


def test_cells_are_reconstructed_and_predicted_as_before(cells: EnvironmentDataset) -> None:
    run = dense(cells)
    after = unmix(run, cells, oblique=0.3)
    for k in range(2):
        m = directions(run, cells, oblique=0.3)[k].matrix
        (_, g0), (_, g1) = run.member(k), after.member(k)
        with torch.no_grad():
            z0, z1 = (g.local["z"](cells.batch()).base_dist for g in (g0, g1))
        assert np.allclose(z0.loc.numpy() @ m.T, z1.loc.numpy(), atol=1e-4)
        # sd of the diagonal Normal nearest to the turned posterior
        inverse = np.linalg.inv(m)
        expected = ((z0.scale.numpy().astype(float) ** -2) @ inverse**2) ** -0.5
        assert np.corrcoef(np.log(expected).ravel(), np.log(z1.scale.numpy()).ravel())[0, 1] > 0.95
        assert np.median(np.abs(np.log(expected / z1.scale.numpy()))) < 0.1


def test_a_rotated_run_predicts_what_it_predicted(cells: EnvironmentDataset) -> None:
    run = dense(cells)
    old, new = (predict_means(r, cells, ["env_03"]) for r in (run, unmix(run, cells, oblique=None)))
    assert np.allclose(old, new, atol=2e-3)
    assert np.abs(old).max() > 1


def test_latents_come_out_and_stay(cells: EnvironmentDataset) -> None:
    adata = synthetic.simulate(latent=3, genes=12, environments=13, cells=60, decoder="linear", seed=3)
    run = dense(cells, epochs=40)
    after = unmix(run, cells)
    refined = refine(after, cells, epochs=10, progress=False)
    assert "effects" in refined.history
    assert refined.seeds == run.seeds
    before, turned, fine = (recovery(r, cells, adata)["mcc_z"].median() for r in (run, after, refined))
    assert turned > max(before + 0.02, 0.9)
    assert fine > turned - 0.02


def test_what_has_no_basis_to_choose_is_refused(cells: EnvironmentDataset) -> None:
    with pytest.raises(ModelError, match="fit the model with sparsity='dense' first"):
        unmix(dense(cells, epochs=1, sparsity="softmax"), cells)
    with pytest.raises(ModelError, match="fit the model with scale=False first"):
        unmix(dense(cells, "environment_vae", epochs=1, scale=True), cells)
    with pytest.raises(ModelError, match="only those can be taken into the decoder"):
        unmix(dense(cells, "structured_translation_vae", epochs=1, mechanism="network"), cells)
    model = ps.models.vae(cells.schema, latent=3)
    plain = ps.fit(model, amortise(model, cells), cells, epochs=1, progress=False)
    with pytest.raises(ModelError, match="environments move no latents"):
        unmix(plain, cells)
    with pytest.raises(DataError, match="effects of 2 environments span 2 of 3 latents"):
        unmix(dense(cells, epochs=1), cells.subset(cells.env < 3))


# ---------------------------------------------------------------------- starting a fit from a run
def test_a_fit_starts_from_each_member_of_a_run(cells: EnvironmentDataset) -> None:
    run = dense(cells, epochs=2)
    still = ps.fit(run.model, run.guide, cells, seeds=(5, 6), start=run, epochs=1, lr=1e-12, progress=False)
    for name, value in run.parameters.items():
        assert torch.allclose(value, still.parameters[name], atol=1e-6), name
    with pytest.raises(ModelError, match="start has 2 members and 1 seeds are given"):
        ps.fit(run.model, run.guide, cells, start=run, epochs=1, progress=False)
    other = ps.models.translation_vae(cells.schema, latent=4, hidden=(), environment_hidden=(), sparsity="dense")
    with pytest.raises(ModelError, match=r"start: parameter model.* has shape .*: give a run of a model and guide of"):
        ps.fit(other, amortise(other, cells), cells, seeds=(0, 1), start=run, epochs=1, progress=False)
    assert replace(run) is not run


# ---------------------------------------------------------------------- the prior on effects
def test_effect_sparsity_is_a_student_t_prior_of_the_environments_effects(cells: EnvironmentDataset) -> None:
    run = dense(cells, epochs=1)
    penalty = EffectSparsity(run.model, len(cells.environments), weight=2.0, size=0.1)
    whole = Objective(penalties={"effects": penalty})
    loss, plain = (o.loss(run.model.forward, run.guide.forward, cells.batch()) for o in _same_noise(whole, Objective()))
    mu = shifts(run).loc[run.best].to_numpy()
    df = 2 * 2.0 - 1
    law = torch.distributions.StudentT(df, 0.0, 0.1 / df**0.5)
    expected = (law.log_prob(torch.zeros(())) - law.log_prob(torch.as_tensor(mu))).sum()
    assert loss - plain == pytest.approx(float(expected), rel=1e-3)
    with pytest.raises(ModelError, match="environments move no latents"):
        EffectSparsity(ps.models.vae(cells.schema, latent=3), 3)


def _same_noise(*objectives: Objective) -> list[Objective]:
    class Seeded:
        def __init__(self, objective: Objective) -> None:
            self.objective = objective

        def loss(self, *args: object) -> float:
            torch.manual_seed(0)
            return float(self.objective.loss(*args))  # type: ignore[arg-type]

    return [Seeded(o) for o in objectives]  # type: ignore[misc]
