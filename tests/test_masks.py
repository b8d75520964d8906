import functools
import math
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from torch.distributions import kl_divergence

from pyro_scm import models, query, recipes, recording
from pyro_scm.contracts import check
from pyro_scm.data import synthetic
from pyro_scm.effects import mask
from pyro_scm.ensemble import Ensemble, System, stack_initial
from pyro_scm.errors import ModelError
from pyro_scm.infer import fit
from pyro_scm.masks import MASK_NOISE, LearntShare, MaskedEffects, MaskedPrior, MaskedShift, OneOf, SpikeSlab, _Charged
from pyro_scm.objectives import ImportanceWeighted, Objective
from tests.screens import cells, make

KINDS = ("one-of", "spike-slab")
MODELS = ("environment_vae", "translation_vae")


# ---------------------------------------------------------------------- laws of masks
@pytest.mark.parametrize("law", [SpikeSlab(0.2, opening=0.5), OneOf(0.7)])
def test_masks_are_hard_and_drawn_with_their_probability(law: Any) -> None:
    logits, n = torch.tensor([1.0, -0.5, 0.2, -2.0]), 40_000
    drawn = law.draw(logits.expand(n, 4), torch.randn(n, 4))
    assert set(drawn.round(decimals=6).unique().tolist()) <= {0.0, 1.0}
    expected = law.probability(logits)
    error = (expected * (1 - expected) / n).sqrt()
    assert ((drawn.mean(0) - expected).abs() < 4.5 * error).all()
    if isinstance(law, OneOf):
        torch.testing.assert_close(drawn.sum(-1), torch.ones(n))
        torch.testing.assert_close(expected.sum(), torch.tensor(1.0))


def test_the_cost_of_a_mask_is_the_divergence_of_the_hard_laws() -> None:
    logits = torch.tensor([[1.0, -0.5, 20.0, -30.0]])
    bernoulli = kl_divergence(dist.Bernoulli(torch.sigmoid(logits + 2)), dist.Bernoulli(torch.full((1, 4), 0.2)))
    torch.testing.assert_close(SpikeSlab(0.2).cost(logits), bernoulli, rtol=1e-4, atol=1e-6)
    one = dist.Categorical(logits=logits), dist.Categorical(torch.ones(1, 4))
    torch.testing.assert_close(OneOf().cost(logits).sum(-1), kl_divergence(*one), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("law", [SpikeSlab(0.2), OneOf()])
def test_the_cost_agrees_with_monte_carlo(law: Any) -> None:
    logits, n = torch.tensor([0.3, -1.0, 0.8]), 100_000
    drawn = law.draw(logits.expand(n, 3), torch.randn(n, 3)).round()
    q = law.probability(logits)
    if isinstance(law, OneOf):
        ratio = (drawn * (q.log() + math.log(3))).sum(-1)
    else:
        on, off = (q / 0.2).log(), ((1 - q) / 0.8).log()
        ratio = (drawn * on + (1 - drawn) * off).sum(-1)
    expected = float(law.cost(logits).sum())
    assert float(ratio.mean()) == pytest.approx(expected, abs=4.5 * float(ratio.std()) / math.sqrt(n))


@pytest.mark.parametrize("law", [SpikeSlab(0.2), OneOf()])
def test_gradients_pass_straight_through_a_mask(law: Any) -> None:
    logits = torch.tensor([[0.3, -1.0, 0.8]], requires_grad=True)
    u = torch.randn(1, 3)
    law.draw(logits, u)[:, 0].sum().backward()
    assert logits.grad is not None
    assert float(logits.grad[0, 0]) > 0
    assert (float(logits.grad[0, 1]) < 0) == isinstance(law, OneOf)  # only targets compete
    extreme = torch.tensor([[60.0, -60.0, 0.0]], requires_grad=True)
    law.draw(extreme, torch.tensor([[8.0, -8.0, 8.0]])).sum().backward()
    assert extreme.grad is not None
    assert extreme.grad.isfinite().all()


def test_without_noise_a_mask_is_the_most_likely() -> None:
    logits = torch.tensor([[1.0, -0.5, 2.0]])
    assert OneOf().draw(logits, torch.zeros(1, 3)).tolist() == [[0, 0, 1]]
    assert SpikeSlab(0.2, opening=0).draw(logits, torch.zeros(1, 3)).tolist() == [[1, 0, 1]]


def test_a_charged_normal_costs_the_same_in_closed_form_and_at_a_sample() -> None:
    cost = torch.tensor([0.5, 2.0])
    q, p = dist.Normal(torch.zeros(2), 1.0), _Charged(cost)
    torch.testing.assert_close(kl_divergence(q, p), cost)
    u = q.sample()
    torch.testing.assert_close(q.log_prob(u) - p.log_prob(u), cost)
    other = dist.Normal(torch.ones(2), 2.0)
    torch.testing.assert_close(kl_divergence(other, p), kl_divergence(other, q) + cost)
    wide = p.expand((3, 2))
    torch.testing.assert_close(wide.log_prob(u.expand(3, 2)), p.log_prob(u).expand(3, 2))


# ---------------------------------------------------------------------- priors and shifts
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [True, False])
def test_masked_latents_keep_the_reference_law(kind: str, scale: bool) -> None:
    model, _ = make("environment_vae", cells().schema, sparsity=kind, scale=scale)
    assert isinstance(model.prior, MaskedPrior)
    batch = cells()[::3]
    u = torch.randn(len(batch), 3)
    with poutine.condition(data={MASK_NOISE: u}):
        law = model.prior(batch).base_dist
    effects, logits = (v.detach() for v in model.prior._outputs(batch.r))
    on = model.prior.mask.draw(logits[batch.row], u).round() * batch.perturbed[batch.row][:, None]
    assert 0 < float(on.mean()) < 1
    assert (law.loc[on == 0] == 0).all()
    assert (law.scale[on == 0] == 1).all()
    torch.testing.assert_close(law.loc[on == 1], effects[batch.row][:, :3][on == 1])
    assert bool((law.scale[on == 1] != 1).all()) is scale
    assert (on[batch.env == 0] == 0).all()
    if kind == "one-of":
        assert (on[batch.env != 0].sum(-1) == 1).all()


