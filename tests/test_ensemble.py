import math
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

from pyro_scm.batch import Batch
from pyro_scm.data.dataset import EnvironmentDataset
from pyro_scm.ensemble import Ensemble, System, _Noise, stack_initial
from pyro_scm.errors import ModelError
from pyro_scm.handlers import reparametrised
from pyro_scm.infer import fit
from pyro_scm.nn import MaskedMLP
from pyro_scm.objectives import Adversary, Objective, Penalty, World
from pyro_scm.recipes import RECIPES
from pyro_scm.run import Run
from tests.screens import cells, doubles, make, train

SEEDS = (0, 3, 7)


def trained(name: str, data: EnvironmentDataset, seeds: tuple[int, ...], **settings: Any) -> Run:
    """Five epochs, in the precision of the data."""
    model, guide = make(name, data.schema)
    if type(data) is not EnvironmentDataset:
        model, guide = model.double(), guide.double()
    return fit(model, guide, data, seeds=seeds, **{"epochs": 5, "batch_size": 40, "progress": False, **settings})


def assert_members_are_as_if_alone(together: Run, alone: Run, k: int, tolerance: float) -> None:
    assert together.parameters.keys() == alone.parameters.keys()
    for parameter, expected in alone.parameters.items():
        found = together.parameters[parameter][k]
        scale = max(float(expected.abs().max()), 1e-3)
        assert float((found - expected[0]).abs().max()) <= tolerance * scale, parameter
    mine = together.history[together.history["seed"] == alone.seeds[0]]
    columns = [column for column in alone.history if column not in ("seconds", "seed", "member")]
    np.testing.assert_allclose(mine[columns].to_numpy(), alone.history[columns].to_numpy(), rtol=tolerance, atol=1e-12)


def ensemble(name: str, seeds: tuple[int, ...] = SEEDS, objective: Objective | None = None) -> Ensemble:
    system = System(*make(name, cells().schema), objective or Objective())
    return Ensemble(system, stack_initial(system, seeds), [torch.Generator().manual_seed(s) for s in seeds])


# ---------------------------------------------------------------------- a member is what it would be alone
@pytest.mark.parametrize("name", RECIPES)
def test_in_double_precision_each_member_is_what_it_would_be_alone(name: str) -> None:
    data = doubles(cells())
    together = trained(name, data, SEEDS)
    assert next(iter(together.parameters.values())).dtype == torch.float64
    for k in (1, 2):
        assert_members_are_as_if_alone(together, trained(name, data, SEEDS[k : k + 1]), k, 1e-8)


@pytest.mark.parametrize("name", RECIPES)
def test_in_single_precision_too_up_to_rounding(name: str) -> None:
    together = trained(name, cells(), SEEDS[:2])
    assert_members_are_as_if_alone(together, trained(name, cells(), SEEDS[1:2]), 1, 1e-3)


def test_counts_film_particles_and_schedules_do_not_change_that() -> None:
    data = doubles(cells("negative-binomial"))

    def run(seeds: tuple[int, ...]) -> Run:
        model, guide = make("structured_environment_vae", data.schema, conditioning="film", mechanism="network")
        return fit(
            model.double(), guide.double(), data, seeds=seeds, objective=Objective(particles=2), epochs=4,
            batch_size=30, schedule="cosine", temperature=(2.0, 0.5), weight_decay=0.1, clip=1.0, progress=False,
        )  # fmt: skip

    assert_members_are_as_if_alone(run(SEEDS[:2]), run(SEEDS[1:2]), 1, 1e-8)


def test_members_stop_early_as_they_would_alone() -> None:
    data = doubles(cells())
    training, held = data.subset(np.arange(100) % 4 > 0), data.subset(np.arange(100) % 4 == 0)
    training, held = doubles(training), doubles(held)
    settings = {"validation": held, "epochs": 14, "patience": 2, "lr": 0.05, "kl_warmup": 0.0}
    together = trained("environment_vae", training, SEEDS, **settings)
    for k, seed in enumerate(SEEDS):
        alone = trained("environment_vae", training, (seed,), **settings)
        assert together.stopped[k] == alone.stopped[0]
        assert together.losses[k] == pytest.approx(alone.losses[0], rel=1e-8)
        for parameter, expected in alone.parameters.items():
            torch.testing.assert_close(together.parameters[parameter][k], expected[0], rtol=1e-8, atol=1e-8)


