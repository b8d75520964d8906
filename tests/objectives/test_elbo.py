import math
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
from torch import Tensor, nn

from guides import amortise
from pyro_scm.batch import Batch
from pyro_scm.ensemble import System
from pyro_scm.errors import ModelError
from pyro_scm.objectives import Adversary, Objective, Penalty, World
from pyro_scm.recipes import RECIPES
from tests.screens import KINDS, cells, double, make

VARIATIONAL = [name for name, recipe in RECIPES.items() if recipe.family != "point"]


def gradients(objective: Any, model: nn.Module, guide: nn.Module, batch: Batch, seed: int = 5) -> dict[str, Tensor]:
    """Gradient of every parameter under a seed."""
    pyro.clear_param_store()
    for module in (model, guide):
        module.zero_grad()
    torch.manual_seed(seed)
    objective.loss_and_grads(model, guide, batch)
    named = {**dict(model.named_parameters(prefix="model")), **dict(guide.named_parameters(prefix="guide"))}
    return {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in named.items()}


def loss(objective: Any, model: nn.Module, guide: nn.Module, batch: Batch, seed: int = 5) -> float:
    torch.manual_seed(seed)
    with torch.no_grad():
        return float(objective.loss(model, guide, batch))


# ---------------------------------------------------------------------- against Pyro's own bound
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", VARIATIONAL)
def test_the_loss_is_pyros_mean_field_bound(name: str, kind: str) -> None:
    model, guide = make(name, cells(kind).schema)
    batch = cells(kind)[::4]
    ours, pyros = loss(Objective(), model, guide, batch), loss(TraceMeanField_ELBO(), model, guide, batch)
    assert ours == pytest.approx(pyros, rel=1e-6)
    assert ours != pytest.approx(loss(Objective(), model, guide, batch, seed=6), rel=1e-6)


@pytest.mark.parametrize("name", VARIATIONAL)
def test_the_gradients_are_those_of_pyros_mean_field_bound(name: str) -> None:
    model, guide = make(name, cells().schema)
    batch = cells()[::4]
    ours, pyros = (gradients(o, model, guide, batch) for o in (Objective(), TraceMeanField_ELBO()))
    largest = max(float(g.abs().max()) for g in pyros.values())
    for parameter, expected in pyros.items():
        assert float((ours[parameter] - expected).abs().max()) <= 1e-5 * largest, parameter
        assert float(expected.abs().max()) > 0, parameter


def test_an_autoencoders_loss_is_pyros_plain_bound_whose_prior_is_masked() -> None:
    model, guide = make("ae", cells().schema)
    batch = cells()[::4]
    assert loss(Objective(), model, guide, batch) == pytest.approx(loss(Trace_ELBO(), model, guide, batch), rel=1e-6)
    world = Objective().world(model, guide, batch)
    assert float(Objective().terms(world).kl) == 0


def test_the_closed_form_is_the_sum_over_latents_of_the_normal_divergence() -> None:
    model, guide = make("environment_vae", cells().schema)
    batch = cells()[::4]
    with torch.no_grad():
        world = Objective().world(model, guide, batch)
        q, p = world.guide["z"]["fn"].base_dist, world.model["z"]["fn"].base_dist
        terms = (q.scale**2 + (q.loc - p.loc) ** 2) / (2 * p.scale**2) + (p.scale / q.scale).log() - 0.5
        expected = float(terms.sum()) * 100 / 25
        assert float(Objective().terms(world).kl) == pytest.approx(expected, rel=1e-5)


