import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyro
import pytest
import scipy.sparse as sp
import torch
from torch import Tensor, nn

from guides import amortise
from pyro_scm import feeding
from pyro_scm.data import synthetic
from pyro_scm.data.dataset import EnvironmentDataset
from pyro_scm.ensemble import Ensemble, System
from pyro_scm.errors import CheckpointError, DataError, ModelError, TrainingError
from pyro_scm.feeding import Feeder
from pyro_scm.infer import fit, grid
from pyro_scm.models import environment_vae
from pyro_scm.objectives import Adversary, Objective
from pyro_scm.recipes import load
from pyro_scm.run import Run
from pyro_scm.training import Trainer, _mixed
from tests.screens import cells, doubles, make, train

TRAINING = np.arange(100) % 4 > 0
KINDS = ["gaussian", "negative-binomial"]


def halves() -> tuple[EnvironmentDataset, EnvironmentDataset]:
    """Three quarters of the cells to train on, one to validate with."""
    return cells().subset(TRAINING), cells().subset(~TRAINING)


# ---------------------------------------------------------------------- the loss and its history
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["ae", "environment_vae", "structured_translation_vae"])
def test_the_loss_falls_for_every_member(name: str, kind: str) -> None:
    run = train(name, cells(kind), seeds=(0, 1), epochs=12, lr=0.02, kl_warmup=0.0)
    for _, member in run.history.groupby("seed"):
        assert member["loss"].iloc[-1] < member["loss"].iloc[0] - 0.3
        assert (member["loss"].diff().dropna() < 0).mean() > 0.7


def test_the_history_has_one_row_an_epoch_and_member() -> None:
    run = train(seeds=(4, 2), epochs=3, lr=0.01)
    assert list(run.history) == ["epoch", "member", "seed", "lr", "seconds", "loss", "reconstruction", "kl"]
    assert list(run.history["epoch"]) == [1, 1, 2, 2, 3, 3]
    assert list(run.history["member"]) == [0, 1] * 3
    assert list(run.history["seed"]) == [4, 2] * 3
    assert set(run.history["lr"]) == {0.01}
    assert (run.history["seconds"] > 0).all()
    assert run.history[["loss", "reconstruction", "kl"]].notna().all(axis=None)


def test_validation_and_penalties_have_columns_of_their_own() -> None:
    training, held = halves()
    objective = Objective(penalties={"critic": Adversary(nn.Linear(3, 4), weight=0.1)})
    run = train("vae", training, validation=held, objective=objective, epochs=2)
    names = ["loss", "reconstruction", "kl"]
    assert list(run.history)[5:] == [*names, "critic", *(f"validation_{name}" for name in names)]


def test_the_loss_is_the_mean_over_cells_of_the_negative_bound() -> None:
    """One step an epoch at a learning rate of almost nothing: the history is the initial loss, in nats a cell."""
    run = train("ae", epochs=2, batch_size=1000, lr=1e-12)
    model, guide = run.member(0)
    expected = Objective().loss(model.forward, guide.forward, cells().batch()) / 100
    np.testing.assert_allclose(run.history["loss"], expected, rtol=1e-5)
    small = train("ae", epochs=1, batch_size=7, lr=1e-12)  # the last of its mini-batches holds two cells
    assert small.history["loss"].iloc[0] == pytest.approx(expected, rel=1e-5)


