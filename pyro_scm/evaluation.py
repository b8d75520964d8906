"""Models beside simple baselines on unseen environments.

The protocol keeps apart what a prediction is made from and what it is scored on:

- the cells of each reference environment are halved: one half is for training and for predicting from, the other only
  for scoring, because the noise of a control that is shared by the predicted and the true change would be scored as
  agreement (a screen in which nothing has an effect would not score 0);
- the cells of each held-out environment are halved: its differential genes are called on one half, against training
  controls, and its true mean is that of the other half;
- what is scored is the change from control: true mean minus the scoring controls' mean against the predicted change.

What a split itself lets leak is searched for (`data.leaks`) and noted. Simple baselines stand in every table, and
`Comparison.gate` says of each model whether it is better than all of them.
"""

import importlib.util
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeAlias

import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch
from numpy.typing import ArrayLike, NDArray

from pyro_scm import metrics, recipes
from pyro_scm.baselines import BASELINES, controls, environment_means, matched_references
from pyro_scm.chance import forked
from pyro_scm.comparison import COLUMNS, Comparison
from pyro_scm.data.dataset import EnvironmentDataset
from pyro_scm.data.leaks import in_words, leaks
from pyro_scm.data.single_cell import differential_genes, halves
from pyro_scm.data.splits import Split
from pyro_scm.errors import DataError, ModelError, listing
from pyro_scm.gate import LOWER_IS_BETTER
from pyro_scm.infer import fit
from pyro_scm.latent_recovery import recovery
from pyro_scm.mean_predictions import (
    log_expression,
    on_device,
    predict_cells,
    predict_means,
    predict_recentred,
    recentring,
    reference_cells,
)
from pyro_scm.objectives import Objective
from pyro_scm.query import isolated, transport
from pyro_scm.run import Run, members

__all__ = ["LOWER_IS_BETTER", "Comparison", "compare", "evaluate", "predict_means", "recovery", "score"]

FloatArray: TypeAlias = NDArray[np.float64]
Genes: TypeAlias = NDArray[np.int64]

RECENTRED = ", recentred"
"""What is added to the name of a model whose predictions are scored recentred."""

_CHUNK = 512
_PARTICLES = 4


# ---------------------------------------------------------------------- scores
def score(
    truth: ArrayLike, prediction: ArrayLike, control: ArrayLike, genes: ArrayLike | None = None
) -> dict[str, float]:
    """Scores of one environment's predicted mean, by the name of the metric; of its differential genes as ``*_deg``.

    delta_pearson and delta_r2 of the change from control; rmse and mae; and r2 and squared_pearson of the mean itself,
    which flatter every prediction, that of no change too: they are for comparison with published tables.

    Args:
        truth: ``[G]`` true mean expression.
        prediction: ``[G]`` predicted.
        control: ``[G]`` mean expression of the controls.
        genes: columns of the differential genes, the most different first; an empty list gives NaN, None leaves these
            scores out. With them comes deg_recall, the share of these genes among as many of largest predicted change.

    Raises:
        DataError: shapes that differ, or values that are not finite.
    """
    subsets: dict[str, ArrayLike | None] = {"": None}
    if genes is not None:
        subsets["_deg"] = genes
    scores: dict[str, float] = {}
    for suffix, chosen in subsets.items():
        scores[f"delta_pearson{suffix}"] = metrics.delta_pearson(truth, prediction, control, genes=chosen)
        scores[f"delta_r2{suffix}"] = metrics.delta_r2(truth, prediction, control, genes=chosen)
        scores[f"rmse{suffix}"] = metrics.rmse(truth, prediction, genes=chosen)
        scores[f"mae{suffix}"] = metrics.mae(truth, prediction, genes=chosen)
        scores[f"r2{suffix}"] = metrics.r2(truth, prediction, genes=chosen)
        scores[f"squared_pearson{suffix}"] = metrics.squared_pearson(truth, prediction, genes=chosen)
    if genes is not None:
        scores["deg_recall"] = metrics.top_recall(genes, np.asarray(prediction) - np.asarray(control))
    return scores


