"""Does pre-training the molecule network help? chemCPA's main claim, on public bulk data, paired over conditions.

chemcpa is fitted to one consensus signature a DrugBank compound (LINCS, over all cell lines and doses), and goes on
with few drugs of one system (`transfer`): A375 plates (`l1000_unseen_drugs`), or hepatocytes (`tggates_doses`, part
drugs). Held-out compounds, under whatever name or salt, are left out of the pre-training.

- from scratch: fitted to the target alone.
- pre-trained: everything that means the same is carried over, genes that both measure included.
- pre-trained, molecules alone: the layers of genes are drawn anew, as chemCPA does for an extended set of genes.

All go through the same number of epochs on the target, from the same seeds.
Needs PYRO_SCM_DATA with l1000_consensus/, and l1000_a375/ or tggates_hepatocytes/.
"""

import time
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd

from experiments import l1000_unseen_drugs, tggates_doses
from experiments.launch import Results, data_folder, launch
from experiments.tables.protocol import ENSEMBLE, SMOKE, Sizes, compared, trained, with_run
from experiments.tables.questions import Question, alike
from experiments.tables.reports import figure, published
from pyro_scm import gate
from pyro_scm.comparison import Comparison
from pyro_scm.data import chemistry
from pyro_scm.data.dataset import EnvironmentDataset
from pyro_scm.errors import DataError
from pyro_scm.pretraining import transfer
from pyro_scm.run import Run

CONTROL = "control"
SCRATCH, FULL, MOLECULES = "from scratch", "pre-trained", "pre-trained, molecules alone"
TARGETS = ("a375", "tggates")
DOSE_MEAN = "mean of the dose"
_BOUND = 10.0  # of consensus signatures, as LINCS clips z-scores


@dataclass(frozen=True)
class Pretraining(Sizes):
    """Sizes.

    Args:
        kl_weights: the first counts.
        batch_size: smaller than elsewhere: with 256 of 399 wells a step, 80 steps taught chemcpa next to nothing.
        targets: of `TARGETS`.
        pretraining_epochs: on the consensus signatures.
        bits: of fingerprints.
    """

    models: tuple[str, ...] = ("chemcpa",)
    kl_weights: tuple[float, ...] = (10.0,)
    latent: int = 30
    hidden: int = 256
    epochs: int = 100
    cells: int = 30
    precision: str = "bfloat16"
    batch_size: int = 128
    targets: tuple[str, ...] = TARGETS
    pretraining_epochs: int = 60
    bits: int = 256

    @classmethod
    def preset(cls, name: str) -> "Pretraining":
        """Sizes of smoke, quick and paper."""
        if name == "smoke":
            return Pretraining(**SMOKE, targets=("tggates",), bits=64, pretraining_epochs=4)
        return Pretraining() if name == "paper" else Pretraining(seeds=(0, 1), epochs=20, pretraining_epochs=20)


def compound_key(smiles: str, name: str) -> str:
    """One name for all names and salts of a compound."""
    return chemistry.canonical(chemistry.parent(smiles, name=name), name=name)


def consensus(left_out: Collection[str], bits: int) -> EnvironmentDataset:
    """Signatures of compounds with a structure, genes by Entrez number; control is no change at all.

    Args:
        left_out: keys of compounds that are held out of the target.
        bits: of fingerprints.
    """
    from anndata import AnnData

    folder = data_folder("l1000_consensus")
    table = pd.read_csv(folder / "consensi-drugbank.tsv.gz", sep="\t", index_col=0)
    smiles = pd.read_csv(folder / "drugbank_smiles.csv.gz").set_index("drugbank_id")["smiles"].dropna()
    smiles = smiles[smiles.index.isin(table.index)]
    keys = pd.Series({str(n): compound_key(str(s), str(n)) for n, s in smiles.items()}).drop_duplicates()
    keys = keys[~keys.isin(set(left_out))]
    x = np.vstack([np.clip(table.loc[keys.index].to_numpy(float), -_BOUND, _BOUND), np.zeros((2, table.shape[1]))])
    obs = pd.DataFrame({"drug": [*keys.index, CONTROL, CONTROL], "smiles": [*keys, None, None]},
                       index=[*keys.index, "no change 1", "no change 2"])  # fmt: skip
    adata = AnnData(x.astype(np.float32), obs, pd.DataFrame(index=table.columns.astype(str)))
    return EnvironmentDataset.from_anndata(
        adata, environment="drug", control=CONTROL, smiles="smiles", representation="molecules", bits=bits, counts=False
    )