@pytest.mark.parametrize("kind", KINDS)
def test_shifts_are_masked_and_moments_are_those_of_the_most_likely_mask(kind: str) -> None:
    model, _ = make("translation_vae", cells().schema, sparsity=kind)
    assert isinstance(model.shift, MaskedShift)
    batch = cells()[::3]
    loc, scale = model.shift.moments(batch.r, batch.perturbed)
    with poutine.condition(data={MASK_NOISE: torch.zeros(len(batch), 3)}):
        torch.testing.assert_close(model.shift(batch), loc[batch.row])
    assert (scale == 1).all()
    assert (loc[batch.perturbed == 0] == 0).all()
    probability = model.shift.probability(batch.r, batch.perturbed)
    assert (probability[batch.perturbed == 0] == 0).all()
    assert (probability[batch.perturbed == 1] > 0).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MODELS)
def test_each_environments_mask_is_paid_for_once(name: str, kind: str) -> None:
    """Over the data set, whose environments have the same number of cells, the cost is sum_e KL(q(m_e) || p(m_e))."""
    model, guide = make(name, cells().schema, sparsity=kind)
    part: Any = model.prior if name == "environment_vae" else model.shift
    batch = cells()[:100]
    world = Objective().world(model, guide, batch)
    from pyro_scm.objectives.elbo import divergence

    found = divergence(world.guide[MASK_NOISE], world.model[MASK_NOISE])
    _, logits = part._outputs(batch.r)
    expected = (part.mask.cost(logits).sum(-1) * batch.perturbed).sum()
    assert len(batch.r) == 4
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MODELS)
def test_the_bound_is_pyros(name: str, kind: str) -> None:
    model, guide = make(name, cells().schema, sparsity=kind)
    batch = cells()[::4]

    def at(loss: Any) -> float:
        torch.manual_seed(5)
        with torch.no_grad():
            return float(loss.loss(model, guide, batch))

    assert at(Objective()) == pytest.approx(at(TraceMeanField_ELBO()), rel=1e-6)
    one = at(ImportanceWeighted(1))
    assert one == pytest.approx(at(Trace_ELBO()), rel=1e-4)


