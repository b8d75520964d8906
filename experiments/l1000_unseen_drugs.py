"""Unseen drugs in A375 cells (LINCS L1000, GSE70138 / GSE92742, level 3): from SMILES, and from a shared pathway.

drugs: trained on plate LJP005 (59 compounds) and the compounds of plate LJP009 that are also on it, five by name and
one under another name; the other 57 compounds of LJP009 are predicted from fingerprint, descriptors and dose.

mechanism: the MEK inhibitors are held out and predicted from the BRAF inhibitors and the rest, where each drug is known
by its mechanisms of action, and MEK and BRAF inhibitors have one feature in common, their pathway (BRAF activates MEK,
and A375 has BRAF V600E). Four compounds are too few for a verdict.

Expression is centred on the vehicle wells of its plate. A condition is a compound at a low (<= 0.37 uM) or high (>= 1.1
uM) dose: three wells each. The vehicle wells of LJP009 are scored against and not trained on.
Needs PYRO_SCM_DATA with l1000_a375/, and compounds/ for mechanism.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from experiments.known_answers_l1000 import BRAF, MEK, mechanisms
from experiments.launch import Results, data_folder, launch
from experiments.tables.models import MANY, UNSEEN, suite
from experiments.tables.protocol import SMOKE, Sizes, compared
from experiments.tables.questions import Question, alike, asked, inner
from experiments.tables.reports import figure, reported, sentence
from pyro_scm.data import l1000, splits
from pyro_scm.data.dataset import EnvironmentDataset
from pyro_scm.errors import DataError

if TYPE_CHECKING:
    from anndata import AnnData

FloatArray: TypeAlias = NDArray[np.float64]

CONTROL = "DMSO"
PARTS = ("drugs", "mechanism")
LOW, HIGH = 0.12, 3.3  # uM, the middle of the doses that are taken together
DOSE_MEAN = "mean of the dose"
_PATHWAY = "MAPK pathway"
_BY_NAME = ("cpa", "sams_vae")  # have a vector for each perturbation and read nothing else of it


@dataclass(frozen=True)
class L1000(Sizes):
    """Sizes.

    Args:
        parts: of `PARTS`.
        bits: of fingerprints.
    """

    parts: tuple[str, ...] = PARTS
    bits: int = 256
    latent: int = 30
    hidden: int = 256
    epochs: int = 100
    batch_size: int = 128
    cells: int = 30
    precision: str = "bfloat16"
    models: tuple[str, ...] = UNSEEN

    @classmethod
    def preset(cls, name: str) -> "L1000":
        """Sizes of smoke, quick and paper."""
        if name == "smoke":
            return L1000(**SMOKE, bits=64)
        return L1000() if name == "paper" else L1000(models=("chemcpa", "decoder_only"), seeds=(0, 1), epochs=20)


def wells(scale: bool = False) -> "AnnData":
    """Wells of both plates, controls and compounds with a structure, centred on their vehicle wells.

    Args:
        scale: also in units of the vehicle wells' spread.
    """
    folder = data_folder("l1000_a375")
    plates = [folder / "LJP005_A375_24H_X1_level3.gct", folder / "LJP009_A375_24H_X1_level3_qnorm.gct"]
    adata = l1000.centre_on_vehicle(l1000.load_plates(plates, obs=pd.read_csv(folder / "obs.csv.gz")), scale=scale)
    adata = adata[adata.obs["control"].to_numpy(dtype=bool) | adata.obs["smiles"].notna().to_numpy()].copy()
    control = adata.obs["control"].to_numpy(dtype=bool)
    adata.obs["drug"] = np.where(control, CONTROL, adata.obs["perturbation"].astype(str))
    adata.obs.loc[control, "smiles"] = None
    dose = adata.obs["dose"].astype(float)
    adata.obs["dose_level"] = np.where(control, 0.0, np.where(dose <= 0.5, LOW, HIGH))
    return adata


def read(config: Any, adata: "AnnData | None" = None, representation: Any = ("morgan", "dose")) -> EnvironmentDataset:
    """The wells as cells.

    Args:
        config: with bits.
        adata: of `wells`.
        representation: of the drugs.
    """
    return EnvironmentDataset.from_anndata(
        wells() if adata is None else adata,
        environment="drug",
        control=CONTROL,
        dose="dose_level",
        smiles="smiles",
        representation=representation,
        bits=config.bits,
    )


def drugs_question(config: Any, cells: EnvironmentDataset | None = None) -> Question:
    """Compounds of LJP009 that are not on LJP005, under whatever name."""
    cells = read(config, representation="molecules") if cells is None else cells
    table = cells.environments
    plate = cells.obs["plate"].to_numpy().astype(str)
    drugs = {p: set(cells.obs.loc[np.char.startswith(plate, p), "drug"]) - {CONTROL} for p in ("LJP005", "LJP009")}
    # a compound that was trained on under another name is not unseen: names are not enough to tell
    molecule = [i for i, feature in enumerate(cells.features) if "dose" not in feature]
    keys = dict(
        zip(table["perturbation"].astype(str), (r[molecule].tobytes() for r in cells.representation), strict=True)
    )
    known = {keys[n] for n in drugs["LJP005"]}
    unseen = [n for n in sorted(drugs["LJP009"]) if keys[n] not in known]
    names = [str(n) for n in table.index[table["perturbation"].isin(unseen)]]
    theirs = cells.reference[cells.env] & np.char.startswith(plate, "LJP009")
    return _scored_against(splits.by_environment(cells, held_out=names), cells, theirs, config)


def _scored_against(split: splits.Split, cells: EnvironmentDataset, rows: NDArray[np.bool_], config: Any) -> Question:
    """The question, where some vehicle wells are kept out of training."""
    train = split.train.subset(~np.isin(np.asarray(split.train.origin), np.flatnonzero(rows)))
    return asked(replace(split, train=train), config.top, cells.subset(rows))


def choosing(question: Question, config: Any, seed: int = 2) -> Question:
    """A fifth of the training drugs, held out."""
    table = question.train.environments.iloc[question.train.present]
    drugs = sorted(table.loc[~table["is_reference"], "perturbation"].unique())
    chosen = np.random.default_rng(seed).permutation(drugs)[: max(len(drugs) // 5, 2)]
    return inner(question, [str(n) for n in table.index[table["perturbation"].isin(chosen)]], config.top)


# ---------------------------------------------------------------------- mechanism of action
def pathway_features(classes: Mapping[str, set[str]], drugs: list[str]) -> pd.DataFrame:
    """One row a drug: its mechanisms, and one feature that MEK and BRAF inhibitors share."""
    named = {d: set(classes.get(d, set())) | ({_PATHWAY} if d in (*MEK, *BRAF) else set()) for d in drugs}
    columns = sorted(set().union(*named.values()))
    rows = [[float(c in named[d]) for c in columns] for d in drugs]
    return pd.DataFrame(rows, drugs, [f"mechanism {c}" for c in columns])


def mechanism_question(config: Any) -> Question:
    """MEK inhibitors held out."""
    adata = wells()
    folder = data_folder("compounds")
    tables = [
        pd.read_csv(folder / name, sep="\t")
        for name in ("lincs_pert_info2_2020.tsv.gz", "lincs_pert_info_gse92742_moa.tsv.gz")
    ]
    classes = mechanisms(adata.obs.assign(target=adata.obs["drug"]), tables)
    drugs = sorted(set(adata.obs["drug"]) - {CONTROL})
    named = read(config, adata, "one-hot").environments
    features = pathway_features(classes, drugs).reindex(named["perturbation"].astype(str)).fillna(0.0)
    features = features.set_axis(named.index).assign(**{"log10(1 + dose)": np.log10(1 + named["dose"].to_numpy(float))})
    cells = read(config, adata, features)
    held = [str(n) for n in cells.environments.index[cells.environments["perturbation"].isin(MEK)]]
    if not held:
        raise DataError(f"none of the MEK inhibitors {', '.join(MEK)} is on the plates")
    split = splits.by_environment(cells, held_out=held)
    vehicle = cells.reference[cells.env]
    rank = cells.obs.assign(v=vehicle).groupby(["plate", "v"], observed=True).cumcount().to_numpy()
    return _scored_against(split, cells, vehicle & (rank % 2 == 1), config)


# ---------------------------------------------------------------------- noise ceiling
def ceiling(question: Question, cells: EnvironmentDataset) -> pd.DataFrame:
    """Correlation of two wells of one condition, and what knowing the true mean would reach, by dose.

    Wells of a condition are neighbours on a plate, and share a position: an upper bound.
    """
    rows = []
    for name in question.names:
        x = np.asarray(cells.of(name).x, np.float64)
        if len(x) > 1:
            r = np.corrcoef(x)[np.triu_indices(len(x), 1)].mean()
            rows.append({"dose": cells.environments.loc[name, "dose"], "wells": len(x), "r": float(r)})
    table = pd.DataFrame(rows).groupby("dose").agg(conditions=("r", "size"), wells=("wells", "mean"), r=("r", "mean"))
    r = table["r"].clip(lower=0)
    table["ceiling"] = np.sqrt(table["wells"] * r / (1 + (table["wells"] - 1) * r))
    return table


def main(config: L1000) -> Results:
    tables: dict[str, pd.DataFrame] = {}
    figures, texts = {}, []
    for part in config.parts:
        if part not in PARTS:
            raise DataError(f"no part {part!r}: use some of {', '.join(PARTS)}")
        made = drugs_question(config) if part == "drugs" else mechanism_question(config)
        names = [m for m in config.models if part == "drugs" or m not in _BY_NAME]
        found = compared(
            made,
            [choosing(made, config)],
            config,
            suite(MANY, names),
            further={DOSE_MEAN: alike("dose")},
            recentre=(DOSE_MEAN, "ridge"),
        )
        groups = made.train.environments.loc[list(made.names), "dose"]
        tables |= reported(part, [found], groups)
        if part == "drugs":
            tables["drugs_ceiling"] = ceiling(made, read(config))
        figures[f"{part}_scores"] = figure([found])
        texts.append(f"{part}: {len(made.train)} training wells of {len(made.train.genes)} genes; {sentence([found])}")
    return Results(tables, figures, "\n".join(texts))


if __name__ == "__main__":
    raise SystemExit(launch(__file__, L1000, main))
