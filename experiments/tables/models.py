"""The models of the suite that a table compares, and their options."""

from collections.abc import Sequence
from typing import Any

from pyro_scm import recipes

__all__ = ["FEW", "MANY", "UNSEEN", "suite"]

_DENSE = {"sparsity": "dense", "environment_hidden": ()}

FEW: dict[str, dict[str, Any]] = {
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
"""For tens of environments: effects are linear in what describes one, for networks have too little to learn from, and
dense, for sparsity helps to name latents and not to predict."""

MANY: dict[str, dict[str, Any]] = {
    "conditional_vae": {},
    "environment_vae": {"scale": False},
    "structured_environment_vae": {"scale": False},
    "translation_vae": {},
    "structured_translation_vae": {},
    "cpa": {"doser": "sigmoid"},
    "chemcpa": {},
    "scgen": {},
    "sams_vae": {},
    "svae_plus": {},
    "discrepancy_vae": {},
    "latent_additive": {},
    "decoder_only": {},
}
"""For hundreds of drugs and doses."""

UNSEEN = tuple(name for name in MANY if name != "scgen")
"""Models that have something to say of a drug that training has not seen; `scgen` has a vector for each one it has."""


def suite(every: dict[str, dict[str, Any]], names: Sequence[str] = (), **options: Any) -> dict[str, dict[str, Any]]:
    """Models by name, with those of these options that each has.

    Args:
        every: `FEW` or `MANY`.
        names: of models; all by default.
        **options: of recipes, such as shortcut and covariates; what `every` says of a model goes before them.
    """
    made = {}
    for name in names or every:
        own = recipes.recipe(name).options
        made[name] = {k: v for k, v in options.items() if k in own} | every[name]
    return made