def test_the_expected_divergence_is_that_of_the_marginalised_mask() -> None:
    """sum_j (1 - pi_j) KL(q_j || N(0, 1)) + pi_j KL(q_j || N(mu_j, sigma_j)): what averaging over masks comes to."""
    model, guide = make("environment_vae", cells().schema, sparsity="spike-slab")
    batch = cells()[::20]
    with torch.no_grad():
        q = guide.local["z"](batch)
        effects, _ = model.prior._outputs(batch.r)
        pi = model.prior.probability(batch.r, batch.perturbed)[batch.row]
        on = model.prior._law(effects, torch.ones_like(effects[..., :3]))
        slab = dist.Normal(on[0][batch.row], on[1][batch.row])
        spike = dist.Normal(torch.zeros(len(batch), 3), 1.0)
        normal = dist.Normal(q.base_dist.loc, q.base_dist.scale)
        expected = ((1 - pi) * kl_divergence(normal, spike) + pi * kl_divergence(normal, slab)).sum(-1)
        draws = []
        for _ in range(3000):
            draws.append(kl_divergence(q, model.prior(batch)))
    values = torch.stack(draws)
    assert ((values.mean(0) - expected).abs() <= 5 * values.std(0) / math.sqrt(3000) + 1e-4).all()


# ---------------------------------------------------------------------- with the rest of the suite
@pytest.mark.parametrize("conditioning", ["concatenate", "film"])
@pytest.mark.parametrize("inputs", [("x",), ("x", "e"), ("x", "e", "plate")])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MODELS)
def test_masked_models_keep_the_contract(name: str, kind: str, inputs: Any, conditioning: str) -> None:
    made = make(name, cells().schema, sparsity=kind, inputs=inputs, conditioning=conditioning)
    check(*made, cells()[::10])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MODELS)
def test_ensembles_are_vectorised_reproducible_and_saved(name: str, kind: str, tmp_path: Any) -> None:
    def trained(seeds: tuple[int, ...]) -> Any:
        model, guide = make(name, cells().schema, sparsity=kind)
        return fit(model, guide, cells(), seeds=seeds, epochs=2, batch_size=50, progress=False)

    both, one = trained((0, 1)), trained((1,))
    for n, value in one.parameters.items():
        torch.testing.assert_close(both.parameters[n][1], value[0], rtol=1e-3, atol=1e-4)
    table = mask(both)
    assert table.shape == (8, 3)
    assert (table.xs("control", level="environment") == 0).all(axis=None)
    both.save(tmp_path)
    loaded = recipes.load(tmp_path)
    assert mask(loaded).equals(table)
    asked: Any = {"environment": "env_2", "draws": 3}
    some = cells().subset(np.arange(0, 100, 9))
    first, second = (query.counterfactual(r, some, **asked) for r in (both, loaded))
    np.testing.assert_array_equal(first.x, second.x)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MODELS)
def test_steps_with_masks_are_recorded(monkeypatch: pytest.MonkeyPatch, name: str, kind: str) -> None:
    def trained(often: int) -> Any:
        monkeypatch.setattr(recording, "_OFTEN", often)
        model, guide = make(name, cells().schema, sparsity=kind)
        return fit(model, guide, cells(), seeds=(0, 1), epochs=6, batch_size=50, progress=False)

    one, other = trained(5), trained(10**9)
    for parameter, value in one.parameters.items():
        assert torch.equal(value, other.parameters[parameter]), parameter


def test_a_cell_put_into_another_environment_gets_that_environments_mask() -> None:
    model, guide = make("translation_vae", cells().schema, sparsity="one-of")
    some = cells().subset(np.flatnonzero(cells().env == 1))
    worlds = query.counterfactual((model, guide), some, environment="env_3")
    r, perturbed = torch.as_tensor(cells().representation), torch.tensor([0.0, 1, 1, 1])
    shift = model.shift.moments(r, perturbed)[0].detach().numpy()
    np.testing.assert_allclose(worlds.c - worlds.z, np.broadcast_to(shift[3], worlds.z.shape), atol=1e-5)
    np.testing.assert_allclose(worlds.factual_c - worlds.z, np.broadcast_to(shift[1], worlds.z.shape), atol=1e-5)