def test_without_a_closed_form_the_divergence_is_taken_at_the_sample() -> None:
    class Model(nn.Module):
        def forward(self, batch: Batch) -> None:
            pyro.sample("rate", dist.Gamma(2.0, 3.0))
            with batch.plate():
                pyro.sample("x", dist.Normal(torch.zeros(8), 1.0).to_event(1), obs=batch.x)

    guide = amortise(Model(), cells())
    world = Objective().world(Model(), guide, cells()[:5])
    value = world.guide["rate"]["value"]
    with pytest.raises(NotImplementedError):
        torch.distributions.kl_divergence(world.guide["rate"]["fn"], world.model["rate"]["fn"])
    q = guide.outside["rate"]
    scale = 1e-4 + nn.functional.softplus(q.raw_scale)
    log_q = dist.LogNormal(q.loc, scale).log_prob(value)
    expected = log_q - dist.Gamma(2.0, 3.0).log_prob(value)
    torch.testing.assert_close(Objective().terms(world).kl, expected)
    assert torch.equal(world.model["rate"]["value"], value)


# ---------------------------------------------------------------------- mini-batches
@pytest.mark.parametrize("name", ["ae", "environment_vae", "structured_translation_vae"])
def test_the_mean_over_mini_batches_is_the_loss_of_all_cells(name: str) -> None:
    model, guide = (m.double() for m in make(name, cells().schema))
    system = System(model, guide, Objective())
    noise = torch.randn(100, 3, dtype=torch.float64)

    def at(rows: Any) -> dict[str, Tensor]:
        with torch.no_grad():
            return system(double(cells()[rows]), {} if name == "ae" else {"z": noise[None, rows]}, 0.7)

    whole = at(slice(None))
    parts = [at(slice(start, start + 20)) for start in range(0, 100, 20)]
    for term in ("loss", "reconstruction", "kl"):
        mean = sum(float(part[term]) for part in parts) / 5
        assert mean == pytest.approx(float(whole[term]), rel=1e-12, abs=1e-12)
    assert len({round(float(part["loss"]), 6) for part in parts}) == 5
    torch.manual_seed(0)
    summed = Objective(kl_weight=0.0).loss(model.forward, guide.forward, double(cells()[:20]))
    assert summed == pytest.approx(100 * float(parts[0]["reconstruction"]), rel=0.2)  # over all cells, not over twenty


# ---------------------------------------------------------------------- particles and weights
def test_particles_are_averaged() -> None:
    model, guide = make("vae", cells().schema)
    batch = cells()[::4]
    torch.manual_seed(5)
    each = [float(Objective().loss(model, guide, batch)) for _ in range(3)]
    assert loss(Objective(particles=3), model, guide, batch) == pytest.approx(np.mean(each), rel=1e-6)
    pyros = loss(TraceMeanField_ELBO(num_particles=3), model, guide, batch)
    assert loss(Objective(particles=3), model, guide, batch) == pytest.approx(pyros, rel=1e-6)
    assert np.std(each) > 0


def test_the_weight_multiplies_the_divergence_alone() -> None:
    model, guide = make("vae", cells().schema)
    batch = cells()[::4]
    torch.manual_seed(5)
    terms = Objective().terms(Objective().world(model, guide, batch))
    reconstruction, kl = float(terms.reconstruction.detach()), float(terms.kl.detach())
    for weight in (0.0, 0.5, 4.0):
        expected = reconstruction + weight * kl
        assert loss(Objective(kl_weight=weight), model, guide, batch) == pytest.approx(expected, rel=1e-6)
        assert float(terms.loss(weight).detach()) == pytest.approx(expected, rel=1e-6)


def test_a_half_weight_is_what_annealing_handlers_give() -> None:
    from pyro_scm.handlers import anneal

    model, guide = make("environment_vae", cells().schema)
    batch = cells()[::4]
    handled = loss(TraceMeanField_ELBO(), anneal(model, 0.5), anneal(guide, 0.5), batch)
    assert loss(Objective(kl_weight=0.5), model, guide, batch) == pytest.approx(handled, rel=1e-6)


# ---------------------------------------------------------------------- penalties
class SizeOfZ(Penalty):
    """Sum over the data set's cells of |z|^2, with a parameter of its own."""

    def __init__(self, weight: float = 1.0) -> None:
        super().__init__(weight)
        self.factor = nn.Parameter(torch.tensor(2.0))

    def penalty(self, world: World) -> Tensor:
        z = world.guide["z"]["value"]
        return self.factor * z.square().sum() * (world.batch.total / len(world.batch))


