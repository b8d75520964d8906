"""Tables 1 and 3 of chemCPA: conditions that training has not seen, by dose, and models beside simple baselines.

One row a dose and model: mean and median over conditions of r2 between predicted and measured mean expression, of all
genes and of the 50 most differential ones, clipped at 0 as published; and what these flatter: the change from control
alone, as Pearson correlation and r2. How models are fitted, chosen and recentred: `experiments.tables.protocol`.

    python -m experiments.chemcpa_tables --data sciplex_complete_v2.h5ad --pretrain lincs_full_smiles.h5ad

takes the published files (`pyro_scm.data.chemcpa_files`); --genes extended is table 3's set: those of both files, and
the most variable others. Without --data it runs on a simulated file of that layout.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from experiments.launch import Results, launch
from experiments.tables.models import MANY, UNSEEN, suite
from experiments.tables.protocol import SMOKE, Sizes, compared, trained, with_run
from experiments.tables.questions import Question, alike, asked, inner
from experiments.tables.reports import figure, reported, sentence
from pyro_scm.data import chemcpa_files, chemistry, splits
from pyro_scm.data.dataset import EnvironmentDataset
from pyro_scm.errors import DataError
from pyro_scm.pretraining import transfer
from pyro_scm.run import Run

DOSE_MEAN = "mean of the dose"


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

    models: tuple[str, ...] = UNSEEN
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


def pretrained(adata: Any, unseen: set[str], question: Question, config: Published, kl_weight: float) -> Run:
    """chemcpa fitted to another file without the held-out compounds, then to the training cells."""
    keys = {s: chemistry.canonical(chemistry.parent(s)) for s in adata.obs["smiles"].dropna().unique()}
    other = as_cells(adata[~adata.obs["smiles"].map(keys).isin(unseen).to_numpy()].copy(), config)
    before = trained("chemcpa", other, config, {}, config.seeds, kl_weight=kl_weight)
    moved = transfer(before, question.train, genes="shared" if config.genes == "shared" else "none")
    return trained("chemcpa", question.train, config, {}, config.seeds, kl_weight=kl_weight, start=moved)


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
    question = asked(split, config.top)
    table = question.train.environments.iloc[question.train.present]
    drugs = sorted(table.loc[~table["is_reference"], "perturbation"].unique())
    chosen = np.random.default_rng(2).permutation(drugs)[: max(len(drugs) // 5, 2)]
    choosing = inner(question, [str(n) for n in table.index[table["perturbation"].isin(chosen)]], config.top)
    found = compared(
        question,
        [choosing],
        config,
        suite(MANY, config.models),
        further={DOSE_MEAN: alike("cell_line", "dose")},
        recentre=(DOSE_MEAN, "ridge"),
    )
    if before is not None and "chemcpa" in config.models:
        smiles = question.train.environments.loc[list(question.names), "smiles"]
        unseen = {chemistry.canonical(chemistry.parent(str(s))) for s in smiles}
        weight = float(found.chosen.set_index("model").loc["chemcpa", "kl_weight"])
        run = pretrained(before, unseen, question, config, weight)
        found = with_run(found, question, "chemcpa, pre-trained", run, config, {DOSE_MEAN: found.baselines[DOSE_MEAN]})
    groups = question.train.environments.loc[list(question.names), "dose"]
    name = "table_1" if config.genes == "shared" else "table_3"
    return Results(
        reported(name, [found], groups),
        {"scores": figure([found])},
        f"{config.data or 'simulated'}: {len(question.train)} training cells of {len(question.train.genes)} genes; "
        f"{sentence([found])}",
    )


if __name__ == "__main__":
    raise SystemExit(launch(__file__, Published, main))
