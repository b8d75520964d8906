"""Every named model with every way for its guide to read the environment: not at all, beside x, or unit by unit."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from guides import AmortisedGuide
from pyro_scm import query, recipes
from pyro_scm.infer import fit
from pyro_scm.nn import FiLM, Joint
from tests.screens import cells, make, objective

CONDITIONINGS: dict[str, dict[str, Any]] = {
    "none": {"inputs": ("x",)},
    "concatenated": {"inputs": ("x", "e"), "conditioning": "concatenate"},
    "film": {"inputs": ("x", "e"), "conditioning": "film"},
}
EVERY = [(name, how) for name, recipe in recipes.RECIPES.items() if recipe.family != "prior" for how in CONDITIONINGS]
ANSWERS = ("z", "factual_c", "c", "factual_x", "x")


def trained(name: str, how: str, epochs: int = 8) -> Any:
    data = cells()
    model, guide = make(name, data.schema, **CONDITIONINGS[how])
    return fit(
        model, guide, data, seeds=(0, 1), epochs=epochs, batch_size=25, lr=1e-2, kl_warmup=0.0, progress=False,
        objective=objective(name, model), critic_steps=recipes.RECIPES[name].critic_steps,
    )  # fmt: skip


@pytest.mark.parametrize(("name", "how"), EVERY)
def test_a_model_trains_answers_and_comes_back_from_disk(name: str, how: str, tmp_path: Path) -> None:
    run = trained(name, how)
    net = run.guide.local["z"].net
    assert isinstance(net, FiLM if how == "film" else Joint)
    losses = run.history.pivot(index="epoch", columns="member", values="loss")
    assert np.isfinite(losses.to_numpy()).all()
    assert (losses.iloc[-1] < losses.iloc[0] - 0.2).all()  # nats per cell of 8 genes

    some = cells().subset(np.arange(0, 100, 9))
    asked: dict[str, Any] = {"do": {"c_1": lambda c: c + 3.0}, "environment": "env_2"}
    worlds = query.counterfactual(run, some, **asked)
    simulated = query.predict(run, "env_1", cells=5)
    assert worlds.x.shape == (2, 1, 12, 8)
    assert simulated.shape == (2, 5, 8)
    assert all(np.isfinite(getattr(worlds, part)).all() for part in ANSWERS)
    assert np.isfinite(simulated).all()
    assert np.abs(worlds.effect).max() > 0.1  # the intervention is seen in the genes

    run.save(tmp_path)
    loaded = recipes.load(tmp_path)
    assert isinstance(loaded.guide, AmortisedGuide)
    assert loaded.guide.spec == run.guide.spec
    again = query.counterfactual(loaded, some, **asked)
    for part in ANSWERS:
        np.testing.assert_array_equal(getattr(worlds, part), getattr(again, part))
    np.testing.assert_array_equal(query.predict(loaded, "env_1", cells=5), simulated)


@pytest.mark.parametrize("how", CONDITIONINGS)
def test_only_a_guide_that_is_told_the_environment_uses_it(how: str) -> None:
    """The same expression in two environments: the posterior mean differs exactly where the guide reads e."""
    data = cells()
    _, guide = make("environment_vae", data.schema, **CONDITIONINGS[how])
    encoder = guide.local["z"]
    batch = data.batch(np.arange(10))
    first, second = (encoder(run_in(batch, e)).mean.detach().numpy() for e in (1, 2))
    assert np.array_equal(first, second) == (how == "none")


def run_in(batch: Any, e: int) -> Any:
    """The same observed cells, said to be in another environment."""
    return batch.under(torch.as_tensor(cells().representation[e]), env=e)