def test_penalties_are_added_with_their_weights() -> None:
    model, guide = make("vae", cells().schema)
    batch = cells()[::4]
    objective = Objective(penalties={"size": SizeOfZ(0.25), "again": SizeOfZ(0.5)})
    torch.manual_seed(5)
    world = objective.world(model, guide, batch)
    square = float(world.guide["z"]["value"].detach().square().sum()) * 4
    terms = objective.terms(world)
    assert list(terms.penalties) == ["size", "again"]
    assert float(terms.penalties["size"].detach()) == pytest.approx(0.25 * 2 * square, rel=1e-5)
    plain = loss(Objective(), model, guide, batch)
    assert loss(objective, model, guide, batch) == pytest.approx(plain + 0.75 * 2 * square, rel=1e-5)


def test_a_penalty_sees_the_models_deterministic_sites() -> None:
    model, guide = make("structured_environment_vae", cells().schema)
    world = Objective().world(model, guide, cells()[::4])
    z, c = world.guide["z"]["value"], world.model["c"]["value"]
    torch.testing.assert_close(c, model.scm.solve(z))
    assert torch.equal(world.model["z"]["value"], z)
    assert world.batch.x is not None
    assert torch.equal(world.model["x"]["value"], world.batch.x)
    assert "data" not in world.model


def test_an_abstract_penalty_must_be_given_its_term() -> None:
    world = Objective().world(*make("vae", cells().schema), cells()[:3])
    with pytest.raises(NotImplementedError):
        Penalty()(world)


# ---------------------------------------------------------------------- adversaries
class Reverse(torch.autograd.Function):
    """Identity forwards, minus lambda backwards."""

    @staticmethod
    def forward(context: Any, value: Tensor, weight: float) -> Tensor:
        context.weight = weight
        return value.clone()

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return -context.weight * gradient, None


def adversary(weight: float = 0.3, **options: Any) -> Adversary:
    torch.manual_seed(2)
    return Adversary(nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4)), weight=weight, **options)


def test_the_two_players_gradients_are_those_of_a_gradient_reversal_layer() -> None:
    model, guide = make("vae", cells().schema)
    batch, weight = cells()[::4], 0.3
    against = adversary(weight)
    objective = Objective(penalties={"adversary": against})
    encoder, critic = list(guide.parameters()), list(against.critic.parameters())

    torch.manual_seed(5)
    world = objective.world(model, guide, batch)
    of_encoder = torch.autograd.grad(objective.terms(world).loss(), encoder, retain_graph=True)
    of_critic = torch.autograd.grad(against.critic_loss(world), critic)

    torch.manual_seed(5)
    world = Objective().world(model, guide, batch)
    logits = against.critic(Reverse.apply(world.guide["z"]["value"], weight))
    cross_entropy = nn.functional.cross_entropy(logits, batch.env, reduction="sum") * (batch.total / len(batch))
    total = Objective().terms(world).loss() + cross_entropy
    expected_encoder = torch.autograd.grad(total, encoder, retain_graph=True)
    expected_critic = torch.autograd.grad(total, critic)

    plain = torch.autograd.grad(Objective().terms(world).loss(), encoder)
    for found, expected, without in zip(of_encoder, expected_encoder, plain, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)
        assert float((expected - without).abs().max()) > 0.1
    for found, expected in zip(of_critic, expected_critic, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)
        assert float(expected.abs().max()) > 0.1


def test_the_critics_loss_does_not_reach_the_encoder() -> None:
    model, guide = make("vae", cells().schema)
    against = adversary()
    objective = Objective(penalties={"adversary": against})
    world = objective.world(model, guide, cells()[::4])
    found = torch.autograd.grad(against.critic_loss(world), list(guide.parameters()), allow_unused=True)
    assert all(g is None for g in found)