def test_members_differ_from_one_another() -> None:
    run = trained("environment_vae", cells(), SEEDS)
    for name, value in run.parameters.items():
        if not name.endswith(("raw_scale", "raw_dispersion", "temperature")):
            assert float((value[0] - value[1]).abs().max()) > 1e-3, name


# ---------------------------------------------------------------------- one vectorised call
@pytest.mark.parametrize("critics", [False, True])
def test_vectorised_losses_are_those_of_a_loop(critics: bool) -> None:
    objective = Objective(penalties={"adversary": Adversary(nn.Linear(3, 4))}, particles=2, kl_weight=0.5)
    many = ensemble("structured_environment_vae", objective=objective)
    batch = cells()[::4]
    noise = many.noise(batch, particles=2)
    together = many.losses(batch, noise, 0.7, critics=critics)
    assert set(together) == ({"loss"} if critics else {"loss", "reconstruction", "kl", "adversary"})
    for k in range(3):
        one = Ensemble(many.system, {n: p[k : k + 1] for n, p in many.parameters.items()}, many.generators[:1])
        alone = one.losses(batch, {n: v[k : k + 1] for n, v in noise.items()}, 0.7, critics=critics)
        for name, value in alone.items():
            assert value.shape == (1,)
            torch.testing.assert_close(together[name][k], value[0], rtol=1e-5, atol=1e-5)
    assert together["loss"].shape == (3,)
    if not critics:
        parts = together["reconstruction"] + 0.35 * together["kl"] + together["adversary"]
        torch.testing.assert_close(together["loss"], parts)


def test_a_members_gradient_is_its_own() -> None:
    many = ensemble("vae")
    batch = cells()[::4]
    noise = many.noise(batch)
    names = list(many.parameters)
    summed = torch.autograd.grad(many.losses(batch, noise)["loss"].sum(), [many.parameters[n] for n in names])
    second = torch.autograd.grad(many.losses(batch, noise)["loss"][1], [many.parameters[n] for n in names])
    for name, all_of_them, own in zip(names, summed, second, strict=True):
        torch.testing.assert_close(all_of_them[1], own[1], msg=name)
        assert not bool(own[0].any())
        assert not bool(own[2].any())


def test_losses_at_other_parameters() -> None:
    many = ensemble("vae")
    batch = cells()[::4]
    noise = many.noise(batch)
    swapped = {name: value.flip(0) for name, value in many.parameters.items()}
    here = many.losses(batch, {"z": noise["z"].flip(0)})["loss"]
    there = many.losses(batch, noise, parameters=swapped)["loss"]
    torch.testing.assert_close(there, here.flip(0))


def test_penalties_are_evaluated_for_each_member() -> None:
    class Norm(Penalty):
        def penalty(self, world: World) -> Tensor:
            return world.guide["z"]["value"].square().sum() * 4

    many = ensemble("ae", objective=Objective(penalties={"norm": Norm(0.5)}))
    batch = cells()[::4]
    losses = many.losses(batch, {})
    for k in range(3):
        many.load_member(k)
        with torch.no_grad():
            z = many.system.guide.local["z"](batch).v  # type: ignore[union-attr,operator,index]
        torch.testing.assert_close(losses["norm"][k], 0.5 * z.square().sum() / 25)


# ---------------------------------------------------------------------- noise
def test_each_members_noise_comes_from_its_own_generator() -> None:
    many = ensemble("vae")
    batch = cells()[:6]
    first, second = many.noise(batch), many.noise(batch)
    for k, seed in enumerate(SEEDS):
        generator = torch.Generator().manual_seed(seed)
        assert torch.equal(first["z"][k, 0], torch.randn((6, 3), generator=generator))
        assert torch.equal(second["z"][k, 0], torch.randn((6, 3), generator=generator))
    again = many.noise(batch, [torch.Generator().manual_seed(9) for _ in SEEDS])
    assert torch.equal(again["z"][0], again["z"][2])