def _cell_scores(model: Any, guide: Any, cells: EnvironmentDataset, total: int, depth: float) -> dict[str, float]:
    """Negative ELBO and reconstruction of held-out cells: a mean over cells, never of cells that a model has seen."""
    objective = Objective()
    sums = dict.fromkeys(("nll", "reconstruction", "squares"), 0.0)
    with isolated(), forked():
        torch.manual_seed(0)
        for batch in on_device(model, cells, _CHUNK):
            batch = replace(batch, total=max(total, len(batch)))  # global sites are shared out over the training cells
            weight = len(batch) / (batch.total * _PARTICLES)
            for _ in range(_PARTICLES):
                terms = objective.terms(objective.world(model.forward, guide.forward, batch))
                sums["nll"] += float(terms.loss()) * weight
                sums["reconstruction"] += float(terms.reconstruction) * weight
            found = log_expression(next(transport(model, guide, batch, ())), batch.size, depth)
            assert batch.x is not None
            x = batch.x if batch.size is None else torch.log1p(batch.x * (depth / batch.size).unsqueeze(-1))
            sums["squares"] += float((x - found).square().mean(-1).sum())
    return {
        "nll": sums["nll"] / len(cells),
        "reconstruction": sums["reconstruction"] / len(cells),
        "reconstruction_rmse": float(np.sqrt(sums["squares"] / len(cells))),
    }


# ---------------------------------------------------------------------- what is asked, fixed before any model is fitted
@dataclass(frozen=True, eq=False)
class _Task:
    """Held-out environments, and what their predictions are scored on.

    Args:
        train: training cells without the reference cells that are kept for scoring.
        held_out: all cells of the environments.
        environments: E names.
        truth: ``[E, G]`` mean expression.
        control: ``[E, G]`` of the reference cells kept for scoring.
        genes: differential genes of each environment, None where they cannot be called for want of scanpy.
        targets: ``[E, G]`` whether an environment's perturbation is named for a gene, which discrimination leaves out.
        notes: what a reader of the scores should know.
        leaks: of `data.leaks.leaks`.
    """

    train: EnvironmentDataset
    held_out: EnvironmentDataset
    environments: tuple[str, ...]
    truth: FloatArray
    control: FloatArray
    genes: dict[str, Genes] | None
    targets: NDArray[np.bool_]
    notes: tuple[str, ...]
    leaks: pd.DataFrame

    def scores(self, change: FloatArray) -> Iterator[tuple[str, str, float]]:
        """(environment, metric, value) of predicted changes ``[E, G]``."""
        ranks = metrics.perturbation_rank(self.truth - self.control, change)
        told = metrics.discrimination(self.truth - self.control, change, target_genes=self.targets)
        for i, name in enumerate(self.environments):
            genes = None if self.genes is None else self.genes.get(name, np.empty(0, np.int64))
            values = score(self.truth[i], self.control[i] + change[i], self.control[i], genes)
            for metric, value in {**values, "rank": float(ranks[i]), "discrimination": float(told[i])}.items():
                yield name, metric, value

    def distances(self, environment: str, predicted: FloatArray) -> Iterator[tuple[str, str, float]]:
        """(environment, metric, value) of predicted cells ``[n, G]`` against the held-out ones."""
        values: Any = self.held_out.of(environment).normalised(self.train.schema.summary.depth)
        true = np.asarray(values if isinstance(values, np.ndarray) else values.toarray(), np.float64)
        width = metrics.median_bandwidth(true)
        widths = [width] if np.isfinite(width) else None
        yield environment, "energy_distance", metrics.energy_distance(true, predicted, unbiased=True)
        yield environment, "mmd", metrics.mmd(true, predicted, widths, unbiased=True)
        yield environment, "variance_r2", metrics.variance_r2(true, predicted)