def test_an_adversary_estimates_the_whole_data_sets_cross_entropy() -> None:
    against = adversary(weight=2.0)
    model, guide = make("vae", cells().schema)
    batch = cells()[::4]
    world = Objective().world(model, guide, batch)
    with torch.no_grad():
        log_p = torch.log_softmax(against.critic(world.guide["z"]["value"]), -1)
        expected = -float(log_p[torch.arange(len(batch)), batch.env].mean()) * batch.total
        assert float(against.critic_loss(world)) == pytest.approx(expected, rel=1e-5)
        assert float(against.penalty(world)) == pytest.approx(-expected, rel=1e-5)
        assert float(against(world)) == pytest.approx(-2.0 * expected, rel=1e-5)


def test_an_adversary_may_read_a_covariate_off_another_site() -> None:
    against = Adversary(nn.Linear(3, 2), target="plate")
    model, guide = make("vae", cells().schema)
    batch = cells()[::4]
    world = Objective().world(model, guide, batch)
    logits = against.critic(world.guide["z"]["value"])
    expected = nn.functional.cross_entropy(logits, batch.covariates["plate"]) * batch.total
    torch.testing.assert_close(against.critic_loss(world), expected)
    with pytest.raises(KeyError, match="w"):
        Adversary(nn.Linear(3, 2), site="w").critic_loss(world)


def test_only_adversaries_are_players() -> None:
    against = adversary()
    objective = Objective(penalties={"size": SizeOfZ(), "adversary": against})
    assert objective.adversaries == [against]
    assert Objective().adversaries == []
    system = System(*make("vae", cells().schema), objective)
    assert system.critic_names() == {
        f"penalties.adversary.critic.{layer}.{kind}" for layer in (0, 2) for kind in ("weight", "bias")
    }
    assert "penalties.size.factor" in dict(system.named_parameters())


# ---------------------------------------------------------------------- as an ELBO of Pyro's
def test_pyros_svi_trains_with_it() -> None:
    model, guide = make("environment_vae", cells().schema)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.02}), loss=Objective())
    batch = cells()[::4]
    before = svi.evaluate_loss(batch)
    steps = [svi.step(batch) for _ in range(40)]
    assert np.mean(steps[-5:]) < 0.95 * np.mean(steps[:5])
    assert svi.evaluate_loss(batch) < 0.95 * before
    assert math.isfinite(steps[-1])


def test_pyros_own_loss_of_traces_sees_the_same_traces() -> None:
    model, guide = make("vae", cells().schema)
    batch = cells()[:6]
    torch.manual_seed(5)
    model_trace, guide_trace = next(Objective()._get_traces(model, guide, (batch,), {}))
    assert torch.equal(model_trace.nodes["z"]["value"], guide_trace.nodes["z"]["value"])
    torch.manual_seed(5)
    assert torch.equal(Objective().world(model, guide, batch).guide["z"]["value"], guide_trace.nodes["z"]["value"])


def test_gradients_accumulate_as_torchs_do() -> None:
    model, guide = make("vae", cells().schema)
    batch = cells()[:6]
    once = gradients(Objective(), model, guide, batch)
    torch.manual_seed(5)
    Objective().loss_and_grads(model, guide, batch)
    name, p = next(iter(model.named_parameters(prefix="model")))
    assert p.grad is not None
    torch.testing.assert_close(p.grad, 2 * once[name])


def test_a_loss_without_parameters_has_no_gradients() -> None:
    class Nothing(nn.Module):
        def forward(self, batch: Batch) -> None:
            with batch.plate():
                pyro.sample("z", dist.Normal(0.0, 1.0))

    value = Objective().loss_and_grads(Nothing(), Nothing(), cells()[:5])
    assert value == 0.0


def test_a_latent_site_that_the_guide_forgets_is_named() -> None:
    model, _ = make("vae", cells().schema)

    def forgetful(batch: Batch) -> None:
        with batch.plate():
            pyro.sample("w", dist.Normal(0.0, 1.0))

    with pytest.raises(ModelError, match="the guide has no site 'z': it must sample every latent site of the model"):
        Objective().loss(model, forgetful, cells()[:5])
