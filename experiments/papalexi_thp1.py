"""Unseen CRISPR knock-outs in THP-1 cells (Papalexi et al. 2021, GSE153056), from raw counts.

Each of 25 knock-outs is predicted once, by the suite's models and simple baselines trained without it (k-fold over
knock-outs), beside the other half of its cells. A knock-out is represented by a constant, what all have in common, and
by the gene sets (MSigDB hallmark, Reactome) that its target belongs to. Models see at most so many cells of each
knock-out, baselines all. Then a model is fitted to all cells, and the latent effect of each knock-out is drawn: do
IFNGR1, IFNGR2, JAK2 and STAT1 share a latent, and does CAV1, a negative control, have none?

Needs PYRO_SCM_DATA with papalexi_thp1/ and networks/.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from experiments.launch import Results, data_folder, launch
from experiments.tables.models import FEW, suite
from experiments.tables.protocol import Sizes, compared
from experiments.tables.questions import asked, inner
from experiments.tables.reports import figure, reported, sentence
from pyro_scm import infer, query, recipes
from pyro_scm.data import splits
from pyro_scm.data.dataset import EnvironmentDataset
from pyro_scm.run import Run

PATHWAY = ("IFNGR1", "IFNGR2", "JAK2", "STAT1")
NEGATIVE = "CAV1"


@dataclass(frozen=True)
class Papalexi(Sizes):
    """Sizes.

    Args:
        folds: of the knock-outs.
        chosen_by: folds of the training knock-outs, held out of training in turn to choose by.
        read: cells of the file.
        effects_epochs: of the model of all cells.
        effects_batch_size: of that model.
        effects_lr: of that model.
    """

    models: tuple[str, ...] = tuple(FEW)
    folds: int = 5
    chosen_by: int = 1
    kl_weights: tuple[float, ...] = (1.0, 10.0)
    most: int = 150
    epochs: int = 10
    batch_size: int = 64
    lr: float = 1e-2
    cells: int = 200
    read: int = 20000
    effects_epochs: int = 20
    effects_batch_size: int = 256
    effects_lr: float = 3e-3

    @classmethod
    def preset(cls, name: str) -> "Papalexi":
        """Sizes of smoke, quick and paper."""
        if name == "smoke":
            return cls(
                models=("cpa",), epochs=1, effects_epochs=1, seeds=(0,), read=1500, most=50, hidden=16, chosen_by=1,
                cells=50,
            )  # fmt: skip
        own = ("cpa", "translation_vae")
        return cls() if name == "paper" else cls(models=own, effects_epochs=10, read=3000, seeds=(0, 1))


def in_folds(names: list[str], number: int) -> list[list[str]]:
    """Names in random folds; a single fold is a fifth of them."""
    order = np.random.default_rng(0).permutation(sorted(names))
    return [list(map(str, fold)) for fold in np.array_split(order, number if number > 1 else 5)][:number]


def gene_sets(folder: Path, largest: int = 500) -> dict[str, set[str]]:
    """Hallmark and Reactome gene sets of at most so many genes."""
    sets: dict[str, set[str]] = {}
    for name in ("h.all.v7.0.symbols.gmt", "Reactome_2016_enrichr.txt"):
        for line in (folder / name).read_text().splitlines():
            head, _, *genes = line.split("\t")
            members = {g.split(",")[0] for g in genes if g}
            if len(members) <= largest:
                sets[head] = members
    return sets


def knock_out_features(genes: list[str], sets: dict[str, set[str]]) -> pd.DataFrame:
    """Principal coordinates of the targets by the gene sets they share; rare sets weigh more."""
    table = pd.DataFrame({k: [g in v for g in genes] for k, v in sets.items()}, index=genes).astype(float)
    table = table.loc[:, table.sum() >= 1]
    table = table / np.sqrt(table.sum())
    table = table.div(np.linalg.norm(table, axis=1).clip(1e-9), axis=0)
    u, s, _ = np.linalg.svd(table.to_numpy(), full_matrices=False)
    return pd.DataFrame((u * s)[:, s > 1e-6], index=genes)


def described(features: pd.DataFrame) -> pd.DataFrame:
    """The features and a constant, by which a linear effect knows what all perturbations have in common."""
    return pd.concat([pd.Series(1.0, features.index, name="common"), features], axis=1)


def read(config: Papalexi) -> EnvironmentDataset:
    """The cells, with gene-set features of the knock-outs."""
    import anndata

    adata = anndata.read_h5ad(data_folder("papalexi_thp1") / "papalexi_thp1_rep12_counts.h5ad")
    if config.read < adata.n_obs:
        adata = adata[np.random.default_rng(0).choice(adata.n_obs, config.read, replace=False)].copy()
    targets = sorted(g for g in adata.obs["grna_target"].unique() if g != "non-targeting")
    return EnvironmentDataset.from_anndata(
        adata,
        environment="grna_target",
        control="non-targeting",
        representation=described(knock_out_features(targets, gene_sets(data_folder("networks")))),
        covariates=["bio_rep"],
    )


def main(config: Papalexi) -> Results:
    cells = read(config)
    options = suite(FEW, config.models, covariates=("bio_rep",), shortcut=True)
    names = [str(n) for n in cells.environments.index[~cells.reference]]
    parts = []
    for i, fold in enumerate(in_folds(names, config.folds)):
        print(f"fold {i + 1} of {config.folds}: {', '.join(fold)}", flush=True)
        question = asked(splits.by_environment(cells, held_out=fold), config.top)
        table = question.train.environments.iloc[question.train.present]
        seen = [str(n) for n in table.index[~table["is_reference"]]]
        inside = [inner(question, own) for own in in_folds(seen, config.chosen_by)]
        parts.append(compared(question, inside, config, options, recentre=("training_mean", "ridge")))
    run, effects = latent_effects(cells, config)
    member = effects.xs(config.seeds[run.best], level="seed")
    return Results(
        tables={**reported("knock_outs", parts), "pathway": pathway(effects), "latent_effects": member},
        figures={"knock_outs": figure(parts), "latent_effects": heat_map(member)},
        text=f"{len(cells)} cells, each knock-out held out once in {config.folds} folds: {sentence(parts)}",
    )


def latent_effects(cells: EnvironmentDataset, config: Papalexi) -> tuple[Run, pd.DataFrame]:
    """Mean noise z of each knock-out minus that of its reference, in standard deviations of the reference cells.

    Rows: seed and knock-out; columns: latents.
    """
    one_hot = cells.with_representation("one-hot")
    model, guide = recipes.make(
        "environment_vae", one_hot.schema, latent=config.latent, hidden=(config.hidden,), scale=False
    )
    run = infer.fit(
        model, guide, one_hot, seeds=config.seeds, epochs=config.effects_epochs, batch_size=config.effects_batch_size,
        lr=config.effects_lr, schedule="cosine",
    )  # fmt: skip
    z = query.embed(run, one_hot)["z"]
    control = one_hot.reference[one_hot.env]
    frames = {}
    for k, seed in enumerate(config.seeds):
        mean = pd.DataFrame(z[k]).groupby(np.array(one_hot.environments.index)[one_hot.env]).mean()
        centre, spread = z[k][control].mean(0), z[k][control].std(0)
        frames[seed] = ((mean - centre) / spread).loc[one_hot.environments.index[~one_hot.reference]]
    return run, pd.concat(frames, names=["seed", "knock_out"]).rename(columns=lambda j: f"z_{j}")


def pathway(effects: pd.DataFrame) -> pd.DataFrame:
    """Do the interferon-gamma receptors, JAK2 and STAT1 move one latent, and CAV1 none?

    One row a seed: the latent that STAT1 moves most, the share of each pathway member's total effect on it, the mean
    cosine between members' effects, and the size of CAV1's effect beside STAT1's.
    """
    rows = []
    for seed, table in effects.groupby(level="seed"):
        e = table.droplevel("seed")
        j = str(e.loc["STAT1"].abs().idxmax())
        share = e.abs().div(e.abs().sum(1), axis=0)[j]
        unit = e.loc[list(PATHWAY)].div(np.linalg.norm(e.loc[list(PATHWAY)], axis=1), axis=0)
        cosines = (unit @ unit.T).to_numpy()[np.triu_indices(len(PATHWAY), 1)]
        rows.append(
            {
                "seed": seed,
                "latent": j,
                **{f"share {g}": share[g] for g in PATHWAY},
                "same latent": sum(str(e.loc[g].abs().idxmax()) == j for g in PATHWAY),
                "mean cosine": cosines.mean(),
                f"|{NEGATIVE}| / |STAT1|": np.linalg.norm(e.loc[NEGATIVE]) / np.linalg.norm(e.loc["STAT1"]),
            }
        )
    return pd.DataFrame(rows).set_index("seed")


def heat_map(effects: pd.DataFrame) -> Any:
    """Knock-outs by latents, ordered by the size of their effect."""
    from matplotlib.figure import Figure

    order = effects.abs().max(axis=1).sort_values(ascending=False).index
    values = effects.loc[order].to_numpy()
    figure = Figure(figsize=(6, 7))
    axes = figure.subplots()
    bound = float(np.abs(values).max())
    image = axes.imshow(values, cmap="RdBu_r", vmin=-bound, vmax=bound, aspect="auto")
    axes.set_xticks(range(values.shape[1]), list(effects.columns))
    axes.set_yticks(range(len(order)), list(order))
    figure.colorbar(image, label="shift of z, sd of non-targeting cells")
    axes.set_title("Latent effect of each knock-out")
    return figure


if __name__ == "__main__":
    raise SystemExit(launch(__file__, Papalexi, main))
