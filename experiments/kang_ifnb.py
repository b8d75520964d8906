"""Interferon-beta in a type of blood cell that was never seen stimulated (Kang et al. 2018, GSE96583): scGen's task.

The stimulated cells of each of seven types are held out in turn; its control cells and all cells of the other types are
there to train on. A model puts control cells of the held-out type into the stimulated condition. Genes are the most
variable ones of the training cells.

What is simple: no change; the mean change of the other types (training mean, additive); ridge and the nearest type. An
environment is described by its condition alone, or also by what its type's control cells express ("of profile"): ridge,
the nearest type and some models have both descriptions.

Needs PYRO_SCM_DATA with kang_pbmc_ifnb/.
"""

import warnings
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from experiments.launch import Results, data_folder, launch
from experiments.tables import compared, joined, reported, with_baselines
from experiments.tables.models import MODELS, suite
from pyro_scm.baselines import environment_means
from pyro_scm.data import splits
from pyro_scm.data.dataset import EnvironmentDataset
from pyro_scm.data.single_cell import highly_variable
from pyro_scm.data.splits import Split

STIMULATED = "stimulated"
TYPES = ("B", "CD14+Mono", "CD4T", "CD8T", "Dendritic", "FCGR3A+Mono", "NK")
PROFILED = ("ridge", "nearest")
_AXES = 3  # of the types' control expression: seven types have six, of which three tell lineages apart


@dataclass(frozen=True)
class Kang:
    """Sizes.

    Args:
        models: of the suite.
        profiled: models that are also given the types' profiles.
        chosen: model or derived prediction that a verdict of its own is about.
        types: of cells to hold out.
        genes: kept, the most variable ones of the training cells.
        latent: of the models.
        hidden: units of their one hidden layer, and of the guides'.
        epochs: of training.
        batch_size: of training.
        lr: of training.
        seeds: members of each model.
        cells: control cells that are put into the stimulated condition.
    """

    models: tuple[str, ...] = tuple(MODELS)
    profiled: tuple[str, ...] = ("conditional_vae", "cpa")
    chosen: str = "conditional_vae"
    types: tuple[str, ...] = TYPES
    genes: int = 1000
    latent: int = 10
    hidden: int = 64
    epochs: int = 20
    batch_size: int = 64
    lr: float = 1e-2
    seeds: tuple[int, ...] = tuple(range(5))
    cells: int = 200

    @classmethod
    def preset(cls, name: str) -> "Kang":
        """Sizes of smoke, quick and paper."""
        if name == "smoke":
            return cls(
                models=("scgen",),
                profiled=("cpa",),
                chosen="scgen",
                types=("CD14+Mono",),
                genes=200,
                hidden=16,
                latent=5,
                epochs=5,
                seeds=(0, 1),
                cells=50,
            )
        return cls() if name == "paper" else cls(models=("conditional_vae", "cpa"), seeds=(0, 1), genes=500)


def read() -> EnvironmentDataset:
    """Log-normalised cells; an environment is a condition of a cell type, described by the condition alone."""
    import anndata

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the file has neighbours where AnnData no longer keeps them
        adata = anndata.read_h5ad(data_folder("kang_pbmc_ifnb") / "kang_pbmc_ifnb_log1p.h5ad")
    return EnvironmentDataset.from_anndata(
        adata,
        environment="condition",
        control="control",
        cell_line="cell_type",
        covariates=["cell_type"],
        counts=False,
    )


def held_out(cells: EnvironmentDataset, name: str, genes: int) -> Split:
    """Without the stimulated cells of a type; genes are chosen on the others."""
    pair = [(STIMULATED, name)]
    split = splits.by_combination(cells, covariate="cell_line", held_out=pair)
    chosen = highly_variable(cells, genes, chosen_on=split.train)
    return splits.by_combination(chosen, covariate="cell_line", held_out=pair)


def profiles(train: EnvironmentDataset) -> pd.DataFrame:
    """Environments by what their type's control cells express: principal coordinates, and whether stimulated."""
    table = train.environments
    means, _ = environment_means(train, train.schema.summary.depth)
    types = table["cell_line"].astype(str)
    control = pd.DataFrame(means[train.reference], index=types[train.reference].to_numpy())
    centred = control - control.mean()
    u, s, _ = np.linalg.svd(centred.to_numpy(), full_matrices=False)
    axes = pd.DataFrame((u * s)[:, :_AXES] / s[0], index=control.index).loc[types].set_axis(table.index)
    return axes.rename(columns=lambda j: f"profile {j}").assign(stimulated=(~train.reference).astype(float))


def of_profiles(split: Split) -> Split:
    """The split with environments described by `profiles`."""
    rows = profiles(split.train)
    return replace(split, train=split.train.with_representation(rows), test=split.test.with_representation(rows))


def main(config: Kang) -> Results:
    cells = read()
    types = config.types
    sizes = {"latent": config.latent, "hidden": (config.hidden,), "guide_hidden": (config.hidden,)}
    options = {**sizes, "covariates": ("cell_type",), "shortcut": True, "likelihood": "normal"}
    profiled = {f"{n} of profile": {**own, "recipe": n} for n, own in suite(config.profiled, **options).items()}
    training = {
        "seeds": config.seeds,
        "epochs": config.epochs,
        "batch_size": config.batch_size,
        "lr": config.lr,
        "schedule": "cosine",
        "cells": config.cells,
    }
    parts = []
    for name in types:
        print(f"{name} held out", flush=True)
        split = held_out(cells, name, config.genes)
        found = with_baselines(
            compared(split, suite(config.models, **options), **training), of_profiles(split), PROFILED, " of profile"
        )
        more = compared(of_profiles(split), profiled, baselines=(), **training)
        both = joined([found, replace(more, scores=more.scores[more.scores["kind"].isin(["model", "derived"])])])
        parts.append(replace(both, runs=found.runs | more.runs))
        print(parts[-1].brief(("delta_pearson",)).to_string(), flush=True)
    tables, figures = reported("types", parts, (config.chosen,))
    text = f"{len(cells)} cells, {config.genes} genes; the stimulated cells of {len(types)} types held out in turn."
    return Results({**tables, "scores": joined(parts).scores}, figures, text)


if __name__ == "__main__":
    raise SystemExit(launch(__file__, Kang, main))
