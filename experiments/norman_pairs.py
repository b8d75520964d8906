"""Gene activations in K562 cells that were never seen (Norman et al. 2019, CRISPR activation): the suite's models.

Combinations: each condition that others say something about is held out: pairs of which both singles are there, pairs
of which one is, and singles that a pair and the other single leave over. A condition is described by its parts.

Unseen singles: each single is held out once (k-fold), with all pairs left out, and described by what all activations
have in common, a constant, and by the gene sets that its target belongs to.

Needs PYRO_SCM_DATA with norman_k562/ and networks/.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd

from experiments.launch import Results, data_folder, launch
from experiments.papalexi_thp1 import described, gene_sets, knock_out_features
from experiments.tables import compared, joined, reported
from experiments.tables.models import MODELS, suite
from pyro_scm.data import splits
from pyro_scm.data.dataset import EnvironmentDataset
from pyro_scm.data.splits import Split

CONTROL = "control"
PAIRS = ("KLF1+MAP2K6", "MAP2K3+MAP2K6", "CNN1+MAPK1", "SET+KLF1")
TASKS = ("combinations", "singles")


@dataclass(frozen=True)
class Norman:
    """Sizes.

    Args:
        tasks: of `TASKS`.
        models: of the suite.
        chosen: model or derived prediction that a verdict of its own is about.
        folds: of the singles.
        latent: of the models.
        hidden: units of their one hidden layer, and of the guides'.
        epochs: of training.
        batch_size: of training.
        lr: of training.
        seeds: members of each model.
        cells: control cells that are put into a condition.
    """

    tasks: tuple[str, ...] = TASKS
    models: tuple[str, ...] = tuple(MODELS)
    chosen: str = "cpa, mean of members"
    folds: int = 3
    latent: int = 10
    hidden: int = 64
    epochs: int = 20
    batch_size: int = 64
    lr: float = 1e-2
    seeds: tuple[int, ...] = tuple(range(5))
    cells: int = 200

    @classmethod
    def preset(cls, name: str) -> "Norman":
        """Sizes of smoke, quick and paper."""
        if name == "smoke":
            return cls(
                tasks=("combinations",),
                models=("cpa",),
                chosen="cpa",
                latent=5,
                hidden=16,
                epochs=2,
                seeds=(0, 1),
                cells=50,
            )
        return cls() if name == "paper" else cls(models=("cpa", "translation_vae"), seeds=(0, 1))


def read(task: str) -> EnvironmentDataset:
    """Log-normalised cells, and what is known of their conditions."""
    import anndata

    adata = anndata.read_h5ad(data_folder("norman_k562") / "norman_k562_train_log1p.h5ad")
    options = {"environment": "condition", "control": CONTROL, "counts": False}
    if task == "combinations":
        return EnvironmentDataset.from_anndata(adata, representation="multi-hot", **options)
    adata = adata[~adata.obs["condition"].astype(str).str.contains("+", regex=False)].copy()
    targets = sorted(set(adata.obs["condition"].astype(str)) - {CONTROL})
    features = described(knock_out_features(targets, gene_sets(data_folder("networks"))))
    return EnvironmentDataset.from_anndata(adata, representation=features, **options)


def parts_held_out(cells: EnvironmentDataset, task: str, folds: int) -> Iterator[Split]:
    """One split after the other; each condition of the task is held out in one."""
    if task == "combinations":
        # a single and a pair that tells of it cannot be held out together
        groups = [list(PAIRS), ["KLF1", "MAP2K3"], ["MAP2K6"]]
    else:
        names = [str(n) for n in cells.environments.index[~cells.reference]]
        groups = [list(g) for g in np.array_split(np.random.default_rng(0).permutation(names), folds)]
    for group in groups:
        yield splits.by_environment(cells, held_out=group)


def main(config: Norman) -> Results:
    models = suite(
        config.models,
        latent=config.latent,
        hidden=(config.hidden,),
        guide_hidden=(config.hidden,),
        shortcut=True,
        likelihood="normal",
    )
    tables: dict[str, pd.DataFrame] = {}
    figures, scores = {}, {}
    for task in config.tasks:
        parts = []
        for split in parts_held_out(read(task), task, config.folds):
            print(f"{task}: {', '.join(map(str, split.held_out))} held out", flush=True)
            found = compared(
                split,
                models,
                seeds=config.seeds,
                epochs=config.epochs,
                batch_size=config.batch_size,
                lr=config.lr,
                schedule="cosine",
                cells=config.cells,
            )
            parts.append(found)
            print(found.brief(("delta_pearson",)).to_string(), flush=True)
        own, drawn = reported(task, parts, (config.chosen,))
        tables, figures = tables | own, figures | drawn
        scores[task] = joined(parts).scores
    tables["scores"] = pd.concat(scores, names=["task"]).reset_index("task").reset_index(drop=True)
    return Results(tables, figures, "Held-out conditions of K562 cells, 500 genes, 50 control cells to train on.")


if __name__ == "__main__":
    raise SystemExit(launch(__file__, Norman, main))