def by_entrez(question: Question) -> Question:
    """The question with its genes named by Entrez number, so that both data sets name them alike."""
    folder = data_folder("l1000_consensus")
    genes = pd.read_csv(folder / "genes.tsv", sep="\t")
    known = dict(zip(genes["symbol"].astype(str), genes["entrez_gene_id"].astype(str), strict=True))
    names = [known.get(g, g) for g in question.train.genes]
    if len(set(names)) < len(names):
        raise DataError("two genes of the target have one Entrez number: name them apart")
    var = question.train.var.set_axis(pd.Index(names))
    return replace(question, train=replace(question.train, var=var))


def target(name: str, config: Pretraining) -> Question:
    """What is scored."""
    if name == "a375":
        return by_entrez(l1000_unseen_drugs.drugs_question(config))
    if name == "tggates":
        return by_entrez(tggates_doses.question("drugs", tggates_doses.Doses(bits=config.bits))[0])
    raise DataError(f"no target {name!r}: use some of {', '.join(TARGETS)}")


def arms(question: Question, config: Pretraining) -> tuple[dict[str, Run], pd.DataFrame]:
    """An ensemble for each way, and how long it took."""
    table = question.train.environments.loc[list(question.names)]
    own = consensus(
        {compound_key(str(s), str(n)) for n, s in zip(table.index, table["smiles"], strict=True)}, config.bits
    )
    rows: dict[str, Any] = {}

    def timed(name: str, cells: EnvironmentDataset, **options: Any) -> Run:
        started = time.process_time()
        run = trained("chemcpa", cells, config, {}, config.seeds, kl_weight=config.kl_weights[0], **options)
        rows[name] = {"cells": len(cells), "fit_cpu_s": time.process_time() - started}
        return run

    before = timed("pre-training", own, epochs=config.pretraining_epochs)
    runs = {SCRATCH: timed(SCRATCH, question.train)}
    for name, genes in ((FULL, "shared"), (MOLECULES, "none")):
        moved = transfer(before, question.train, genes=genes)
        runs[name] = timed(name, question.train, start=moved)
    shared = len(set(own.genes) & set(question.train.genes))
    return runs, pd.DataFrame.from_dict(rows, orient="index").assign(shared_genes=shared).rename_axis("fit")


def paired(comparison: Comparison, kind: str, metric: str) -> pd.DataFrame:
    """Each pre-trained way minus from scratch, over the same conditions; doses and times of a drug are one case.

    Args:
        comparison: scores.
        kind: what is added to the ways' names: recentred, ensemble or neither.
        metric: such as ``"delta_pearson"``.
    """
    ways = [f"{name}{kind}" for name in (SCRATCH, FULL, MOLECULES)]
    own = comparison.scores[comparison.scores["model"].isin(ways)]
    own = own.assign(kind=np.where(own["model"] == ways[0], "baseline", "model"))
    return gate.differences(own, metric=metric, units=comparison.config["units"])


def main(config: Pretraining) -> Results:
    tables, figures, texts = {}, {}, []
    for name in config.targets:
        question = target(name, config)
        runs, seconds = arms(question, config)
        found = compared(question, [], config, {}, further={DOSE_MEAN: alike("time", "dose")}, recentre=())
        on = {DOSE_MEAN: found.baselines[DOSE_MEAN]}
        for way, run in runs.items():
            found = with_run(found, question, way, run, config, on)
        kinds = [n.removeprefix(SCRATCH) for n in found.changes if n.startswith(SCRATCH)]
        gain = pd.concat([paired(found.comparison, k, m) for k in kinds for m in ("delta_pearson", "rmse")])
        tables[f"{name}_published"] = published(
            found.comparison, question.train.environments.loc[list(question.names), "dose"]
        )
        tables[f"{name}_gain"] = gain.drop(columns="enough").set_index(["model", "metric"])
        tables[f"{name}_seconds"] = seconds
        tables[f"{name}_scores"] = found.comparison.scores
        figures[f"{name}_scores"] = figure([found])
        first = gain[(gain["metric"] == "delta_pearson") & gain["model"].str.startswith(f"{FULL}{ENSEMBLE}")].iloc[0]
        texts.append(
            f"{name}: {len(question.names)} conditions of {len({*map(tuple, question.units.values())})} drugs; Pearson "
            f"delta, {first['model']} - {first['baseline']}: "
            f"{first['difference']:+.3f} [{first['lower']:+.3f}, {first['upper']:+.3f}]."
        )
    return Results(tables, figures, "\n".join(texts))


if __name__ == "__main__":
    raise SystemExit(launch(__file__, Pretraining, main))
