"""Gene activations in K562 cells that were never seen (Norman et al. 2019, CRISPR activation): the suite's models.

Combinations: each condition that others say something about is held out: pairs of which both singles are there, pairs
of which one is, each by itself, and singles that a pair and the other single leave over. A condition is described by
its parts. Choices are made on the other pairs.

Unseen singles: each single is held out once (k-fold), with all pairs left out, and described by what all activations
have in common, a constant, and by the gene sets that its target belongs to. Choices are made on training singles.

Needs PYRO_SCM_DATA with norman_k562/ and networks/.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from experiments.launch import Results, data_folder, launch
from experiments.papalexi_thp1 import described, gene_sets, in_folds, knock_out_features
from experiments.tables.models import FEW, suite
from experiments.tables.protocol import Sizes, compared
from experiments.tables.questions import Question, asked, inner
from experiments.tables.reports import figure, reported, sentence
from pyro_scm.data import splits
from pyro_scm.data.dataset import EnvironmentDataset
from pyro_scm.data.splits import Split

CONTROL = "control"
PAIRS = ("KLF1+MAP2K6", "MAP2K3+MAP2K6", "CNN1+MAPK1", "SET+KLF1")
TASKS = ("combinations", "singles")
RECENTRE = {"combinations": ("training_mean", "additive"), "singles": ("training_mean", "ridge")}


@dataclass(frozen=True)
class Norman(Sizes):
    """Sizes.

    Args:
        tasks: of `TASKS`.
        folds: of the singles.
        chosen_by: folds of the training singles, held out of training in turn to choose by.
    """

    models: tuple[str, ...] = tuple(FEW)
    tasks: tuple[str, ...] = TASKS
    folds: int = 3
    chosen_by: int = 2
    kl_weights: tuple[float, ...] = (10.0, 100.0)
    epochs: int = 20
    batch_size: int = 64
    lr: float = 1e-2
    cells: int = 200

    @classmethod
    def preset(cls, name: str) -> "Norman":
        """Sizes of smoke, quick and paper."""
        if name == "smoke":
            return cls(tasks=("combinations",), models=("cpa",), latent=5, hidden=16, epochs=2, seeds=(0, 1), cells=50)
        return cls() if name == "paper" else cls(models=("cpa", "translation_vae"), seeds=(0, 1), folds=3)


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
        groups = [*([pair] for pair in PAIRS), ["KLF1", "MAP2K3"], ["MAP2K6"]]
    else:
        names = [str(n) for n in cells.environments.index[~cells.reference]]
        groups = in_folds(names, folds)
    for group in groups:
        yield splits.by_environment(cells, held_out=group)


def choosing(question: Question, task: str, number: int) -> list[Question]:
    """Other pairs at once, or singles in folds, to choose by."""
    train = question.train
    names = [str(train.environments.index[e]) for e in train.present if not train.reference[e]]
    if task == "combinations":
        return [inner(question, [name for name in names if name in PAIRS])]
    return [inner(question, fold) for fold in in_folds(names, number)]


def main(config: Norman) -> Results:
    options = suite(FEW, config.models, shortcut=True)
    tables, figures, texts = {}, {}, []
    for task in config.tasks:
        parts = []
        for split in parts_held_out(read(task), task, config.folds):
            print(f"{task}: {', '.join(map(str, split.held_out))} held out", flush=True)
            question = asked(split, config.top)
            parts.append(
                compared(question, choosing(question, task, config.chosen_by), config, options, recentre=RECENTRE[task])
            )
        tables |= reported(task, parts)
        figures[task] = figure(parts)
        texts.append(f"{task}: {sentence(parts)}")
    return Results(tables, figures, "\n".join(texts))


if __name__ == "__main__":
    raise SystemExit(launch(__file__, Norman, main))
