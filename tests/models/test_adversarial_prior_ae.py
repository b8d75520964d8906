import functools
from typing import Any

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import nn

from guides.encoders import Fresh
from pyro_scm import models, query, recipes, recording
from pyro_scm.attention import ALPHA, EPSILON, counterfactual_code
from pyro_scm.data import synthetic
from pyro_scm.effects import attention, mask
from pyro_scm.ensemble import Ensemble, System, stack_initial
from pyro_scm.errors import ModelError
from pyro_scm.infer import fit
from pyro_scm.objectives import CounterfactualAdversary, adversarial_prior
from pyro_scm.recipes import load
from tests.screens import cells, fitted, make, train

NAME = "adversarial_prior_ae"


def game(target: str = "env", weight: float = 0.5, **options: Any) -> tuple[Any, Any, Any, Any]:
    """Model, guide, objective and its adversary, always with the same parameters."""
    model, guide = make(NAME, cells().schema, **options)
    objective = adversarial_prior(model, cells(), hidden=(6,), target=target, weight=weight)
    return model, guide, objective, objective.adversaries[0]


# ---------------------------------------------------------------------- the program
def test_attention_lies_in_the_simplex_and_is_the_environments() -> None:
    model, _, batch = *make(NAME, cells().schema), cells()[::4]
    trace = poutine.trace(model).get_trace(batch)
    alpha = trace.nodes[ALPHA]["value"]
    assert (alpha >= 0).all()
    torch.testing.assert_close(alpha.sum(-1), torch.ones(len(batch)))
    for e in range(4):
        assert (alpha[batch.env == e] == alpha[batch.env == e][0]).all()
    torch.testing.assert_close(alpha, model.prior.attention(batch.r)[batch.row])
    assert len(alpha.unique(dim=0)) == 4
    cold, _ = make(NAME, cells().schema, temperature=1e-3)
    torch.testing.assert_close(cold.prior.attention(batch.r).max(-1).values, torch.ones(len(batch.r)))


def test_the_counterfactual_code_keeps_what_is_not_attended() -> None:
    z, epsilon = torch.randn(4, 3), torch.randn(4, 3)
    alpha = torch.tensor([0.2, 0.0, 0.8])
    found = counterfactual_code(z, epsilon, alpha.expand(4, 3))
    torch.testing.assert_close(found, alpha * epsilon + (1 - alpha) * z)
    assert torch.equal(found[:, 1], z[:, 1])


def test_with_attention_on_one_latent_the_code_is_a_noise_intervention() -> None:
    """The docstring's claim: the law of z_count is that of z with the noise of the attended latent replaced."""
    model, guide = make(NAME, cells().schema, temperature=1e-4)
    some = cells().subset(np.flatnonzero(cells().env == 1))
    batch = some.batch()
    alpha = model.prior.attention.of_cells(batch)[0].detach()
    j = int(alpha.argmax())
    assert float(alpha[j]) == pytest.approx(1)
    worlds = query.counterfactual((model, guide), some, noise={f"c_{j}": dist.Normal(0.0, 1.0)}, draws=400)
    z = torch.as_tensor(worlds.z[0])
    code = counterfactual_code(z, torch.randn_like(z), alpha).numpy()
    asked = worlds.c[0]
    others = [i for i in range(3) if i != j]
    np.testing.assert_allclose(code[..., others], asked[..., others], atol=1e-6)
    for values in (code[..., j], asked[..., j]):
        assert values.mean() == pytest.approx(0, abs=4 / np.sqrt(values.size))
        assert values.std() == pytest.approx(1, rel=0.05)


def test_the_fresh_noise_costs_nothing_and_no_encoder() -> None:
    model, guide, objective, _ = game()
    assert isinstance(guide.local[EPSILON], Fresh)
    assert list(guide.local[EPSILON].parameters()) == []
    world = objective.world(model, guide, cells()[::4])
    assert float(objective.terms(world).kl.detach()) == 0
    model, guide, objective, _ = game(prior="standard", family="normal")
    world = objective.world(model, guide, cells()[::4])
    assert float(objective.terms(world).kl.detach()) > 1


# ---------------------------------------------------------------------- the game
def test_the_adversary_is_the_cross_entropy_of_the_counterfactual_code() -> None:
    model, guide, objective, adversary = game()
    batch = cells()[::4]
    world = objective.world(model, guide, batch)
    alpha = model.prior.attention(batch.r)[batch.row]
    code = alpha * world.guide[EPSILON]["value"] + (1 - alpha) * world.guide["z"]["value"]
    log_d = torch.log_softmax(adversary.critic(code), -1)[torch.arange(len(batch)), batch.env]
    expected = -log_d.sum() * batch.total / len(batch)
    torch.testing.assert_close(adversary.critic_loss(world), expected)
    torch.testing.assert_close(adversary(world), -0.5 * expected)
    model, guide, objective, adversary = game("r")
    world = objective.world(model, guide, batch)
    expected = 0.5 * (adversary.critic(adversary.code(world)) - batch.e).square().sum() * 4
    torch.testing.assert_close(adversary.critic_loss(world), expected)


