"""The models of the suite that a table on one kind of molecule compares."""

from collections.abc import Mapping, Sequence
from typing import Any

from pyro_scm import recipes

__all__ = ["MODELS", "suite"]

_DENSE = {"sparsity": "dense", "environment_hidden": ()}

MODELS: dict[str, dict[str, Any]] = {
    "conditional_vae": {},
    "environment_vae": {**_DENSE, "scale": False},
    "translation_vae": _DENSE,
    "structured_environment_vae": {**_DENSE, "scale": False},
    "structured_translation_vae": _DENSE,
    "cpa": {},
    "scgen": {},
    "sams_vae": {},
    "svae_plus": {},
    "discrepancy_vae": {"environment_hidden": ()},
    "latent_additive": {"environment_hidden": ()},
    "decoder_only": {"environment_hidden": ()},
}
"""Models by name, with options for few environments: effects are linear in what describes an environment, for networks
have too little to learn from, and dense, for sparsity helps to name latents and not to predict."""


def suite(names: Sequence[str] = (), covariates: Sequence[str] = (), **options: Any) -> dict[str, dict[str, Any]]:
    """Options of `pyro_scm.compare` for several models: those of `MODELS`, and of `options` those that a model has.

    Args:
        names: of models; all by default.
        covariates: of cells, for the models whose latents have effects of covariates.
        **options: of models and guides, such as latent, hidden and guide_hidden.
    """
    every: Mapping[str, Any] = {**options, "covariates": tuple(covariates)}
    made = {}
    for name in names or MODELS:
        own = recipes.recipe(name).options
        made[name] = {k: v for k, v in every.items() if k in own or k == "guide_hidden"} | MODELS[name]
    return made