def _task(
    split: Split,
    degs: int,
    seed: int,
    references: EnvironmentDataset | None = None,
    protocol: str | None = None,
    plate: str | None = None,
) -> _Task:
    names, skipped = _held_out(split)
    if references is None:
        train, kept, shared = _halved_controls(split.train, seed)
    else:
        train, kept, shared = split.train, _other_references(split.train, references), []
    test = split.test.of(*names)
    depth = train.schema.summary.depth
    counts = dict(zip(names, np.bincount(test.env)[test.environment_index(*names)].tolist(), strict=True))
    halved = [name for name in names if counts[name] >= 4]
    first, second = halves(test.of(*halved), seed)
    scored = test.subset(np.isin(_rows(test), _rows(second)) | ~np.isin(test.env, first.env))
    notes = []
    if skipped:
        notes.append(f"not scored, for they have a single cell: {listing(skipped)}")
    if shared:
        notes.append(f"references of one cell, both trained on and scored against: {listing(shared)}")
    own = replace(split, train=train, test=test)
    found = leaks(own, protocol, plate=plate, degs_from=first if degs else None, scored=scored)
    notes += in_words(found)
    genes, lacking = _differential(first, halved, train, degs) if degs else (None, "")
    if genes is not None and len(genes) < len(names):
        few = len(names) - len(genes)
        lacking = f"differential genes need 4 cells and 2 controls: not called in {few} environments"
    return _Task(
        train=train,
        held_out=test,
        environments=tuple(names),
        truth=environment_means(scored, depth)[0][scored.environment_index(*names)],
        control=controls(kept, names, depth),
        genes=genes,
        targets=_targets(train, names),
        notes=(*notes, lacking) if lacking else tuple(notes),
        leaks=found,
    )


def _targets(cells: EnvironmentDataset, names: Sequence[str]) -> NDArray[np.bool_]:
    """``[E, G]`` whether a gene is named by an environment's perturbation: a knock-out's own change is trivial."""
    own = cells.environments["perturbation"].astype(str).to_numpy()[cells.environment_index(*names)]
    column = {gene: g for g, gene in enumerate(cells.genes)}
    found = np.zeros((len(names), len(cells.genes)), bool)
    for row, perturbation in zip(found, own, strict=True):
        row[[column[part] for part in perturbation.split("+") if part in column]] = True
    return found


def _held_out(split: Split) -> tuple[list[str], list[str]]:
    """Environments with two test cells or more, and those with one."""
    test = split.test
    counts = np.bincount(test.env, minlength=len(test.environments))
    asked = [int(e) for e in test.present if not test.reference[e]]
    names = [str(test.environments.index[e]) for e in asked if counts[e] >= 2]
    if not names:
        raise DataError("no environment has 2 held-out cells or more: hold out more cells, or whole environments")
    trained = set(split.train.present.tolist()) & set(asked)
    if split.combination is not None and trained:
        name = test.environments.index[min(trained)]
        raise DataError(
            f"the split holds out pairs of a perturbation and {split.combination!r}, and environment {str(name)!r} has "
            f"cells on both sides: read the data with cell_line={split.combination!r}, so that each category has "
            "environments of its own"
        )
    return names, [str(test.environments.index[e]) for e in asked if counts[e] < 2]


def _rows(cells: EnvironmentDataset) -> NDArray[np.int64]:
    """What tells cells of one data set apart."""
    return np.arange(len(cells)) if cells.origin is None else cells.origin


def _halved_controls(train: EnvironmentDataset, seed: int) -> tuple[EnvironmentDataset, EnvironmentDataset, list[str]]:
    """Training cells without half of each reference's, that half, and the references of one cell, which are in both."""
    references = train.subset(train.reference[train.env])
    counts = np.bincount(references.env, minlength=len(train.environments))
    names = [str(name) for name in train.environments.index]
    several, single = ([names[e] for e in np.flatnonzero(those)] for those in (counts >= 2, counts == 1))
    if not several:
        return train, references, single
    _, second = halves(references.of(*several), seed)
    out = np.isin(_rows(references), _rows(second))
    alone = counts[references.env] == 1
    return train.subset(~np.isin(_rows(train), _rows(second))), references.subset(out | alone), single


def _other_references(train: EnvironmentDataset, references: EnvironmentDataset) -> EnvironmentDataset:
    """Reference cells that were measured apart from the training cells."""
    kept = references.subset(references.reference[references.env])
    if not len(kept):
        raise DataError("references has no reference cells: give unperturbed cells to score against")
    if np.isin(_rows(kept), _rows(train)).any():
        raise DataError("references are among the training cells: leave them out of the training split")
    return kept