@pytest.mark.parametrize("target", ["env", "r"])
def test_the_players_pull_in_opposite_directions(target: str) -> None:
    """A step of D along its gradient raises log D; a step of encoder and attention along theirs lowers it."""
    model, guide, objective, adversary = game(target)
    batch = cells()[::4]
    players = {"critic": list(adversary.critic.parameters())}
    players["model"] = [*model.prior.attention.parameters(), *guide.parameters()]

    def log_d() -> torch.Tensor:
        torch.manual_seed(3)
        world = objective.world(model, guide, batch)
        return -adversary.critic_loss(world), adversary(world)  # type: ignore[return-value]

    before = float(log_d()[0].detach())
    for player, better in (("critic", 1), ("model", -1)):
        loss = -log_d()[0] if player == "critic" else log_d()[1]
        gradients = torch.autograd.grad(loss, players[player], allow_unused=True)
        assert all(g is not None for g in gradients)
        kept = [p.detach().clone() for p in players[player]]
        size = torch.cat([g.reshape(-1) for g in gradients]).norm()
        with torch.no_grad():
            for p, g in zip(players[player], gradients, strict=True):
                p -= 1e-2 * g / size
            after = float(log_d()[0])
            for p, value in zip(players[player], kept, strict=True):
                p.copy_(value)
        assert (after - before) * better > 1e-3 * abs(before) / 10, player


def test_the_critics_loss_reaches_neither_encoder_nor_attention() -> None:
    model, guide, objective, adversary = game()
    loss = adversary.critic_loss(objective.world(model, guide, cells()[::4]))
    others = [*model.parameters(), *guide.parameters()]
    assert all(g is None for g in torch.autograd.grad(loss, others, allow_unused=True))


def test_attention_is_the_models_parameter_and_the_critic_the_adversarys() -> None:
    model, guide, objective, _ = game()
    system = System(model, guide, objective)
    assert system.critic_names() == {n for n, _ in system.named_parameters() if n.startswith("penalties.")}
    assert [n for n, _ in system.named_parameters(remove_duplicate=False) if "attention" in n] == [
        f"model.prior.attention.net.{i}.{kind}" for i in (0, 2) for kind in ("weight", "bias")
    ]


def test_environments_that_were_not_trained_on_have_no_class() -> None:
    held = cells().subset(np.flatnonzero(cells().env != 2))
    model, guide = make(NAME, cells().schema)
    adversary: Any = adversarial_prior(model, held).adversaries[0]
    assert adversary.classes.tolist() == [0, 1, -1, 2]
    assert adversary.critic[-1].out_features == 3
    objective = adversarial_prior(model, held)
    adversary = objective.adversaries[0]
    torch.manual_seed(0)
    whole = adversary.critic_loss(objective.world(model, guide, cells().subset(np.arange(100)).batch()))
    torch.manual_seed(0)
    world = objective.world(model, guide, cells()[:100])
    seen = world.batch.env != 2
    labels = torch.tensor([0, 1, -1, 2])[world.batch.env[seen]]
    logits = adversary.critic(adversary.code(world))[seen]
    torch.testing.assert_close(whole, nn.functional.cross_entropy(logits, labels, reduction="sum"))
    outside = world.batch.under(torch.zeros(5))
    assert float(adversary._cross_entropy(adversary.code(world), outside).detach()) == 0


@pytest.mark.parametrize("critics", [False, True])
def test_vectorised_games_are_those_of_a_loop(critics: bool) -> None:
    model, guide, objective, _ = game()
    system = System(model, guide, objective)
    parameters = stack_initial(system, (3, 4))
    batch = cells()[::4]
    both = Ensemble(system, parameters, [torch.Generator().manual_seed(s) for s in (3, 4)])
    noise = both.noise(batch)
    assert set(noise) == {EPSILON}  # a point guide draws nothing else
    together = both.losses(batch, noise, critics=critics)
    for k in range(2):
        one = {n: p[k : k + 1] for n, p in parameters.items()}
        alone = Ensemble(system, one, [torch.Generator()]).losses(
            batch, {n: v[k : k + 1] for n, v in noise.items()}, critics=critics
        )
        for name, value in together.items():
            torch.testing.assert_close(value[k], alone[name][0], rtol=1e-4, atol=1e-4)


def test_a_member_is_what_it_would_be_alone_and_runs_are_read_back(tmp_path: Any) -> None:
    def trained(seeds: tuple[int, ...]) -> Any:
        model, guide, objective, _ = game()
        return fit(
            model, guide, cells(), objective=objective, seeds=seeds, epochs=2, batch_size=50, critic_steps=2,
            progress=False,
        )  # fmt: skip

    both, one = trained((0, 1)), trained((1,))
    for name, value in one.parameters.items():
        torch.testing.assert_close(both.parameters[name][1], value[0], rtol=1e-3, atol=1e-4)
    table = attention(both)
    assert table.shape == (8, 3)
    np.testing.assert_allclose(table.sum(1), 1, rtol=1e-5)
    assert not table.loc[0].equals(table.loc[1])
    both.save(tmp_path)
    assert attention(load(tmp_path)).equals(table)


