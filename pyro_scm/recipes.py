"""The composition table: model + guide by name. The only module of the package that imports `guides`."""

import importlib.util
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from guides import AmortisedGuide, amortise
from pyro_scm import models
from pyro_scm.batch import Schema
from pyro_scm.data.dataset import EnvironmentDataset
from pyro_scm.errors import CheckpointError, ModelError
from pyro_scm.model import LatentModel
from pyro_scm.objectives import Objective, adversarial_prior, compositional, discrepancy
from pyro_scm.run import Run

__all__ = ["RECIPES", "Recipe", "load", "make", "objective", "rebuild", "recipe"]


@dataclass(frozen=True)
class Recipe:
    """A model and the guide that suits it.

    Args:
        build: (schema, options) -> model.
        inputs: of the guide.
        family: of the guide.
        section: of the seed or paper that it comes from.
        objective: (model, training cells, options) -> what it must be trained with, where that is not the ELBO alone.
        critic_steps: see `pyro_scm.fit`.
    """

    build: Callable[..., LatentModel]
    inputs: tuple[str, ...] = ("x", "e")
    family: str = "normal"
    section: str = ""
    objective: Callable[..., Objective] | None = None
    critic_steps: int = 1

    @property
    def summary(self) -> str:
        """First line of the model's docstring: its generative program."""
        return (inspect.getdoc(self.build) or "").split("\n")[0]

    @property
    def options(self) -> dict[str, Any]:
        """Names and defaults of the model's options."""
        parameters = list(inspect.signature(self.build).parameters.values())[1:]
        return {p.name: p.default for p in parameters}


RECIPES: dict[str, Recipe] = {
    "ae": Recipe(models.ae, ("x",), "point", "6.5, figure 10"),
    "vae": Recipe(models.vae, ("x",), section="6.1"),
    "conditional_vae": Recipe(models.conditional_vae, section="4.6"),
    "environment_vae": Recipe(models.environment_vae, section="4.5"),
    "translation_vae": Recipe(models.translation_vae, section="4.8"),
    "structured_environment_vae": Recipe(models.structured_environment_vae, section="4.5, 4.9"),
    "structured_translation_vae": Recipe(models.structured_translation_vae, section="4.8, 4.9"),
    "adversarial_prior_ae": Recipe(
        models.adversarial_prior_ae, family="point", section="4.10", objective=adversarial_prior, critic_steps=5
    ),
    "cpa": Recipe(models.cpa, section="CPA", objective=compositional, critic_steps=2),
    "chemcpa": Recipe(models.chemcpa, section="chemCPA", objective=compositional, critic_steps=2),
    "multicpa": Recipe(models.multicpa, ("x", "y", "e"), section="MultiCPA", objective=compositional, critic_steps=2),
    "scgen": Recipe(models.scgen, ("x",), section="scGen"),
    "sams_vae": Recipe(models.sams_vae, section="SAMS-VAE"),
    "svae_plus": Recipe(models.svae_plus, section="sVAE+"),
    "discrepancy_vae": Recipe(models.discrepancy_vae, section="discrepancy-VAE", objective=discrepancy),
    "latent_additive": Recipe(models.latent_additive, ("x",), "reference", "PerturBench"),
    "decoder_only": Recipe(models.decoder_only, ("x",), "prior", "PerturBench"),
}


def recipe(name: str) -> Recipe:
    """A recipe by the name of a model, or from a file of the user's: ``"my_model.py:function"``.

    Raises:
        ModelError: no such model, file or function.
    """
    if name in RECIPES:
        return RECIPES[name]
    path, _, function = name.partition(":")
    if not path.endswith(".py"):
        raise ModelError(f"unknown model {name!r}: use one of {', '.join(RECIPES)}, or FILE.py:FUNCTION")
    if not Path(path).is_file():
        raise ModelError(
            f"{path}: no such file: give FILE.py:FUNCTION with a function (schema, options) -> LatentModel"
        )
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    build = getattr(module, function or Path(path).stem, None)
    if isinstance(build, Recipe):
        return build
    if not callable(build):
        raise ModelError(f"{path} has no function {function or Path(path).stem!r}: give FILE.py:FUNCTION")
    return Recipe(build)


def make(
    name: str,
    schema: Schema,
    *,
    guide_hidden: Sequence[int] = (128,),
    conditioning: str = "concatenate",
    inputs: Sequence[str] | None = None,
    family: str | None = None,
    **options: Any,
) -> tuple[LatentModel, AmortisedGuide]:
    """Model and guide by name.

    Args:
        name: see `recipe`.
        schema: of the training cells.
        guide_hidden: widths of the encoder's hidden layers.
        conditioning: see `guides.amortise`.
        inputs: of the guide; the recipe's own by default.
        family: of the guide, see `guides.amortise`; the recipe's own by default.
        **options: of the model.

    Raises:
        ModelError: unknown names or options.
    """
    found = recipe(name)
    unknown = [o for o in options if o not in found.options]
    if unknown:
        raise ModelError(f"model {name!r} has no option {', '.join(unknown)}: it has {', '.join(found.options)}")
    model = found.build(schema, **options)
    guide = amortise(
        model,
        schema,
        inputs=found.inputs if inputs is None else inputs,
        hidden=guide_hidden,
        conditioning=conditioning,
        family=found.family if family is None else family,
    )
    return model, guide


def objective(name: str, model: LatentModel, cells: EnvironmentDataset, **options: Any) -> Objective:
    """What a named model is trained with: the recipe's own objective, else the ELBO.

    Args:
        name: see `recipe`.
        model: that `make` made.
        cells: training cells.
        **options: of the objective.

    Raises:
        ModelError: unknown names.
    """
    build = recipe(name).objective
    return Objective(**options) if build is None else build(model, cells, **options)


def load(folder: str | Path, model: nn.Module | None = None, guide: nn.Module | None = None) -> Run:
    """A run that `Run.save` wrote.

    Args:
        folder: of the run.
        model: needed only for a composition of the user's own: one of the same structure.
        guide: likewise.

    Raises:
        CheckpointError: damaged, or a model that cannot be built from its name.
    """
    return Run.restore(folder, model, guide, _rebuild)


def _rebuild(manifest: Mapping[str, Any], schema: Schema) -> tuple[LatentModel, AmortisedGuide]:
    made, guided = manifest.get("model"), manifest.get("guide")
    if not made or not guided or made["name"] not in RECIPES:
        raise CheckpointError(
            "this run's model is not one of the named models: call load(folder, model=..., guide=...)"
        )
    model = RECIPES[made["name"]].build(schema, **made["options"])
    return model, amortise(model, schema, **guided)


def rebuild(model: nn.Module, guide: nn.Module, schema: Schema) -> tuple[LatentModel, AmortisedGuide]:
    """A named model and its guide with the same options, for other data.

    Args:
        model: that a named function built.
        guide: that `amortise` built.
        schema: of the other data.

    Raises:
        ModelError: a composition of the user's own.
    """
    made: Any = getattr(model, "spec", None)
    guided: Any = getattr(guide, "spec", None)
    if not made or not guided or made["name"] not in RECIPES:
        raise ModelError("this model is not one of the named models: build it anew for the other data yourself")
    return _rebuild({"model": made, "guide": guided}, schema)