def _differential(
    cells: EnvironmentDataset, names: Sequence[str], train: EnvironmentDataset, top: int
) -> tuple[dict[str, Genes] | None, str]:
    """Differential genes of environments against training controls, or why there are none."""
    if importlib.util.find_spec("scanpy") is None:
        return None, "no scores of differential genes: scanpy is not installed (pyro-scm[single-cell])"
    counts = np.bincount(train.env, minlength=len(train.environments))
    sets = matched_references(train, names)
    called = [name for name, own in zip(names, sets, strict=True) if counts[list(own)].sum() >= 2]
    if not called:
        return {}, ""
    both = _joined(cells.of(*called), train.subset(train.reference[train.env]))
    return differential_genes(both, top=top, environments=called), ""


def _joined(a: EnvironmentDataset, b: EnvironmentDataset) -> EnvironmentDataset:
    """Expression of two sets of cells of one environment table; their annotation is left out."""
    stack: Any = sp.vstack if sp.issparse(a.x) else np.concatenate
    x = stack([a.x, b.x])
    return replace(
        a,
        x=sp.csr_matrix(x) if sp.issparse(a.x) else x,
        env=np.concatenate([a.env, b.env]),
        size=np.concatenate([a.size, b.size]),
        obs=pd.DataFrame(index=np.arange(x.shape[0])),
        covariates={},
        categories={},
        y=None,
        proteins=(),
        origin=None,
    )


def compare(
    split: Split,
    models: Sequence[str] | Mapping[str, Mapping[str, Any]],
    *,
    baselines: Sequence[str] = tuple(BASELINES),
    seeds: Sequence[int] = (0, 1, 2),
    references: EnvironmentDataset | None = None,
    degs: int = 50,
    cells: int = 500,
    latent: int | None = None,
    epochs: int = 100,
    seed: int = 0,
    protocol: str | None = None,
    plate: str | None = None,
    distances: bool = False,
    recentre: bool | str | Sequence[str] = False,
    progress: bool | None = None,
    **fit_options: Any,
) -> Comparison:
    """Fit models and baselines to the training cells and score their predictions of the held-out environments.

    See the top of this module for what is kept apart from what: the reference cells kept for scoring are not trained
    on. Scored are the environments with two test cells or more; of those with fewer than four all cells make the truth,
    and no differential genes are called. Models never see a test cell; `split.validation`, where there is one, decides
    which epoch's parameters are kept.

    Args:
        split: of `pyro_scm.data.splits`.
        models: names of recipes, or name -> options of `recipes.make`, with ``"recipe"`` for the recipe where the name
            is a label of your own: ``{"shallow": {"recipe": "vae", "hidden": ()}}``.
        baselines: names in `BASELINES`.
        seeds: of each model's ensemble.
        references: reference cells that are not in training, to score against, for example those of the held-out
            plates; half of the training references by default, which are then not trained on.
        degs: differential genes of each environment; 0 for none.
        cells: reference cells to predict from; see `predict_means`.
        latent: of every model whose options do not say.
        epochs: of the training.
        seed: of the halves and of predictions.
        protocol: what the scores are said to show, by default what the split holds out; leaks that contradict it are
            noted in ``config["notes"]`` (`data.leaks.leaks`).
        plate: obs column of the plate, where plates are said to be unseen.
        distances: whether to draw cells too and score their distribution: energy_distance and mmd (unbiased, see
            `metrics`) and variance_r2. A baseline's cells are the reference cells, moved by its change.
        recentre: whether to score each model a second time, as ``"NAME, recentred"``, with what a simple baseline makes
            of its errors in training environments added: the training mean (True), whereby the common change is
            measured instead of predicted, another baseline by name, or the mean over environments that are alike in
            columns, such as ``("dose",)``; see `predict_means`.
        progress: see `fit`.
        **fit_options: more of `fit`.

    Raises:
        DataError: nothing to score, no reference cells, or environments that are in training and held out by category.
        ModelError: an unknown model, baseline or option.
        TrainingError: see `fit`.
    """
    made = _options(models, latent)
    _check_names(made, baselines)
    task = _task(split, degs, seed, references, protocol, plate)
    programs = {n: recipes.make(recipe, task.train.schema, **options) for n, (recipe, options) in made.items()}
    rows = _baseline_rows(task, baselines, cells if distances else 0, seed)
    runs: dict[str, Run] = {}
    for name, (model, guide) in programs.items():
        recipe = recipes.recipe(made[name][0])
        own = {"objective": recipes.objective(made[name][0], model, task.train), "critic_steps": recipe.critic_steps}
        settings = {"seeds": seeds, "epochs": epochs, "progress": progress, **own, **fit_options}
        runs[name] = fit(model, guide, task.train, validation=split.validation, **settings)
        rows += _model_rows(name, runs[name], task, cells, seed, distances, recentre)
    described = {name: {"recipe": recipe, **options} for name, (recipe, options) in made.items()}
    training = {"seeds": list(seeds), "epochs": epochs, **fit_options}
    config = _config(split, task, described, training, baselines, degs, cells, seed, protocol)
    return Comparison(pd.DataFrame(rows, columns=COLUMNS), runs, task.genes or {}, config)


