from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pyro_scm import feeding, recipes, recording
from pyro_scm.objectives import Adversary, ImportanceWeighted, Objective
from pyro_scm.recipes import RECIPES
from pyro_scm.recording import Recorded
from tests.screens import cells, make, train

OFTEN = recording._OFTEN


def replayed(function: Any, *calls: dict[str, Tensor]) -> tuple[Recorded, list[dict[str, Tensor]]]:
    """A function, recorded at the first call's shapes, and its results at the others."""
    recorded = Recorded(function)
    for _ in range(OFTEN + 2):
        recorded(calls[0])
    return recorded, [recorded(call) for call in calls[1:]]


def test_a_replay_is_the_function_itself() -> None:
    runs = 0
    net = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1))

    def function(arguments: dict[str, Tensor]) -> dict[str, Tensor]:
        nonlocal runs
        runs += 1
        weights = {n.removeprefix("w "): v.requires_grad_() for n, v in arguments.items() if n.startswith("w ")}
        loss = torch.func.functional_call(net, weights, (arguments["x"],)).square().sum()
        return {"loss": loss.detach(), "slope": torch.autograd.grad(loss, weights["0.weight"])[0]}

    def call(seed: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        values = {f"w {n}": torch.randn(p.shape, generator=generator) for n, p in net.named_parameters()}
        return {"x": torch.randn(4, 3, generator=generator), **values}

    recorded, (found,) = replayed(function, call(0), call(1))
    assert len(recorded.programs) == 1
    before = runs
    again = recorded(call(1))
    assert runs == before
    expected = function(call(1))
    for name, value in expected.items():
        assert torch.equal(found[name], value)
        assert torch.equal(again[name], value)
        assert not found[name].requires_grad


def test_shapes_have_recordings_of_their_own_and_only_so_many() -> None:
    recorded = Recorded(lambda a: {"y": a["x"] * 2})
    for n in range(1, recording._SHAPES + 3):
        for _ in range(OFTEN + 3):
            assert recorded({"x": torch.ones(n)})["y"].shape == (n,)
    assert len(recorded.programs) == recording._SHAPES


def test_rare_shapes_are_not_recorded() -> None:
    recorded = Recorded(lambda a: {"y": a["x"] * 2})
    for _ in range(OFTEN - 1):
        recorded({"x": torch.ones(2)})
    assert not recorded.programs


@pytest.mark.parametrize(
    "function",
    [
        lambda a: {"y": a["x"] * 2 if bool(a["x"].sum() > 0) else a["x"]},  # a branch on a value
        lambda a: {"y": a["x"][: int((a["x"] > 0).sum())]},  # a shape that depends on values
        lambda a: {"y": a["x"] + torch.randn(3)},  # a random number
    ],
)
def test_what_depends_on_values_or_chance_is_not_replayed(function: Any) -> None:
    recorded, _ = replayed(function, {"x": torch.ones(3)})
    assert not recorded.programs


def test_what_depends_on_more_than_its_arguments_is_noticed_at_the_next_call() -> None:
    count = 0

    def counting(arguments: dict[str, Tensor]) -> dict[str, Tensor]:
        nonlocal count
        count += 1
        return {"y": arguments["x"] * count}

    recorded = Recorded(counting)
    for _ in range(OFTEN + 5):
        before = count
        assert float(recorded({"x": torch.ones(1)})["y"]) > before
    assert not recorded.programs


# ---------------------------------------------------------------------- trainings
LONG: dict[str, Any] = {"epochs": 40, "batch_size": 50, "lr": 0.01, "seeds": (0, 1)}


def both_ways(monkeypatch: pytest.MonkeyPatch, name: str, **settings: Any) -> int:
    """Train with and without recordings: the same to the last bit. Returns how many steps were replayed."""
    replays = 0
    record = recording._record

    def counted(function: Any, arguments: Any) -> Any:
        program = record(function, arguments)
        if program is None:
            return None

        def replay(given: Any) -> Any:
            nonlocal replays
            replays += 1
            return program(given)

        return replay

    monkeypatch.setattr(recording, "_record", counted)
    one = train(name, **{**LONG, **settings})
    monkeypatch.setattr(recording, "_OFTEN", 10**9)
    other = train(name, **{**LONG, **settings})
    for parameter, value in one.parameters.items():
        assert torch.equal(value, other.parameters[parameter]), parameter
    assert one.history.drop(columns="seconds").equals(other.history.drop(columns="seconds"))
    return replays


@pytest.mark.parametrize("name", RECIPES)
def test_recorded_steps_train_every_model_as_its_program_does(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    assert both_ways(monkeypatch, name) == 80 - OFTEN + 1


def test_schedules_are_arguments_of_the_recording(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"kl_warmup": 1.0, "temperature": (4.0, 0.1), "schedule": "cosine", "kl_weight": (1.0, 2.0)}
    assert both_ways(monkeypatch, "environment_vae", **settings) > 30


def test_both_sides_are_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    adversary = Adversary(nn.Linear(3, 4), weight=0.1)
    steps = both_ways(monkeypatch, "vae", objective=Objective(penalties={"a": adversary}), critic_steps=2)
    assert steps == (80 - OFTEN + 1) + (160 - OFTEN + 1)


@pytest.mark.parametrize("options", [{"adversary": 1.0, "warmup": 0.5}, {"independence": 1.0}])
def test_what_compositional_models_are_trained_with_is_recorded_too(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, float]
) -> None:
    model, _ = make("cpa", cells().schema)
    objective = recipes.objective("cpa", model, cells(), **options)
    steps = both_ways(monkeypatch, "cpa", objective=objective, critic_steps=1)
    assert steps == (80 - OFTEN + 1) * (2 if objective.adversaries else 1)


@pytest.mark.parametrize("settings", [{"precision": "bfloat16"}, {"objective": ImportanceWeighted(3)}])
def test_other_settings_are_recorded_too(monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]) -> None:
    assert both_ways(monkeypatch, "structured_environment_vae", **settings) > 30


@pytest.mark.parametrize("largest", [3, 300])
def test_counts_are_recorded_too_for_which_genes_are_large_is_known(
    monkeypatch: pytest.MonkeyPatch, largest: int
) -> None:
    data = cells("negative-binomial")
    x = np.asarray(data.x).copy()
    x[7, 2] = largest
    settings = {"data": replace(data, x=x), "batch_size": 100, "epochs": 50, "seeds": (0,)}
    assert both_ways(monkeypatch, "environment_vae", **settings) > 0


def test_where_it_is_not_known_steps_with_counts_are_not_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which counts are beyond the tables depends on the batch."""
    monkeypatch.setattr(feeding, "_with_large", lambda cells, counts: cells)
    data = cells("negative-binomial")
    assert both_ways(monkeypatch, "environment_vae", data=data, batch_size=100, epochs=50, seeds=(0,)) == 0
