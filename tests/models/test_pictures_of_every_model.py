"""Dictionaries, dose-response curves, combinations and scatters make sense for every model whose environments act."""

import functools
from typing import Any

import numpy as np
import pytest
import torch

from pyro_scm import recipes
from pyro_scm.agreement import scatter
from pyro_scm.combinations import interactions
from pyro_scm.conditions import novelty
from pyro_scm.data.dataset import EnvironmentDataset
from pyro_scm.dictionaries import dictionary
from pyro_scm.doses import dose_response
from pyro_scm.infer import fit
from pyro_scm.run import Run
from tests.compositions import cells
from tests.screens import SECOND_SEED

PAIR = "A+B 10+10 uM"
FIRST_SEED = (
    "conditional_vae", "environment_vae", "translation_vae", "structured_environment_vae",
    "structured_translation_vae", "adversarial_prior_ae",
)  # fmt: skip
MODELS = (*SECOND_SEED, *FIRST_SEED)
UNMOVED = ("conditional_vae", "adversarial_prior_ae")  # environments act on the decoder, or on nothing


@functools.cache
def fitted(name: str) -> tuple[Run, EnvironmentDataset]:
    kinds: dict[str, Any] = {"chemcpa": "molecules", "cpa": "multi-dose", "multicpa": "multi-dose"}
    screen = cells(kinds.get(name, "multi-hot"), counts=name == "multicpa")
    training = screen.subset(screen.env != screen.environment_index(PAIR)[0])
    torch.manual_seed(0)
    known = recipes.recipe(name).options
    own = {k: v for k, v in {"latent": 3, "hidden": (6,), "guide_hidden": (6,)}.items() if k in known}
    model, guide = recipes.make(name, training.schema, **own)
    objective = recipes.objective(name, model, training)
    steps = recipes.recipe(name).critic_steps
    run = fit(model, guide, training, objective=objective, seeds=(0, 1), epochs=1, critic_steps=steps, progress=False)
    return run, screen


@pytest.mark.parametrize("name", [n for n in MODELS if n not in UNMOVED])
def test_dictionaries(name: str) -> None:
    run, _ = fitted(name)
    found = dictionary(run).kind("perturbation")
    assert found.names == ["A", "B", "C"]
    assert np.isfinite(found.vectors).all()
    assert (found.neighbours(1)["cosine"].abs() <= 1 + 1e-9).all()


@pytest.mark.parametrize("name", MODELS)
def test_curves_combinations_and_scatters(name: str) -> None:
    run, screen = fitted(name)
    curves = dose_response(run, screen, ["A"], doses=[0.5, 10.0], references=20, hill=None).curves
    assert np.isfinite(curves["value"]).all()
    pair = interactions(run, screen, references=20, bootstraps=10).scores.loc[PAIR]
    assert np.isfinite(pair["observed_synergy"])
    assert np.isfinite(pair["synergy"]) == (name != "adversarial_prior_ae")  # without any change nothing can be said
    assert np.isfinite(scatter(run, screen, references=20).genes["predicted"]).all()
    assert novelty(run, PAIR)["nearest"].iloc[0] in ("A 10 uM", "B 10 uM")
