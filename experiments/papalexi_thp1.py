"""Unseen CRISPR knock-outs in THP-1 cells (Papalexi et al. 2021, GSE153056), from raw counts.

Each of 25 knock-outs is predicted once, by models and simple baselines trained without it (k-fold over knock-outs).
A knock-out is represented by the gene sets (MSigDB hallmark, Reactome) that its target belongs to. Then a model is
fitted to all cells, and the latent effect of each knock-out is drawn: do IFNGR1, IFNGR2, JAK2 and STAT1 share a latent,
and does CAV1, a negative control, have none?

Needs PYRO_SCM_DATA with papalexi_thp1/ and networks/.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from experiments.launch import UNSEEN_ENVIRONMENT_MODELS, Results, data_folder, launch
from pyro_scm import evaluation, infer, query, recipes
from pyro_scm.data import splits
from pyro_scm.data.dataset import EnvironmentDataset
from pyro_scm.run import Run

PATHWAY = ("IFNGR1", "IFNGR2", "JAK2", "STAT1")
NEGATIVE = "CAV1"


@dataclass(frozen=True)
class Papalexi:
    """Sizes."""

    folds: int = 5
    latent: int = 10
    hidden: int = 64
    epochs: int = 20
    batch_size: int = 256
    lr: float = 3e-3
    seeds: tuple[int, ...] = (0, 1, 2)
    cells: int = 20000

    @classmethod
    def preset(cls, name: str) -> "Papalexi":
        """Sizes of smoke, quick and paper."""
        if name == "smoke":
            return Papalexi(folds=5, epochs=1, seeds=(0,), cells=1500, hidden=16)
        return Papalexi() if name == "paper" else Papalexi(epochs=10, cells=3000)


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


def read(config: Papalexi) -> EnvironmentDataset:
    """The cells, with gene-set features of the knock-outs."""
    import anndata

    adata = anndata.read_h5ad(data_folder("papalexi_thp1") / "papalexi_thp1_rep12_counts.h5ad")
    if config.cells < adata.n_obs:
        adata = adata[np.random.default_rng(0).choice(adata.n_obs, config.cells, replace=False)].copy()
    targets = sorted(g for g in adata.obs["grna_target"].unique() if g != "non-targeting")
    return EnvironmentDataset.from_anndata(
        adata,
        environment="grna_target",
        control="non-targeting",
        representation=knock_out_features(targets, gene_sets(data_folder("networks"))),
        covariates=["bio_rep"],
    )


def main(config: Papalexi) -> Results:
    cells = read(config)
    sizes = {"latent": config.latent, "hidden": (config.hidden,)}
    training = {"epochs": config.epochs, "batch_size": config.batch_size, "lr": config.lr, "schedule": "cosine"}
    names = [str(n) for n in cells.environments.index[~cells.reference]]
    folds = np.array_split(np.random.default_rng(0).permutation(names), config.folds)
    parts = []
    for i, fold in enumerate(folds):
        print(f"fold {i + 1} of {len(folds)}: {', '.join(fold)}", flush=True)
        split = splits.by_environment(cells, held_out=list(fold))
        options = {name: {**sizes, **given} for name, given in UNSEEN_ENVIRONMENT_MODELS.items()}
        comparison = evaluation.compare(split, options, seeds=config.seeds, **training)
        parts.append(comparison.scores.assign(fold=i))
    scores = pd.concat(parts, ignore_index=True)
    run, effects = latent_effects(cells, config, training)
    member = effects.xs(config.seeds[run.best], level="seed")
    return Results(
        tables={
            "summary": evaluation.Comparison(scores).brief(),
            "pathway": pathway(effects),
            "scores": scores,
            "latent_effects": member,
        },
        figures={"scores": evaluation.Comparison(scores).figure(), "latent_effects": heat_map(member)},
        text=f"{len(cells)} cells, {len(names)} knock-outs each held out once in {config.folds} folds.",
    )


def latent_effects(cells: EnvironmentDataset, config: Papalexi, training: dict[str, Any]) -> tuple[Run, pd.DataFrame]:
    """Mean noise z of each knock-out minus that of its reference, in standard deviations of the reference cells.

    Rows: seed and knock-out; columns: latents.
    """
    one_hot = cells.with_representation("one-hot")
    model, guide = recipes.make(
        "environment_vae", one_hot.schema, latent=config.latent, hidden=(config.hidden,), scale=False
    )
    run = infer.fit(model, guide, one_hot, seeds=config.seeds, **training)
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
