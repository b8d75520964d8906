"""One protocol for every table on real screens: fit, choose on training conditions, score once.

Every model stands there as it is, recentred on simple baselines (what the baseline makes of the model's errors on the
training conditions is added: `pyro_scm.baselines.Baseline.of_rest`), halfway between that and the baseline ("half on":
errors of the two that differ cancel in part), and as the mean of its ensemble's predictions. The weight of the KL is
chosen for each model, and one **champion** among all models and variants, on conditions held out of the training cells.
The champion is one row of the table, and the only one that a verdict is about without correction.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from experiments.tables.models import MANY
from experiments.tables.questions import Fitted, Question, simple
from pyro_scm import recipes
from pyro_scm.baselines import Baseline
from pyro_scm.comparison import COLUMNS, Comparison
from pyro_scm.data.dataset import EnvironmentDataset
from pyro_scm.infer import fit
from pyro_scm.mean_predictions import predict_recentred
from pyro_scm.run import Run
from pyro_scm.threads import few_threads

__all__ = [
    "CEILING",
    "CHAMPION",
    "ENSEMBLE",
    "SMOKE",
    "Sizes",
    "Table",
    "at_most",
    "compared",
    "trained",
    "variants",
    "with_run",
]

FloatArray: TypeAlias = NDArray[np.float64]

CEILING = "other half of the cells"
CHAMPION = "champion"
ENSEMBLE = ", ensemble"
RECENTRED = ", on "
HALF = ", half on "


@dataclass(frozen=True)
class Sizes:
    """Of every model.

    Args:
        models: names.
        seeds: members of each ensemble.
        kl_weights: one is chosen for each model on training conditions.
        choosing_seeds: members of each weight's ensemble while choosing.
        latent: d.
        hidden: units of each hidden layer.
        epochs: of the training.
        batch_size: cells a step.
        lr: of Adam, falling as a cosine.
        top: differential genes.
        cells: reference cells to predict from.
        precision: ``"bfloat16"`` takes half the time or less where networks are wide.
        most: training cells of a condition that models are fitted to, drawn at random where there are more.
    """

    models: tuple[str, ...] = tuple(MANY)
    seeds: tuple[int, ...] = tuple(range(5))
    kl_weights: tuple[float, ...] = (1.0, 10.0, 100.0)
    choosing_seeds: tuple[int, ...] = (0,)
    latent: int = 10
    hidden: int = 64
    epochs: int = 40
    batch_size: int = 256
    lr: float = 5e-3
    top: int = 50
    cells: int = 100
    precision: str = "float32"
    most: int = 10**9


SMOKE: dict[str, Any] = {
    "models": ("chemcpa", "decoder_only"), "seeds": (0, 1), "kl_weights": (1.0, 10.0), "epochs": 4, "hidden": 16,
    "cells": 20,
}  # fmt: skip
"""Sizes of the smallest runs of drug screens."""


@dataclass(frozen=True, eq=False)
class Table:
    """Results of `compared`.

    Args:
        comparison: scores of all rows.
        chosen: one row a model: KL weight, scores on the inner conditions, seconds of the fit.
        champion: its name, among all models and variants.
        changes: name -> predicted changes ``[K, E, G]``.
        baselines: fitted.
    """

    comparison: Comparison
    chosen: pd.DataFrame
    champion: str
    changes: dict[str, FloatArray]
    baselines: dict[str, Baseline]


# ---------------------------------------------------------------------- a model's fit
def at_most(cells: EnvironmentDataset, number: int) -> EnvironmentDataset:
    """The cells with so many of each environment, drawn at random; of references all."""
    place = pd.Series(np.random.default_rng(0).random(len(cells))).groupby(cells.env).rank().to_numpy()
    return cells.subset((place <= number) | cells.reference[cells.env])


def program(name: str, cells: EnvironmentDataset, sizes: Sizes, options: Mapping[str, Any]) -> tuple[Any, Any]:
    """Model and guide."""
    widths = {"hidden": (sizes.hidden,), "guide_hidden": (sizes.hidden,)}
    if "environment_hidden" in recipes.recipe(name).options:
        widths["environment_hidden"] = (sizes.hidden,)
    own = {"latent": sizes.latent, "likelihood": None if cells.counts else "normal", **widths, **options}
    return recipes.make(name, cells.schema, **own)


def trained(
    name: str,
    cells: EnvironmentDataset,
    sizes: Sizes,
    options: Mapping[str, Any],
    seeds: Sequence[int],
    **settings: Any,
) -> Run:
    """An ensemble, trained with the model's own objective."""
    cells = at_most(cells, sizes.most)
    model, guide = program(name, cells, sizes, options)
    given = {"epochs": sizes.epochs, "batch_size": sizes.batch_size, "lr": sizes.lr, "schedule": "cosine"}
    given |= {"precision": sizes.precision}
    given |= {"objective": recipes.objective(name, model, cells), "critic_steps": recipes.recipe(name).critic_steps}
    given |= settings
    with few_threads():
        return fit(model, guide, cells, seeds=seeds, progress=False, **given)


