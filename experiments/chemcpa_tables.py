"""Tables 1 and 3 of chemCPA: conditions that training has not seen, by dose, and models beside simple baselines.

One row a dose and model: mean and median over conditions of r2 between predicted and measured mean expression, of all
genes and of the 50 most differential ones, clipped at 0 as published; and what these flatter: the change from control
alone, as Pearson correlation and r2. Every model stands there three times: as it is, recentred on the training
conditions of the same dose (`predict_means(recentre=("dose",))`), and as the mean of its ensemble's predictions.

The weight of the KL is chosen for each model, and one champion among all models and variants, on conditions held out
of the training cells; `champion` is the verdict on that one alone, `gate` on every row.

    python -m experiments.chemcpa_tables --data sciplex_complete_v2.h5ad --pretrain lincs_full_smiles.h5ad

takes the published files (`pyro_scm.data.chemcpa_files`); --genes extended is table 3's set: those of both files, and
the most variable others. Without --data it runs on a simulated file of that layout.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from experiments.launch import Results, launch
from pyro_scm import metrics, recipes
from pyro_scm.baselines import BASELINES, Ridge, TrainingMean, controls, environment_means
from pyro_scm.comparison import COLUMNS, Comparison
from pyro_scm.data import chemcpa_files, chemistry, splits
from pyro_scm.data.dataset import EnvironmentDataset
from pyro_scm.data.single_cell import halves
from pyro_scm.data.splits import Split
from pyro_scm.errors import DataError
from pyro_scm.evaluation import RECENTRED, predict_means, score
from pyro_scm.infer import fit
from pyro_scm.mean_predictions import alike
from pyro_scm.pretraining import transfer
from pyro_scm.run import Run
from pyro_scm.threads import few_threads

FloatArray: TypeAlias = NDArray[np.float64]

ENSEMBLE = ", ensemble"
MODELS: dict[str, dict[str, Any]] = {
    "conditional_vae": {},
    "environment_vae": {"scale": False},
    "structured_environment_vae": {"scale": False},
    "translation_vae": {},
    "structured_translation_vae": {},
    "cpa": {"doser": "sigmoid"},
    "chemcpa": {},
    "scgen": {},
    "sams_vae": {},
    "svae_plus": {"environment_hidden": (64,)},
    "discrepancy_vae": {},
    "latent_additive": {},
    "decoder_only": {},
}
"""With their options; `scgen` has a vector for each perturbation and none for one that training has not seen."""


@dataclass(frozen=True)
class Sizes:
    """Of every model.

    Args:
        models: names in `MODELS`.
        seeds: members of each ensemble.
        kl_weights: one is chosen for each model on training conditions.
        latent: d.
        hidden: units of each hidden layer.
        epochs: of the training; half as many while choosing.
        batch_size: cells a step.
        lr: of Adam, falling as a cosine.
        top: differential genes.
        cells: reference cells to predict from.
    """

    models: tuple[str, ...] = tuple(MODELS)
    seeds: tuple[int, ...] = tuple(range(5))
    kl_weights: tuple[float, ...] = (1.0, 10.0, 100.0)
    latent: int = 10
    hidden: int = 64
    epochs: int = 40
    batch_size: int = 256
    lr: float = 5e-3
    top: int = 50
    cells: int = 100


SMOKE: dict[str, Any] = {
    "models": ("chemcpa", "decoder_only"), "seeds": (0, 1), "kl_weights": (1.0, 10.0), "epochs": 4, "hidden": 16,
    "cells": 20,
}  # fmt: skip


# ---------------------------------------------------------------------- what is asked
@dataclass(frozen=True, eq=False)
class Task:
    """Held-out conditions, and what their predictions are scored on.

    Args:
        train: training cells, without the control cells that are scored against.
        names: E conditions.
        truth: ``[E, G]`` mean expression.
        control: ``[E, G]`` of control cells that are not in training.
        genes: ``[E, top]`` columns of the genes that differ most.
        before: ``[E, G]`` control that predictions start from.
        offset: ``[E, G]`` what was taken from expression before, and makes r2 of the mean what it is in publications.
    """

    train: EnvironmentDataset
    names: tuple[str, ...]
    truth: FloatArray
    control: FloatArray
    genes: NDArray[np.int64]
    before: FloatArray
    offset: FloatArray | float = 0.0

    def rows(self, name: str, kind: str, seed: int, change: FloatArray) -> list[tuple[Any, ...]]:
        """Rows of `Comparison.scores` of predicted changes ``[E, G]``."""
        rank = metrics.perturbation_rank(self.truth - self.control, change)
        truth, control = self.truth + self.offset, self.control + self.offset
        found = []
        for i, environment in enumerate(self.names):
            values = score(truth[i], control[i] + change[i], control[i], self.genes[i])
            found += [(name, kind, seed, environment, m, v) for m, v in {**values, "rank": float(rank[i])}.items()]
        return found

    @property
    def units(self) -> dict[str, list[str]]:
        """Doses and times of one drug are no cases of their own: see `Comparison.gate`."""
        table = self.train.environments.loc[list(self.names)]
        lines = table["cell_line"].astype(str)
        return {n: [f"{p} {c}"] for n, p, c in zip(table.index, table["perturbation"], lines, strict=True)}


def asked(split: Split, top: int = 50, references: EnvironmentDataset | None = None, seed: int = 0) -> Task:
    """What a split asks: where each condition has 4 cells, half of them name its differential genes, half are scored.

    With fewer all cells are scored and name the genes too, as in the published tables.

    Args:
        split: of training and test cells.
        top: differential genes.
        references: control cells to score against; half of the training ones by default, which then leave training.
        seed: of the halves.
    """
    train, test = split.train, split.test
    if references is None:
        own = train.subset(train.reference[train.env])
        _, references = halves(own, seed)
        train = train.subset(~np.isin(np.asarray(train.origin), np.asarray(references.origin)))
    names = tuple(
        str(n) for n in test.environments.index[test.present] if not test.reference[test.environment_index(str(n))[0]]
    )
    first = scored = test
    if np.bincount(test.env)[test.environment_index(*names)].min() >= 4:
        first, scored = halves(test, seed)
    depth = train.schema.summary.depth
    index = test.environment_index(*names)
    control, before = controls(references, names, depth), controls(train, names, depth)
    spread = _spread(train, depth)
    size = np.abs(environment_means(first, depth)[0][index] - control) / spread
    return Task(
        train=train,
        names=names,
        truth=environment_means(scored, depth)[0][index],
        control=control,
        genes=np.argsort(-size, axis=1, kind="stable")[:, :top],
        before=before,
    )


def _spread(train: EnvironmentDataset, depth: float) -> FloatArray:
    """``[G]`` standard deviation of control cells, never 0."""
    values: Any = train.subset(train.reference[train.env]).normalised(depth)
    dense = np.asarray(values if isinstance(values, np.ndarray) else values.toarray(), np.float64)
    found: FloatArray = dense.std(axis=0)
    return found + max(float(np.median(found)), 1e-6)


def inner(task: Task, names: Sequence[str], top: int = 50) -> Task:
    """The same question about training conditions, to choose by: they are held out of training in turn.

    All training controls are both trained on and scored against, for there may be few: these scores rank models, and
    are too high to be compared with those of the held-out conditions.
    """
    train = task.train
    held = np.isin(train.env, train.environment_index(*names))
    return asked(Split(train.subset(~held), None, train.subset(held)), top, train.subset(train.reference[train.env]))


# ---------------------------------------------------------------------- predictions
def same(train: EnvironmentDataset, names: Sequence[str], columns: Sequence[str]) -> FloatArray:
    """Mean change of the training conditions that agree in as many of the first columns as any does."""
    mean, table = TrainingMean().fit(train), train.environments
    result = np.zeros((len(names), mean.changes.shape[1]))
    for row, name in zip(result, names, strict=True):
        chosen = mean.trained
        for column in columns:
            fitting = chosen[(table[column].iloc[chosen] == table.loc[name, column]).to_numpy()]
            chosen = fitting if len(fitting) else chosen
        row += mean.changes[np.isin(mean.trained, chosen)].mean(axis=0)
    return result


def baseline_changes(
    task: Task, further: Mapping[str, Sequence[str]], recentre: Sequence[str] = ("dose",)
) -> dict[str, FloatArray]:
    """Predicted changes of every baseline; of the further ones by the columns of `same`.

    Ridge stands there recentred too, as the models do: what recentring gives is not to be taken for what a model knows.
    """
    found = {name: kind().fit(task.train).predict(task.names) - task.before for name, kind in BASELINES.items()}
    mean, ridge = TrainingMean().fit(task.train), Ridge().fit(task.train)
    seen = [str(task.train.environments.index[e]) for e in mean.trained]
    missed = mean.changes + mean.control[mean.trained] - ridge.predict(seen)
    found[f"ridge{RECENTRED}"] = found["ridge"] + alike(task.train, task.names, recentre) @ missed
    return found | {name: same(task.train, task.names, columns) for name, columns in further.items()}


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
    model, guide = program(name, cells, sizes, options)
    given = {"epochs": sizes.epochs, "batch_size": sizes.batch_size, "lr": sizes.lr, "schedule": "cosine"}
    given |= {"objective": recipes.objective(name, model, cells), "critic_steps": recipes.recipe(name).critic_steps}
    given |= settings
    with few_threads():
        return fit(model, guide, cells, seeds=seeds, progress=False, **given)


def variants(run: Run, task: Task, name: str, sizes: Sizes, recentre: Sequence[str]) -> dict[str, FloatArray]:
    """Predicted changes ``[K, E, G]`` as they are, recentred, and of the ensemble ``[1, E, G]``."""
    with few_threads():
        plain = predict_means(run, task.train, task.names, cells=sizes.cells) - task.before
        centred = predict_means(run, task.train, task.names, cells=sizes.cells, recentre=recentre or True) - task.before
    found = {name: plain, f"{name}{RECENTRED}": centred}
    return found | {f"{n}{ENSEMBLE}": change.mean(axis=0, keepdims=True) for n, change in found.items()}


def pearson(task: Task, change: FloatArray) -> float:
    """Mean over conditions of the Pearson correlation of true and predicted change; an undefined one counts as 0."""
    truth = task.truth - task.control
    found = [metrics.delta_pearson(t, c, np.zeros_like(t)) for t, c in zip(truth, change, strict=True)]
    return float(np.nan_to_num(found).mean())


# ---------------------------------------------------------------------- the table
@dataclass(frozen=True, eq=False)
class Tables:
    """Results of `compared`.

    Args:
        comparison: scores of all rows.
        chosen: one row a model: KL weight, scores on the inner conditions, seconds of the fit.
        champion: its name, among all models and variants.
        changes: name -> predicted changes ``[K, E, G]``.
    """

    comparison: Comparison
    chosen: pd.DataFrame
    champion: str
    changes: dict[str, FloatArray]

    def champion_gate(self) -> pd.DataFrame:
        """The one verdict that nothing was picked for: of the champion of the inner conditions, as an ensemble."""
        scores = self.comparison.scores
        own = scores[(scores["kind"] == "baseline") | (scores["model"] == self.champion)]
        return Comparison(own, config=self.comparison.config).gate()


def compared(
    task: Task,
    choosing: Task,
    sizes: Sizes,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    *,
    further: Mapping[str, Sequence[str]] | None = None,
    recentre: Sequence[str] = ("dose",),
) -> Tables:
    """Fit, choose and score.

    Args:
        task: what is scored.
        choosing: of `inner`.
        sizes: of every model.
        options: of models, besides those of `MODELS`.
        further: baselines besides `BASELINES`: name -> columns of `same`.
        recentre: columns of `predict_means`.
    """
    baselines = baseline_changes(task, further or {}, recentre)
    rows = [row for name, change in baselines.items() for row in task.rows(name, "baseline", -1, change)]
    config = {"units": task.units, "environments": list(task.names)}
    comparison = Comparison(pd.DataFrame(rows, columns=COLUMNS), config=config)
    tables = Tables(comparison, pd.DataFrame(), "", {name: change[None] for name, change in baselines.items()})
    table, best = [], (-np.inf, "")
    for name in sizes.models:
        own = {**MODELS[name], **(options or {}).get(name, {})}
        weights = list(sizes.kl_weights)
        run = trained(
            name, choosing.train, sizes, own, [0] * len(weights), kl_weight=weights, epochs=max(sizes.epochs // 2, 1)
        )
        found = variants(run, choosing, name, sizes, recentre)
        inside = {v: [pearson(choosing, c) for c in found[v]] for v in (name, f"{name}{RECENTRED}")}
        k = int(np.argmax(np.max([*inside.values()], axis=0)))
        best = max([best, *((values[k], f"{variant}{ENSEMBLE}") for variant, values in inside.items())])
        started = time.perf_counter(), time.process_time()
        run = trained(name, task.train, sizes, own, sizes.seeds, kl_weight=weights[k])
        seconds = time.perf_counter() - started[0], time.process_time() - started[1]
        tables = with_run(tables, task, name, run, sizes, recentre)
        scored = {"inner": inside[name][k], "inner, recentred": inside[f"{name}{RECENTRED}"][k]}
        table.append({"model": name, "kl_weight": weights[k], **scored, "fit_s": seconds[0], "fit_cpu_s": seconds[1]})
        print(f"{name}: {scored}, {seconds[1]:.0f} s of CPU", flush=True)
    return replace(tables, chosen=pd.DataFrame(table).set_index("model"), champion=best[1])


def with_run(found: Tables, task: Task, name: str, run: Run, sizes: Sizes, recentre: Sequence[str]) -> Tables:
    """The table with the rows of one more run."""
    changes = variants(run, task, name, sizes, recentre)
    rows = []
    for variant, several in changes.items():
        seeds = [-1] if variant.endswith(ENSEMBLE) else sizes.seeds
        rows += [r for s, change in zip(seeds, several, strict=True) for r in task.rows(variant, "model", s, change)]
    scores = pd.concat([found.comparison.scores, pd.DataFrame(rows, columns=COLUMNS)], ignore_index=True)
    return replace(found, comparison=replace(found.comparison, scores=scores), changes=found.changes | changes)


def published(comparison: Comparison, groups: "pd.Series[Any]") -> pd.DataFrame:
    """The form of chemCPA's table 1.

    Args:
        comparison: with the metrics r2, r2_deg, delta_pearson and delta_r2.
        groups: condition -> dose, or whatever the rows are grouped by.

    Returns:
        One row a group and model; E[r2] and median r2, clipped at 0, means over seeds, and the standard deviation over
        seeds of the Pearson delta. A correlation that is not defined is left blank.
    """
    scores = comparison.scores
    wide = scores[scores["metric"].isin(["r2", "r2_deg", "delta_pearson", "delta_r2"])].pivot_table(
        index=["model", "kind", "seed", "environment"], columns="metric", values="value", dropna=False, observed=True
    ).dropna(how="all").reset_index()  # fmt: skip
    wide["group"] = wide["environment"].map(groups)
    order = {name: i for i, name in enumerate(scores["model"].unique())}
    rows = []
    for (group, model), own in wide.groupby(["group", "model"]):
        clipped = own.assign(all=own["r2"].clip(lower=0), deg=own["r2_deg"].clip(lower=0)).groupby("seed")
        means = own.groupby("seed")[["delta_pearson", "delta_r2"]].mean()
        rows.append(
            {
                "group": group,
                "model": model,
                "conditions": own["environment"].nunique(),
                "E[r2] all": clipped["all"].mean().mean(),
                "E[r2] DEGs": clipped["deg"].mean().mean(),
                "median r2 all": clipped["all"].median().mean(),
                "median r2 DEGs": clipped["deg"].median().mean(),
                "delta Pearson": means["delta_pearson"].mean(),
                "sd of seeds": means["delta_pearson"].std(),
                "delta r2": means["delta_r2"].mean(),
            }
        )
    table = pd.DataFrame(rows)
    return table.sort_values(["group", "model"], key=lambda c: c.map(order) if c.name == "model" else c).set_index(
        ["group", "model"]
    )


# ---------------------------------------------------------------------- chemCPA's own files
@dataclass(frozen=True)
class Published(Sizes):
    """Sizes.

    Args:
        data: an h5ad file of chemCPA; simulated where none is named.
        pretrain: another, to pre-train chemcpa on; simulated too where `data` is.
        split: obs column.
        genes: ``"shared"`` by both files, or ``"extended"``: all of `data`.
        most: cells of a condition, drawn at random where there are more.
        largest: uM of the largest dose, for files that have shares of it alone.
        bits: of fingerprints.
    """

    models: tuple[str, ...] = tuple(m for m in MODELS if m != "scgen")
    data: str = ""
    pretrain: str = ""
    split: str = "split_ood_finetuning"
    genes: str = "shared"
    most: int = 100
    largest: float = 10.0
    bits: int = 1024

    @classmethod
    def preset(cls, name: str) -> "Published":
        """Sizes of smoke, quick and paper."""
        if name == "smoke":
            return Published(**SMOKE, bits=64, most=20)
        return Published() if name == "paper" else Published(models=("chemcpa", "decoder_only"), seeds=(0, 1), bits=256)


def as_cells(adata: Any, config: Published) -> EnvironmentDataset:
    """Cells of `chemcpa_files.read`, at most `config.most` of a condition; controls of each line are kept whole."""
    obs = adata.obs
    order = np.random.default_rng(0).permutation(len(obs))
    rank = obs.iloc[order].groupby(["drug", "dose", "cell_line"], observed=True).cumcount().to_numpy()
    kept = np.sort(order[(rank < config.most) | obs["control"].to_numpy(bool)[order]])
    return EnvironmentDataset.from_anndata(
        adata[kept].copy(),
        environment="drug",
        control=chemcpa_files.CONTROL,
        dose="dose",
        cell_line="cell_line",
        smiles="smiles",
        representation=("molecules", "cell_line"),
        bits=config.bits,
        counts=False,
    )


def pretrained(adata: Any, unseen: set[str], task: Task, config: Published, kl_weight: float) -> Run:
    """chemcpa fitted to another file without the held-out compounds, then to the training cells."""
    keys = {s: chemistry.canonical(chemistry.parent(s)) for s in adata.obs["smiles"].dropna().unique()}
    other = as_cells(adata[~adata.obs["smiles"].map(keys).isin(unseen).to_numpy()].copy(), config)
    before = trained("chemcpa", other, config, {}, config.seeds, kl_weight=kl_weight)
    moved = transfer(before, task.train, genes="shared" if config.genes == "shared" else "none")
    return trained("chemcpa", task.train, config, {}, config.seeds, kl_weight=kl_weight, start=moved)


def files(config: Published) -> tuple[Any, Any]:
    """The file to score and the one to pre-train on, with the same genes in the same order where these are shared."""
    if config.data:
        data = chemcpa_files.read(config.data, largest=config.largest)
        before = chemcpa_files.read(config.pretrain, largest=config.largest) if config.pretrain else None
    else:
        data, before = (chemcpa_files.standardise(adata) for adata in simulated())
    if config.genes not in ("shared", "extended"):
        raise DataError(f"genes = {config.genes!r}: use 'shared' or 'extended'")
    if config.genes == "shared" and before is not None:
        shared = [g for g in data.var_names if g in set(before.var_names)]
        if not shared:
            raise DataError("the two files have no gene in common: name both by Ensembl ids (var gene_id)")
        data, before = (chemcpa_files.in_order(adata, shared) for adata in (data, before))
    return data, before


def simulated(seed: int = 0) -> tuple[Any, Any]:
    """Single cells in sci-Plex 3's layout, and bulk wells of more drugs in that of LINCS.

    What a drug does is linear in its chain length and end group, grows with the dose, and differs between lines.
    """
    from anndata import AnnData

    rng = np.random.default_rng(seed)
    ends = ("O", "N", "C(=O)O", "S")
    drugs = [(f"drug{n}{i}", "C" * n + end) for n in range(1, 11) for i, end in enumerate(ends)]
    genes = [f"ENSG{i:03d}" for i in range(60)]
    by_length, by_end, common = rng.normal(size=60), rng.normal(size=(len(ends), 60)), rng.normal(size=60)
    base = {line: rng.uniform(0.5, 3, 60) for line in ("A549", "K562")}

    def measured(chosen: Sequence[tuple[str, str]], wells: int, noise: float, control: str) -> tuple[Any, Any]:
        rows, x = [], []
        for line, level in base.items():
            for name, smiles in [(control, ""), *chosen]:
                for dose in (1.0, 10.0) if smiles else (0.0,):
                    change = common + by_length * (smiles.count("C") - 5) / 5
                    change = change + by_end[next((i for i, e in enumerate(ends) if smiles.endswith(e)), 0)]
                    mean = level + (0.3 * np.log10(1 + dose) * change if smiles else 0.0)
                    for _ in range(wells * (1 if smiles else 10)):
                        rows.append((name, dose, line, smiles, int(not smiles)))
                        x.append(np.maximum(mean + noise * rng.normal(size=60), 0.0))
        columns = ["condition", "dose", "cell_type", "SMILES", "control"]
        return pd.DataFrame(rows, columns=columns, index=[f"c{i}" for i in range(len(rows))]), np.array(x, np.float32)

    unseen = {name for name, _ in drugs[2::5]}
    obs, x = measured(drugs[:30:2] + drugs[2::5], 8, 0.4, "control")
    obs["dose"] *= 1000  # nM
    obs["split_ood_finetuning"] = np.where(obs["condition"].isin(unseen), "ood", "train")
    sciplex = AnnData(x, obs, pd.DataFrame({"gene_id": genes}, index=[g.lower() for g in genes]))
    obs, x = measured(drugs, 3, 0.1, "DMSO")
    obs = obs.rename(columns={"dose": "pert_dose", "SMILES": "canonical_smiles"})
    order = rng.permutation(45)  # another order, and fewer genes
    lincs = AnnData(
        x[:, order], obs, pd.DataFrame({"gene_id": [genes[i] for i in order]}, index=[f"g{i}" for i in order])
    )
    return sciplex, lincs


def main(config: Published) -> Results:
    data, before = files(config)
    cells = as_cells(data, config)
    side = chemcpa_files.sides(data[list(cells.cells)], config.split)
    held = np.unique(cells.env[(side == "test") & ~cells.reference[cells.env]])
    if not len(held):
        raise DataError(f"no cell is held out by {config.split!r}: name another split")
    split = splits.by_environment(cells, held_out=[str(n) for n in cells.environments.index[held]])
    task = asked(split, config.top)
    table = task.train.environments.iloc[task.train.present]
    drugs = sorted(table.loc[~table["is_reference"], "perturbation"].unique())
    chosen = np.random.default_rng(2).permutation(drugs)[: max(len(drugs) // 5, 2)]
    choosing = inner(task, [str(n) for n in table.index[table["perturbation"].isin(chosen)]], config.top)
    found = compared(task, choosing, config, further={"mean of the dose": ("cell_line", "dose")})
    if before is not None and "chemcpa" in config.models:
        smiles = task.train.environments.loc[list(task.names), "smiles"]
        unseen = {chemistry.canonical(chemistry.parent(str(s))) for s in smiles}
        run = pretrained(before, unseen, task, config, float(found.chosen.loc["chemcpa", "kl_weight"]))
        found = with_run(found, task, "chemcpa, pre-trained", run, config, ("dose",))
    groups = task.train.environments.loc[list(task.names), "dose"]
    name = "table_1" if config.genes == "shared" else "table_3"
    return Results(
        {
            name: published(found.comparison, groups),
            "gate": found.comparison.gate().set_index("model"),
            "champion": found.champion_gate().set_index("model"),
            "chosen": found.chosen,
        },
        {"scores": found.comparison.figure()},
        f"{config.data or 'simulated'}: {len(task.train)} training cells, {len(task.names)} conditions of "
        f"{len({*map(tuple, task.units.values())})} unseen pairs of drug and line, {len(task.train.genes)} genes.",
    )


if __name__ == "__main__":
    raise SystemExit(launch(__file__, Published, main))