def test_noise_of_masks_is_each_members_own() -> None:
    system = System(*make("environment_vae", cells().schema, sparsity="spike-slab"), Objective())
    ensemble = Ensemble(system, stack_initial(system, (0, 1)), [torch.Generator().manual_seed(s) for s in (0, 1)])
    assert {n: tuple(v.shape) for n, v in ensemble.noise(cells()[:7]).items()} == {
        MASK_NOISE: (2, 1, 7, 3), "z": (2, 1, 7, 3)
    }  # fmt: skip


@functools.cache
def simple() -> Any:
    """Four latents, four environments that each move one of them by five standard deviations."""
    adata = synthetic.simulate(
        latent=4, genes=20, environments=5, cells=120, graph="empty", decoder="linear", constant=True, seed=1
    )
    return adata, synthetic.dataset(adata)


@pytest.mark.parametrize("kind", KINDS)
def test_a_mask_finds_the_shifted_latent_when_the_decoder_is_known(kind: str) -> None:
    """The decoder frozen at the truth, latents are the true ones: the mask must name the target of each environment."""
    adata, data = simple()
    truth = synthetic.truth(adata)
    model, guide = recipes.make(
        "environment_vae", data.schema, latent=4, hidden=(), environment_hidden=(), guide_hidden=(32,), sparsity=kind,
        scale=False,
    )  # fmt: skip
    known = truth.likelihoods[0].requires_grad_(False)
    model.likelihoods[0] = known
    run = fit(model, guide, data, epochs=60, lr=0.02, batch_size=150, fresh=False, progress=False)
    found = mask(run).loc[0].iloc[1:].to_numpy()
    targets = np.asarray(adata.uns["truth"]["targets"])[1:]
    assert (found.argmax(1) == targets.argmax(1)).all()
    if kind == "spike-slab":  # masks start open, and shut slowly where an effect is 0
        assert found[targets == 1].min() > 0.9 > found[targets == 0].max()


def test_options_that_do_not_fit_are_refused() -> None:
    schema = cells().schema
    with pytest.raises(ModelError, match=r"prior probability 1\.0: give a share between 0 and 1 \(k below latent\)"):
        models.environment_vae(schema, latent=3, k=3, sparsity="spike-slab")
    for kind in KINDS:
        with pytest.raises(ModelError, match="temperature 0 of the mask: give a positive number"):
            models.translation_vae(schema, sparsity=kind, temperature=0)
    with pytest.raises(ModelError, match="a learnt mask, 'one-of' or 'spike-slab'"):
        models.environment_vae(schema, sparsity="l1")


def test_a_mask_leaves_pyros_own_programs_alone() -> None:
    model, _ = make("environment_vae", cells().schema, sparsity="one-of")
    with pyro.plate("draws", 5, dim=-2), torch.no_grad():
        trace = poutine.trace(model).get_trace(cells()[:4].unobserved())
    assert trace.nodes["x"]["value"].shape == (5, 4, 8)
    assert trace.nodes[MASK_NOISE]["value"].shape == (5, 4, 3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["structured_environment_vae", "structured_translation_vae"])
def test_structured_models_take_masks_too(name: str, kind: str) -> None:
    data = cells()
    model, guide = make(name, data.schema, latent=3, depth=2, sparsity=kind)
    run = fit(model, guide, data, epochs=2, progress=False)
    probability = mask(run)
    assert (probability.xs("control", level="environment") == 0).all().all()
    assert probability.to_numpy().max() > 0
    trace = poutine.trace(run.model).get_trace(data.batch())
    assert trace.nodes[MASK_NOISE]["value"].shape == (len(data), 3)
    assert len(run.model.sites) == 3  # type: ignore[arg-type]