def evaluate(
    runs: Mapping[str, Run],
    split: Split,
    *,
    baselines: Sequence[str] = tuple(BASELINES),
    degs: int = 50,
    cells: int = 500,
    seed: int = 0,
    protocol: str | None = None,
    plate: str | None = None,
    distances: bool = False,
    recentre: bool | str | Sequence[str] = False,
) -> Comparison:
    """Score runs that are fitted already beside baselines, as `compare` does.

    A run that was fitted to all of `split.train` has also seen the reference cells that `compare` keeps for scoring:
    what it learnt of their noise may flatter it, if there are few of them; the notes say so. Whether it has seen the
    held-out environments is for the caller to say (`run.environments.table["trained"]`).

    Args:
        runs: by the name to give them.
        split: of cells with the runs' genes and environments.
        baselines: names in `BASELINES`; fitted here.
        degs: differential genes of each environment; 0 for none.
        cells: reference cells to predict from; see `predict_means`.
        seed: of the halves and of predictions.
        protocol: see `compare`.
        plate: see `compare`.
        distances: see `compare`.
        recentre: see `compare`.

    Raises:
        DataError: see `compare`; or cells of other genes or environments than a run's.
        ModelError: an unknown baseline.
    """
    _check_names(runs, baselines)
    task = _task(split, degs, seed, protocol=protocol, plate=plate)
    rows = _baseline_rows(task, baselines, cells if distances else 0, seed)
    for name, run in runs.items():
        task = replace(task, notes=(*task.notes, *_trained_references(name, run, task)))
        rows += _model_rows(name, run, task, cells, seed, distances, recentre)
    described = {name: dict(getattr(run.model, "spec", None) or {}) for name, run in runs.items()}
    training = {name: {"seeds": list(run.seeds), **asdict(run.settings)} for name, run in runs.items()}
    config = _config(split, task, described, training, baselines, degs, cells, seed, protocol)
    return Comparison(pd.DataFrame(rows, columns=COLUMNS), dict(runs), task.genes or {}, config)


def _trained_references(name: str, run: Run, task: _Task) -> Iterator[str]:
    """Whether a run was fitted to more cells of a reference than are left to train on: to those scored against."""
    table = run.environments.table
    seen = dict(zip(table.index.astype(str), table["cells"].tolist(), strict=True))
    left = np.bincount(task.train.env, minlength=len(task.train.environments))
    for e in np.flatnonzero(task.train.reference & (left > 0)).tolist():
        reference = str(task.train.environments.index[e])
        if seen.get(reference, 0) > left[e]:
            yield (
                f"leak (reference): {name!r} was fitted to {seen[reference]} cells of {reference!r}, of which it was "
                f"to see {left[e]}; the others are scored against: use pyro_scm.compare, which keeps them out of it"
            )


def _check_names(models: Iterable[str], baselines: Sequence[str]) -> None:
    unknown = [name for name in baselines if name not in BASELINES]
    if unknown:
        raise ModelError(f"unknown baseline {listing(unknown)}: use some of {', '.join(BASELINES)}")
    both = [name for name in models if name in baselines]
    if both:
        raise ModelError(f"{listing(both)} names a model and a baseline: rename the model")


def _before(task: _Task) -> FloatArray:
    """``[E, G]`` control that predictions start from."""
    return controls(task.train, task.environments, task.train.schema.summary.depth)


def _baseline_rows(
    task: _Task, baselines: Sequence[str], cells: int, seed: int
) -> list[tuple[str, str, int, str, str, float]]:
    """Rows of `Comparison.scores`."""
    rows: list[tuple[str, str, int, str, str, float]] = []
    for name in baselines:
        change = BASELINES[name]().fit(task.train).predict(task.environments) - _before(task)
        rows += [(name, "baseline", -1, *found) for found in task.scores(change)]
        for environment, own in zip(task.environments, change, strict=True) if cells else ():
            moved = reference_cells(task.train, environment, cells=cells, seed=seed) + own
            rows += [(name, "baseline", -1, *found) for found in task.distances(environment, moved)]
    return rows


