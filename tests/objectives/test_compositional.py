from typing import Any

import pytest
import torch

from pyro_scm import metrics, query, recipes
from pyro_scm.errors import ModelError
from pyro_scm.infer import fit
from pyro_scm.objectives import BasalAdversary, Objective, World, compositional
from pyro_scm.objectives.compositional import Critic
from pyro_scm.run import Run
from pyro_scm.training import Trainer
from tests.compositions import cells

PUBLISHED: dict[str, Any] = {"prior": "flat", "family": "point", "inputs": ("x",)}


def build(**options: Any) -> tuple[Any, Any]:
    torch.manual_seed(1)
    own = {"latent": 3, "hidden": (8,), "guide_hidden": (8,), "covariates": ("cell_type",), **PUBLISHED}
    return recipes.make("cpa", cells().schema, **{**own, **options})


def train(objective: dict[str, Any], critic_steps: int = 3, **settings: Any) -> tuple[Run, Objective]:
    model, guide = build()
    made = recipes.objective("cpa", model, cells(), **objective)
    options = {"epochs": 3, "batch_size": 70, "lr": 0.02, "seeds": (0, 1), "progress": False, **settings}
    return fit(model, guide, cells(), objective=made, critic_steps=critic_steps, **options), made


def given(value: torch.Tensor) -> World:
    """A world in which the guide gave this basal state to all cells."""
    return World(cells().batch(), {"z": {"value": value}}, {})


# ---------------------------------------------------------------------- which there are
def test_there_is_no_adversary_unless_it_is_asked_for() -> None:
    model, _ = build()
    assert recipes.objective("cpa", model, cells()).penalties == {}


def test_perturbations_and_every_covariate_have_a_critic_and_all_are_trained() -> None:
    run, objective = train({"adversary": 1.0})
    assert list(objective.penalties) == ["adversary_perturbations", "adversary_cell_type"]
    assert len(objective.adversaries) == 2
    start = {n: p for n, p in train({"adversary": 1.0}, epochs=1, lr=1e-12)[0].parameters.items() if "critic" in n}
    assert len(start) == 2 * 6  # three layers each, weights and offsets
    for name, p in start.items():
        assert float((run.parameters[name] - p).abs().max()) > 1e-3, name


def test_cell_lines_that_the_representation_holds_have_one_too() -> None:
    data = cells()
    table = data.environments.assign(cell_line=["PC3"] * 4 + ["A549"] * 3)
    lined = type(data)(**{**vars(data), "environments": table})
    model, _ = build()
    objective = compositional(model, lined, adversary=1.0)
    assert "adversary_cell_line" in objective.penalties
    labels = objective.penalties["adversary_cell_line"].labels
    assert labels.tolist() == [1] * 4 + [0] * 3  # type: ignore[operator,union-attr]


def test_a_combination_has_the_labels_of_all_its_parts() -> None:
    model, _ = build()
    labels = compositional(model, cells(), adversary=1.0).penalties["adversary_perturbations"].labels
    names = list(cells().environments.index)
    found = dict(zip(names, labels.tolist(), strict=True))  # type: ignore[operator,union-attr]
    assert found["DMSO"] == [0, 0, 0]
    assert found["A 10 uM"] == [1, 0, 0]
    assert found["A+B 10+10 uM"] == [1, 1, 0]


def test_weights_of_perturbations_and_covariates_may_differ() -> None:
    model, _ = build()
    one = compositional(model, cells(), adversary=2.0, covariate_adversary=0.5)
    assert {name: p.weight for name, p in one.penalties.items()} == {
        "adversary_perturbations": 24.0, "adversary_cell_type": 6.0,
    }  # fmt: skip
    assert list(compositional(model, cells(), covariate_adversary=1.0).penalties) == ["adversary_cell_type"]


# ---------------------------------------------------------------------- losses
def test_the_loss_of_several_labels_is_the_mean_binary_cross_entropy_and_of_one_the_cross_entropy() -> None:
    torch.manual_seed(0)
    data, z = cells(), torch.randn(len(cells()), 3)
    labels = torch.tensor([[0.0, 0], [1, 0], [1, 0], [0, 1], [0, 1], [0, 0], [1, 1]])
    several = BasalAdversary(Critic(3, (4,), 2), labels)
    p = torch.sigmoid(several.critic(z))
    y = labels[torch.as_tensor(data.env)]
    expected = -(y * p.log() + (1 - y) * (1 - p).log()).mean(1).sum()
    torch.testing.assert_close(several.critic_loss(given(z)), expected)
    torch.testing.assert_close(several(given(z)), -expected)
    covariate = BasalAdversary(Critic(3, (4,), 2), covariate="cell_type", weight=2.0)
    log_p = torch.log_softmax(covariate.critic(z), -1)
    own = -log_p[torch.arange(len(z)), torch.as_tensor(data.covariates["cell_type"])].sum()
    torch.testing.assert_close(covariate.critic_loss(given(z)), own)
    torch.testing.assert_close(covariate(given(z)), -2 * own)