# ---------------------------------------------------------------------- masks of perturbations, shares that are learnt
def test_a_learnt_share_enters_the_bound_as_its_posterior_expects_it() -> None:
    """KL of masks and share together, by Monte Carlo over the share."""
    torch.manual_seed(0)
    mask = LearntShare(3, concentration=4.0, opening=0.0)
    with torch.no_grad():
        mask.raw.copy_(torch.tensor([[1.0, 2.0, 0.3], [2.0, 1.0, 3.0]]))
        a, b = 1e-3 + torch.nn.functional.softplus(mask.raw)
        q, p = dist.Beta(a, b), dist.Beta(torch.ones(3), 4.0 * torch.ones(3))
        logits = torch.tensor([0.5, -1.0, 2.0])
        share = q.sample((40_000,)).clamp(1e-6, 1 - 1e-6)
        on = torch.sigmoid(logits)
        each = on * (on.log() - share.log()) + (1 - on) * ((1 - on).log() - (1 - share).log())
        error = each.std(0) / 200
        assert ((mask.cost(logits) - each.mean(0)).abs() < 6 * error).all()
        ratio = q.log_prob(share) - p.log_prob(share)
        assert ((mask.shared_cost() - ratio.mean(0)).abs() < 6 * ratio.std(0) / 200).all()
        mask.reset_parameters()
    assert float(mask.shared_cost().detach().abs().max()) < 1e-4  # it starts at its prior
    with pytest.raises(ModelError, match=r"concentration 0 of the masks' prior"):
        LearntShare(3, concentration=0)


def test_the_cost_of_what_masks_share_counts_once_for_the_data_set() -> None:
    mask = LearntShare(3, opening=0.0)
    with torch.no_grad():
        mask.raw.add_(1.0)
    prior = MaskedPrior(torch.nn.Linear(5, 6), 3, mask, 4, scale=False)
    whole, part = cells().batch(), cells()[:25]
    once = float(mask.shared_cost().detach().sum())
    for batch in (whole, part):
        site = poutine.trace(prior).get_trace(batch).nodes["mask_noise"]
        bare = poutine.trace(MaskedPrior(prior.net, 3, Bare(mask), 4, scale=False)).get_trace(batch).nodes["mask_noise"]
        difference = site["fn"].base_dist.cost - bare["fn"].base_dist.cost
        assert float((difference.sum() * batch.total / len(batch)).detach()) == pytest.approx(once, rel=1e-4)


class Bare(torch.nn.Module):
    """A mask without the cost of what it shares."""

    def __init__(self, mask: LearntShare) -> None:
        super().__init__()
        self.mask = mask

    def draw(self, logits: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        return self.mask.draw(logits, u)

    def cost(self, logits: torch.Tensor) -> torch.Tensor:
        return self.mask.cost(logits)

    def shared_cost(self) -> float:
        return 0.0


def effects(share: float = 0.3) -> MaskedEffects:
    torch.manual_seed(0)
    part = MaskedEffects(cells().schema, 3, SpikeSlab(share, opening=0.0), width=2.0)
    with torch.no_grad():
        part.logits.normal_()
        part.loc.normal_()
    return part


def test_the_divergence_of_masks_and_effects_is_that_of_their_own_laws_and_counts_once() -> None:
    part, batch = effects(), cells()[:30]
    site = poutine.trace(part).get_trace(batch).nodes["effect_noise"]
    assert site["scale"] == 1
    scale = 1e-4 + torch.nn.functional.softplus(part.raw_scale)
    own = kl_divergence(torch.distributions.Normal(part.loc, scale), torch.distributions.Normal(0.0, 2.0)).sum()
    probability = torch.sigmoid(part.logits)
    own = own + kl_divergence(torch.distributions.Bernoulli(probability), torch.distributions.Bernoulli(0.3)).sum()
    standard = dist.Normal(torch.zeros(2, 5, 3), 1.0).to_event(3)
    torch.testing.assert_close(kl_divergence(standard, site["fn"]), own, rtol=1e-4, atol=1e-4)


def test_masks_and_effects_are_drawn_from_their_posterior() -> None:
    part, batch = effects(), cells().of("env_1")[:2]
    with torch.no_grad():
        drawn = torch.stack([part(batch)[0] for _ in range(4000)])
        amounts = batch.e[0]
        mean = amounts @ (torch.sigmoid(part.logits) * part.loc)
        assert ((drawn.mean(0) - mean).abs() < 5 * drawn.std(0) / 4000**0.5).all()
        with pyro.plate("draws", 6, dim=-2):
            assert part(batch).shape == (6, 2, 3)
        reference = cells().of("control")[:2]
        assert not part(reference).any()
    loc, _ = part.moments(batch.r, batch.perturbed)
    hard = (part.logits > 0).float() * part.loc
    torch.testing.assert_close(loc[batch.row[0]], amounts @ hard)
    with pytest.raises(ModelError, match="width 0 of the effects' prior"):
        MaskedEffects(cells().schema, 3, SpikeSlab(0.5), width=0)
