"""`unmix`: sparse coordinates of a dense fit, and that nothing but the coordinates changes."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import ortho_group

import pyro_scm as ps
from guides import amortise
from pyro_scm import recipes
from pyro_scm.data import synthetic
from pyro_scm.data.dataset import EnvironmentDataset
from pyro_scm.directions import Directions
from pyro_scm.effects import shifts
from pyro_scm.errors import DataError, ModelError
from pyro_scm.evaluation import predict_means, recovery
from pyro_scm.model import LatentModel
from pyro_scm.models.building import decoder
from pyro_scm.objectives import EffectSparsity, Objective
from pyro_scm.objectives.sparsity import EffectSpikeSlab
from pyro_scm.priors import StandardPrior
from pyro_scm.run import Run
from pyro_scm.shifts import LinearShift
from pyro_scm.unmixing import directions, fold, refine, spreads, stability, unmix
from tests import compositions

Array = np.ndarray


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


def with_effects(run: Run, effects: Array) -> Run:
    """The members of a Translation VAE, with given effects ``[K, E - 1, d]`` of the perturbed environments."""
    parameters = dict(run.parameters)
    (name,) = [n for n in parameters if n.startswith("model.shift.net") and n.endswith("weight")]
    weight = torch.zeros_like(parameters[name])
    for k, e in enumerate(effects):
        weight[k] = torch.as_tensor(e.T)  # one-hot features
    parameters |= {name: weight, name.replace("weight", "bias"): torch.zeros(weight.shape[:2])}
    return replace(run, parameters=parameters)


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


def test_vectors_that_add_are_turned_with_the_model(cells: EnvironmentDataset) -> None:
    model = LatentModel(StandardPrior(3), decoder(cells.schema, 3, (), None), shift=LinearShift(len(cells.features), 3))
    guide = amortise(model, cells, hidden=(16,))
    run = ps.fit(model, guide, cells, seeds=(0, 1), epochs=3, lr=1e-2, batch_size=64, progress=False)
    after = unmix(run, cells)
    m = directions(run, cells)[1].matrix
    assert np.allclose(shifts(after).loc[1], shifts(run).loc[1] @ m.T, atol=1e-4)
    old, new = (predict_means(r, cells, ["env_03"]) for r in (run, after))
    assert np.allclose(old, new, atol=2e-3)


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


@pytest.mark.parametrize(
    ("name", "representation", "options"),
    [
        ("cpa", "multi-dose", {"doser": "log-sigmoid", "covariates": ("cell_type",)}),
        ("chemcpa", "molecules", {"covariates": ("cell_type",)}),
        ("scgen", "multi-dose", {}),
    ],
)
def test_compositions_turn_with_their_covariates(name: str, representation: str, options: dict[str, Any]) -> None:
    own = compositions.cells(representation)
    model, guide = recipes.make(name, own.schema, latent=3, hidden=(8,), guide_hidden=(8,), **options)
    run = ps.fit(model, guide, own, epochs=8, lr=1e-2, progress=False)
    basis = ortho_group.rvs(3, random_state=np.random.default_rng(0))
    effects_of = shifts(run).loc[0].to_numpy()
    turned = fold(run, own, [Directions(basis, 0.0, np.zeros(1), effects_of @ basis.T, 3, np.zeros(3))])
    assert np.allclose(shifts(turned).loc[0], effects_of @ basis.T, atol=1e-5)
    rows = torch.arange(0, len(own), 7)
    before, after = (r.member(0) for r in (run, turned))
    with torch.no_grad():
        batch = own.batch(rows)
        old, new = (g.local["z"](batch).base_dist.loc for _, g in (before, after))
        assert torch.allclose(new, old @ torch.as_tensor(basis.T, dtype=old.dtype), atol=1e-4)
        means = []
        for (m, _), z in ((before, old), (after, new)):
            _, shift, _ = m.parts(batch)
            means.append(m.likelihoods[0].mean(m.scm(z + shift), batch))
        assert torch.allclose(*means, atol=1e-3)
        assert means[0].std() > 0.1
    assert np.isfinite(unmix(run, own, rank=2).losses[0])


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
    with pytest.raises(ModelError, match="unknown rank 'all': give a number of latents, 'auto', or None"):
        unmix(dense(cells, epochs=1), cells, rank="all")
    with pytest.raises(ModelError, match="unknown prior 'laplace': use student-t or spike-slab"):
        refine(dense(cells, epochs=1), cells, prior="laplace")


# ---------------------------------------------------------------------- how many latents
def test_fewer_environments_than_latents_turn_as_many_directions_as_they_span(cells: EnvironmentDataset) -> None:
    run = dense(cells, epochs=3)
    few = cells.subset(cells.env < 3)
    after = unmix(run, few, rank=2)
    moved = shifts(after).loc[0].loc[["env_01", "env_02"]].to_numpy()
    assert np.abs(moved[:, 2]).max() < 1e-4 * np.abs(moved).max()
    old, new = (predict_means(r, cells, ["env_05"]) for r in (run, after))
    assert np.allclose(old, new, atol=2e-3)


def test_directions_that_only_noise_moves_do_not_count(cells: EnvironmentDataset) -> None:
    run = dense(cells, epochs=3)
    effects = np.random.default_rng(0).normal(0, 1e-4, (2, 12, 3))
    effects[:, :, :2] += np.random.default_rng(1).normal(0, 2, (2, 12, 2))
    found = directions(with_effects(run, effects), cells, rank="auto")
    assert [d.rank for d in found] == [2, 2]
    assert [d.rank for d in directions(with_effects(run, effects * 300), cells, rank="auto")] == [2, 2]
    effects[:, :, 2] *= 1e4
    assert [d.rank for d in directions(with_effects(run, effects), cells, rank="auto")] == [3, 3]


def test_spreads_are_those_of_posterior_draws(cells: EnvironmentDataset) -> None:
    run = dense(cells, epochs=3)
    found = spreads(run, cells)
    assert found.shape == (2, 13, 3, 3)
    _, guide = run.member(1)
    one = cells.subset(cells.env == 4)
    with torch.no_grad():
        torch.manual_seed(0)
        draws = guide.local["z"](one.batch()).sample((4000,)).reshape(-1, 3).double().numpy()
    assert np.allclose(found[1, 4], np.cov(draws.T), atol=0.03)
    assert np.isnan(spreads(run, one)[0, 5]).all()


def test_scales_tell_the_basis_where_no_mean_moves() -> None:
    adata = synthetic.simulate(
        latent=3, genes=12, environments=13, cells=60, decoder="linear", interventions=("scale",), seed=3
    )
    cells = synthetic.dataset(adata)
    run = dense(cells, epochs=30)
    before, by_means, by_both = (
        recovery(r, cells, adata)["mcc_z"].mean() for r in (run, unmix(run, cells), unmix(run, cells, scales=True))
    )
    assert by_both > max(before, by_means) + 0.05
    assert by_both > 0.85


# ---------------------------------------------------------------------- do members agree
def test_latents_that_members_share_agree_whatever_their_order_and_sign(cells: EnvironmentDataset) -> None:
    run = dense(cells, epochs=1)
    rng = np.random.default_rng(0)
    first = rng.normal(size=(12, 3))
    second = np.stack([-first[:, 2], rng.normal(size=12), 2 * first[:, 0]], 1)  # the first's latent 1 is not there
    table = stability(with_effects(run, np.stack([first, second])))
    assert table.index.names == ["member", "latent"]
    assert np.allclose(table.loc[0]["agreement"].to_numpy()[[0, 2]], 1, atol=1e-5)
    assert table.loc[(0, "1"), "agreement"] < 0.7
    assert np.allclose(table.loc[1]["agreement"].to_numpy()[[0, 2]], 1, atol=1e-5)
    assert np.allclose(table.loc[0]["size"], np.sqrt(np.square(first).mean(0)), rtol=1e-4)
    # an offset that all share is agreed upon for no merit of the latents
    apart = np.stack([rng.normal(size=(12, 3)) + 9 for _ in range(2)])
    assert stability(with_effects(run, apart))["agreement"].min() > 0.9
    assert stability(with_effects(run, apart), offset=True)["agreement"].mean() < 0.7
    single = replace(run, seeds=(0,), parameters={n: v[:1] for n, v in run.parameters.items()}, losses=(0.0,))
    with pytest.raises(DataError, match="fit two or more"):
        stability(single)


# ---------------------------------------------------------------------- environments from features
def test_unseen_environments_are_predicted_as_before(cells: EnvironmentDataset) -> None:
    adata = synthetic.simulate(latent=3, genes=12, environments=13, cells=40, decoder="linear", descriptors=8, seed=3)
    described = synthetic.dataset(adata, "descriptors")
    train = described.subset(described.env < 10)
    run = dense(train, environment_hidden=(16,), epochs=5)
    assert not run.environments.table["trained"].iloc[11]
    after = unmix(run, train)
    m = directions(run, train)[0].matrix
    assert np.allclose(shifts(after).loc[0], shifts(run).loc[0] @ m.T, atol=1e-4)
    unseen = ["env_11", "env_12"]
    old, new, still = (predict_means(r, train, names) for r, names in
                       ((run, unseen), (after, unseen), (run, ["control", "control"])))  # fmt: skip
    assert np.allclose(old, new, atol=2e-3)
    assert np.abs(old - still).max() > 0.1


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


def test_a_spike_and_slab_sums_over_masks_exactly(cells: EnvironmentDataset) -> None:
    run = dense(cells, epochs=1)
    prior = EffectSpikeSlab(run.model, 13, least=0.1, share=0.25, spike=0.2, size=1.5, spread=0.6)
    mu = torch.linspace(-3, 3, 601).unsqueeze(1).expand(601, 3).double()
    normal = torch.distributions.Normal
    on = 0.5 * (normal(1.5, 0.6).log_prob(mu).exp() + normal(-1.5, 0.6).log_prob(mu).exp())
    off = normal(0.0, 0.2).log_prob(mu).exp()
    density = 0.25 * on + 0.75 * off
    with torch.no_grad():
        cost, included = prior.cost(mu), prior.inclusion(mu)
    assert torch.allclose(cost + density.log(), (cost + density.log())[:1], atol=1e-4)  # up to a constant
    assert torch.allclose(included, 0.25 * on / density, atol=1e-4)


def test_priors_of_effects_count_from_their_offset(cells: EnvironmentDataset) -> None:
    run = dense(cells, epochs=1)
    for kind in (EffectSparsity, EffectSpikeSlab):
        plain, moved = kind(run.model, 13), kind(run.model, 13, offset=True)
        objectives = [Objective(penalties={"effects": p}) for p in (plain, moved)]
        at_zero = [o.loss(run.model.forward, run.guide.forward, cells.batch()) for o in _same_noise(*objectives)]
        assert at_zero[0] == pytest.approx(at_zero[1], rel=1e-6)
        assert moved.offset is not None
        with torch.no_grad():
            moved.offset.fill_(0.3)
        elsewhere = _same_noise(objectives[1])[0].loss(run.model.forward, run.guide.forward, cells.batch())
        assert elsewhere > at_zero[1] + 1


def test_refining_with_a_spike_and_slab_learns_its_groups_and_offset(cells: EnvironmentDataset) -> None:
    rng = np.random.default_rng(0)
    effects = np.zeros((2, 12, 3)) + rng.normal(0, 0.05, (2, 12, 3))
    effects[:, np.arange(12), np.arange(12) % 3] += 3
    run = with_effects(dense(cells, epochs=15), effects)
    refined = refine(run, cells, prior="spike-slab", epochs=3, offset=True, progress=False)
    assert np.isfinite(refined.history["effects"]).all()
    assert (refined.parameters["penalties.effects.raw"].std(0) > 0).all()  # each member its own
    assert (refined.parameters["penalties.effects.offset"] != 0).all()


def _same_noise(*objectives: Objective) -> list[Objective]:
    class Seeded:
        def __init__(self, objective: Objective) -> None:
            self.objective = objective

        def loss(self, *args: object) -> float:
            torch.manual_seed(0)
            return float(self.objective.loss(*args))  # type: ignore[arg-type]

    return [Seeded(o) for o in objectives]  # type: ignore[misc]