class Globals(nn.Module):
    """Sites of every kind outside the plate, and one inside."""

    def forward(self, batch: Batch) -> None:
        pyro.sample("flat", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("rate", dist.Gamma(torch.ones(2), 1.0).to_event(1))
        pyro.sample("share", dist.Dirichlet(torch.ones(4)))
        with batch.plate():
            pyro.sample("size", dist.LogNormal(0.0, 1.0))


class GlobalsGuide(nn.Module):
    """Its guide, written by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.loc = nn.Parameter(torch.zeros(3))

    def reset_parameters(self) -> None:
        nn.init.normal_(self.loc)

    def forward(self, batch: Batch) -> None:
        pyro.sample("flat", dist.Normal(self.loc[:2], 2.0).to_event(1))
        pyro.sample("rate", dist.LogNormal(self.loc[:2], 0.5).to_event(1))
        sticks = torch.distributions.StickBreakingTransform()
        pyro.sample("share", dist.TransformedDistribution(dist.Normal(self.loc, 1.0), [sticks]))
        with batch.plate():
            pyro.sample("size", dist.LogNormal(self.loc[0], 0.1))


def test_transforms_of_normal_sites_are_drawn_from_their_own_noise_too() -> None:
    system = System(Globals(), GlobalsGuide(), Objective())
    many = Ensemble(system, stack_initial(system, (1, 2)), [torch.Generator().manual_seed(s) for s in (1, 2)])
    batch = cells()[:5]
    noise = many.noise(batch)
    assert {name: tuple(value.shape) for name, value in noise.items()} == {
        "flat": (2, 1, 2), "rate": (2, 1, 2), "share": (2, 1, 3), "size": (2, 1, 5)
    }  # fmt: skip
    many.load_member(1)
    world = system.objective.world(
        system.model.forward, system.guide.forward, batch, [_Noise({n: v[1, 0] for n, v in noise.items()})]
    )
    loc = many.parameters["guide.loc"][1].detach()
    values = {name: site["value"].detach() for name, site in world.guide.items()}
    torch.testing.assert_close(values["flat"], loc[:2] + 2 * noise["flat"][1, 0])
    torch.testing.assert_close(values["rate"], (loc[:2] + 0.5 * noise["rate"][1, 0]).exp())
    torch.testing.assert_close(values["size"], (loc[0] + 0.1 * noise["size"][1, 0]).exp())
    assert values["share"].shape == (4,)
    assert float(values["share"].sum()) == pytest.approx(1.0)
    expected = torch.distributions.StickBreakingTransform()(loc + noise["share"][1, 0])
    torch.testing.assert_close(values["share"], expected)
    torch.manual_seed(0)
    first = many.losses(batch, noise)["loss"]
    torch.manual_seed(1)
    assert torch.equal(first, many.losses(batch, noise)["loss"])  # nothing is left to torch's own generator


def test_transforms_of_transforms_are_applied_from_the_inside_out() -> None:
    affine = torch.distributions.AffineTransform(1.0, 2.0)
    nested = dist.TransformedDistribution(dist.LogNormal(torch.tensor([0.5]), 0.5), [affine]).to_event(1)
    law, transforms = reparametrised(nested)
    assert float(law.loc) == 0.5
    value = torch.tensor(0.3)
    for transform in transforms:
        value = transform(value)
    assert float(value) == pytest.approx(1 + 2 * math.exp(0.3))


def test_a_site_that_is_no_normal_draws_for_itself() -> None:
    class Model(nn.Module):
        def forward(self, batch: Batch) -> None:
            with batch.plate():
                pyro.sample("z", dist.Laplace(torch.zeros(3), 1.0).to_event(1))

    system = System(Model(), Model(), Objective())
    many = Ensemble(system, {}, [torch.Generator()])
    assert many.noise(cells()[:4]) == {}


# ---------------------------------------------------------------------- initial parameters
def test_initial_parameters_are_drawn_from_the_seeds() -> None:
    from pyro_scm.nn import reset_parameters

    system = System(*make("environment_vae", cells().schema), Objective())
    before = torch.get_rng_state()
    drawn = stack_initial(system, (4, 5))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(5)
    reset_parameters(system)
    for name, p in system.named_parameters():
        assert torch.equal(drawn[name][1], p), name
    again = stack_initial(system, (5,))
    assert all(torch.equal(again[name][0], value[1]) for name, value in drawn.items())


def test_all_members_may_start_from_the_present_parameters() -> None:
    system = System(*make("vae", cells().schema), Objective())
    copies = stack_initial(system, (4, 5), fresh=False)
    for name, p in system.named_parameters():
        assert copies[name].shape == (2, *p.shape)
        assert torch.equal(copies[name][0], p)
        assert torch.equal(copies[name][1], p)


def test_drawing_leaves_the_modules_as_they_were() -> None:
    system = System(*make("vae", cells().schema), Objective())
    before = {name: p.detach().clone() for name, p in system.named_parameters()}
    stack_initial(system, (4, 5))
    assert all(torch.equal(before[name], p) for name, p in system.named_parameters())


class Forgetful(nn.Module):
    """A prior with a parameter that nothing draws."""

    latent = 3

    def __init__(self) -> None:
        super().__init__()
        self.centre = nn.Parameter(torch.zeros(3))

    def forward(self, batch: Batch) -> dist.Independent:
        return dist.Normal(self.centre.expand(len(batch), 3), 1.0).to_event(1)


def test_a_part_that_cannot_be_drawn_is_refused_by_the_name_of_its_parameter() -> None:
    model, guide = make("vae", cells().schema)
    model.prior = Forgetful()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    message = r"parameter 'model.prior.centre' has no initial value: give the module .* a method reset_parameters"
    with pytest.raises(ModelError, match=message):
        fit(model, guide, cells(), epochs=1, progress=False)
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    run = fit(model, guide, cells(), epochs=1, fresh=False, progress=False)
    assert bool(run.parameters["model.prior.centre"].isfinite().all())


def test_frozen_parameters_keep_their_values_and_the_others_are_trained() -> None:
    model, guide = make("vae", cells().schema)
    first = model.likelihoods[0].net[0]
    first.requires_grad_(False).eval()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    run = fit(model, guide, cells(), seeds=(0, 1), epochs=2, weight_decay=0.5, progress=False)
    frozen = {f"model.likelihoods.0.net.0.{kind}" for kind in ("weight", "bias")}
    for name, value in before.items():
        found = run.parameters[f"model.{name}"]
        assert bool(torch.equal(found[0], value) and torch.equal(found[1], value)) == (f"model.{name}" in frozen), name
    assert not first.weight.requires_grad


def test_networks_without_offsets_stay_without() -> None:
    model, guide = make("vae", cells().schema)
    model.likelihoods[0].net = MaskedMLP(torch.ones(8, 3), hidden=2, bias=False)
    run = fit(model, guide, cells(), epochs=2, lr=0.1, progress=False)
    assert not bool(run.parameters["model.likelihoods.0.net.offset"].any())
    assert bool(run.parameters["model.likelihoods.0.net.first"].any())


def test_nothing_to_train_is_refused() -> None:
    model, guide = make("vae", cells().schema)
    model.requires_grad_(False)
    guide.requires_grad_(False)
    with pytest.raises(ModelError, match="neither model nor guide has a parameter to train: all are frozen"):
        fit(model, guide, cells(), epochs=1, progress=False)


# ---------------------------------------------------------------------- members, buffers
def test_a_members_parameters_can_be_put_into_the_modules() -> None:
    many = ensemble("vae")
    many.load_member(2)
    for name, p in many.system.named_parameters():
        assert torch.equal(p, many.parameters[name][2])
    other = {name: torch.full_like(value, 3.0) for name, value in many.parameters.items()}
    many.load_member(0, other)
    assert all(bool((p == 3).all()) for p in many.system.parameters())


def test_every_member_has_a_temperature_of_its_own_and_shares_the_other_buffers() -> None:
    many = ensemble("environment_vae")
    name = "model.prior.sparsifier.temperature"
    assert set(many.parameters) == {name, *(n for n, _ in many.system.named_parameters())}
    batch = cells()[::4]
    noise = many.noise(batch)
    before = many.losses(batch, noise)["kl"]
    many.parameters[name].data[1] = 0.01
    assert (many.losses(batch, noise)["kl"] != before).tolist() == [False, True, False]
    many.load_member(1)
    assert float(many.system.get_buffer(name)) == pytest.approx(0.01)
    spread = many.system.get_buffer("guide.local.z.spread")
    spread.mul_(2)
    assert bool((many.losses(batch, noise)["loss"] != before).all())


# ---------------------------------------------------------------------- adversaries
def against(weight: float = 0.05) -> Objective:
    critic = nn.Sequential(nn.Linear(3, 16), nn.ReLU(), nn.Linear(16, 4))
    return Objective(penalties={"adversary": Adversary(critic, weight=weight)})


@pytest.fixture
def sides(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whose turn each evaluation of the losses was: True for the critics'."""
    turns: list[bool] = []
    losses = Ensemble.losses

    def counted(self: Ensemble, batch: Any, noise: Any, weight: Any, critics: bool, *args: Any) -> dict[str, Tensor]:
        turns.append(critics)
        return losses(self, batch, noise, weight, critics, *args)

    monkeypatch.setattr(Ensemble, "losses", counted)
    return turns


@pytest.mark.parametrize("steps", [1, 3])
def test_critics_take_their_own_steps_before_each_step_of_the_model(sides: list[bool], steps: int) -> None:
    train("vae", objective=against(), critic_steps=steps, epochs=2, batch_size=25)
    assert sides == ([True] * steps + [False]) * 8


def test_without_critics_there_are_no_such_steps(sides: list[bool]) -> None:
    train("vae", critic_steps=5, epochs=2, batch_size=25)
    assert sides == [False] * 8


def test_critics_learn_to_tell_environments_apart() -> None:
    objective = against(weight=1e-3)
    run = train("environment_vae", objective=objective, seeds=(0, 1), epochs=15, batch_size=25, lr=0.03, critic_steps=4)
    history = run.history.assign(cross_entropy=-run.history["adversary"] / 1e-3)
    for _, member in history.groupby("seed"):
        first, last = member["cross_entropy"].iloc[0], member["cross_entropy"].iloc[-1]
        assert 1.0 < first < 1.8  # log 4 = 1.39 is chance
        assert last < 0.85 * first
    critic = objective.adversaries[0].critic
    for name, p in critic.named_parameters():
        assert torch.equal(p, run.parameters[f"penalties.adversary.critic.{name}"][run.best])


def test_a_strong_adversary_keeps_environments_out_of_the_latents() -> None:
    def cross_entropy(weight: float) -> float:
        settings = {"epochs": 25, "batch_size": 25, "lr": 0.02, "critic_steps": 3, "kl_warmup": 0.0}
        run = train("vae", objective=against(weight), **settings)
        return float(-run.history["adversary"].iloc[-1] / weight)

    assert cross_entropy(20.0) == pytest.approx(math.log(4), abs=0.05)  # chance
    assert cross_entropy(1e-3) < math.log(4) - 0.2


def test_members_with_critics_are_what_they_would_be_alone() -> None:
    data = doubles(cells())

    def run(seeds: tuple[int, ...]) -> Run:
        objective = against()
        objective.penalties["adversary"].double()
        return trained("vae", data, seeds, objective=objective, critic_steps=2)

    together = run(SEEDS[:2])
    assert together.parameters["penalties.adversary.critic.0.weight"].shape == (2, 16, 3)
    assert_members_are_as_if_alone(together, run(SEEDS[1:2]), 1, 1e-8)