def _options(
    models: Sequence[str] | Mapping[str, Mapping[str, Any]], latent: int | None
) -> dict[str, tuple[str, dict[str, Any]]]:
    """Label -> recipe and options."""
    if isinstance(models, str):
        models = [models]
    given = models if isinstance(models, Mapping) else {name: {} for name in models}
    made = {}
    for name, own in given.items():
        options = {"latent": latent, **own} if latent is not None else dict(own)
        made[name] = (str(options.pop("recipe", name)), options)
    return made


def _model_rows(
    name: str, run: Run, task: _Task, cells: int, seed: int, distances: bool, recentre: bool | str | Sequence[str]
) -> Iterator[tuple[str, str, int, str, str, float]]:
    """Rows of `Comparison.scores` of every member, and those of its recentred predictions."""
    if distances:
        for found in _distance_scores(run, task, cells, seed):
            yield name, "model", *found
    before, depth = _before(task), task.train.schema.summary.depth
    baselines = {f"{name}{RECENTRED}": recentring(recentre).fit(task.train)} if recentre else {}
    predicted, recentred = predict_recentred(run, task.train, task.environments, baselines, cells=cells, seed=seed)
    for own, means, (model, guide) in zip(run.seeds, predicted, members(run), strict=True):
        for scored in task.scores(means - before):
            yield name, "model", own, *scored
        for environment in task.environments:
            each = _cell_scores(model, guide, task.held_out.of(environment), len(task.train), depth)
            for metric, value in each.items():
                yield name, "model", own, environment, metric, value
    for label, several in recentred.items():
        for own, means in zip(run.seeds, several, strict=True):
            for scored in task.scores(means - before):
                yield label, "model", own, *scored


def _distance_scores(run: Run, task: _Task, cells: int, seed: int) -> Iterator[tuple[int, str, str, float]]:
    """(seed, environment, metric, value) of every member's cells."""
    for name in task.environments:
        drawn = predict_cells(run, task.train, name, cells=cells, seed=seed)
        for own, predicted in zip(run.seeds, drawn, strict=True):
            for found in task.distances(name, predicted):
                yield own, *found


def _config(
    split: Split,
    task: _Task,
    models: Mapping[str, Mapping[str, Any]],
    training: Mapping[str, Any],
    baselines: Sequence[str],
    degs: int,
    cells: int,
    seed: int,
    protocol: str | None,
) -> dict[str, Any]:
    """What `save` writes beside the scores."""
    from importlib.metadata import version

    return {
        "models": dict(models),
        "training": dict(training),
        "baselines": list(baselines),
        "degs": degs if task.genes is not None else 0,
        "predicted_from": cells,
        "seed": seed,
        "environments": list(task.environments),
        "units": _units(task),
        "protocol": protocol or split.protocol,
        "leaks": task.leaks.to_dict("records"),
        "cells": {
            "training": len(task.train),
            "controls kept for scoring": len(split.train) - len(task.train),
            "validation": 0 if split.validation is None else len(split.validation),
            "held out": len(task.held_out),
        },
        "genes": len(task.train.genes),
        "library_size": task.train.schema.summary.depth,
        "notes": list(task.notes),
        "versions": {name: version(name) for name in ("pyro-scm", "torch", "pyro-ppl", "numpy")},
    }


def _units(task: _Task) -> dict[str, list[str]]:
    """Parts of each environment's perturbation, in its cell line: doses and times are no cases of their own."""
    table = task.train.environments
    unperturbed = set(table["perturbation"].astype(str)[task.train.reference])
    units = {}
    index = task.train.environment_index(*task.environments)
    rows = zip(table["perturbation"].iloc[index].astype(str), table["cell_line"].iloc[index], strict=True)
    for name, (perturbation, cell_line) in zip(task.environments, rows, strict=True):
        place = "" if pd.isna(cell_line) else f" in {cell_line}"
        units[name] = [f"{part}{place}" for part in perturbation.split("+") if part not in unperturbed]
    return units
