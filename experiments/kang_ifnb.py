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
from experiments.tables.models import FEW, suite
from experiments.tables.protocol import Sizes, Table, compared
from experiments.tables.questions import Question, asked, inner
from experiments.tables.reports import figure, reported, sentence
from pyro_scm.baselines import Baseline, NearestEnvironment, Ridge, environment_means
from pyro_scm.data import splits
from pyro_scm.data.dataset import EnvironmentDataset
from pyro_scm.data.single_cell import highly_variable
from pyro_scm.data.splits import Split

STIMULATED = "stimulated"
TYPES = ("B", "CD14+Mono", "CD4T", "CD8T", "Dendritic", "FCGR3A+Mono", "NK")
RIDGE, NEAREST = "ridge of profile", "nearest of profile"
_AXES = 3  # of the types' control expression: seven types have six, of which three tell lineages apart


@dataclass(frozen=True)
class Kang(Sizes):
    """Sizes.

    Args:
        profiled: models that are also given the types' profiles.
        types: of cells to hold out.
        chosen_by: types held out of training in turn to choose by.
        genes: kept, the most variable ones of the training cells.
    """

    models: tuple[str, ...] = tuple(FEW)
    profiled: tuple[str, ...] = ("conditional_vae",)
    types: tuple[str, ...] = TYPES
    chosen_by: int = 1
    genes: int = 1000
    kl_weights: tuple[float, ...] = (1.0, 10.0)
    epochs: int = 20
    batch_size: int = 64
    lr: float = 1e-2
    cells: int = 200

    @classmethod
    def preset(cls, name: str) -> "Kang":
        """Sizes of smoke, quick and paper."""
        if name == "smoke":
            return cls(
                models=("scgen",), profiled=("cpa",), types=("CD14+Mono",), chosen_by=1, genes=200, hidden=16, latent=5,
                epochs=5, seeds=(0, 1), cells=50,
            )  # fmt: skip
        own = ("conditional_vae", "cpa")
        return cls() if name == "paper" else cls(models=own, profiled=own, seeds=(0, 1), genes=500)


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


def of_profiles(train: EnvironmentDataset) -> EnvironmentDataset:
    """The cells with environments described by `profiles`."""
    return train.with_representation(profiles(train))


def ridge_of_profile(train: EnvironmentDataset) -> Baseline:
    """Ridge regression on profiles."""
    return Ridge().fit(of_profiles(train))


def nearest_of_profile(train: EnvironmentDataset) -> Baseline:
    """The training type of the most similar profile."""
    return NearestEnvironment().fit(of_profiles(train))


def choosing(question: Question, number: int) -> list[Question]:
    """The stimulated cells of other types held out, one at a time: those with most cells, whose truth is best known."""
    train = question.train
    counts = np.bincount(train.env, minlength=len(train.environments))
    names = [str(n) for n in train.environments.index]
    order = sorted((e for e in train.present if not train.reference[e]), key=lambda e: -counts[e])
    return [inner(question, [names[e]]) for e in order[:number]]


def held_out_type(cells: EnvironmentDataset, name: str, config: Kang) -> Table:
    """One type's table: models told the condition alone, then those told the types' profiles too."""
    question = asked(held_out(cells, name, config.genes), config.top)
    inside = choosing(question, config.chosen_by)
    options = {"covariates": ("cell_type",), "shortcut": True}
    further = {RIDGE: ridge_of_profile, NEAREST: nearest_of_profile}
    on = ("training_mean", RIDGE)
    found = compared(question, inside, config, suite(FEW, config.models, **options), further=further, recentre=on)
    told, inside = (
        replace(question, train=of_profiles(question.train)),
        [replace(q, train=of_profiles(q.train)) for q in inside],
    )
    own = suite(FEW, config.profiled, **options)
    return compared(told, inside, config, own, further=further, recentre=on, label=" of profile", given=found)


def main(config: Kang) -> Results:
    cells = read()
    parts = []
    for name in config.types:
        print(f"{name} held out", flush=True)
        parts.append(held_out_type(cells, name, config))
    text = (
        f"{len(cells)} cells, {config.genes} genes; stimulated cells of each type held out in turn: {sentence(parts)}"
    )
    return Results(reported("types", parts), {"types": figure(parts)}, text)


if __name__ == "__main__":
    raise SystemExit(launch(__file__, Kang, main))