def test_the_order_of_the_cells_is_new_in_every_epoch_and_covers_all() -> None:
    seen: list[list[int]] = []

    class Watching(EnvironmentDataset):
        def batches(self, size: int, order: Any = None) -> Any:
            seen.append([] if order is None else order.tolist())
            return super().batches(size, order)

    watching = Watching(**{name: getattr(cells(), name) for name in cells().__dataclass_fields__})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(feeding, "_RESIDENT_BYTES", 0)
        train("vae", watching, epochs=3)
    epochs = seen[1:]  # the first asks for the cells of the first evaluation
    assert len(epochs) == 3
    assert all(sorted(order) == list(range(100)) for order in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_the_result_holds_the_best_member_and_describes_the_training() -> None:
    run = train(seeds=(0, 1, 2), epochs=4)
    assert run.best == int(np.argmin(run.losses))
    last = run.history[run.history["epoch"] == 4]["loss"].to_numpy()
    np.testing.assert_allclose(run.losses, last)
    for name, p in run.model.named_parameters():
        assert torch.equal(p, run.parameters[f"model.{name}"][run.best])
    assert run.seeds == (0, 1, 2)
    assert run.stopped == (4, 4, 4)
    assert run.schema == cells().schema
    assert run.settings.epochs == 4
    assert run.settings.batch_size == 40
    assert bool(run.environments.table["trained"].all())


def test_environments_without_training_cells_are_marked() -> None:
    run = train("vae", cells().subset(cells().env != 2), epochs=1)
    assert list(run.environments.table["trained"]) == [True, True, False, True]


def test_a_seed_repeats_itself_and_leaves_torchs_generator_alone() -> None:
    one = train(seeds=(3,))
    torch.manual_seed(99)
    other = train(seeds=(3,))
    for name, value in one.parameters.items():
        assert torch.equal(value, other.parameters[name])
    pd.testing.assert_frame_equal(one.history.drop(columns="seconds"), other.history.drop(columns="seconds"))


def test_members_may_start_from_the_present_parameters() -> None:
    model, guide = make("vae", cells().schema)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    run = fit(model, guide, cells(), seeds=(0, 1), epochs=1, lr=1e-9, fresh=False, progress=False)
    for name, value in before.items():
        found = run.parameters[f"model.{name}"]
        torch.testing.assert_close(found, value.expand_as(found), rtol=0, atol=1e-6)
    anew = fit(model, guide, cells(), seeds=(0, 1), epochs=1, lr=1e-9, progress=False)
    weight = anew.parameters["model.likelihoods.0.net.0.weight"]
    assert float((weight[0] - weight[1]).abs().max()) > 0.01


def test_distribution_checks_are_as_they_were_afterwards() -> None:
    for state in (True, False):
        with pyro.validation_enabled(state):
            train("vae", epochs=1)
            assert torch.distributions.Distribution._validate_args is state
            assert pyro.settings.get("validate_distributions_pyro") is state
            assert pyro.settings.get("validate_poutine") is state


def test_training_leaves_nothing_in_pyros_parameter_store() -> None:
    train(seeds=(0, 1), epochs=1)
    assert len(pyro.get_param_store()) == 0


def test_a_progress_bar_on_request(capsys: pytest.CaptureFixture[str]) -> None:
    train("vae", epochs=2, progress=True)
    shown = capsys.readouterr().err
    assert "2/2" in shown
    assert "nats/cell" in shown
    train("vae", epochs=2, progress=None)  # the error stream is no terminal here
    assert capsys.readouterr().err == ""


# ---------------------------------------------------------------------- schedules
@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Every evaluation of the losses: the KL's weight, the temperature, whether for validation."""
    made: list[dict[str, Any]] = []
    losses = Ensemble.losses

    def recorded(self: Ensemble, batch: Any, noise: Any, weight: Any, *args: Any, **options: Any) -> dict[str, Tensor]:
        temperatures = [float(p[0]) for n, p in self.parameters.items() if n.endswith("temperature")]
        made.append({"weight": float(weight[0]), "temperatures": temperatures, "cells": len(batch)})
        return losses(self, batch, noise, weight, *args, **options)

    monkeypatch.setattr(Ensemble, "losses", recorded)
    return made


def test_the_kl_warms_up_step_by_step(calls: list[dict[str, Any]]) -> None:
    train("vae", epochs=4, batch_size=25, kl_warmup=0.5)
    assert [call["weight"] for call in calls] == [i / 8 for i in range(8)] + [1.0] * 8


def test_without_warm_up_the_kl_counts_from_the_first_step(calls: list[dict[str, Any]]) -> None:
    train("vae", epochs=1, batch_size=25, kl_warmup=0.0)
    assert [call["weight"] for call in calls] == [1.0] * 4


def test_validation_is_of_the_whole_bound_while_the_kl_warms_up(calls: list[dict[str, Any]]) -> None:
    training, held = halves()
    train("vae", training, validation=held, epochs=2, batch_size=75, kl_warmup=1.0)
    assert [call["weight"] for call in calls] == [0.0, 1.0, 0.5, 1.0]
    assert [call["cells"] for call in calls] == [75, 25, 75, 25]


def test_the_warm_up_multiplies_the_objectives_own_weight() -> None:
    settings = {"epochs": 4, "batch_size": 100, "lr": 1e-12, "kl_warmup": 1.0}
    run = train("vae", objective=Objective(kl_weight=3.0), **settings)
    h = run.history
    np.testing.assert_allclose(h["loss"], h["reconstruction"] + 3.0 * np.arange(4) / 4 * h["kl"], rtol=1e-5)


def test_the_temperature_is_annealed_geometrically_and_validation_does_not_touch_it(
    calls: list[dict[str, Any]],
) -> None:
    training, held = halves()
    run = train(data=training, validation=held, epochs=4, batch_size=75, temperature=(8.0, 1.0))
    assert len(calls) == 8
    for epoch in range(4):
        for call in calls[2 * epoch : 2 * epoch + 2]:  # a step, then validation
            assert call["temperatures"] == pytest.approx([8.0 * (1 / 8) ** (epoch / 3)])
    assert float(run.model.prior.sparsifier.temperature) == pytest.approx(1.0)  # type: ignore[arg-type,union-attr]


def test_one_temperature_is_kept_throughout(calls: list[dict[str, Any]]) -> None:
    train("translation_vae", epochs=2, temperature=0.3)
    assert len(calls) == 6
    assert all(call["temperatures"] == [pytest.approx(0.3)] for call in calls)


def test_by_default_the_models_own_temperature_is_kept(calls: list[dict[str, Any]]) -> None:
    model, guide = make("environment_vae", cells().schema, temperature=0.7)
    fit(model, guide, cells(), epochs=2, progress=False)
    assert all(call["temperatures"] == [pytest.approx(0.7)] for call in calls)


def test_the_learning_rate_follows_a_cosine() -> None:
    run = train("vae", epochs=4, lr=0.2, schedule="cosine")
    expected = [0.2, 0.1 * (1 + math.cos(math.pi / 4)), 0.1, 0.1 * (1 - math.cos(math.pi / 4))]
    np.testing.assert_allclose(run.history["lr"], expected, rtol=1e-12)


def test_the_learning_rate_reaches_the_optimiser() -> None:
    steps = {}
    for lr in (1e-3, 1e-2):
        model, guide = make("ae", cells().schema)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        fit(model, guide, cells(), epochs=1, batch_size=100, lr=lr, fresh=False, progress=False)
        steps[lr] = max(float((p - before[name]).abs().max().detach()) for name, p in model.named_parameters())
        assert steps[lr] == pytest.approx(lr, rel=1e-2)  # Adam's first step is the learning rate


def test_the_schedule_reaches_the_optimiser(monkeypatch: pytest.MonkeyPatch) -> None:
    rates: list[float] = []
    step = torch.optim.AdamW.step

    def recorded(self: torch.optim.AdamW, *args: Any) -> Any:
        rates.extend(group["lr"] for group in self.param_groups)
        return step(self, *args)

    monkeypatch.setattr(torch.optim.AdamW, "step", recorded)
    run = train("vae", epochs=3, batch_size=100, lr=0.2, schedule="cosine")
    assert rates == pytest.approx(list(run.history["lr"]))
    assert rates == pytest.approx([0.2, 0.15, 0.05])


def test_each_particle_has_noise_of_its_own() -> None:
    run = train("vae", epochs=1, batch_size=100, objective=Objective(particles=3), lr=1e-12, kl_warmup=0.0)
    model, guide = run.member(0)
    generator = torch.Generator().manual_seed(0)
    order = np.random.default_rng(0).permutation(100)
    system = System(model, guide, Objective())
    with torch.no_grad():
        each = [
            float(system(cells().batch(order), {"z": torch.randn((1, 100, 3), generator=generator)})["loss"])
            for _ in range(3)
        ]
    assert len(set(each)) == 3
    assert run.history["loss"].iloc[0] == pytest.approx(np.mean(each), rel=1e-5)


def test_weights_decay() -> None:
    model, guide = make("ae", cells().schema)
    before = float(model.likelihoods[0].net[2].weight.detach().norm())
    settings = {"epochs": 5, "lr": 1e-2, "fresh": False, "progress": False}
    fit(model, guide, cells(), weight_decay=20.0, **settings)
    assert float(model.likelihoods[0].net[2].weight.detach().norm()) < 0.5 * before


# ---------------------------------------------------------------------- gradients
@pytest.fixture
def gradients(monkeypatch: pytest.MonkeyPatch) -> list[list[Tensor]]:
    """What the optimiser is given at each step."""
    given: list[list[Tensor]] = []
    step = torch.optim.AdamW.step

    def recorded(self: torch.optim.AdamW, *args: Any) -> Any:
        parameters = [p for group in self.param_groups for p in group["params"]]
        given.append([p.grad.clone() for p in parameters if p.grad is not None])
        return step(self, *args)

    monkeypatch.setattr(torch.optim.AdamW, "step", recorded)
    return given


def norms(gradient: list[Tensor]) -> Tensor:
    """Norm ``(K,)`` of each member's gradient."""
    return torch.stack([g.reshape(len(g), -1).square().sum(1) for g in gradient]).sum(0).sqrt()


def test_each_members_gradient_is_clipped_on_its_own(gradients: list[list[Tensor]]) -> None:
    settings = {"seeds": (0, 1, 2), "epochs": 1, "batch_size": 100}
    train("vae", clip=None, **settings)
    (free,) = gradients
    limit = float(norms(free).median())
    gradients.clear()
    train("vae", clip=limit, **settings)
    (clipped,) = gradients
    expected = (limit / norms(free)).clamp(max=1.0)
    assert int((expected < 1).sum()) == 1  # one member beyond the limit; the others as they were
    torch.testing.assert_close(norms(clipped), norms(free).clamp(max=limit), rtol=1e-4, atol=1e-6)
    for before, after in zip(free, clipped, strict=True):
        torch.testing.assert_close(after, before * expected.view(-1, *[1] * (before.dim() - 1)), rtol=1e-4, atol=1e-7)


def test_no_step_is_larger_than_the_clip(gradients: list[list[Tensor]]) -> None:
    train("environment_vae", clip=0.01, epochs=3, seeds=(0, 1))
    assert len(gradients) == 9
    for gradient in gradients:
        assert bool((norms(gradient) <= 0.01 * (1 + 1e-5)).all())


def test_gradients_are_of_the_loss_per_cell(gradients: list[list[Tensor]]) -> None:
    model, guide = make("ae", cells().schema)
    fit(model, guide, cells(), epochs=1, batch_size=100, clip=None, fresh=False, lr=1e-12, progress=False)
    parameters = [*model.parameters(), *guide.parameters()]
    loss = Objective().differentiable_loss(model.forward, guide.forward, cells().batch()) / 100
    for found, expected in zip(gradients[0], torch.autograd.grad(loss, parameters), strict=True):
        torch.testing.assert_close(found[0], expected, rtol=1e-3, atol=1e-6)


# ---------------------------------------------------------------------- validation and early stopping
def scripted(patch: pytest.MonkeyPatch, losses: list[list[float]]) -> list[dict[str, Tensor]]:
    """Validation losses as given, one row an epoch; returns the parameters after each epoch."""
    snapshots: list[dict[str, Tensor]] = []

    def validate(self: Trainer) -> dict[str, Any]:
        snapshots.append({name: p.detach().clone() for name, p in self.ensemble.parameters.items()})
        return {"validation_loss": np.array(losses[self.epoch - 1])}

    patch.setattr(Trainer, "_validate", validate)
    return snapshots


SCRIPT = [[9, 9], [7, 8], [5, 7], [4, 6], [3, 5], [8, 4], [9, 3], [9, 2], [9, 9], [9, 9], [1, 1], [1, 1]]


def averaged(k: int) -> list[float]:
    """Mean of the last five losses at each epoch."""
    return [float(np.mean([row[k] for row in SCRIPT[max(0, e - 4) : e + 1]])) for e in range(len(SCRIPT))]


def test_each_member_keeps_the_parameters_of_its_best_averaged_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    snapshots = scripted(monkeypatch, SCRIPT)  # type: ignore[arg-type]
    training, held = halves()
    run = train("vae", training, validation=held, seeds=(0, 1), epochs=10, kl_warmup=0.0)
    best = [int(np.argmin(averaged(k)[:10])) for k in (0, 1)]
    assert best == [5, 7]  # not epoch 4, where the first member's own loss is lowest
    assert run.stopped == (6, 8)
    assert run.losses == pytest.approx((averaged(0)[5], averaged(1)[7]))
    for name, value in run.parameters.items():
        for k in (0, 1):
            assert torch.equal(value[k], snapshots[best[k]][name][k]), name
    for name, p in run.model.named_parameters():
        assert torch.equal(p, run.parameters[f"model.{name}"][run.best])


def test_patience_stops_each_member_and_then_the_training(monkeypatch: pytest.MonkeyPatch) -> None:
    scripted(monkeypatch, SCRIPT)  # type: ignore[arg-type]
    training, held = halves()
    settings = {"validation": held, "seeds": (0, 1), "kl_warmup": 0.0}
    run = train("vae", training, epochs=12, patience=2, **settings)
    # the first member's best is epoch 6, the second's epoch 8: two epochs later nobody hopes any more
    assert run.stopped == (6, 8)
    assert run.history["epoch"].max() == 10
    patient = train("vae", training, epochs=12, patience=6, **settings)
    assert patient.stopped == (6, 8)
    assert patient.history["epoch"].max() == 12


def test_a_stopped_member_does_not_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    script = [[5.0, 9.0], [6.0, 8.0], [6.0, 7.0], [6.0, 6.0], [0.0, 5.0], [0.0, 4.0], [0.0, 3.0]]
    scripted(monkeypatch, script)
    training, held = halves()
    run = train("vae", training, validation=held, seeds=(0, 1), epochs=7, patience=2, kl_warmup=0.0)
    assert run.stopped == (1, 7)  # its loss of 0 in epoch 5 comes too late
    assert run.losses[0] == 5.0


def test_while_the_kl_warms_up_the_best_is_yet_to_come(monkeypatch: pytest.MonkeyPatch) -> None:
    scripted(monkeypatch, [[1.0], [2.0], [30.0], [4.0], [40.0], [50.0], [60.0], [60.0]])
    training, held = halves()
    run = train("vae", training, validation=held, epochs=8, kl_warmup=0.5, patience=2)
    assert run.stopped[0] == 4  # the warm-up ends after four epochs of eight
    assert run.history["epoch"].max() == 6
    assert run.losses[0] == pytest.approx((1 + 2 + 30 + 4) / 4)


def test_without_validation_the_last_epoch_is_kept() -> None:
    run = train("vae", seeds=(0, 1), epochs=3)
    assert run.stopped == (3, 3)


def test_the_validation_loss_is_the_bound_of_the_held_out_cells_with_the_same_noise_each_time() -> None:
    training, held = halves()
    run = train("vae", training, validation=held, epochs=2, lr=1e-12, seeds=(0, 1))
    values = run.history.set_index(["epoch", "seed"])
    for seed in (0, 1):
        for name in ("loss", "reconstruction", "kl"):
            column = values[f"validation_{name}"]
            assert column[1, seed] == pytest.approx(column[2, seed], rel=1e-6)
    model, guide = run.member(0)
    noise = torch.randn((1, 25, 3), generator=torch.Generator().manual_seed(_mixed(0, 0)))
    with torch.no_grad():
        expected = System(model, guide, Objective())(held.batch(), {"z": noise})
    assert run.schema.cells == 75
    assert values["validation_loss"][2, 0] == pytest.approx(float(expected["loss"]), rel=1e-5)
    assert values["validation_kl"][2, 0] == pytest.approx(float(expected["kl"]), rel=1e-5)


def test_validation_does_not_change_the_training() -> None:
    training, held = halves()
    alone, watched = (train("vae", training, validation=v, epochs=3) for v in (None, held))
    np.testing.assert_array_equal(alone.history["loss"], watched.history["loss"])


# ---------------------------------------------------------------------- failures
class Breaking(nn.Module):
    """A decoder whose output is NaN from its n-th evaluation on."""

    def __init__(self, net: nn.Module, after: int) -> None:
        super().__init__()
        self.net, self.after, self.count = net, after, 0

    def forward(self, c: Tensor) -> Tensor:
        self.count += 1
        out: Tensor = self.net(c)
        return out * torch.nan if self.count > self.after else out


def test_a_loss_that_is_not_finite_is_explained() -> None:
    model, guide = make("vae", cells().schema)
    model.likelihoods[0].net = Breaking(model.likelihoods[0].net, after=1 + 3 + 1)
    with pytest.raises(TrainingError) as error:
        fit(model, guide, cells(), seeds=(8,), epochs=5, batch_size=40, progress=False)
    message = str(error.value)
    assert "not finite in epoch 2, member with seed 8, batch of rows [" in message  # 3 steps an epoch
    assert "sites at fault: ['x']" in message
    assert "parameters at fault: none" in message
    assert "Lower the learning rate, clip gradients harder, or look at these rows" in message


def test_a_training_that_blows_up_is_explained() -> None:
    with pytest.raises(TrainingError, match=r"not finite in epoch 1, member with seed 0, .*sites at fault: \['"):
        train("environment_vae", lr=1e30, clip=None, epochs=3)


def test_the_member_at_fault_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    noise = Ensemble.noise

    def broken(self: Ensemble, *args: Any) -> dict[str, Tensor]:
        drawn = noise(self, *args)
        drawn["z"][1] = torch.nan
        return drawn

    monkeypatch.setattr(Ensemble, "noise", broken)
    with pytest.raises(TrainingError, match=r"epoch 1, member with seed 6, .* at fault: none \(the gradient alone\)"):
        train("vae", seeds=(5, 6, 7))


def test_the_parameter_at_fault_is_named() -> None:
    model, guide = make("vae", cells().schema)
    with torch.no_grad():
        model.likelihoods[0].raw_scale[3] = torch.inf
    with pytest.raises(TrainingError, match=r"parameters at fault: \['model.likelihoods.0.raw_scale'\]"):
        fit(model, guide, cells(), fresh=False, epochs=1, progress=False)


def test_a_guide_that_forgets_a_site_is_refused() -> None:
    model, _ = make("vae", cells().schema)

    class Forgetful(nn.Module):
        def forward(self, batch: Any) -> None:
            with batch.plate():
                pyro.sample("w", pyro.distributions.Normal(0.0, 1.0))

    with pytest.raises(ModelError, match=r"the guide has no site 'z'"):
        fit(model, Forgetful(), cells(), epochs=1, progress=False)


def test_a_model_of_other_data_is_refused() -> None:
    model, guide = make("vae", cells().schema)
    fewer = cells().subset(np.arange(10))
    narrow = EnvironmentDataset(
        **{**{n: getattr(fewer, n) for n in fewer.__dataclass_fields__}, "x": fewer.x[:, :5], "var": fewer.var[:5]}
    )
    with pytest.raises(ModelError, match=r"the first evaluation of the model failed: .*\(5\) must match .*\(8\)"):
        fit(model, guide, narrow, epochs=1, progress=False)


def test_invalid_parameters_of_a_distribution_are_refused_in_the_first_evaluation() -> None:
    model, guide = make("vae", cells().schema)
    model.likelihoods[0].floor = -50.0
    with pytest.raises(ModelError, match=r"the first evaluation of the model failed: .*scale"):
        fit(model, guide, cells(), epochs=1, progress=False)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epochs": 0}, "epochs = 0: give a positive number"),
        ({"batch_size": -1}, "batch_size = -1: give a positive number"),
        ({"lr": 0.0}, r"lr = 0\.0: give a positive number"),
        ({"lr": math.nan}, "lr = nan: give a positive number"),
        ({"critic_steps": 0}, "critic_steps = 0: give a positive number"),
        ({"schedule": "linear"}, "unknown schedule 'linear': use one of constant, cosine"),
        ({"temperature": 0.0}, r"temperature 0\.0: give positive numbers"),
        ({"temperature": (1.0, -1.0)}, r"temperature \(1\.0, -1\.0\): give positive numbers"),
        ({"kl_warmup": 1.5}, r"kl_warmup = 1\.5: give a share of the epochs, between 0 and 1"),
        ({"kl_warmup": -0.1}, r"kl_warmup = -0\.1: give a share"),
        ({"weight_decay": -1.0}, r"weight_decay = -1\.0: give 0 or a positive number"),
        ({"clip": -1.0}, r"clip = -1\.0: give a positive number, or None for none"),
        ({"patience": 3}, "patience needs validation cells: pass validation=, or leave patience out"),
        ({"seeds": ()}, r"seeds \[\]: give at least one, each once"),
        ({"seeds": (1, 2, 1)}, r"seeds \[1, 2, 1\]: give at least one, each once"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        train("vae", **settings)


def test_no_patience_at_all_is_refused() -> None:
    training, held = halves()
    with pytest.raises(ModelError, match="patience = 0: give a positive number, or None for none"):
        train("vae", training, validation=held, patience=0)


def test_no_cells_are_refused() -> None:
    model, guide = make("vae", cells().schema)
    with pytest.raises(DataError, match="there are no training cells: the data set is empty"):
        fit(model, guide, cells().subset(np.zeros(100, dtype=bool)), progress=False)


def test_validation_cells_of_other_data_are_refused() -> None:
    renamed = cells().var.rename(index={"gene_0": "other"})
    other = EnvironmentDataset(**{**{n: getattr(cells(), n) for n in cells().__dataclass_fields__}, "var": renamed})
    with pytest.raises(DataError, match="the validation cells have other genes than the training cells: split both"):
        train("vae", validation=other)
    with pytest.raises(DataError, match="the validation cells have other features than the training cells"):
        train("vae", validation=cells().with_representation("one-hot"))


# ---------------------------------------------------------------------- data that do not fit, sparse data
def test_data_too_large_for_the_device_are_fed_batch_by_batch_with_the_same_result(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    training, held = halves()
    settings = {"epochs": 3, "seeds": (0, 1), "batch_size": 16, "validation": doubles(held), "progress": False}

    def run() -> Run:
        model, guide = make("structured_environment_vae", training.schema)
        return fit(model.double(), guide.double(), doubles(training), **settings)  # type: ignore[arg-type]

    resident = run()
    monkeypatch.setattr(feeding, "_RESIDENT_BYTES", 0)
    assert Feeder(training, torch.device("cpu")).resident is None
    fed = run()
    for name, value in resident.parameters.items():
        torch.testing.assert_close(fed.parameters[name], value, rtol=1e-9, atol=1e-10)
    columns = ["loss", "kl", "validation_loss"]
    np.testing.assert_allclose(fed.history[columns], resident.history[columns], rtol=1e-9)


@pytest.mark.parametrize("size", [30, 3])  # more cells in a batch than there are environments, and fewer
def test_both_ways_feed_the_same_cells(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    data, order = cells("negative-binomial"), np.random.default_rng(0).permutation(100)
    monkeypatch.setattr(feeding, "_RESIDENT_BYTES", 0)
    fed = list(Feeder(data, torch.device("cpu")).batches(size, order))
    monkeypatch.undo()
    resident = list(Feeder(data, torch.device("cpu")).batches(size, order))
    assert [len(batch) for batch in resident] == [size] * (100 // size) + [100 % size]
    assert all(
        len(batch.r) == (4 if size == 30 else 8) for batch in resident
    )  # a multiple of 8 where some are left out
    for a, b in zip(fed, resident, strict=True):
        assert a.x is not None
        assert a.size is not None
        for name in ("index", "env", "e", "x", "size"):
            assert torch.equal(getattr(a, name), getattr(b, name)), name
        assert torch.equal(a.covariates["plate"], b.covariates["plate"])
        assert torch.equal(a.perturbed[a.row], b.perturbed[b.row])
        assert a.total == b.total == 100


@pytest.mark.parametrize("resident", [True, False])
def test_sparse_expression_is_trained_on_as_dense_is(monkeypatch: pytest.MonkeyPatch, resident: bool) -> None:
    if not resident:
        monkeypatch.setattr(feeding, "_RESIDENT_BYTES", 0)
    dense = cells("negative-binomial")
    fields = {name: getattr(dense, name) for name in dense.__dataclass_fields__}
    sparse = EnvironmentDataset(**{**fields, "x": sp.csr_matrix(np.asarray(dense.x))})
    one, other = train(data=dense), train(data=sparse)
    for name, value in one.parameters.items():
        torch.testing.assert_close(other.parameters[name], value, rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------------- checkpoints
class Interrupted(Exception):
    """Stands for a machine that goes away."""


def interrupt(patch: pytest.MonkeyPatch, epoch: int, how: type[BaseException] = Interrupted) -> None:
    """Make a training break off in the middle of an epoch."""
    step = Trainer._step

    def stepping(self: Trainer, *args: Any) -> Any:
        result = step(self, *args)
        if self.epoch == epoch - 1:
            raise how  # the parameters have changed, the epoch is not over
        return result

    patch.setattr(Trainer, "_step", stepping)


LONG: dict[str, Any] = {
    "epochs": 8,
    "seeds": (0, 1),
    "kl_warmup": 0.75,
    "schedule": "cosine",
    "temperature": (2.0, 0.2),
    "lr": 0.01,
    "checkpoint_every": 2,
}


def assert_identical(one: Run, other: Run) -> None:
    assert one.parameters.keys() == other.parameters.keys()
    for name, value in one.parameters.items():
        assert torch.equal(value, other.parameters[name]), name
    pd.testing.assert_frame_equal(
        one.history.drop(columns="seconds"), other.history.drop(columns="seconds"), check_exact=True
    )
    assert one.losses == other.losses
    assert one.stopped == other.stopped
    for name, buffer in one.model.named_buffers():
        assert torch.equal(buffer, dict(other.model.named_buffers())[name]), name


@pytest.mark.parametrize("how", [Interrupted, KeyboardInterrupt])
def test_an_interrupted_training_goes_on_bit_by_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: type[BaseException]
) -> None:
    whole = train("environment_vae", **LONG)
    with monkeypatch.context() as patch:
        interrupt(patch, 6, how)  # the last save is after epoch 4
        with pytest.raises(how):
            train("environment_vae", checkpoint=tmp_path, **LONG)
    torch.manual_seed(77)
    resumed = train("environment_vae", checkpoint=tmp_path, **LONG)
    assert list(resumed.history["epoch"].unique()) == list(range(1, 9))
    assert_identical(whole, resumed)


def test_so_does_one_with_validation_patience_and_critics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training, held = halves()

    def run(**options: Any) -> Run:
        torch.manual_seed(3)
        objective = Objective(penalties={"critic": Adversary(nn.Linear(3, 4), weight=0.1)}, particles=2)
        return train("vae", training, validation=held, objective=objective, patience=3, **{**LONG, **options})

    whole = run()
    with monkeypatch.context() as patch:
        interrupt(patch, 6)
        with pytest.raises(Interrupted):
            run(checkpoint=tmp_path)
    assert_identical(whole, run(checkpoint=tmp_path))


def test_a_finished_training_is_not_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = train("environment_vae", checkpoint=tmp_path, **LONG)
    monkeypatch.setattr(Trainer, "_one_epoch", lambda self: pytest.fail("an epoch was run"))
    again = train("environment_vae", checkpoint=tmp_path, **LONG)
    assert_identical(whole, again)
    assert float(again.model.prior.sparsifier.temperature) == pytest.approx(0.2)  # type: ignore[arg-type,union-attr]


def test_a_training_stopped_by_patience_is_not_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scripted(monkeypatch, [[1.0], [2.0], [3.0], [4.0], [5.0]])
    training, held = halves()
    settings = {"validation": held, "epochs": 5, "patience": 2, "kl_warmup": 0.0, "checkpoint": tmp_path}
    assert train("vae", training, **settings).history["epoch"].max() == 3
    assert train("vae", training, **settings).history["epoch"].max() == 3


def test_more_epochs_go_on_from_where_a_training_ended(tmp_path: Path) -> None:
    settings = {"kl_warmup": 0.0, "checkpoint": tmp_path}
    train("vae", epochs=2, **settings)
    longer = train("vae", epochs=4, **settings)
    straight = train("vae", epochs=4, kl_warmup=0.0)
    assert_identical(straight, longer)


def test_a_checkpoint_is_a_run_that_can_be_loaded(tmp_path: Path) -> None:
    from pyro_scm.recipes import load

    run = train("environment_vae", checkpoint=tmp_path, **LONG)
    loaded = load(tmp_path)
    assert_identical(run, loaded)
    pd.testing.assert_frame_equal(run.history, loaded.history, check_exact=True)


def test_saves_are_made_every_so_many_epochs_and_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved: list[int] = []
    save = Trainer.save

    def counted(self: Trainer, folder: Path) -> None:
        saved.append(self.epoch)
        save(self, folder)

    monkeypatch.setattr(Trainer, "save", counted)
    train("vae", epochs=5, checkpoint=tmp_path, checkpoint_every=2)
    assert saved[:3] == [2, 4, 5]
    assert set(saved[3:]) <= {5}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"lr": 0.02}, r"holds a training with lr = 0\.01, asked for 0\.02: use the same settings, or another folder"),
        ({"seeds": (0, 2)}, r"with seeds = \[0, 1\], asked for \[0, 2\]"),
        ({"batch_size": 20}, "with batch_size = 40, asked for 20"),
        ({"temperature": (2.0, 0.1)}, r"with temperature = \[2\.0, 0\.2\], asked for \[2\.0, 0\.1\]"),
        ({"temperature": None}, r"with temperature = \[2\.0, 0\.2\], asked for None"),
        ({"clip": None}, r"with clip = 100\.0, asked for None"),
        ({"objective": Objective(kl_weight=2.0)}, r"with kl_weight = 1\.0, asked for 2\.0"),
        ({"objective": Objective(particles=2)}, "with particles = 1, asked for 2"),
        (
            {"objective": Objective(penalties={"a": Adversary(nn.Linear(3, 4), weight=0.5)})},
            r"with penalties = \{\}, asked for \{'a': 0\.5\}",
        ),
    ],
)
def test_a_checkpoint_of_other_settings_is_refused(tmp_path: Path, changed: dict[str, Any], message: str) -> None:
    settings = {**LONG, "epochs": 1}
    train("environment_vae", checkpoint=tmp_path, **settings)
    with pytest.raises(CheckpointError, match=message):
        train("environment_vae", checkpoint=tmp_path, **{**settings, **changed})


def test_a_checkpoint_of_other_cells_is_refused(tmp_path: Path) -> None:
    train("vae", epochs=1, checkpoint=tmp_path)
    training, held = halves()
    with pytest.raises(CheckpointError, match="with cells = 100, asked for 75"):
        train("vae", training, epochs=1, checkpoint=tmp_path)
    with pytest.raises(CheckpointError, match="with validation = None, asked for 25"):
        train("vae", validation=held, epochs=1, checkpoint=tmp_path)


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    train("structured_translation_vae", epochs=1, checkpoint=tmp_path)
    message = r"holds a training of another model \(parameter model\.scm\.weight differs\)"
    with pytest.raises(CheckpointError, match=message):
        train("translation_vae", epochs=1, checkpoint=tmp_path)  # lacks a parameter that was saved
    with pytest.raises(CheckpointError, match="of another model"):
        train("environment_vae", epochs=1, checkpoint=tmp_path)


def test_a_folder_without_a_training_is_started_in(tmp_path: Path) -> None:
    run = train("vae", epochs=1, checkpoint=tmp_path / "deep" / "folder")
    assert len(run.history) == 1
    assert (tmp_path / "deep" / "folder" / "manifest.json").is_file()
    assert (tmp_path / "deep" / "folder" / "training" / "manifest.json").is_file()


def test_bfloat16_changes_losses_by_less_than_their_noise() -> None:
    adata = synthetic.simulate(latent=3, genes=40, environments=5, cells=60, seed=2)
    screen = synthetic.dataset(adata)
    losses = {}
    for precision in ("float32", "bfloat16"):
        model = environment_vae(screen.schema, latent=3)
        run = fit(model, amortise(model, screen), screen, seeds=(0, 1, 2), epochs=12, precision=precision)
        assert all(p.dtype == torch.float32 for p in run.parameters.values())
        losses[precision] = run.history.groupby("seed")["loss"].last().to_numpy()
    spread = losses["float32"].std() + 0.01 * abs(losses["float32"].mean())
    assert np.abs(losses["bfloat16"] - losses["float32"]).mean() < spread
    assert not np.array_equal(losses["bfloat16"], losses["float32"])
    with pytest.raises(ModelError, match=r"unknown precision 'half': use one of float32, bfloat16"):
        fit(model, amortise(model, screen), screen, precision="half")


# ---------------------------------------------------------------------- members with settings of their own
def test_members_may_differ_in_settings_and_are_what_they_would_be_alone() -> None:
    own = {"lr": [0.01, 0.003, 0.01], "kl_weight": [1.0, 0.3, 2.0], "weight_decay": [0.0, 0.5, 0.1]}
    own["temperature"] = [0.5, (4.0, 0.1), 1.0]  # type: ignore[list-item]
    settings: dict[str, Any] = {"epochs": 4, "schedule": "cosine"}
    together = train(seeds=(3, 3, 5), **settings, **own)
    for k, seed in enumerate((3, 3, 5)):
        alone = train(seeds=(seed,), **settings, **{name: values[k] for name, values in own.items()})
        for name, value in alone.parameters.items():
            torch.testing.assert_close(together.parameters[name][k], value[0], rtol=2e-3, atol=2e-5, msg=name)
        mine = together.history[together.history["member"] == k]
        np.testing.assert_allclose(mine["loss"], alone.history["loss"], rtol=1e-4)
        np.testing.assert_allclose(mine["lr"], alone.history["lr"], rtol=1e-12)
    parameters = together.parameters["model.likelihoods.0.net.0.weight"]
    assert float((parameters[0] - parameters[1]).abs().max()) > 1e-3


def test_a_grid_is_every_combination_and_the_run_tells_which_is_which(tmp_path: Path) -> None:
    arguments = grid(seeds=(0, 1), lr=(0.01, 0.001), temperature=(1.0, (2.0, 0.5)))
    assert arguments["seeds"] == [0, 0, 0, 0, 1, 1, 1, 1]
    assert arguments["lr"] == [0.01, 0.01, 0.001, 0.001] * 2
    run = train(epochs=1, **arguments)
    summary = run.summary()
    assert list(summary) == ["seed", "loss", "epoch", "lr", "temperature"]
    assert list(summary["lr"]) == arguments["lr"]
    assert list(summary["temperature"]) == [(1.0, 1.0), (2.0, 0.5)] * 4
    temperature = run.parameters["model.prior.sparsifier.temperature"]
    assert temperature.tolist() == pytest.approx([1.0, 2.0] * 4)
    run.save(tmp_path)
    again = load(tmp_path)
    assert again.settings == run.settings
    assert again.summary().equals(summary)
    assert list(train(epochs=1).summary()) == ["seed", "loss", "epoch"]


def test_a_grid_varies_what_members_may_have_of_their_own() -> None:
    with pytest.raises(ModelError, match="epochs is the same for all members: a grid may vary lr, kl_weight"):
        grid(epochs=(1, 2))
    with pytest.raises(ModelError, match="lr: 2 values for 3 members"):
        train(seeds=(0, 1, 2), lr=(0.1, 0.2))
    with pytest.raises(ModelError, match="give at least one, each once"):
        train(seeds=(0, 0), lr=(0.1, 0.1))
    with pytest.raises(ModelError, match=r"kl_weight = .*give 0 or a positive number"):
        train(seeds=(0, 1), kl_weight=(0.1, -1.0))