@pytest.mark.parametrize("hidden", [(), (5,), (6, 5, 4)])
def test_the_slope_is_the_gradient_of_the_summed_logits(hidden: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    critic, z = Critic(3, hidden, 4), torch.randn(9, 3, requires_grad=True)
    (expected,) = torch.autograd.grad(critic(z).sum(), z)
    torch.testing.assert_close(critic.slope(z), expected)


def test_the_gradient_penalty_is_the_critics_alone_and_flattens_it() -> None:
    z = torch.randn(len(cells()), 3)
    labels = torch.eye(7)[:, 1:]
    torch.manual_seed(0)
    plain, steep = BasalAdversary(Critic(3, (4,), 6), labels), BasalAdversary(Critic(3, (4,), 6), labels)
    steep.load_state_dict(plain.state_dict())
    steep.gradient_penalty = 3.0
    added = 3 * len(z) * plain.critic.slope(z).square().mean()  # type: ignore[operator]
    torch.testing.assert_close(steep.critic_loss(given(z)), plain.critic_loss(given(z)) + added)
    torch.testing.assert_close(steep(given(z)), plain(given(z)))
    slopes = []
    for weight in (0.0, 100.0):
        run, objective = train({"adversary": 1e-3, "gradient_penalty": weight}, epochs=15, seeds=(0,))
        critic = objective.penalties["adversary_perturbations"].critic
        with torch.no_grad():
            for name, p in critic.named_parameters():  # type: ignore[union-attr]
                p.copy_(run.parameters[f"penalties.adversary_perturbations.critic.{name}"][0])
            z = torch.as_tensor(query.embed(run, cells())["z"][0])
            slopes.append(float(critic.slope(z).square().mean()))  # type: ignore[operator,union-attr]
    assert slopes[1] < 0.3 * slopes[0]


def test_the_encoders_side_warms_up_and_the_critics_does_not() -> None:
    adversary = BasalAdversary(Critic(3, (4,), 2), covariate="cell_type", warmup=0.5)
    world = given(torch.randn(len(cells()), 3))
    full, critic = adversary(world), adversary.critic_loss(world)
    for done, share in ((0.0, 0.0), (0.25, 0.5), (0.5, 1.0), (1.0, 1.0)):
        adversary.at(done)
        torch.testing.assert_close(adversary(world), share * full)
        torch.testing.assert_close(adversary.critic_loss(world), critic)


# ---------------------------------------------------------------------- the game
def test_critics_take_their_own_number_of_steps_for_each_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    step = Trainer._step

    def counted(self: Trainer, player: int, *rest: Any) -> Any:
        taken.append(player)
        return step(self, player, *rest)

    monkeypatch.setattr(Trainer, "_step", counted)
    train({"adversary": 1.0}, critic_steps=3, epochs=2)
    assert taken == [1, 1, 1, 0] * 12


def leak(run: Run) -> float:
    """Accuracy of a held-out probe that reads the cell type off the basal state."""
    found = metrics.environment_probe(
        query.embed(run, cells())["z"][0], cells().covariates["cell_type"], permutations=1, seed=0
    )
    return found.accuracy


def test_adversaries_take_the_covariate_out_of_the_basal_state() -> None:
    free, _ = train({}, epochs=40, seeds=(0,))
    held, _ = train({"adversary": 20.0, "gradient_penalty": 1.0}, epochs=40, seeds=(0,), critic_steps=5)
    assert leak(free) > 0.8
    assert leak(held) < 0.7


def test_what_cannot_be_is_refused() -> None:
    model, _ = build()
    with pytest.raises(ModelError, match="adversary = -1: give 0 or a positive weight"):
        compositional(model, cells(), adversary=-1)
    with pytest.raises(ModelError, match=r"warmup = 2: give a share of the epochs"):
        compositional(model, cells(), adversary=1.0, warmup=2)
    with pytest.raises(ModelError, match="unknown measure of independence 'cka': use one of hsic, mmd"):
        compositional(model, cells(), independence=1.0, measure="cka")