@pytest.mark.parametrize("conditioning", ["concatenate", "film"])
@pytest.mark.parametrize("inputs", [("x",), ("x", "e"), ("x", "e", "plate")])
@pytest.mark.parametrize("family", ["point", "normal"])
def test_it_trains_under_every_guide(conditioning: str, inputs: tuple[str, ...], family: str) -> None:
    prior = "flat" if family == "point" else "standard"
    model, guide, objective, _ = game(conditioning=conditioning, inputs=inputs, family=family, prior=prior)
    before = [p.detach().clone() for p in model.prior.attention.parameters()]
    run = fit(model, guide, cells(), objective=objective, epochs=2, batch_size=50, fresh=False, progress=False)
    assert np.isfinite(run.history["loss"]).all()
    assert all(not torch.equal(a, b) for a, b in zip(before, model.prior.attention.parameters(), strict=True))


def test_a_schedule_sharpens_the_attention() -> None:
    model, guide, objective, _ = game()
    run = fit(
        model, guide, cells(), objective=objective, seeds=(0, 1), epochs=3, batch_size=50, temperature=(1.0, 0.01),
        progress=False,
    )  # fmt: skip
    assert run.parameters["model.prior.attention.gate.temperature"].tolist() == pytest.approx([0.01, 0.01])
    model, guide, objective, _ = game()
    soft = fit(model, guide, cells(), objective=objective, seeds=(0, 1), epochs=3, batch_size=50, progress=False)
    assert attention(run).max(1).mean() > 0.9 > attention(soft).max(1).mean()


def test_both_players_steps_are_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    def play(often: int) -> Any:
        monkeypatch.setattr(recording, "_OFTEN", often)
        model, guide, objective, _ = game()
        return fit(model, guide, cells(), objective=objective, seeds=(0, 1), epochs=6, batch_size=50, progress=False)

    one, other = play(5), play(10**9)
    for name, value in one.parameters.items():
        assert torch.equal(value, other.parameters[name]), name


# ---------------------------------------------------------------------- recovery
@functools.cache
def strong() -> Any:
    """One latent, moved far in each of two environments of different descriptors, beside a control."""
    adata = synthetic.simulate(
        latent=2, genes=12, environments=3, cells=100, graph="empty", decoder="linear", strength=6.0, constant=True
    )
    return adata, synthetic.dataset(adata)


def test_the_game_hides_the_environment_from_a_probe() -> None:
    """After training the counterfactual code shows less of the environment than the code does."""
    from pyro_scm.metrics import environment_probe

    _, data = strong()
    model, guide = recipes.make(NAME, data.schema, latent=2, hidden=(), environment_hidden=(), guide_hidden=(32,))
    objective = adversarial_prior(model, data, weight=2.0, hidden=(32,))
    fit(model, guide, data, objective=objective, epochs=50, lr=5e-3, batch_size=100, critic_steps=3, progress=False)
    with torch.no_grad():
        world = objective.inferred(guide, data.batch())
        code, z = objective.adversaries[0].code(world), world.guide["z"]["value"]  # type: ignore[attr-defined]
    seen, left = (environment_probe(v.numpy(), data.env, permutations=3, seed=0) for v in (z, code))
    assert seen.accuracy > 0.8
    assert left.accuracy < seen.accuracy - 0.15


# ---------------------------------------------------------------------- what is refused
def test_options_that_do_not_exist_are_refused() -> None:
    schema = cells().schema
    with pytest.raises(ModelError, match="unknown prior 'none': use 'flat' or 'standard'"):
        models.adversarial_prior_ae(schema, prior="none")
    with pytest.raises(ModelError, match="temperature 0 of the attention: give a positive number"):
        models.adversarial_prior_ae(schema, temperature=0)
    model, _ = make("vae", schema)
    with pytest.raises(ModelError, match=r"no attention to train: build it with models\.adversarial_prior_ae"):
        adversarial_prior(model, cells())
    attentive = make(NAME, schema)[0].prior.attention
    with pytest.raises(ModelError, match="unknown target 'plate' of the adversary: use 'env' or 'r'"):
        CounterfactualAdversary(attentive, nn.Linear(3, 4), torch.arange(4), target="plate")
    with pytest.raises(ModelError, match="this model has no attention"):
        attention(fitted())
    with pytest.raises(ModelError, match="this model has no learnt mask"):
        mask(fitted())


def test_the_objective_of_a_recipe() -> None:
    model, _ = make(NAME, cells().schema)
    assert len(recipes.objective(NAME, model, cells(), weight=0.1).adversaries) == 1
    assert recipes.objective("vae", model, cells(), kl_weight=0.5).kl_weight == 0.5
    assert train(NAME, epochs=1).history["loss"].notna().all()  # an autoencoder