def variants(
    run: Run, question: Question, name: str, sizes: Sizes, baselines: Mapping[str, Baseline]
) -> dict[str, FloatArray]:
    """Predicted changes ``[K, E, G]``: as they are, recentred on baselines, and halfway between that and the baseline.

    Args:
        run: K members.
        question: what is asked.
        name: of the model.
        sizes: of it.
        baselines: to recentre on, fitted to the question's training cells.
    """
    with few_threads():
        plain, recentred = predict_recentred(run, question.train, question.names, baselines, cells=sizes.cells)
    found = {name: plain - question.before}
    for on, means in recentred.items():
        whole, own = means - question.before, baselines[on].predict(question.names) - question.before
        found |= {f"{name}{RECENTRED}{on}": whole, f"{name}{HALF}{on}": (whole + own) / 2}
    return found


def ensembles(found: Mapping[str, FloatArray]) -> dict[str, FloatArray]:
    """With the mean prediction of all members, ``[1, E, G]``, after each variant."""
    both = {}
    for name, change in found.items():
        both |= {name: change, f"{name}{ENSEMBLE}": change.mean(axis=0, keepdims=True)}
    return both


# ---------------------------------------------------------------------- the table
def compared(
    question: Question,
    choosing: Sequence[Question],
    sizes: Sizes,
    models: Mapping[str, Mapping[str, Any]],
    *,
    further: Mapping[str, Fitted] | None = None,
    recentre: Sequence[str] = ("training_mean",),
    label: str = "",
    given: Table | None = None,
) -> Table:
    """Fit, choose and score.

    Args:
        question: what is scored.
        choosing: of `inner`; scores are averaged over them.
        sizes: of every model.
        models: options of the recipes.
        further: baselines besides the suite's.
        recentre: names of the baselines that models are recentred on.
        label: added to the models' names, and to nothing else.
        given: a table of the same held-out conditions, by models that were told something else of the environments: to
            be continued, with its baselines.
    """
    made, changes = simple(question, further or {}, recentre)
    on = {name: made[name] for name in recentre}
    if given is None:
        rows = [row for name, change in changes.items() for row in question.rows(name, "baseline", -1, change)]
        if question.other is not None:
            rows += question.rows(CEILING, "ceiling", -1, question.other)
        config = {"units": question.units, "environments": list(question.names)}
        comparison = Comparison(pd.DataFrame(rows, columns=COLUMNS), config=config)
        given = Table(comparison, pd.DataFrame(), "", {name: change[None] for name, change in changes.items()}, made)
    inside = [(q, {n: b for n, b in simple(q, further or {}, ())[0].items() if n in recentre}) for q in choosing]
    table = given
    for recipe, options in models.items():
        name = f"{recipe}{label}"
        tried = _tried(recipe, name, inside, sizes, options)
        weight, variant = max(tried, key=lambda key: tried[key])
        started = time.perf_counter(), time.process_time()
        run = trained(recipe, question.train, sizes, options, sizes.seeds, kl_weight=weight)
        seconds = time.perf_counter() - started[0], time.process_time() - started[1]
        table = with_run(table, question, name, run, sizes, on)
        row = {"model": name, "kl_weight": weight, "variant": variant, "inner": tried[weight, variant]}
        row |= {"members": len(sizes.seeds), "fit_s": seconds[0], "fit_cpu_s": seconds[1]}
        table = replace(table, chosen=pd.concat([table.chosen, pd.DataFrame([row])], ignore_index=True))
        print(f"{variant} at {weight:g}: {tried[weight, variant]:.3f}, {seconds[1]:.0f} s of CPU", flush=True)
    if table.chosen.empty:
        return table
    champion = f"{table.chosen.loc[table.chosen['inner'].idxmax(), 'variant']}{ENSEMBLE}"
    own = table.comparison.scores[table.comparison.scores["model"] != CHAMPION]
    theirs = own[own["model"] == champion].assign(model=CHAMPION)
    return replace(
        table,
        champion=champion,
        comparison=replace(table.comparison, scores=pd.concat([own, theirs], ignore_index=True)),
    )


def _tried(
    recipe: str,
    name: str,
    inside: Sequence[tuple[Question, Mapping[str, Baseline]]],
    sizes: Sizes,
    options: Mapping[str, Any],
) -> dict[tuple[float, str], float]:
    """Mean Pearson delta over the inner questions of every (KL weight, variant), of the mean of the members."""
    weights, seeds = sizes.kl_weights, sizes.choosing_seeds
    found: dict[tuple[float, str], list[float]] = {}
    for question, baselines in inside:
        every, each = [s for _ in weights for s in seeds], [w for w in weights for _ in seeds]
        run = trained(recipe, question.train, sizes, options, every, kl_weight=each)
        for variant, change in variants(run, question, name, sizes, baselines).items():
            for weight, own in zip(weights, change.reshape(len(weights), len(seeds), *change.shape[1:]), strict=True):
                found.setdefault((weight, variant), []).append(question.pearson(own.mean(0)))
    return {key: float(np.mean(values)) for key, values in found.items()}


def with_run(
    table: Table, question: Question, name: str, run: Run, sizes: Sizes, baselines: Mapping[str, Baseline]
) -> Table:
    """The table with the rows of one more run."""
    changes = ensembles(variants(run, question, name, sizes, baselines))
    rows = []
    for variant, several in changes.items():
        seeds = [-1] if variant.endswith(ENSEMBLE) else list(run.seeds)
        rows += [
            r for s, change in zip(seeds, several, strict=True) for r in question.rows(variant, "model", s, change)
        ]
    scores = pd.concat([table.comparison.scores, pd.DataFrame(rows, columns=COLUMNS)], ignore_index=True)
    return replace(
        table,
        comparison=replace(table.comparison, scores=scores),
        changes=table.changes | changes,
    )
